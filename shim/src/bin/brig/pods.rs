//! The pods of this node as their journals tell of them, and which of them a word on the command line means.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use brig_shim::error::{Error, Result};
use brig_shim::node::identity::Identity;
use brig_shim::node::journal::{self, StateDir};
use serde_json::{Value, json};

use crate::cli;

/// One pod.
#[derive(Debug)]
pub struct Row {
    /// containerd's namespace.
    pub namespace: String,
    /// The sandbox's id.
    pub id: String,
    shim: u32,
    vmm: Option<u32>,
    /// `starting`, `running`, `ended`, or `abandoned` by a shim that died.
    pub state: &'static str,
    /// The shim's, where it can be asked.
    pub socket: Option<PathBuf>,
    /// Those of its processes that live, by name.
    living: Vec<(&'static str, u32)>,
    /// Since the shim began.
    pub age: Option<Duration>,
}

impl Row {
    fn read(base: &Path, namespace: String, id: String) -> Option<Self> {
        let dir = StateDir::new(base, &namespace, &id).ok()?;
        let journal = dir.read().ok()??;
        let alive = |identity: &Identity| identity.is_alive();
        let vmm = journal.vmm.filter(alive).map(|vmm| vmm.pid);
        let state = match (alive(&journal.shim), vmm, journal.vmm) {
            (false, ..) => "abandoned",
            (true, Some(_), _) => "running",
            (true, None, None) => "starting",
            (true, None, Some(_)) => "ended",
        };
        let shim = alive(&journal.shim).then_some(journal.shim.pid);
        let living = [("shim", shim), ("vmm", vmm)].into_iter();
        let living = living.filter_map(|(name, pid)| Some((name, pid?)));
        Some(Self {
            shim: journal.shim.pid,
            vmm: journal.vmm.map(|vmm| vmm.pid),
            state,
            socket: journal.socket,
            living: living.collect(),
            age: shim.and_then(age),
            namespace,
            id,
        })
    }

    /// The processes that live: `shim` and `vmm`, with their pids.
    pub fn processes(&self) -> impl Iterator<Item = (&'static str, u32)> + '_ {
        self.living.iter().copied()
    }

    /// Whether there is a shim to ask.
    pub fn living(&self) -> bool {
        self.processes().any(|(name, _)| name == "shim")
    }

    /// Proportional set size of both processes in KiB, the guest's memory included.
    fn pss(&self) -> u64 {
        self.processes().filter_map(|(_, pid)| pss(pid)).sum()
    }

    fn json(&self) -> Value {
        json!({
            "namespace": self.namespace,
            "id": self.id,
            "state": self.state,
            "shimPid": self.shim,
            "vmmPid": self.vmm,
            "pssKiB": self.pss(),
            "ageSeconds": self.age.map(|age| age.as_secs()),
        })
    }
}

/// In KiB; `None` for a process that has gone.
pub fn pss(pid: u32) -> Option<u64> {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:"))?;
    line.trim().strip_suffix("kB")?.trim().parse().ok()
}

/// Since a process began.
fn age(pid: u32) -> Option<Duration> {
    let began = fs::metadata(format!("/proc/{pid}")).ok()?.modified().ok()?;
    SystemTime::now().duration_since(began).ok()
}

/// As kubectl writes it: the two largest units at most.
fn show_age(age: Duration) -> String {
    let seconds = age.as_secs();
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7200 => format!("{}m{}s", seconds / 60, seconds % 60),
        7200..172_800 => format!("{}h{}m", seconds / 3600, seconds / 60 % 60),
        _ => format!("{}d{}h", seconds / 86_400, seconds / 3600 % 24),
    }
}

/// All pods.
#[must_use]
pub fn rows(base: &Path) -> Vec<Row> {
    let pods = journal::list(base).into_iter();
    pods.filter_map(|(namespace, id)| Row::read(base, namespace, id))
        .collect()
}

/// All pods, a line each.
#[must_use]
pub fn list(base: &Path, as_json: bool) -> String {
    let rows = rows(base).into_iter();
    if as_json {
        let all: Vec<Value> = rows.map(|row| row.json()).collect();
        return format!("{}\n", Value::from(all));
    }
    let mut text = format!(
        "{:<12} {:<64} {:>8} {:>8} {:>10} {:>8}  STATE\n",
        "NAMESPACE", "ID", "SHIM", "VMM", "PSS", "AGE"
    );
    for row in rows {
        let dash = || "-".to_owned();
        let vmm = row.vmm.map_or_else(dash, |pid| pid.to_string());
        let pss = format!("{} MiB", row.pss().div_ceil(1024));
        let age = row.age.map_or_else(dash, show_age);
        text.push_str(&format!(
            "{:<12} {:<64} {:>8} {vmm:>8} {pss:>10} {age:>8}  {}\n",
            row.namespace, row.id, row.shim, row.state
        ));
    }
    text
}

/// The directory of the pod that is meant: the one with this id, else the only one whose id begins so.
///
/// # Errors
/// `NotFound`; `InvalidArgument` that lists them when several are meant.
pub fn find(base: &Path, pod: &cli::Pod) -> Result<StateDir> {
    let mut found: Vec<(String, String)> = journal::list(base)
        .into_iter()
        .filter(|(namespace, id)| {
            let wanted = pod.namespace.as_ref();
            id.starts_with(&pod.id) && wanted.is_none_or(|wanted| wanted == namespace)
        })
        .collect();
    if found.iter().any(|(_, id)| *id == pod.id) {
        found.retain(|(_, id)| *id == pod.id);
    }
    match &found[..] {
        [] => Err(Error::not_found(format!("no pod {} on this node", pod.id))),
        [(namespace, id)] => StateDir::new(base, namespace, id),
        several => {
            let several = several
                .iter()
                .map(|(namespace, id)| format!("\n  -n {namespace} {id}"));
            Err(Error::invalid(format!(
                "{} may be one of these:{}",
                pod.id,
                several.collect::<String>()
            )))
        }
    }
}

/// The journal of a pod whose shim is this process.
#[cfg(test)]
pub fn fake(base: &Path, namespace: &str, id: &str) {
    let dir = StateDir::new(base, namespace, id).unwrap();
    dir.create().unwrap();
    let journal = journal::Journal {
        shim: Identity::of(std::process::id()).unwrap(),
        vmm: None,
        cgroup: None,
        socket: None,
        netns: None,
    };
    dir.write(&journal).unwrap();
}

#[cfg(test)]
mod tests {
    use super::fake as pod;
    use super::*;

    fn meant(base: &Path, namespace: Option<&str>, id: &str) -> Result<StateDir> {
        let namespace = namespace.map(str::to_owned);
        let id = id.to_owned();
        find(base, &cli::Pod { namespace, id })
    }

    #[test]
    fn a_pod_is_found_by_the_beginning_of_its_id_if_that_is_its_alone() {
        let base = tempfile::tempdir().unwrap();
        for (namespace, id) in [("k8s.io", "abc1"), ("k8s.io", "abd2"), ("default", "abc1")] {
            pod(base.path(), namespace, id);
        }
        assert!(meant(base.path(), None, "abd").is_ok());
        assert!(meant(base.path(), Some("default"), "a").is_ok());
        let error = meant(base.path(), None, "ab").err().unwrap();
        assert_eq!(error.message.matches("\n  -n").count(), 3, "{error}");
        let error = meant(base.path(), None, "abc1").err().unwrap();
        assert_eq!(error.message.matches("\n  -n").count(), 2, "{error}");
        let error = meant(base.path(), None, "x").err().unwrap();
        assert!(error.message.contains("no pod x"), "{error}");
    }

    #[test]
    fn an_id_that_is_the_beginning_of_another_means_itself() {
        let base = tempfile::tempdir().unwrap();
        pod(base.path(), "default", "web");
        pod(base.path(), "default", "web-2");
        assert!(meant(base.path(), None, "web").is_ok());
    }

    #[test]
    fn the_list_has_what_a_living_process_holds() {
        let base = tempfile::tempdir().unwrap();
        pod(base.path(), "default", "web");
        let rows: Value = serde_json::from_str(&list(base.path(), true)).unwrap();
        assert_eq!(rows[0]["id"], "web");
        assert_eq!(rows[0]["state"], "starting");
        assert_eq!(rows[0]["shimPid"], std::process::id());
        assert!(rows[0]["pssKiB"].as_u64().unwrap() > 100, "{rows}");
        assert!(list(base.path(), false).contains("starting"));
    }

    #[test]
    fn ages_are_short() {
        for (seconds, expected) in [
            (0, "0s"),
            (119, "119s"),
            (125, "2m5s"),
            (7325, "2h2m"),
            (180_000, "2d2h"),
        ] {
            assert_eq!(show_age(Duration::from_secs(seconds)), expected);
        }
    }
}
