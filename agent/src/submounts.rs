//! The share's volumes as file systems of their own, each with its device number.
//!
//! The file server marks a volume's top directory (`FUSE_ATTR_SUBMOUNT`), and the kernel mounts it for whoever goes there
//! first, in that one's mount namespace. So the agent goes first, before a container's namespace is made: all containers
//! of the pod then have the same one, with the same pipes and sockets in it. It stays until the last of them has gone.
//! Paths are the shim's and have no links.
use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, Mutex},
};

use nix::mount::{MntFlags, umount2};
use rustix::fs::{Mode, OFlags, openat};

use crate::sync::lock;

/// How many containers have a volume.
type Users = Arc<Mutex<usize>>;

/// The volumes that are mounted.
pub struct Submounts {
    /// Where the share is mounted; `None` where it is no virtio-fs.
    share: Option<PathBuf>,
    volumes: Mutex<HashMap<String, Users>>,
}

/// A container's hold on its volumes; given back when it is dropped, which blocks.
#[must_use]
pub struct Entered {
    submounts: Arc<Submounts>,
    paths: Vec<String>,
}

impl Submounts {
    /// None yet, of a share that is mounted at `share`; without one, none ever.
    #[must_use]
    pub fn new(share: Option<PathBuf>) -> Self {
        Self {
            share,
            volumes: Mutex::default(),
        }
    }

    /// Has these directories of the share mounted in this process's namespace, those that are marked. A volume that cannot be
    /// looked at is left to whoever mounts it, who has the error. Blocking: a volume that hangs holds up those
    /// who want the same one.
    pub fn enter(self: &Arc<Self>, mut paths: Vec<String>) -> Entered {
        let Some(share) = &self.share else {
            paths.clear();
            return self.entered(paths);
        };
        for path in &paths {
            self.with_users(path, |users| {
                *users += 1;
                // The last name is gone into only where a directory is asked for.
                let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                drop(openat(
                    rustix::fs::CWD,
                    share.join(path),
                    flags,
                    Mode::empty(),
                ));
            });
        }
        self.entered(paths)
    }

    fn entered(self: &Arc<Self>, paths: Vec<String>) -> Entered {
        Entered {
            submounts: Arc::clone(self),
            paths,
        }
    }

    fn leave(&self, path: &str) {
        let Some(share) = &self.share else { return };
        self.with_users(path, |users| {
            *users = users.saturating_sub(1);
            if *users == 0 {
                let flags = MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW;
                // One that was not marked is no mount.
                let _ = umount2(&share.join(path), flags);
                lock(&self.volumes).remove(path);
            }
        });
    }

    /// Nobody else mounts this volume, or takes it away, meanwhile.
    fn with_users(&self, path: &str, act: impl FnOnce(&mut usize)) {
        loop {
            let users = Arc::clone(lock(&self.volumes).entry(path.to_owned()).or_default());
            let mut held = lock(&users);
            // The last user may have taken it off the table since.
            let current = lock(&self.volumes)
                .get(path)
                .is_some_and(|current| Arc::ptr_eq(current, &users));
            if current {
                return act(&mut held);
            }
        }
    }
}

impl Entered {
    /// Gives it back without holding up the thread.
    pub async fn leave(self) {
        let _ = tokio::task::spawn_blocking(move || drop(self)).await;
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        for path in &self.paths {
            self.submounts.leave(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::{
        mount::{MsFlags, mount},
        sched::{CloneFlags, unshare},
    };
    use std::{fs, os::unix::fs::MetadataExt as _};

    #[test]
    fn a_volume_stays_mounted_until_its_last_container_has_gone() {
        if !brig_fixtures::needs::root() {
            return;
        }
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        let none = None::<&str>;
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(none, "/", none, private, none).unwrap();
        let share = tempfile::tempdir().unwrap();
        let at = share.path().join(".volumes/1");
        fs::create_dir_all(&at).unwrap();
        // What the kernel does for a marked directory.
        mount(Some("x"), &at, Some("tmpfs"), MsFlags::empty(), none).unwrap();
        let device = || fs::metadata(&at).unwrap().dev();
        let (mounted, below) = (device(), fs::metadata(share.path()).unwrap().dev());
        assert_ne!(mounted, below);

        let submounts = Arc::new(Submounts::new(Some(share.path().to_owned())));
        let paths = || vec![".volumes/1".to_owned(), "absent".to_owned()];
        let first = submounts.enter(paths());
        let second = submounts.enter(paths());
        drop(first);
        assert_eq!(device(), mounted);
        drop(second);
        assert_eq!(device(), below);
        assert!(lock(&submounts.volumes).is_empty());
    }

    #[test]
    fn whoever_comes_while_the_last_one_leaves_counts() {
        let share = tempfile::tempdir().unwrap();
        let submounts = Arc::new(Submounts::new(Some(share.path().to_owned())));
        let users = || {
            let users = lock(&submounts.volumes).get("v").cloned();
            users.map(|users| *lock(&users))
        };
        let kept = submounts.enter(vec!["v".to_owned()]);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..2000 {
                        drop(submounts.enter(vec!["v".to_owned()]));
                    }
                });
            }
        });
        assert_eq!(users(), Some(1));
        drop(kept);
        assert_eq!(users(), None);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..2000 {
                        let held = submounts.enter(vec!["v".to_owned()]);
                        assert!(users().is_some_and(|users| users > 0));
                        drop(held);
                    }
                });
            }
        });
        assert_eq!(users(), None);
    }
}
