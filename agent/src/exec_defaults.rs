//! What an exec has from its container where its own process does not say it, as with runc.
use crate::spec::{
    Capabilities, ExecCpuAffinity, IoPriority, Personality, Process, Rlimit, Scheduler, Spec,
};

/// Kept of a container's specification for its execs.
#[derive(Default)]
pub struct ExecDefaults {
    /// Holds for each of its processes: an exec cannot say another.
    pub personality: Option<Personality>,
    capabilities: Option<Capabilities>,
    rlimits: Vec<Rlimit>,
    oom_score_adj: Option<i32>,
    scheduler: Option<Scheduler>,
    io_priority: Option<IoPriority>,
    affinity: Option<ExecCpuAffinity>,
}

impl ExecDefaults {
    /// Those of this specification.
    pub fn of(spec: &Spec) -> Self {
        let process = spec.process.clone().unwrap_or_default();
        Self {
            personality: spec.linux.personality.clone(),
            capabilities: process.capabilities,
            rlimits: process.rlimits,
            oom_score_adj: process.oom_score_adj,
            scheduler: process.scheduler,
            io_priority: process.io_priority,
            affinity: process.exec_cpu_affinity,
        }
    }

    /// Fills in what the process of an exec lacks.
    pub fn complete(&self, process: &mut Process) {
        fn fill<T: Clone>(wanted: &mut Option<T>, default: &Option<T>) {
            if wanted.is_none() {
                wanted.clone_from(default);
            }
        }
        fill(&mut process.capabilities, &self.capabilities);
        fill(&mut process.oom_score_adj, &self.oom_score_adj);
        fill(&mut process.scheduler, &self.scheduler);
        fill(&mut process.io_priority, &self.io_priority);
        fill(&mut process.exec_cpu_affinity, &self.affinity);
        if process.rlimits.is_empty() {
            process.rlimits.clone_from(&self.rlimits);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_an_exec_does_not_say_is_the_containers_and_what_it_says_counts() {
        let spec: Spec = serde_json::from_value(json!({
            "process": {
                "args": ["init"], "env": ["A=b"], "noNewPrivileges": true, "oomScoreAdj": 7,
                "capabilities": {"bounding": ["CAP_KILL"]},
                "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 5, "hard": 6}],
                "execCPUAffinity": {"initial": "0"}
            },
            "linux": {"personality": {"domain": "LINUX32"}}
        }))
        .unwrap();
        let defaults = ExecDefaults::of(&spec);
        assert_eq!(defaults.personality.as_ref().unwrap().domain, "LINUX32");
        let completed = |value| {
            let mut process: Process = serde_json::from_value(value).unwrap();
            defaults.complete(&mut process);
            process
        };
        let process = completed(json!({"args": ["x"]}));
        assert_eq!(process.capabilities.unwrap().bounding, ["CAP_KILL"]);
        assert_eq!(process.rlimits[0].soft, 5);
        assert_eq!(process.oom_score_adj, Some(7));
        assert_eq!(process.exec_cpu_affinity.unwrap().initial, "0");
        assert_eq!((process.args.len(), process.env.len()), (1, 0));
        assert!(!process.no_new_privileges);

        let process = completed(json!({
            "capabilities": {}, "oomScoreAdj": 0,
            "rlimits": [{"type": "RLIMIT_CORE", "soft": 1, "hard": 1}]
        }));
        assert!(process.capabilities.unwrap().bounding.is_empty());
        assert_eq!(process.rlimits.len(), 1);
        assert_eq!(process.oom_score_adj, Some(0));
    }
}
