//! Limits of the I/O on the node's own devices. A container's files lie on them, and its VMM reads and writes there for it:
//! what a container's limits say of such a device holds for the pod's cgroup, which the VMM is in. Of a device that the
//! container was given as a disk they are the agent's to apply, in the guest.
//!
//! A VMM does not do its I/O in the name of one container, so the pod may do as much as its containers that have a limit may
//! together.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use slog::{Logger, warn};

use crate::asked::spec::{Throttled, Throttles, changed_throttles};
use crate::error::{Error, Result};
use crate::node::cgroup::Cgroup;
use crate::node::disk::Numbers;

/// The limits of one pod. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct NodeIo(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    cgroup: OnceLock<Cgroup>,
    containers: Mutex<BTreeMap<String, Container>>,
    /// What the cgroup has. Held while it is changed, which may block.
    applied: Mutex<Throttles>,
}

/// One that has limits, or disks of which it may be given some.
#[derive(Debug, Clone, Default)]
struct Container {
    /// The node's devices that it has in the guest.
    disks: BTreeSet<Numbers>,
    throttles: Throttles,
}

impl Container {
    /// Those that are the node's to apply.
    fn of_the_node(&self) -> impl Iterator<Item = (&(Numbers, Throttled), &u64)> {
        let throttles = self.throttles.iter();
        throttles.filter(|((numbers, _), rate)| **rate > 0 && !self.disks.contains(numbers))
    }
}

impl NodeIo {
    fn containers(&self) -> MutexGuard<'_, BTreeMap<String, Container>> {
        let containers = &self.0.containers;
        containers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The pod's cgroup, once it is known.
    pub fn is_in(&self, cgroup: Cgroup) {
        let _ = self.0.cgroup.set(cgroup);
    }

    /// A container is about to be made, which was given these disks: from now on its limits hold. They are taken back by
    /// [`gone`](Self::gone), also when this fails.
    ///
    /// # Errors
    /// `InvalidArgument` for a device that the node cannot limit, `FailedPrecondition` where it cannot limit any.
    pub async fn admit(
        &self,
        id: &str,
        throttles: Throttles,
        disks: BTreeSet<Numbers>,
        cgroup: Option<Cgroup>,
    ) -> Result<()> {
        if throttles.is_empty() && disks.is_empty() {
            return Ok(());
        }
        if let Some(cgroup) = cgroup {
            self.is_in(cgroup);
        }
        let container = Container { disks, throttles };
        self.containers().insert(id.to_owned(), container);
        self.apply().await
    }

    /// Changes the limits of a container: `resources` is OCI's `LinuxResources` as JSON, in which what is not named stays.
    /// What else the change is of may still be refused: then it is to be [undone](Changed::undo).
    ///
    /// # Errors
    /// As of [`admit`](Self::admit); the limits are the old ones then.
    pub async fn update(&self, id: &str, resources: &[u8]) -> Result<Changed> {
        let changed = changed_throttles(resources)?;
        if changed.is_empty() {
            return Ok(Changed(None));
        }
        let old = {
            let mut containers = self.containers();
            let container = containers.entry(id.to_owned()).or_default();
            let old = container.clone();
            container.throttles.extend(changed);
            old
        };
        let undo = Changed(Some((self.clone(), id.to_owned(), old)));
        match self.apply().await {
            Ok(()) => Ok(undo),
            Err(error) => {
                undo.undo().await;
                Err(error)
            }
        }
    }

    /// The container has gone, or was not made.
    pub fn gone(&self, id: &str, logger: &Logger) {
        if self.containers().remove(id).is_none() {
            return;
        }
        let (limits, logger) = (self.clone(), logger.clone());
        tokio::spawn(async move {
            if let Err(error) = limits.apply().await {
                warn!(logger, "limits of the node's devices are left"; "error" => %error);
            }
        });
    }

    async fn apply(&self) -> Result<()> {
        let limits = self.clone();
        tokio::task::spawn_blocking(move || limits.write()).await?
    }

    /// All containers together.
    fn wanted(&self) -> Throttles {
        let mut all = Throttles::new();
        for container in self.containers().values() {
            for (what, rate) in container.of_the_node() {
                let sum = all.entry(*what).or_default();
                *sum = rate.saturating_add(*sum);
            }
        }
        all
    }

    /// Blocking.
    fn write(&self) -> Result<()> {
        let applied = &self.0.applied;
        let mut applied = applied.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted = self.wanted();
        let gone = applied.keys().filter(|what| !wanted.contains_key(*what));
        let gone: Vec<_> = gone.map(|what| (*what, 0)).collect();
        let new = wanted.iter().map(|(what, rate)| (*what, *rate));
        let new = new.filter(|(what, rate)| applied.get(what) != Some(rate));
        for (what, rate) in gone.into_iter().chain(new.collect::<Vec<_>>()) {
            let cgroup = self.0.cgroup.get().ok_or_else(|| {
                Error::state(
                    "linux.resources.blockIO limits a device of the node, and the pod has no cgroup there: it needs a cgroupsPath",
                )
            })?;
            limit(cgroup.dirs(), what, rate).map_err(|error| refused(what.0, &error))?;
            match rate {
                0 => applied.remove(&what),
                rate => applied.insert(what, rate),
            };
        }
        Ok(())
    }
}

/// A change that was made.
#[derive(Debug)]
#[must_use = "the rest of the change may fail"]
pub struct Changed(Option<(NodeIo, String, Container)>);

impl Changed {
    /// What was possible before is so again. A container that has gone meanwhile stays away.
    pub async fn undo(self) {
        let Some((limits, id, old)) = self.0 else {
            return;
        };
        if let Some(container) = limits.containers().get_mut(&id) {
            *container = old;
        }
        let _ = limits.apply().await;
    }
}

/// Gives one to the kernel: cgroup v2's `io.max`, or one of v1's files in the directory that has it. 0 takes it away.
fn limit(
    dirs: &[impl AsRef<Path>],
    (numbers, what): (Numbers, Throttled),
    rate: u64,
) -> io::Result<()> {
    let (key, old) = match what {
        Throttled::ReadBytes => ("rbps", "blkio.throttle.read_bps_device"),
        Throttled::WrittenBytes => ("wbps", "blkio.throttle.write_bps_device"),
        Throttled::Reads => ("riops", "blkio.throttle.read_iops_device"),
        Throttled::Writes => ("wiops", "blkio.throttle.write_iops_device"),
    };
    let (major, minor) = numbers;
    let max = match rate {
        0 => "max".to_owned(),
        rate => rate.to_string(),
    };
    let written = |dir: &Path, file: &str, text: String| {
        let file = fs::OpenOptions::new().write(true).open(dir.join(file));
        // In one write, which is a line of its own to the kernel.
        file.and_then(|mut file| io::Write::write_all(&mut file, text.as_bytes()))
    };
    let mut last = Err(io::ErrorKind::NotFound.into());
    for dir in dirs {
        let dir = dir.as_ref();
        last = written(dir, "io.max", format!("{major}:{minor} {key}={max}"));
        if matches!(&last, Err(error) if error.kind() == io::ErrorKind::NotFound) {
            last = written(dir, old, format!("{major}:{minor} {rate}"));
        }
        if !matches!(&last, Err(error) if error.kind() == io::ErrorKind::NotFound) {
            break;
        }
    }
    last
}

fn refused((major, minor): Numbers, error: &io::Error) -> Error {
    let what = format!("linux.resources.blockIO: device {major}:{minor} of the node");
    match error.raw_os_error() {
        Some(libc::ENODEV) => Error::invalid(format!(
            "{what} cannot be limited: it is no whole disk that this node has"
        )),
        _ if error.kind() == io::ErrorKind::NotFound => Error::state(format!(
            "{what} cannot be limited: the pod's cgroup has no io controller (its parents' cgroup.subtree_control)"
        )),
        _ => Error::io(format_args!("{what} cannot be limited"), error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(dir: &Path, file: &str) -> String {
        fs::read_to_string(dir.join(file)).unwrap()
    }

    fn throttles(list: &[(Numbers, Throttled, u64)]) -> Throttles {
        let entries = list
            .iter()
            .map(|(numbers, what, rate)| ((*numbers, *what), *rate));
        entries.collect()
    }

    #[test]
    fn a_pod_may_do_what_its_limited_containers_may_together_but_on_their_disks() {
        let limits = NodeIo::default();
        let disk = (254, 0);
        let add = |id: &str, list: &[(Numbers, Throttled, u64)], disks: &[Numbers]| {
            let container = Container {
                disks: disks.iter().copied().collect(),
                throttles: throttles(list),
            };
            limits.containers().insert(id.to_owned(), container);
        };
        add("plain", &[], &[]);
        add("a", &[(disk, Throttled::ReadBytes, 100)], &[]);
        add(
            "b",
            &[
                (disk, Throttled::ReadBytes, u64::MAX),
                (disk, Throttled::Writes, 0),
                ((7, 1), Throttled::Writes, 5),
                ((7, 2), Throttled::Writes, 6),
            ],
            &[(7, 1)],
        );
        let wanted = [
            (disk, Throttled::ReadBytes, u64::MAX),
            ((7, 2), Throttled::Writes, 6),
        ];
        assert_eq!(limits.wanted(), throttles(&wanted));
    }

    #[test]
    fn a_limit_is_written_as_either_cgroup_wants_it() {
        let dir = tempfile::tempdir().unwrap();
        let [other, own] = ["cpu", "io"].map(|name| dir.path().join(name));
        for dir in [&other, &own] {
            fs::create_dir(dir).unwrap();
        }
        let what = ((8, 16), Throttled::WrittenBytes);
        let error = limit(&[&other, &own], what, 7).unwrap_err();
        let error = refused(what.0, &error);
        assert_eq!(error.kind, crate::error::Kind::FailedPrecondition);
        assert!(error.message.contains("8:16") && error.message.contains("io controller"));
        fs::write(own.join("blkio.throttle.write_bps_device"), "").unwrap();
        limit(&[&other, &own], what, 7).unwrap();
        assert_eq!(text(&own, "blkio.throttle.write_bps_device"), "8:16 7");
        fs::write(own.join("io.max"), "").unwrap();
        limit(&[&other, &own], what, 7).unwrap();
        assert_eq!(text(&own, "io.max"), "8:16 wbps=7");
        fs::write(own.join("io.max"), "").unwrap();
        limit(&[&other, &own], what, 0).unwrap();
        assert_eq!(text(&own, "io.max"), "8:16 wbps=max");
        let none = io::Error::from_raw_os_error(libc::ENODEV);
        assert_eq!(
            refused((8, 17), &none).kind,
            crate::error::Kind::InvalidArgument
        );
    }

    #[tokio::test]
    async fn limits_come_and_go_with_their_containers_and_one_that_is_refused_changes_none() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("io.max");
        let cgroup: Cgroup = serde_json::from_value(serde_json::json!({
            "dirs": [dir.path()], "parents": [], "home": null,
        }))
        .unwrap();
        let limits = NodeIo::default();
        let one = throttles(&[((8, 0), Throttled::Reads, 7)]);
        let none = BTreeSet::new();
        let error = limits.admit("a", one.clone(), none.clone(), None).await;
        assert!(error.unwrap_err().message.contains("cgroupsPath"));
        let error = limits.admit("a", one.clone(), none.clone(), Some(cgroup.clone()));
        let error = error.await.unwrap_err();
        assert!(error.message.contains("io controller"), "{error}");
        fs::write(&file, "").unwrap();
        limits.admit("a", one, none.clone(), None).await.unwrap();
        assert_eq!(text(dir.path(), "io.max"), "8:0 riops=7");
        let change = br#"{"blockIO":{"throttleReadIOPSDevice":[{"major":8,"minor":0,"rate":9}]}}"#;
        let _ = limits.update("a", change).await.unwrap();
        // The file keeps what was there beyond what is written, as this one is no cgroup's.
        assert_eq!(text(dir.path(), "io.max"), "8:0 riops=9");
        fs::remove_file(&file).unwrap();
        let change = br#"{"blockIO":{"throttleReadIOPSDevice":[{"major":8,"minor":0,"rate":5}]}}"#;
        limits.update("a", change).await.unwrap_err();
        assert_eq!(limits.wanted(), throttles(&[((8, 0), Throttled::Reads, 9)]));
        fs::write(&file, "").unwrap();
        let _ = limits.update("a", b"{}").await.unwrap();
        assert_eq!(text(dir.path(), "io.max"), "");
        // The guest refuses the rest of a change.
        let change = br#"{"blockIO":{"throttleReadIOPSDevice":[{"major":8,"minor":0,"rate":5}]}}"#;
        let changed = limits.update("a", change).await.unwrap();
        assert_eq!(text(dir.path(), "io.max"), "8:0 riops=5");
        changed.undo().await;
        assert_eq!(text(dir.path(), "io.max"), "8:0 riops=9");
        assert_eq!(limits.wanted(), throttles(&[((8, 0), Throttled::Reads, 9)]));
        let logger = Logger::root(slog::Discard, slog::o!());
        limits.gone("a", &logger);
        while !text(dir.path(), "io.max").contains("riops=max") {
            tokio::task::yield_now().await;
        }
        assert!(limits.wanted().is_empty());
    }
}
