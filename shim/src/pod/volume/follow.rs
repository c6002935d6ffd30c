//! Mounts that the node makes and takes away below a volume, for HostToContainer propagation.
//!
//! The kernel's own slave mounts would bring everything along, also a procfs that is mounted there later, with
//! which a broken VMM could change the node. So the shim follows the node's mount table instead, and
//! each mount goes through the share's checks and gets its flags before the guest can reach it.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::mountinfo::{MountTable, Mounted};
use crate::node::watched::watched;

/// What changed below a volume.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Changes {
    /// Mounts that are new: the kernel's number, and the way from the volume's top. Parents first.
    pub(super) added: Vec<(u64, PathBuf)>,
    /// Mounts that have gone, by the way from the volume's top. What lay below is first.
    pub(super) removed: Vec<PathBuf>,
    /// A new one may never answer.
    pub(super) remote: bool,
}

/// The mounts below one directory of the node, as the guest has them.
#[derive(Debug)]
pub(super) struct Below {
    source: PathBuf,
    /// By number, and where each is below the directory.
    known: BTreeMap<u64, (Mounted, PathBuf)>,
}

impl Below {
    /// The guest has none yet.
    pub(super) fn new(source: &Path) -> Self {
        Self {
            source: source.to_owned(),
            known: BTreeMap::new(),
        }
    }

    /// A mount that [`Self::changes`] had added is to be tried again at the next change.
    pub(super) fn forget(&mut self, id: u64) {
        self.known.remove(&id);
    }

    /// What is different in `table`.
    pub(super) fn changes(&mut self, table: &MountTable) -> Changes {
        let now: Vec<(&Mounted, PathBuf)> = table
            .below(&self.source)
            .filter_map(|mounted| Some((mounted, self.way(mounted)?)))
            .collect();
        let mut changes = Changes::default();
        // One that was moved is elsewhere, and the number of one that has gone may be another's already.
        let stays = |known: &Mounted| now.iter().any(|(mounted, _)| mounted.is(known));
        self.known.retain(|_, (mounted, way)| {
            let stays = stays(mounted);
            if !stays {
                changes.removed.push(std::mem::take(way));
            }
            stays
        });
        changes
            .removed
            .sort_by_key(|way| std::cmp::Reverse(way.components().count()));
        for (mounted, way) in now {
            if let Entry::Vacant(place) = self.known.entry(mounted.id) {
                changes.remote |= mounted.is_remote();
                changes.added.push((mounted.id, way.clone()));
                place.insert((mounted.clone(), way));
            }
        }
        changes
    }

    fn way(&self, mounted: &Mounted) -> Option<PathBuf> {
        let way = mounted.point.strip_prefix(&self.source).ok()?;
        // A mount over the volume's own top, and what waits to be mounted, stay the node's.
        (!way.as_os_str().is_empty() && mounted.kind != "autofs").then(|| way.to_owned())
    }
}

/// Tells of changes of the node's mount table.
pub(super) struct Changed(AsyncFd<OwnedFd>);

impl Changed {
    /// Changes from now on. Inside a runtime.
    ///
    /// # Errors
    /// When procfs cannot be opened.
    pub(super) fn new() -> io::Result<Self> {
        // Not /proc/thread-self: this thread's entry is opened by whichever thread runs the task.
        let table = File::open("/proc/self/mountinfo")?;
        Ok(Self(watched(table.into(), Interest::PRIORITY)?))
    }

    /// Waits for one.
    pub(super) async fn wait(&self) {
        match self.0.ready(Interest::PRIORITY).await {
            Ok(mut ready) => ready.clear_ready(),
            // The runtime ends.
            Err(_) => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(lines: &[(u64, &str, &str)]) -> MountTable {
        let text: String = lines
            .iter()
            .map(|(id, point, kind)| format!("{id} 1 0:{id} / {point} rw - {kind} x rw\n"))
            .collect();
        MountTable::parse(text.as_bytes())
    }

    #[test]
    fn mounts_come_parents_first_and_go_children_first() {
        let before = [(1, "/", "ext4"), (2, "/v", "xfs"), (3, "/v/old", "tmpfs")];
        let mut below = Below::new(Path::new("/v"));
        assert_eq!(below.changes(&table(&before)).added, [(3, "old".into())]);
        assert_eq!(below.changes(&table(&before)), Changes::default());
        below.forget(3);
        assert_eq!(below.changes(&table(&before)).added, [(3, "old".into())]);
        let now = [
            (1, "/", "ext4"),
            (2, "/v", "xfs"),
            (4, "/v/a", "tmpfs"),
            (5, "/v/a/b", "tmpfs"),
            (6, "/vv/c", "tmpfs"),
            (7, "/v/auto", "autofs"),
        ];
        let changes = below.changes(&table(&now));
        assert_eq!(changes.added, [(4, "a".into()), (5, "a/b".into())]);
        assert_eq!(changes.removed, [Path::new("old")]);
        let changes = below.changes(&table(&before[..2]));
        assert_eq!(changes.removed, [Path::new("a/b"), Path::new("a")]);
        assert!(changes.added.is_empty());
    }

    #[test]
    fn a_new_mount_that_may_never_answer_is_told() {
        let mut below = Below::new(Path::new("/v"));
        let first = [(1, "/", "nfs4"), (2, "/v", "fuse.x"), (3, "/v/a", "tmpfs")];
        assert!(!below.changes(&table(&first)).remote, "not of those below");
        let then = [&first[..], &[(4, "/v/b", "fuse.sshfs")]].concat();
        assert!(below.changes(&table(&then)).remote);
        assert!(!below.changes(&table(&then)).remote, "it is known");
    }

    #[test]
    fn a_mount_that_is_replaced_goes_and_comes() {
        let mut below = Below::new(Path::new("/v"));
        below.changes(&table(&[(1, "/", "x"), (2, "/v/m", "x")]));
        let changes = below.changes(&table(&[(1, "/", "x"), (9, "/v/m", "x")]));
        assert_eq!(changes.removed, [Path::new("m")]);
        assert_eq!(changes.added, [(9, "m".into())]);
    }

    #[test]
    fn a_mount_that_has_the_number_of_one_before_goes_and_comes() {
        let mut below = Below::new(Path::new("/v"));
        let table = |device: u32, place: &str, source: &str| {
            let text = format!(
                "1 0 8:1 / /v rw - x x rw\n7 1 0:{device} / /v/{place} rw - nfs4 {source} rw\n"
            );
            MountTable::parse(text.as_bytes())
        };
        below.changes(&table(30, "m", "a"));
        let places = [(31, "m", "a"), (31, "m", "b"), (31, "n", "b")];
        let before = ["m", "m", "m"];
        for ((device, place, source), before) in places.into_iter().zip(before) {
            let changes = below.changes(&table(device, place, source));
            assert_eq!(changes.removed, [Path::new(before)], "{place}");
            assert_eq!(changes.added, [(7, place.into())]);
        }
        assert_eq!(below.changes(&table(31, "n", "b")), Changes::default());
    }
}
