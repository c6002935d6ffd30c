//! What an exec has from its container where its own process does not say it, as with runc.
//!
//! Who executes something says its process as the container's was asked for (containerd keeps that), and knows nothing of what
//! the container was given here besides: variables and groups of a driver bundle.
use crate::{
    spec::{
        Capabilities, ExecCpuAffinity, IoPriority, Personality, Process, Rlimit, Scheduler, Spec,
    },
    variables,
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
    umask: Option<u32>,
    given: Given,
}

/// What a container's process has that was not asked for.
#[derive(Default)]
struct Given {
    variables: Vec<Variable>,
    groups: Vec<u32>,
}

struct Variable {
    entry: String,
    /// In the place of this one.
    asked: Option<String>,
}

impl Given {
    fn of(asked: &Process, has: &Process) -> Self {
        let variable = |entry: &String| Variable {
            entry: entry.clone(),
            asked: variables::like(&asked.env, entry).map(str::to_owned),
        };
        let counts = |entry: &&String| variables::like(&has.env, entry) == Some(entry.as_str());
        let variables = has.env.iter().filter(counts).map(variable);
        let asked_for = &asked.user.additional_gids;
        let groups = has.user.additional_gids.iter();
        Self {
            variables: variables
                .filter(|one| one.asked.as_deref() != Some(one.entry.as_str()))
                .collect(),
            groups: groups
                .filter(|group| !asked_for.contains(group))
                .copied()
                .collect(),
        }
    }

    /// A variable that an exec says otherwise than its container was asked for is its own wish.
    fn complete(&self, process: &mut Process) {
        for Variable { entry, asked } in &self.variables {
            if variables::like(&process.env, entry) == asked.as_deref() {
                variables::set(&mut process.env, entry);
            }
        }
        let groups = &mut process.user.additional_gids;
        for group in &self.groups {
            if !groups.contains(group) {
                groups.push(*group);
            }
        }
    }
}

impl ExecDefaults {
    /// Those of this specification, whose process was `asked` for.
    pub fn of(spec: &Spec, asked: &Process) -> Self {
        let process = spec.process.clone().unwrap_or_default();
        Self {
            given: Given::of(asked, &process),
            personality: spec.linux.personality.clone(),
            capabilities: process.capabilities,
            rlimits: process.rlimits,
            oom_score_adj: process.oom_score_adj,
            scheduler: process.scheduler,
            io_priority: process.io_priority,
            affinity: process.exec_cpu_affinity,
            umask: process.user.umask,
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
        fill(&mut process.user.umask, &self.umask);
        if process.rlimits.is_empty() {
            process.rlimits.clone_from(&self.rlimits);
        }
        self.given.complete(process);
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
                "execCPUAffinity": {"initial": "0"}, "user": {"umask": 63}
            },
            "linux": {"personality": {"domain": "LINUX32"}}
        }))
        .unwrap();
        let asked = spec.process.clone().unwrap();
        let defaults = ExecDefaults::of(&spec, &asked);
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
        assert_eq!(process.user.umask, Some(0o77));
        assert_eq!((process.args.len(), process.env.len()), (1, 0));
        assert!(!process.no_new_privileges);

        let process = completed(json!({
            "capabilities": {}, "oomScoreAdj": 0, "user": {"umask": 0},
            "rlimits": [{"type": "RLIMIT_CORE", "soft": 1, "hard": 1}]
        }));
        assert!(process.capabilities.unwrap().bounding.is_empty());
        assert_eq!(process.rlimits.len(), 1);
        assert_eq!(process.user.umask, Some(0));
        assert_eq!(process.oom_score_adj, Some(0));
    }

    #[test]
    fn what_a_container_was_given_besides_its_execs_have_too() {
        let process = |env: &[&str], groups: &[u32]| -> Process {
            let value = json!({"args": ["x"], "env": env, "user": {"additionalGids": groups}});
            serde_json::from_value(value).unwrap()
        };
        let asked = process(&["OWN=0", "PATH=/bin", "LIBRARY=old", "OWN=1"], &[5]);
        let spec = Spec {
            process: Some(process(
                &["OWN=0", "PATH=/bin", "OWN=1", "LIBRARY=new", "GPU=0"],
                &[5, 44],
            )),
            ..Spec::default()
        };
        let defaults = ExecDefaults::of(&spec, &asked);
        let completed = |mut process: Process| {
            defaults.complete(&mut process);
            (process.env, process.user.additional_gids)
        };
        // As containerd says an exec: what the container was asked for, and what is this one's own.
        let (env, groups) = completed(process(
            &["PATH=/bin", "LIBRARY=old", "OWN=2", "TERM=xterm"],
            &[5],
        ));
        assert_eq!(
            env,
            ["PATH=/bin", "OWN=2", "TERM=xterm", "LIBRARY=new", "GPU=0"]
        );
        assert_eq!(groups, [5, 44]);
        let (env, groups) = completed(process(&["LIBRARY=mine", "GPU=1"], &[44]));
        assert_eq!(env, ["LIBRARY=mine", "GPU=1"]);
        assert_eq!(groups, [44]);
    }
}
