//! The pods of this node as their journals tell of them, and which of them a word on the command line means.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use brig_shim::asked::pod_name::PodName;
use brig_shim::containerd::debug_service::Method;
use brig_shim::error::{Error, Kind, Result};
use brig_shim::node::identity::Identity;
use brig_shim::node::journal::{self, StateDir};
use brig_shim::node::remains::Remains;
use serde_json::{Value, json};

use crate::cli;
use crate::processes::pss;
use crate::shims;
use crate::terminal::{self, printable_line};

/// How long one pod may keep a search waiting.
const PATIENCE: Duration = Duration::from_secs(3);
/// So many letters of an id are not another's by chance.
const TELLING: usize = 12;

/// What a pod can be: `abandoned` by a shim that died, `damaged` if its journal cannot be read.
pub const STATES: [&str; 5] = ["starting", "running", "ended", "abandoned", "damaged"];

/// One pod.
#[derive(Debug, Clone)]
pub struct Row {
    /// containerd's namespace.
    pub namespace: String,
    /// The sandbox's id.
    pub id: String,
    /// Its name in Kubernetes.
    pub pod: Option<PodName>,
    shim: Option<u32>,
    vmm: Option<u32>,
    /// One of [`STATES`].
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
        let Ok(journal) = dir.read() else {
            return Some(Self {
                shim: None,
                vmm: None,
                state: "damaged",
                socket: None,
                pod: None,
                living: Vec::new(),
                age: None,
                namespace,
                id,
            });
        };
        let journal = journal?;
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
            shim: Some(journal.shim.pid),
            vmm: journal.vmm.map(|vmm| vmm.pid),
            state,
            socket: journal.socket,
            pod: journal.pod,
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

    fn living(&self) -> bool {
        self.processes().any(|(name, _)| name == "shim")
    }

    /// Whether its shim lives now, and is not only late with an answer.
    #[must_use]
    pub fn lives_on(&self, base: &Path) -> bool {
        Self::read(base, self.namespace.clone(), self.id.clone()).is_some_and(|row| row.living())
    }

    /// Proportional set size of both processes in KiB, the guest's memory included.
    fn pss(&self) -> u64 {
        self.processes().filter_map(|(_, pid)| pss(pid)).sum()
    }

    /// Where its shim can be asked, if it lives.
    #[must_use]
    pub fn to_ask(&self) -> Option<PathBuf> {
        self.living().then(|| self.socket.clone()).flatten()
    }

    /// For programs.
    #[must_use]
    pub fn json(&self) -> Value {
        json!({
            "pod": self.pod,
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

/// Since a process began.
fn age(pid: u32) -> Option<Duration> {
    let began = fs::metadata(format!("/proc/{pid}")).ok()?.modified().ok()?;
    SystemTime::now().duration_since(began).ok()
}

/// As kubectl writes it: the two largest units at most.
pub fn show_age(age: Duration) -> String {
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
    let dash = || "-".to_owned();
    let rows: Vec<Vec<String>> = rows
        .map(|row| {
            vec![
                row.namespace.clone(),
                row.id.clone(),
                row.pod.as_ref().map_or_else(dash, PodName::full),
                row.shim.map_or_else(dash, |pid| pid.to_string()),
                row.vmm.map_or_else(dash, |pid| pid.to_string()),
                format!("{} MiB", row.pss().div_ceil(1024)),
                row.age.map_or_else(dash, show_age),
                row.state.to_owned(),
            ]
        })
        .collect();
    let head = [
        "NAMESPACE",
        "ID",
        "POD",
        "SHIM",
        "VMM",
        "PSS",
        "AGE",
        "STATE",
    ];
    terminal::table(&head, &rows)
}

/// The pod that is meant: the one with this id; else the only one whose id begins so or that has this name in Kubernetes (`web-0`,
/// `shop/web-0`); else the one with a container whose id begins so. A short beginning may be a container's as well.
///
/// # Errors
/// `NotFound`, which says where to look for one that failed and is gone; `InvalidArgument` that lists them when
/// several are meant.
pub fn find(base: &Path, pod: &cli::Pod) -> Result<Row> {
    find_here(base, pod).map_err(|error| match remembered(base, pod) {
        Ok(Some(account)) if error.kind == Kind::NotFound => {
            let id = account["id"].as_str().unwrap_or_default();
            Error::not_found(format!(
                "pod {} has failed and is gone: 'brig dump {id}' has why",
                pod.id
            ))
        }
        _ => error,
    })
}

/// As [`find`], without a word on those that are gone.
///
/// # Errors
/// As of [`find`].
pub fn find_here(base: &Path, pod: &cli::Pod) -> Result<Row> {
    let wanted = pod.namespace.as_ref();
    let of_namespace = |row: &Row| wanted.is_none_or(|wanted| *wanted == row.namespace);
    let all: Vec<Row> = rows(base).into_iter().filter(of_namespace).collect();
    let word = pod.id.as_str();
    let mut meant = named(all.iter().collect(), word, |row| {
        (row.id.clone(), row.pod.clone())
    });
    let begin = |row: &Row| row.id != word && row.id.starts_with(word);
    if meant.is_empty() || (word.len() < TELLING && meant.iter().all(|row| begin(row))) {
        let sockets = all.iter().map(Row::to_ask).collect();
        let told = shims::ask_all_json(sockets, Method::Inspect, PATIENCE)?;
        let having = all.iter().zip(told).filter(|(_, told)| {
            let told = told.as_ref().and_then(|told| told["containers"].as_array());
            let ids = told.into_iter().flatten();
            let mut ids = ids.filter_map(|container| container["id"].as_str());
            ids.any(|id| id.starts_with(word))
        });
        for (row, _) in having {
            if !meant.iter().any(|known| std::ptr::eq(*known, row)) {
                meant.push(row);
            }
        }
    }
    only(meant.into_iter().cloned().collect(), word)
}

/// Of `all`, what a word means by an id and a name in Kubernetes: those with exactly this id, else those whose id begins so and those
/// that have this name. A tenant gives names: one that is the beginning of another pod's id does not stand for that pod.
fn named<T>(all: Vec<T>, word: &str, of: impl Fn(&T) -> (String, Option<PodName>)) -> Vec<T> {
    let exact = all.iter().any(|one| of(one).0 == word);
    let meant = |one: &T| {
        let (id, pod) = of(one);
        if exact {
            return id == word;
        }
        id.starts_with(word) || pod.is_some_and(|pod| pod.name == word || pod.full() == word)
    };
    all.into_iter().filter(meant).collect()
}

/// The account of a pod that has failed and gone: by the beginning of its id, or by its name.
///
/// # Errors
/// `InvalidArgument` if several pods may be meant.
pub fn remembered(base: &Path, pod: &cli::Pod) -> Result<Option<Value>> {
    let text = |account: &Value, pointer: &str| {
        let text = account.pointer(pointer).and_then(Value::as_str);
        text.unwrap_or_default().to_owned()
    };
    let wanted = pod.namespace.as_ref();
    let mut all = Remains::beside(base).all();
    all.retain(|account| wanted.is_none_or(|wanted| *wanted == text(account, "/namespace")));
    let meant = named(all, &pod.id, |account| {
        let name = serde_json::from_value(account["pod"].clone()).ok();
        (text(account, "/id"), name)
    });
    // The newest of one pod is its last.
    let first = meant.first().cloned();
    let id = first.as_ref().map(|account| text(account, "/id"));
    if meant.iter().any(|account| Some(text(account, "/id")) != id) {
        let several = meant.iter().map(|account| {
            format!(
                "\n  -n {} {} ({})",
                text(account, "/namespace"),
                text(account, "/id"),
                text(account, "/at")
            )
        });
        let several: String = several.collect();
        return Err(Error::invalid(format!(
            "{} may be one of these, which have failed:{several}",
            pod.id
        )));
    }
    Ok(first)
}

fn only(mut found: Vec<Row>, word: &str) -> Result<Row> {
    match (found.pop(), found.is_empty()) {
        (None, _) => Err(Error::not_found(format!(
            "no pod {word} on this node, by the beginning of its id or of a container's, or by its name"
        ))),
        (Some(row), true) => Ok(row),
        (Some(last), false) => {
            found.push(last);
            let several = found.iter().map(|row| {
                let name = row
                    .pod
                    .as_ref()
                    .map_or_else(String::new, |pod| format!(" ({})", pod.full()));
                format!(
                    "\n  -n {} {}{}",
                    row.namespace,
                    row.id,
                    printable_line(&name)
                )
            });
            let several: String = several.collect();
            Err(Error::invalid(format!(
                "{word} may be one of these:{several}"
            )))
        }
    }
}

/// The journal of a pod whose shim is this process.
#[cfg(test)]
pub fn fake(base: &Path, namespace: &str, id: &str) {
    let dir = StateDir::new(base, namespace, id).unwrap();
    dir.create().unwrap();
    let journal = journal::Journal::new(Identity::of(std::process::id()).unwrap());
    dir.write(&journal).unwrap();
}

#[cfg(test)]
mod tests {
    use super::fake as pod;
    use super::*;

    fn meant(base: &Path, namespace: Option<&str>, id: &str) -> Result<Row> {
        let namespace = namespace.map(str::to_owned);
        let id = id.to_owned();
        find(base, &cli::Pod { namespace, id })
    }

    fn named_pod(base: &Path, id: &str, namespace: &str, name: &str) {
        let dir = StateDir::new(base, "k8s.io", id).unwrap();
        dir.create().unwrap();
        let journal = journal::Journal {
            pod: PodName::of_metadata(namespace, name, "u"),
            ..journal::Journal::new(Identity::of(std::process::id()).unwrap())
        };
        dir.write(&journal).unwrap();
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
    fn a_pod_whose_journal_cannot_be_read_is_there_all_the_same() {
        let base = tempfile::tempdir().unwrap();
        pod(base.path(), "k8s.io", "abc1");
        let journal = base.path().join("k8s.io/abc1/pod.json");
        assert!(journal.exists());
        fs::write(&journal, "{ half").unwrap();
        let text = list(base.path(), false);
        assert!(text.contains("abc1") && text.contains("damaged"), "{text}");
        let row = meant(base.path(), None, "abc").unwrap();
        assert_eq!(
            (row.state, row.json()["shimPid"].clone()),
            ("damaged", Value::Null)
        );
        assert!(row.to_ask().is_none());
        let pod = cli::Pod {
            namespace: None,
            id: "abc1".to_owned(),
        };
        let described = crate::inspect::pod(base.path(), &pod, true);
        let error = described
            .err()
            .map(|error| error.message)
            .unwrap_or_default();
        assert!(!error.contains("no pod"), "{error}");
    }

    #[test]
    fn a_pod_is_found_by_its_name_in_kubernetes_when_no_id_begins_so() {
        let base = tempfile::tempdir().unwrap();
        for (id, namespace, name) in [
            ("abc1", "shop", "web-0"),
            ("abd2", "test", "web-0"),
            ("web", "x", "y"),
        ] {
            named_pod(base.path(), id, namespace, name);
        }
        assert_eq!(meant(base.path(), None, "test/web-0").unwrap().id, "abd2");
        assert_eq!(meant(base.path(), None, "web").unwrap().id, "web");
        let error = meant(base.path(), None, "web-0").err().unwrap();
        assert!(
            error.message.contains("k8s.io abc1 (shop/web-0)"),
            "{error}"
        );
    }

    #[test]
    fn a_name_that_is_the_beginning_of_an_id_stands_for_neither() {
        let base = tempfile::tempdir().unwrap();
        named_pod(base.path(), "abc1", "shop", "db");
        named_pod(base.path(), "db12", "test", "web-0");
        let error = meant(base.path(), None, "db").err().unwrap();
        assert!(error.message.contains("k8s.io abc1 (shop/db)"), "{error}");
        assert!(
            error.message.contains("k8s.io db12 (test/web-0)"),
            "{error}"
        );
        assert_eq!(meant(base.path(), None, "shop/db").unwrap().id, "abc1");
        assert_eq!(meant(base.path(), None, "db1").unwrap().id, "db12");
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
