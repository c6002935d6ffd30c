//! Files of a pod with a user namespace, whose owners are seen through a map (idmapped mounts).
//!
//! A volume's clone is mapped before anyone can reach it. A root file system is, as containerd 2.x describes
//! it, an overlay with the options `uidmap=` and `gidmap=`, which the kernel's overlay does not know: each
//! layer is cloned, the clone is mapped and mounted over the layer itself, in the throw-away namespace
//! where the overlay is then mounted. The upper directory is not mapped; containerd has given it to the
//! map's root.
//!
//! Trusted: the maps, which containerd wrote.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::sched::{CloneFlags, clone};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::{Pid, pause};
use rustix::fs::CWD;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

use crate::mount_attr;

/// A range of ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdRange {
    /// The first one on the file system.
    pub stored: u32,
    /// What it is seen as.
    pub seen: u32,
    /// How many.
    pub length: u32,
}

/// Ids of files and what they are seen as, as `/proc/PID/uid_map` takes them.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct IdMap {
    users: String,
    groups: String,
    below: bool,
}

impl IdMap {
    /// A map of users and groups; `below` maps the mounts below too. Ids that are in no range are seen as
    /// the kernel's overflow id.
    #[must_use]
    pub fn new(users: &[IdRange], groups: &[IdRange], below: bool) -> Self {
        let text = |ranges: &[IdRange]| {
            let line = |range: &IdRange| {
                let IdRange {
                    stored,
                    seen,
                    length,
                } = range;
                format!("{stored} {seen} {length}\n")
            };
            ranges.iter().map(line).collect()
        };
        Self {
            users: text(users),
            groups: text(groups),
            below,
        }
    }

    /// Whether the mounts below are mapped too.
    #[must_use]
    pub fn maps_below(&self) -> bool {
        self.below
    }

    /// Maps a clone that was never attached.
    ///
    /// # Errors
    /// What the kernel says: `EINVAL` from a file system that cannot be mapped, `EPERM` for what is mapped
    /// already.
    pub(crate) fn map(&self, clone: BorrowedFd<'_>) -> io::Result<()> {
        let namespace = self.namespace()?;
        mount_attr::map_ids(clone, namespace.as_fd(), self.below)
    }

    /// Takes the map out of an overlay's options.
    ///
    /// # Errors
    /// `InvalidData` for a map of another form, or with users alone.
    pub(super) fn take(options: &mut Vec<String>) -> io::Result<Option<Self>> {
        let mut find = |name: &str| {
            let at = options.iter().position(|option| option.starts_with(name))?;
            let option = options.remove(at);
            option.strip_prefix(name).map(str::to_owned)
        };
        match (find("uidmap="), find("gidmap=")) {
            (None, None) => Ok(None),
            (Some(users), Some(groups)) => Ok(Some(Self {
                users: lines(&users)?,
                groups: lines(&groups)?,
                below: false,
            })),
            _ => Err(invalid("uidmap and gidmap come together")),
        }
    }

    /// Maps each layer of `lowerdir=` where it is. The caller's mount namespace is its own.
    ///
    /// # Errors
    /// What the kernel says: `EINVAL` from a file system that cannot be mapped.
    pub(super) fn apply(&self, options: &[String]) -> io::Result<()> {
        let layers = options
            .iter()
            .find_map(|option| option.strip_prefix("lowerdir="))
            .ok_or_else(|| invalid("an overlay without lowerdir"))?;
        if layers.contains('\\') || layers.contains("::") {
            return Err(invalid("a lowerdir with escapes or data layers"));
        }
        let namespace = self.namespace()?;
        for layer in layers.split(':').map(Path::new) {
            let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
            let clone = open_tree(CWD, layer, flags)?;
            mount_attr::map_ids(clone.as_fd(), namespace.as_fd(), false)?;
            let empty = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
            move_mount(&clone, "", CWD, layer, empty)?;
        }
        Ok(())
    }

    /// A user namespace with this map; nothing runs in it.
    fn namespace(&self) -> io::Result<OwnedFd> {
        let holder = Holder::new()?;
        let directory = Path::new("/proc").join(holder.0.to_string());
        fs::write(directory.join("uid_map"), &self.users)?;
        fs::write(directory.join("gid_map"), &self.groups)?;
        Ok(File::open(directory.join("ns/user"))?.into())
    }
}

/// `INSIDE:OUTSIDE:LENGTH`, separated by commas, as lines of `uid_map`.
fn lines(map: &str) -> io::Result<String> {
    let mut lines = String::new();
    for extent in map.split(',') {
        let numbers: Vec<u32> = extent
            .split(':')
            .map(|number| number.parse().map_err(|_| invalid("an id map of text")))
            .collect::<io::Result<_>>()?;
        let [inside, outside, length] = numbers[..] else {
            return Err(invalid("an id map's extent has three numbers"));
        };
        lines += &format!("{inside} {outside} {length}\n");
    }
    Ok(lines)
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// A process that keeps a new user namespace alive while its map is written.
struct Holder(Pid);

impl Holder {
    fn new() -> io::Result<Self> {
        let mut stack = vec![0; 64 << 10];
        // No signal at its end: whoever reaps this process's children must not find it.
        let flags = CloneFlags::CLONE_NEWUSER;
        // SAFETY: without CLONE_VM the child has a copy of this memory, the stack included; it calls
        // nothing but pause(2), which is safe also where other threads hold locks.
        let child = unsafe { clone(Box::new(wait), &mut stack, flags, None)? };
        Ok(Self(child))
    }
}

/// Until it is killed.
fn wait() -> isize {
    loop {
        pause();
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = kill(self.0, Signal::SIGKILL);
        while waitpid(self.0, Some(WaitPidFlag::__WALL)) == Err(Errno::EINTR) {}
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use nix::mount::{MsFlags, mount};
    use nix::sched::unshare;

    use super::*;

    fn words(options: &[&str]) -> Vec<String> {
        options.iter().map(|option| (*option).to_owned()).collect()
    }

    #[test]
    fn a_map_is_taken_out_of_the_options() {
        let mut options = words(&["uidmap=0:200000:65536", "lowerdir=/a", "gidmap=0:1:2,5:6:7"]);
        let map = IdMap::take(&mut options).unwrap().unwrap();
        assert_eq!(map.users, "0 200000 65536\n");
        assert_eq!(map.groups, "0 1 2\n5 6 7\n");
        assert_eq!(options, ["lowerdir=/a"]);
        assert_eq!(IdMap::take(&mut options).unwrap(), None);
    }

    #[test]
    fn ranges_are_lines_of_the_file_systems_ids_first() {
        let range = |stored, seen, length| IdRange {
            stored,
            seen,
            length,
        };
        let users = [range(0, 200_000, 1000), range(1000, 7, 1)];
        let map = IdMap::new(&users, &[range(0, 1, 2)], true);
        assert_eq!(map.users, "0 200000 1000\n1000 7 1\n");
        assert_eq!(map.groups, "0 1 2\n");
    }

    #[test]
    fn a_map_of_another_form_is_refused() {
        for bad in [
            &["uidmap=0:1:2"][..],
            &["uidmap=0:1", "gidmap=0:1:2"],
            &["uidmap=0:1:2:3", "gidmap=0:1:2"],
            &["uidmap=", "gidmap="],
            &["uidmap=a:b:c", "gidmap=0:1:2"],
            &["uidmap=0:1:4294967296", "gidmap=0:1:2"],
        ] {
            assert!(IdMap::take(&mut words(bad)).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn layers_are_seen_through_the_map_and_only_in_this_namespace() {
        if !brig_fixtures::needs::root() {
            return;
        }
        let layer = tempfile::tempdir().unwrap();
        let file = layer.path().join("f");
        fs::write(&file, "x").unwrap();
        let path = file.clone();
        let lower = format!("lowerdir={}", layer.path().display());
        let owner = std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS).unwrap();
            let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
            mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
            let mut options = words(&[&lower, "uidmap=0:200000:65536", "gidmap=0:300000:65536"]);
            let map = IdMap::take(&mut options).unwrap().unwrap();
            map.apply(&options).unwrap();
            let seen = fs::metadata(path).unwrap();
            (seen.uid(), seen.gid())
        })
        .join()
        .unwrap();
        assert_eq!(owner, (200_000, 300_000));
        let seen = fs::metadata(&file).unwrap();
        assert_eq!((seen.uid(), seen.gid()), (0, 0));
    }
}
