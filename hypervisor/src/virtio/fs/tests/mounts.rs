//! Mounts below the share: told apart, forgotten when they go, mapped.

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use rustix::fs::CWD;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};
use std::os::fd::AsFd;
use std::path::PathBuf;

use super::*;
use crate::share::{IdMap, IdRange};

/// A mount namespace of the test's own, with a share whose `v` and `c/rootfs` are mounts.
pub(in crate::virtio::fs) fn mounted_share() -> Option<tempfile::TempDir> {
    if !brig_fixtures::needs::root() {
        return None;
    }
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_FS).unwrap();
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
    let share = share();
    for path in ["v", "c", "c/rootfs"] {
        fs::create_dir(share.path().join(path)).unwrap();
    }
    for path in ["v", "c/rootfs"] {
        mount_tmpfs(&share.path().join(path));
        fs::write(share.path().join(path).join("same"), path).unwrap();
    }
    Some(share)
}

pub(super) fn mount_tmpfs(path: &Path) {
    mount(
        Some("brig-test"),
        path,
        Some("tmpfs"),
        MsFlags::empty(),
        None::<&str>,
    )
    .unwrap();
}

/// A bind mount.
pub(super) fn mount_over(source: &Path, at: &Path) {
    let none = None::<&str>;
    mount(Some(source), at, none, MsFlags::MS_BIND, none).unwrap();
}

/// What this process has open at and below a path. umount(2) alone would tell of too much: children of other tests have
/// copies of all descriptors until they run a program, or end.
pub(super) fn open_below(path: &Path) -> Vec<PathBuf> {
    let descriptors = fs::read_dir("/proc/self/fd").unwrap();
    let open = descriptors.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
    open.filter(|open| open.starts_with(path)).collect()
}

/// Takes a mount away, which must be free.
pub(super) fn unmount(path: &Path) {
    assert_eq!(open_below(path), [] as [PathBuf; 0]);
    umount2(path, MntFlags::MNT_DETACH).unwrap();
}

#[test]
fn files_of_two_mounts_have_different_inode_numbers() {
    let Some(share) = mounted_share() else { return };
    let of = |path: &str| fs::metadata(share.path().join(path)).unwrap().ino();
    assert_eq!(
        of("v/same"),
        of("c/rootfs/same"),
        "the test wants a collision"
    );
    let mut client = Client::new(share.path());
    let first = client.walk("v/same");
    let second = client.walk("c/rootfs/same");
    assert_ne!(first.node, second.node);
    assert_ne!(first.ino, second.ino);
    assert_eq!(client.walk("v/same").ino, first.ino, "and keep them");
    assert_eq!(client.walk("v").entry_seconds, 0);
    assert_eq!(first.entry_seconds, 1);
    assert_eq!(second.entry_seconds, 3600);
}

#[test]
fn only_a_root_file_system_is_cached_without_asking_again() {
    let Some(share) = mounted_share() else { return };
    let mut client = Client::new(share.path());
    let rootfs = client.walk("c/rootfs").node;
    let volume = client.walk("v").node;
    let absent = client.lookup(rootfs, "absent").unwrap();
    assert_eq!((absent.node, absent.entry_seconds), (0, 3600));
    assert_eq!(client.lookup(volume, "absent").unwrap_err(), libc::ENOENT);
    assert_eq!(client.lookup(ROOT, "absent").unwrap_err(), libc::ENOENT);

    const KEEP_CACHE: u32 = 1 << 1;
    for (path, kept) in [("c/rootfs/same", KEEP_CACHE), ("v/same", 0)] {
        let file = client.walk(path).node;
        let reply = client.call(OPEN, file, &[0; 8]).unwrap();
        assert_eq!(u32_at(&reply, 8) & KEEP_CACHE, kept, "{path}");
    }
    client.handle.forget("");
}

#[test]
fn a_forgotten_mount_is_free_and_its_inodes_are_stale() {
    let Some(share) = mounted_share() else { return };
    let mut client = Client::new(share.path());
    let volume = client.walk("v").node;
    let file = client.walk("v/same").node;
    let handle = client.open(OPEN, file, libc::O_RDONLY).unwrap();
    let other = client.walk("c/rootfs/same").node;
    client.list(ROOT);
    let held = open_below(&share.path().join("v"));
    assert!(held.len() > 1, "{held:?}");

    client.handle.forget("v");
    unmount(&share.path().join("v"));
    assert_eq!(
        client.read(READ, file, handle, 0, 10).unwrap_err(),
        libc::ESTALE
    );
    assert_eq!(client.lookup(volume, "same").unwrap_err(), libc::ESTALE);
    assert!(
        client.open(OPEN, other, libc::O_RDONLY).is_ok(),
        "another mount's are not"
    );

    // A FORGET for what is gone is no error, and the path can be used again.
    let bytes = client.header(48, FORGET, file);
    let request = [bytes, 1u64.to_le_bytes().to_vec()].concat();
    assert_eq!(client.raw(&request, 0), 0);
    mount_tmpfs(&share.path().join("v"));
    fs::write(share.path().join("v/fresh"), "").unwrap();
    let again = client.walk("v/fresh");
    assert_ne!(again.node, file);
    client.handle.forget("");
    unmount(&share.path().join("v"));
    unmount(&share.path().join("c/rootfs"));
}

#[test]
fn a_mount_that_comes_and_goes_below_a_volume_is_seen_by_the_next_lookup() {
    let Some(share) = mounted_share() else { return };
    let below = share.path().join("v/below");
    fs::create_dir(&below).unwrap();
    let mut client = Client::new(share.path());
    let before = client.walk("v/below");
    assert_eq!(before.entry_seconds, 1, "the guest asks again");
    mount_tmpfs(&below);
    fs::write(below.join("later"), "later").unwrap();
    let mounted = client.walk("v/below");
    assert_ne!((mounted.node, mounted.ino), (before.node, before.ino));
    assert_eq!(client.walk("v/below/later").size, 5);
    umount2(&below, MntFlags::MNT_DETACH).unwrap();
    assert_eq!(client.walk("v/below").node, before.node);
    assert_eq!(
        client.lookup(before.node, "later").unwrap_err(),
        libc::ENOENT
    );
    client.handle.forget("");
}

#[test]
fn a_mount_can_be_forgotten_under_load() {
    let Some(share) = mounted_share() else { return };
    let mut client = Client::new(share.path());
    let handle = client.handle.clone();
    // Descriptors are the process's, mounts the thread's: the forgetting thread needs none.
    let (go, started) = std::sync::mpsc::channel();
    let forgetter = std::thread::spawn(move || {
        started.recv().unwrap();
        for _ in 0..100 {
            handle.forget("v");
        }
    });
    go.send(()).unwrap();
    for _ in 0..300 {
        if let Ok(directory) = client.lookup(ROOT, "v") {
            let _ = client.lookup(directory.node, "same");
        }
    }
    forgetter.join().unwrap();
    client.handle.forget("v");
    unmount(&share.path().join("v"));
    client.handle.forget("");
}

#[test]
fn a_mount_that_was_replaced_without_notice_is_not_mixed_up() {
    let Some(share) = mounted_share() else { return };
    let mut client = Client::new(share.path());
    let before = client.walk("v/same");
    umount2(&share.path().join("v"), MntFlags::MNT_DETACH).unwrap();
    mount_tmpfs(&share.path().join("v"));
    fs::write(share.path().join("v/same"), "longer content").unwrap();
    let after = client.walk("v/same");
    assert_ne!(after.node, before.node);
    assert_eq!(after.size, 14);
    client.handle.forget("");
}

#[test]
fn nothing_is_renamed_between_mounts() {
    let Some(share) = mounted_share() else { return };
    let mut client = Client::new(share.path());
    let from = client.walk("v").node;
    let to = client.walk("c/rootfs").node;
    let mut body = to.to_le_bytes().to_vec();
    body.extend([0; 8]);
    body.extend(b"same\0moved\0");
    assert_eq!(client.call(RENAME2, from, &body).unwrap_err(), libc::EXDEV);
    client.handle.forget("");
}

/// Mounts a directory over itself, with id 0 seen as 200,000.
pub(super) fn map_to_200_000(directory: &Path) {
    let range = IdRange {
        stored: 0,
        seen: 200_000,
        length: 65_536,
    };
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let clone = open_tree(CWD, directory, flags).unwrap();
    let map = IdMap::new(&[range], &[range], false);
    map.map(clone.as_fd()).unwrap();
    let empty = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(&clone, "", CWD, directory, empty).unwrap();
}

#[test]
fn files_of_a_mapped_mount_get_new_names_from_who_is_in_the_map() {
    let Some(share) = mounted_share() else { return };
    let volume = share.path().join("v");
    map_to_200_000(&volume);
    let mut client = Client::new(share.path());
    let directory = client.walk("v").node;
    assert_eq!(client.walk("v/same").uid, 200_000);
    let mut rename = directory.to_le_bytes().to_vec();
    rename.extend([0; 8]);
    rename.extend(b"same\0moved\0");
    let nobody = client.call(RENAME2, directory, &rename);
    assert_eq!(nobody.unwrap_err(), libc::EOVERFLOW);
    client.ids = (200_000, 200_000);
    client.call(RENAME2, directory, &rename).unwrap();
    let mut link = client.walk("v/moved").node.to_le_bytes().to_vec();
    link.extend(b"hard\0");
    client.call(LINK, directory, &link).unwrap();
    let hard = fs::metadata(volume.join("hard")).unwrap();
    assert_eq!((hard.uid(), hard.nlink()), (200_000, 2));
    client.handle.forget("");
}
