//! What is one pod's own: the guest keeps what it writes, and opens nothing.

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};

use super::*;

const SETATTR: u32 = 4;
const MKNOD: u32 = 8;
const FLUSH: u32 = 25;
/// What a request has instead of a handle.
const NONE: u64 = 0;
const WRITEBACK_CACHE: u32 = 1 << 16;
const ATOMIC_O_TRUNC: u32 = 1 << 3;

/// Makes a file as a guest does that has been told that there is no CREATE.
fn make(client: &mut Client, parent: u64, name: &str) -> Found {
    let mut body = (libc::S_IFREG | 0o600).to_le_bytes().to_vec();
    body.extend([0; 12]);
    body.extend(name.as_bytes());
    body.push(0);
    Found::parse(&client.call(MKNOD, parent, &body).unwrap())
}

/// `struct fuse_setattr_in` with a size.
fn truncate(client: &mut Client, node: u64, size: u64) -> Reply {
    let mut body = (1u32 << 3).to_le_bytes().to_vec();
    body.extend([0; 12]);
    body.extend(size.to_le_bytes());
    body.resize(88, 0);
    client.call(SETATTR, node, &body)
}

#[test]
fn only_there_the_guest_may_keep_what_it_writes() {
    let share = share();
    let agreed = |mut client: Client| {
        let mut body = Vec::new();
        for word in [7u32, 31, 0x2_0000, !INIT_EXT] {
            body.extend(word.to_le_bytes());
        }
        u32_at(&client.call(INIT, 0, &body).unwrap(), 12)
    };
    let flags = WRITEBACK_CACHE | ATOMIC_O_TRUNC;
    let (own, shared) = (Client::of_own(share.path()), Client::new(share.path()));
    assert_eq!(agreed(own) & flags, WRITEBACK_CACHE);
    assert_eq!(agreed(shared) & flags, ATOMIC_O_TRUNC);
}

#[test]
fn files_are_read_and_written_by_their_numbers_and_nothing_is_opened() {
    let Some(share) = mounted_share() else { return };
    let mut client = Client::of_own(share.path());
    let (top, same) = (client.walk("v").node, client.walk("v/same").node);
    for flags in [libc::O_RDONLY, libc::O_RDWR | libc::O_TRUNC] {
        assert_eq!(client.open(OPEN, same, flags).unwrap_err(), libc::ENOSYS);
    }
    assert_eq!(client.create(top, "new", 0o600).unwrap_err(), libc::ENOSYS);
    assert_eq!(
        client.call(FLUSH, same, &[0; 24]).unwrap_err(),
        libc::ENOSYS
    );

    assert_eq!(client.read(READ, same, NONE, 0, 64).unwrap(), b"v");
    assert_eq!(client.write(same, NONE, b"written").unwrap(), 7);
    assert_eq!(client.read(READ, same, NONE, 0, 64).unwrap(), b"written");
    truncate(&mut client, same, 4).unwrap();
    assert_eq!(client.read(READ, same, NONE, 0, 64).unwrap(), b"writ");
    assert_eq!(fs::read(share.path().join("v/same")).unwrap(), b"writ");

    let new = make(&mut client, top, "new").node;
    assert_eq!(client.write(new, NONE, b"x").unwrap(), 1);
    assert_eq!(fs::read(share.path().join("v/new")).unwrap(), b"x");
    // A file without a name is written by its number too.
    let made = client.make(TMPFILE, top, "", 0o600, 0).unwrap();
    assert_eq!(u64_at(&made, 128), NONE);
    let unnamed = Found::parse(&made).node;
    assert_eq!(client.write(unnamed, NONE, b"y").unwrap(), 1);
    assert_eq!(client.read(READ, unnamed, NONE, 0, 64).unwrap(), b"y");
}

#[test]
fn directories_and_what_the_guest_does_not_know_are_no_files() {
    let Some(share) = mounted_share() else { return };
    let mut client = Client::of_own(share.path());
    let top = client.walk("v").node;
    for node in [top, top + 77, ROOT] {
        assert_eq!(
            client.read(READ, node, NONE, 0, 1).unwrap_err(),
            libc::EBADF
        );
        assert_eq!(client.write(node, NONE, b"x").unwrap_err(), libc::EBADF);
    }
    assert!(truncate(&mut client, top, 0).is_err());
    // Nor is any file the server's own.
    let mut shared = Client::new(share.path());
    let same = shared.walk("v/same").node;
    assert_eq!(
        shared.read(READ, same, NONE, 0, 1).unwrap_err(),
        libc::EBADF
    );
}

#[test]
fn a_mount_can_be_made_read_only_once_it_is_quiet() {
    let Some(share) = mounted_share() else { return };
    let readonly = || {
        let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
        let none = None::<&str>;
        mount(none, &share.path().join("v"), none, flags, none)
    };
    let mut client = Client::of_own(share.path());
    let same = client.walk("v/same").node;
    client.write(same, NONE, b"x").unwrap();
    assert_eq!(readonly(), Err(Errno::EBUSY));
    client.harness.device.catch_up().unwrap();
    readonly().unwrap();
    assert_eq!(client.write(same, NONE, b"y").unwrap_err(), libc::EROFS);
    assert_eq!(client.read(READ, same, NONE, 0, 64).unwrap(), b"x");
}

#[test]
fn a_file_that_was_removed_and_forgotten_takes_no_space() {
    let Some(share) = mounted_share() else { return };
    let mut client = Client::of_own(share.path());
    let same = client.walk("v/same").node;
    client.write(same, NONE, b"x").unwrap();
    fs::remove_file(share.path().join("v/same")).unwrap();
    let is_open = || {
        let open = fs::read_dir("/proc/self/fd").unwrap().flatten();
        let wanted = share.path().join("v/same (deleted)");
        open.filter_map(|entry| fs::read_link(entry.path()).ok())
            .any(|open| open == wanted)
    };
    assert!(is_open());
    client.forget_on_hiprio(same, 1);
    client.harness.device.catch_up().unwrap();
    assert!(!is_open());
}

#[test]
fn what_is_detached_from_the_share_is_forgotten_there_too() {
    let Some(share) = mounted_share() else { return };
    let mut client = Client::of_own(share.path());
    client.walk("v/same");
    let (_, mut handle) = Fs::with_root("share", share.path()).unwrap();
    handle.own = Some(Arc::clone(&client.handle.served));
    for other in ["v", ".owner/v", ".own"] {
        handle.forget(other);
        assert!(client.lookup(ROOT, "v").is_ok());
        assert_eq!(
            mounts::open_below(&share.path().join("v")).len(),
            2,
            "{other}"
        );
    }
    handle.forget(".own/v");
    unmount(&share.path().join("v"));
}
