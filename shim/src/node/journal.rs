//! What a pod leaves on the host if everything is killed at once, written down so that `delete` can
//! undo it: `/run/brig/<namespace>/<id>/pod.json`.
//!
//! The directory is root's alone; what is read back is trusted. Processes are named by pid and start
//! time, so an old journal never hurts a stranger.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::asked::pod_name::PodName;
use crate::error::{Error, Result, ignore_missing};
use crate::node::cgroup::Cgroup;
use crate::node::identity::Identity;
use crate::node::network;

const FILE: &str = "pod.json";
const TIMELINE: &str = "timeline.json";
/// Longer than any node runs.
const FOREVER: Duration = Duration::from_secs(1 << 32);

/// The contents of `pod.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Journal {
    /// The shim's server.
    pub shim: Identity,
    /// brig-vmm, once it is started.
    pub vmm: Option<Identity>,
    /// The pod's cgroup, once it is made.
    pub cgroup: Option<Cgroup>,
    /// The server's socket.
    pub socket: Option<PathBuf>,
    /// The pod's network namespace, where packets are redirected.
    #[serde(default)]
    pub netns: Option<PathBuf>,
    /// Its name in Kubernetes, for those who look.
    #[serde(default)]
    pub pod: Option<PodName>,
    /// Its end is under way, in order: the shim ends it, and itself when that is asked for.
    #[serde(default)]
    pub ending: Option<Ending>,
}

/// How a pod was when its end began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ending {
    /// Its last container had been deleted, or there was none: whatever was to be done after a container is done.
    Emptied,
    /// There were containers in it.
    Inhabited,
}

/// A pod's directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateDir {
    path: PathBuf,
}

impl StateDir {
    /// The directory of a pod below `base`. Ids come from containerd, which validates them; one that
    /// is no single path component is refused all the same.
    ///
    /// # Errors
    /// `InvalidArgument`.
    pub fn new(base: &Path, namespace: &str, id: &str) -> Result<Self> {
        for (what, name) in [("namespace", namespace), ("id", id)] {
            if name.is_empty()
                || name == "."
                || name == ".."
                || name.contains('/')
                || name.len() > 255
            {
                return Err(Error::invalid(format!(
                    "{what} {name:?} is not a valid name"
                )));
            }
        }
        Ok(Self {
            path: base.join(namespace).join(id),
        })
    }

    /// Makes the directory.
    ///
    /// # Errors
    /// What the host says.
    pub fn create(&self) -> Result<()> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.path)
            .map_err(|error| Error::io(format_args!("cannot make {}", self.path.display()), &error))
    }

    /// Writes the journal.
    ///
    /// # Errors
    /// What the host says.
    pub fn write(&self, journal: &Journal) -> Result<()> {
        let bytes = serde_json::to_vec(journal).map_err(|e| Error::internal(e.to_string()))?;
        self.replace(FILE, &bytes)
    }

    /// Writes the boot timeline.
    ///
    /// # Errors
    /// What the host says.
    pub fn write_timeline(&self, bytes: &[u8]) -> Result<()> {
        self.replace(TIMELINE, bytes)
    }

    /// Reads the boot timeline.
    ///
    /// # Errors
    /// `NotFound` and what else the host says.
    pub fn read_timeline(&self) -> Result<Vec<u8>> {
        let path = self.path.join(TIMELINE);
        fs::read(&path).map_err(|error| Error::io(path.display(), &error))
    }

    /// Reads the journal; `None` when there is none.
    ///
    /// # Errors
    /// `Internal` when it is there and not readable.
    pub fn read(&self) -> Result<Option<Journal>> {
        let path = self.path.join(FILE);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io(path.display(), &error)),
        };
        serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|error| Error::internal(format!("{} is damaged: {error}", path.display())))
    }

    /// The directory of all pods that this one is of.
    #[must_use]
    pub fn base(&self) -> &Path {
        let base = self.path.parent().and_then(Path::parent);
        base.unwrap_or(&self.path)
    }

    /// Where files lie that are mounted into the pod's containers.
    #[must_use]
    pub fn files(&self) -> PathBuf {
        self.path.join(crate::node::sandbox_files::DIRECTORY)
    }

    /// Removes the directory, and its namespace's when that is empty. Repeatable.
    pub fn remove(&self) {
        let _ = fs::remove_dir_all(&self.path);
        if let Some(namespace) = self.path.parent() {
            let _ = fs::remove_dir(namespace);
        }
    }

    /// As [`Self::remove`], unless the journal in it is another's than that of this shim: then the name is that
    /// shim's by now. One without a journal is nobody's.
    pub fn remove_if_of(&self, shim: Option<Identity>) {
        let others = match self.read() {
            Ok(Some(journal)) => shim != Some(journal.shim),
            Ok(None) | Err(_) => false,
        };
        if !others {
            self.remove();
        }
    }

    /// A reader sees the old file or the new one, never half.
    fn replace(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.path.join(name);
        let new = self.path.join(format!("{name}.new"));
        fs::write(&new, bytes)
            .and_then(|()| fs::rename(&new, &path))
            .map_err(|error| Error::io(format_args!("cannot write {}", path.display()), &error))
    }
}

impl Journal {
    /// That of a shim that has done nothing yet.
    #[must_use]
    pub fn new(shim: Identity) -> Self {
        Self {
            shim,
            vmm: None,
            cgroup: None,
            socket: None,
            netns: None,
            pod: None,
            ending: None,
        }
    }

    /// Waits until its processes have ended, but for this one, however long that takes: what has been killed may wait for a disk.
    pub fn wait_for_end(&self) {
        let shim = Some(&self.shim).filter(|shim| shim.pid != std::process::id());
        for process in shim.into_iter().chain(&self.vmm) {
            // A process that nobody can be told of is not waited for.
            let _ = process.kill(FOREVER);
        }
    }

    /// Undoes what it tells of: kills the VMM (and the shim, unless it is this process), removes the
    /// cgroup and the socket. Repeatable; every step is tried, the first error is returned. All steps together wait until
    /// `end`, and what does not wait comes before what does: whoever asks may have no more time than that.
    ///
    /// # Errors
    /// What the host says.
    pub fn undo(&self, end: Instant) -> io::Result<()> {
        let left = || end.saturating_duration_since(Instant::now());
        let mut first = Ok(());
        let mut keep = |result: io::Result<()>| {
            if first.is_ok() {
                first = result;
            }
        };
        let shim = Some(&self.shim).filter(|shim| shim.pid != std::process::id());
        let processes = || shim.into_iter().chain(&self.vmm);
        for process in processes() {
            // Told to end, and not waited for.
            let _ = process.kill(Duration::ZERO);
        }
        if let Some(netns) = &self.netns {
            keep(network::undo(netns).map_err(io::Error::other));
        }
        if let Some(socket) = &self.socket {
            keep(ignore_missing(fs::remove_file(socket)));
        }
        for process in processes() {
            keep(process.kill(left()));
        }
        if let Some(cgroup) = &self.cgroup {
            keep(cgroup.kill_and_remove(left()));
        }
        first
    }
}

/// Every pod that has a directory below `base`: (namespace, id).
#[must_use]
pub fn list(base: &Path) -> Vec<(String, String)> {
    let names = |path: &Path| -> Vec<String> {
        let Ok(entries) = fs::read_dir(path) else {
            return Vec::new();
        };
        entries
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .collect()
    };
    let mut pods = Vec::new();
    for namespace in names(base) {
        for id in names(&base.join(&namespace)) {
            pods.push((namespace.clone(), id));
        }
    }
    pods.sort();
    pods
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_journal_is_read_back_and_listed_and_removed_with_its_namespace() {
        let base = tempfile::tempdir().unwrap();
        let dir = StateDir::new(base.path(), "ns", "c1").unwrap();
        assert_eq!(dir.read().unwrap(), None);
        dir.create().unwrap();
        let journal = Journal {
            shim: Identity {
                pid: 1,
                start_time: 2,
            },
            vmm: None,
            cgroup: None,
            socket: Some("/run/s".into()),
            netns: Some("/run/netns/a".into()),
            pod: PodName::of_metadata("shop", "web", "u"),
            ending: Some(Ending::Emptied),
        };
        dir.write(&journal).unwrap();
        assert_eq!(dir.read().unwrap(), Some(journal));
        assert_eq!(list(base.path()), [("ns".to_owned(), "c1".to_owned())]);
        dir.remove();
        dir.remove();
        assert_eq!(fs::read_dir(base.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_directory_is_not_removed_for_one_whose_name_is_anothers_by_now() {
        let base = tempfile::tempdir().unwrap();
        let dir = StateDir::new(base.path(), "ns", "c1").unwrap();
        let shim = |pid| Identity { pid, start_time: 2 };
        dir.create().unwrap();
        dir.write(&Journal::new(shim(1))).unwrap();
        for other in [None, Some(shim(7))] {
            dir.remove_if_of(other);
            assert_eq!(dir.read().unwrap(), Some(Journal::new(shim(1))));
        }
        dir.remove_if_of(Some(shim(1)));
        assert!(!dir.path.exists());
        dir.create().unwrap();
        dir.remove_if_of(Some(shim(7)));
        assert!(!dir.path.exists(), "nobody's is left");
    }

    #[test]
    fn names_that_leave_the_directory_are_refused() {
        for id in ["", ".", "..", "a/b", "/"] {
            assert!(
                StateDir::new(Path::new("/run/brig"), "ns", id).is_err(),
                "{id}"
            );
        }
    }

    #[test]
    fn undoing_kills_what_is_left_and_may_be_repeated() {
        let base = tempfile::tempdir().unwrap();
        let socket = base.path().join("s");
        fs::write(&socket, "").unwrap();
        let mut vmm = Command::new("sleep").arg("60").spawn().unwrap();
        let mut shim = Command::new("sleep").arg("60").spawn().unwrap();
        let journal = Journal {
            shim: Identity::of(shim.id()).unwrap(),
            vmm: Identity::of(vmm.id()),
            cgroup: None,
            socket: Some(socket.clone()),
            netns: None,
            pod: None,
            ending: None,
        };
        journal
            .undo(Instant::now() + Duration::from_secs(5))
            .unwrap();
        assert!(!vmm.wait().unwrap().success());
        assert!(!shim.wait().unwrap().success());
        assert!(!socket.exists());
        journal
            .undo(Instant::now() + Duration::from_secs(5))
            .unwrap();
    }

    #[test]
    fn what_does_not_wait_is_done_also_when_there_is_no_time() {
        let base = tempfile::tempdir().unwrap();
        let socket = base.path().join("s");
        fs::write(&socket, "").unwrap();
        let mut vmm = Command::new("sleep").arg("60").spawn().unwrap();
        let gone = Identity {
            pid: vmm.id(),
            start_time: 0,
        };
        let journal = Journal {
            vmm: Identity::of(vmm.id()),
            socket: Some(socket.clone()),
            ..Journal::new(gone)
        };
        // The VMM may have ended by then or not.
        let _ = journal.undo(Instant::now());
        assert!(!socket.exists());
        assert!(!vmm.wait().unwrap().success());
    }
}
