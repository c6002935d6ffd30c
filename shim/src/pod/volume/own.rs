//! Which shared directory is one pod's own, so that its guest may keep for a while what it writes there: an emptyDir on disk.
//! A sub-path of one is a part of the same, so that all containers have the same files, written back or not.
//!
//! Trusted: kubelet, who names and binds them. The paths in a volume are its containers' to choose.

use std::path::{Path, PathBuf};

use super::classify::{EMPTY_DIR, sub_path, volume_of_a_pod};
use super::mountinfo::{MountTable, Mounted};
use crate::asked::spec::BindMount;

/// File systems of disks, which tell what fails when it is synced, not when it is closed.
const KINDS: [&str; 8] = [
    "bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "xfs", "zfs",
];

/// A part of an emptyDir.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Own {
    /// The volume's directory.
    pub(super) top: PathBuf,
    /// The way from there; empty for all.
    pub(super) inside: String,
    /// The mount that it lies on, and where in its file system.
    pub(super) mount: Mounted,
    pub(super) place: PathBuf,
}

/// The part of an emptyDir that this mount, with its `source` without links, shows; none of what is not, or is seen by
/// more than the pod's guest. Its propagation makes no difference: of containers that differ in it none would see at once
/// what another writes. What they mount there propagates in the guest, and nobody else mounts anything in an emptyDir.
pub(super) fn place(bind: &BindMount, source: &Path, table: &MountTable) -> Option<Own> {
    // Owners that are mapped are another view of the same files.
    if bind.id_map.is_some() {
        return None;
    }
    let top = if volume_of_a_pod(&bind.source) == Some(EMPTY_DIR) {
        bind.source.clone()
    } else {
        let (pod, name) = sub_path(&bind.source)?;
        pod.join("volumes").join(EMPTY_DIR).join(name)
    };
    let top = std::fs::canonicalize(top).ok()?;
    if !top.is_dir() {
        return None;
    }
    let (volume, whole) = table.place(&top)?;
    let (mounted, part) = table.place(source)?;
    let plain = !volume.readonly && KINDS.contains(&volume.kind.as_str());
    if !plain || volume.device != mounted.device || table.seen_from(&top).len() != 1 {
        return None;
    }
    Some(Own {
        inside: part.strip_prefix(&whole).ok()?.to_str()?.to_owned(),
        mount: volume.clone(),
        place: whole,
        top,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Node {
        base: PathBuf,
        _dir: tempfile::TempDir,
    }

    impl Node {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let base = std::fs::canonicalize(dir.path()).unwrap();
            let node = Self { base, _dir: dir };
            for path in [&node.volume().join("a/b"), &node.bound()] {
                std::fs::create_dir_all(path).unwrap();
            }
            node
        }

        fn volume(&self) -> PathBuf {
            let volumes = self.base.join("pods/u/volumes");
            volumes.join("kubernetes.io~empty-dir/cache")
        }

        fn bound(&self) -> PathBuf {
            self.base.join("pods/u/volume-subpaths/cache/main/0")
        }

        /// All on one disk of this kind, `what` of which is bound as a sub-path, and more mounts.
        fn place(&self, source: &Path, kind: &str, what: &Path, more: &str) -> Option<Own> {
            let table = format!(
                "1 0 8:1 / / rw - {kind} x rw\n2 1 8:1 {} {} rw - {kind} x rw\n{more}",
                what.display(),
                self.bound().display()
            );
            let bind = BindMount::plain(source);
            place(&bind, source, &MountTable::parse(table.as_bytes()))
        }
    }

    #[test]
    fn an_empty_dir_and_its_sub_paths_are_parts_of_one() {
        let node = Node::new();
        let what = node.volume().join("a/b");
        for (source, inside) in [(node.volume(), ""), (node.bound(), "a/b")] {
            let own = node.place(&source, "ext4", &what, "").unwrap();
            assert_eq!((&own.top, own.inside.as_str()), (&node.volume(), inside));
            assert_eq!(own.mount.id, 1);
            assert_eq!(Path::new("/").join(own.place), node.volume());
        }
    }

    #[test]
    fn what_others_may_see_or_write_is_not_the_pods_own() {
        let node = Node::new();
        let (volume, bound) = (node.volume(), node.bound());
        let what = volume.join("a/b");
        for kind in ["nfs4", "fuse.x", "tmpfs", "overlay"] {
            assert_eq!(node.place(&volume, kind, &what, ""), None, "{kind}");
        }
        // A sub-path of something else, or of what was removed.
        for elsewhere in ["/srv/other", "/srv/other//deleted"] {
            let elsewhere = Path::new(elsewhere);
            assert_eq!(node.place(&bound, "ext4", elsewhere, ""), None);
        }
        // Something is mounted in it.
        let more = format!("3 1 8:2 / {} rw - ext4 y rw\n", volume.join("a").display());
        assert_eq!(node.place(&volume, "ext4", &what, &more), None);
        // A directory of a volume, and what only looks like one.
        let below = volume.join("a");
        assert_eq!(node.place(&below, "ext4", &what, ""), None);
        std::fs::create_dir_all(node.base.join("data")).unwrap();
        assert_eq!(node.place(&node.base.join("data"), "ext4", &what, ""), None);
    }
}
