//! The device as a guest sees it.

mod acl;
mod churn;
mod client;
mod held;
mod mounts;
mod own;
mod requests;
mod slow;

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;

use proptest::prelude::*;

use super::queues::MOST_PUT_OFF;
use super::*;
use client::*;
pub(super) use mounts::mounted_share;
use mounts::{map_to_200_000, mount_over, mount_tmpfs, unmount};

fn share() -> tempfile::TempDir {
    let share = tempfile::tempdir_in("/dev/shm").unwrap();
    fs::write(share.path().join("file"), "content").unwrap();
    fs::create_dir(share.path().join("dir")).unwrap();
    fs::write(share.path().join("dir/inner"), "x").unwrap();
    symlink("/etc", share.path().join("link")).unwrap();
    share
}

#[test]
fn the_configuration_space_holds_the_tag_and_one_queue() {
    let share = share();
    let (device, _) = Fs::with_root("brig", share.path()).unwrap();
    let mut bytes = [0xff; 44];
    device.config().read(0, &mut bytes);
    assert_eq!(&bytes[..5], b"brig\0");
    assert_eq!(bytes[36..40], 1u32.to_le_bytes());
    assert_eq!(bytes[40..], [0; 4]);
    assert_eq!(device.device_type(), 26);
    assert!(Fs::with_root("", share.path()).is_err());
    assert!(Fs::with_root(&"x".repeat(37), share.path()).is_err());
    assert!(Fs::with_root(&"x".repeat(36), share.path()).is_ok());
}

#[test]
fn a_file_is_found_read_and_written() {
    let share = share();
    let mut client = Client::new(share.path());
    let file = client.lookup(ROOT, "file").unwrap();
    assert_eq!(file.size, 7);
    assert_eq!(file.mode & libc::S_IFMT, libc::S_IFREG);

    let mut body = [0; 16].to_vec();
    body[0] = 0;
    let attributes = client.call(GETATTR, file.node, &body).unwrap();
    assert_eq!(u64_at(&attributes, 16), file.ino);

    let handle = client.open(OPEN, file.node, libc::O_RDWR).unwrap();
    assert_eq!(
        client.read(READ, file.node, handle, 0, 4096).unwrap(),
        b"content"
    );
    assert_eq!(client.read(READ, file.node, handle, 3, 2).unwrap(), b"te");
    assert_eq!(client.write(file.node, handle, b"CON").unwrap(), 3);
    assert_eq!(fs::read(share.path().join("file")).unwrap(), b"CONtent");
    assert_eq!(client.lookup(ROOT, "absent").unwrap_err(), libc::ENOENT);
}

#[test]
fn unaligned_direct_io_of_the_guest_works_on_the_host() {
    let share = share();
    let mut client = Client::new(share.path());
    let file = client.lookup(ROOT, "file").unwrap();
    let handle = client
        .open(OPEN, file.node, libc::O_RDWR | libc::O_DIRECT)
        .unwrap();
    assert_eq!(client.read(READ, file.node, handle, 1, 3).unwrap(), b"ont");
}

#[test]
fn a_directory_lists_the_numbers_that_lookup_gives() {
    let share = share();
    let mut client = Client::new(share.path());
    let names = client.list(ROOT);
    assert_eq!(
        names
            .iter()
            .map(|(name, _, _)| name.as_str())
            .collect::<Vec<_>>(),
        [".", "..", "dir", "file", "link"]
    );
    for (name, entry, attribute) in &names[2..] {
        let (entry, attribute) = (*entry, *attribute);
        let found = client.lookup(ROOT, name).unwrap();
        assert_eq!(entry, found.ino, "{name}");
        assert_eq!(attribute, found.ino, "{name}");
    }
}

#[test]
fn what_a_user_creates_is_his() {
    if !brig_fixtures::needs::root() {
        return;
    }
    let share = share();
    let mut client = Client::new(share.path());
    client.ids = (1234, 4321);
    let file = client.create(ROOT, "new", 0o640);
    // The directory is root's and this process has not the jail's securebits, so it may be refused:
    // what counts is that it is never left as root's.
    if let Ok(file) = file {
        assert_eq!(file.uid, 1234);
        let metadata = fs::metadata(share.path().join("new")).unwrap();
        assert_eq!((metadata.uid(), metadata.gid()), (1234, 4321));
    } else {
        assert!(!share.path().join("new").exists());
    }
    client.harness.device.catch_up().unwrap();
    assert_eq!(
        nix::unistd::geteuid().as_raw(),
        0,
        "and the thread is root's again"
    );
}

/// Ids stay from one request to the next, and must never be another's.
#[test]
fn callers_take_turns_and_each_has_his_own_files() {
    let share = share();
    if !jailed_credentials() {
        return;
    }
    let mut client = Client::new(share.path());
    let root = client.create(ROOT, "of-root", 0o644).unwrap().node;
    let callers = [(1000, 1000), (1000, 2000), (0, 0), (3000, 2000), (0, 2000)];
    for (number, ids) in callers.into_iter().cycle().take(40).enumerate() {
        client.ids = ids;
        // What comes between is anybody's, root's or the caller's.
        match number % 4 {
            0 => drop(client.call(GETATTR, root, &[0; 16]).unwrap()),
            1 => drop(client.attributes(root)),
            2 => {
                let handle = client.open(OPEN, root, libc::O_RDWR).unwrap();
                client.write(root, handle, b"x").unwrap();
            }
            _ => {}
        }
        let name = format!("file-{number}");
        client.create(ROOT, &name, 0o640).unwrap();
        let directory = format!("directory-{number}\0");
        let mut body = 0o750u32.to_le_bytes().to_vec();
        body.extend([0; 4]);
        body.extend(directory.as_bytes());
        client.call(MKDIR, ROOT, &body).unwrap();
        for name in [name, format!("directory-{number}")] {
            let made = fs::symlink_metadata(share.path().join(name)).unwrap();
            assert_eq!((made.uid(), made.gid()), ids, "{number}");
        }
    }
}

#[test]
fn what_has_no_answer_is_put_off_while_requests_come_and_nothing_else() {
    let share = share();
    let mut client = Client::new(share.path());
    client.harness.device.catch_up().unwrap();
    assert!(client.harness.device.puts_off().is_none(), "idle");
    let file = client.walk("file").node;
    assert_eq!(client.harness.device.puts_off(), Some(PUT_OFF));
    let handle = client.open(OPEN, file, libc::O_RDONLY).unwrap();
    let interrupts = |client: &Client, queue| client.harness.interrupts.of(queue);

    let before = (interrupts(&client, HIPRIO), interrupts(&client, REQUEST));
    let mut body = handle.to_le_bytes().to_vec();
    body.extend([0; 16]);
    client.call(RELEASE, file, &body).unwrap();
    client.forget_on_hiprio(file, 1);
    assert_eq!(interrupts(&client, HIPRIO), before.0, "put off");
    // A guest waits until the file is closed.
    assert_eq!(interrupts(&client, REQUEST), before.1 + 1);
    assert!(
        client.call(GETATTR, file, &[0; 16]).is_ok(),
        "not forgotten yet"
    );

    client.harness.device.catch_up().unwrap();
    assert!(client.harness.device.puts_off().is_none());
    assert_eq!(interrupts(&client, HIPRIO), before.0 + 1);
    assert_eq!(client.harness.queues[usize::from(HIPRIO)].used().len(), 1);
    assert_eq!(
        client.call(GETATTR, file, &[0; 16]).unwrap_err(),
        libc::EBADF
    );
}

#[test]
fn forgets_are_served_at_once_when_they_are_many_or_nothing_else_comes() {
    let share = share();
    let mut client = Client::new(share.path());
    client.harness.device.catch_up().unwrap();
    let hiprio = usize::from(HIPRIO);
    // Nobody asks for anything: each by itself.
    client.forget_on_hiprio(77, 1);
    assert_eq!(client.harness.queues[hiprio].used().len(), 1);
    for number in 0..u64::from(MOST_PUT_OFF) {
        client.walk("file");
        client.forget_on_hiprio(100 + number, 1);
    }
    client.walk("file");
    let served = client.harness.queues[hiprio].used().len();
    assert_eq!(served, usize::from(MOST_PUT_OFF));
}

/// What some tests need.
const ATTRIBUTES: &str = "extended attributes of users and ACLs, where temporary files are";

/// Makes this thread what the file server's is in the jail.
fn jailed_credentials() -> bool {
    if !brig_fixtures::needs::root() {
        return false;
    }
    const NO_SETUID_FIXUP: libc::c_ulong = 1 << 2;
    // SAFETY: numbers only; the securebits are this thread's.
    let set = unsafe { libc::prctl(libc::PR_SET_SECUREBITS, NO_SETUID_FIXUP, 0, 0, 0) };
    assert_eq!(set, 0);
    let kept = crate::jail::allow::CAPABILITIES.iter().copied().collect();
    for set in [caps::CapSet::Effective, caps::CapSet::Permitted] {
        caps::set(None, set, &kept).unwrap();
    }
    true
}

#[test]
fn a_supplementary_groups_volume_can_be_written() {
    let share = share();
    let directory = share.path().join("dir");
    std::os::unix::fs::chown(&directory, Some(0), Some(2000)).unwrap();
    fs::set_permissions(
        &directory,
        std::os::unix::fs::PermissionsExt::from_mode(0o2770),
    )
    .unwrap();
    if !jailed_credentials() {
        return;
    }
    let mut client = Client::new(share.path());
    // The guest's kernel has seen the group and allowed it; the request names only the primary one.
    client.ids = (1000, 1000);
    let parent = client.lookup(ROOT, "dir").unwrap().node;
    let file = client.create(parent, "new", 0o640).unwrap();
    assert_eq!(file.uid, 1000);
    let metadata = fs::metadata(directory.join("new")).unwrap();
    assert_eq!(
        (metadata.uid(), metadata.gid()),
        (1000, 2000),
        "set-group-id directory"
    );
}

/// An NFS server judges by the user and the groups it is told, and knows of no capability: without it this
/// kernel does the same.
#[test]
fn where_a_server_refuses_the_caller_its_directorys_group_makes_the_file() {
    let share = share();
    let directories = ["plain", "group", "closed"].map(|name| share.path().join(name));
    for (directory, mode) in directories.iter().zip([0o770, 0o2770, 0o2750]) {
        fs::create_dir(directory).unwrap();
        std::os::unix::fs::chown(directory, Some(0), Some(2000)).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(mode);
        fs::set_permissions(directory, mode).unwrap();
    }
    if !jailed_credentials() {
        return;
    }
    caps::drop(
        None,
        caps::CapSet::Effective,
        caps::Capability::CAP_DAC_OVERRIDE,
    )
    .unwrap();
    let mut client = Client::new(share.path());
    let [plain, group, closed] =
        ["plain", "group", "closed"].map(|name| client.lookup(ROOT, name).unwrap().node);
    client.ids = (1000, 1000);
    // Its group may not write there.
    assert_eq!(
        client.create(closed, "file", 0o640).unwrap_err(),
        libc::EACCES
    );
    for parent in [plain, group] {
        let file = client.create(parent, "file", 0o640).unwrap();
        assert_eq!(file.uid, 1000, "as the guest is told");
        let mut body = 0o750u32.to_le_bytes().to_vec();
        body.extend([0; 4]);
        body.extend(b"directory\0");
        client.call(MKDIR, parent, &body).unwrap();
    }
    for directory in &directories[..2] {
        for name in ["file", "directory"] {
            let made = fs::symlink_metadata(directory.join(name)).unwrap();
            assert_eq!((made.uid(), made.gid()), (1000, 2000), "{name}");
        }
    }
}

#[test]
fn a_hard_link_needs_no_capability() {
    let share = share();
    nix::unistd::mkfifo(&share.path().join("fifo"), nix::sys::stat::Mode::S_IRUSR).unwrap();
    if !jailed_credentials() {
        return;
    }
    let mut client = Client::new(share.path());
    let directory = client.walk("dir").node;
    for name in ["file", "link", "fifo"] {
        let node = client.lookup(ROOT, name).unwrap();
        // The credentials change between the lookup and the link.
        client.ids = (1000, 1000);
        let _ = client.create(ROOT, "other", 0o600);
        client.ids = (0, 0);
        let mut body = node.node.to_le_bytes().to_vec();
        body.extend(format!("linked-{name}\0").as_bytes());
        let linked = Found::parse(&client.call(LINK, directory, &body).unwrap());
        assert_eq!((linked.node, linked.ino), (node.node, node.ino), "{name}");
        let metadata = fs::symlink_metadata(share.path().join(format!("dir/linked-{name}")));
        assert_eq!(metadata.unwrap().nlink(), 2, "{name}");
    }
}

#[test]
fn dot_dot_is_refused_from_every_directory() {
    let share = share();
    let mut client = Client::new(share.path());
    let directory = client.walk("dir").node;
    for node in [ROOT, directory] {
        for name in ["..", ".", "", "../file", "dir/inner", "/etc"] {
            assert_eq!(
                client.lookup(node, name).unwrap_err(),
                libc::EINVAL,
                "{name:?}"
            );
        }
        assert_eq!(client.create(node, "..", 0o600).unwrap_err(), libc::EINVAL);
        assert_eq!(
            client.create(node, "../x", 0o600).unwrap_err(),
            libc::EINVAL
        );
    }
    // A link is the guest's to follow.
    let link = client.lookup(ROOT, "link").unwrap();
    assert_eq!(link.mode & libc::S_IFMT, libc::S_IFLNK);
    assert_eq!(
        client.lookup(link.node, "passwd").unwrap_err(),
        libc::ENOTDIR
    );
    assert!(client.open(OPEN, link.node, 0).is_err());
}

#[test]
fn trusted_attributes_are_kept_apart_from_the_hosts() {
    let share = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    fs::write(share.path().join("file"), "").unwrap();
    let mut client = Client::new(share.path());
    let file = client.lookup(ROOT, "file").unwrap().node;
    let kept = client.set_attribute(file, "user.a", b"1");
    if !brig_fixtures::needs::needs(kept != Err(libc::EOPNOTSUPP), ATTRIBUTES) {
        return;
    }
    client
        .set_attribute(file, "trusted.overlay.opaque", b"y")
        .unwrap();
    assert_eq!(
        client.set_attribute(file, "user.brig.trusted.x", b"y"),
        Err(libc::EPERM)
    );
    let mut names: Vec<_> = client
        .attributes(file)
        .split('\0')
        .map(str::to_owned)
        .collect();
    names.sort();
    assert_eq!(names, ["", "trusted.overlay.opaque", "user.a"]);
    assert_eq!(
        rustix::fs::getxattr(
            share.path().join("file"),
            "trusted.overlay.opaque",
            &mut [0u8; 8][..]
        ),
        Err(rustix::io::Errno::NODATA)
    );
}

#[test]
fn a_reset_ends_the_session() {
    let share = share();
    let mut client = Client::new(share.path());
    let file = client.lookup(ROOT, "file").unwrap().node;
    client.harness.deactivate();
    client.harness.activate(0);
    let body = [0; 16];
    assert_eq!(client.call(GETATTR, file, &body).unwrap_err(), libc::EBADF);
    assert!(client.lookup(ROOT, "file").is_ok());
}

#[test]
fn a_driver_that_enables_one_queue_alone_leaves_nothing_registered() {
    let share = share();
    for only in [0, 1] {
        let mut client = Client::new(share.path());
        client.harness.deactivate();
        let refused = client.harness.try_activate_some(0, |index| index == only);
        assert!(refused.is_err());
        client.harness.queues[usize::from(only)].kick();
        assert_eq!(client.harness.step(0).unwrap(), 0);
    }
}

#[test]
fn lengths_that_lie_are_no_way_out_of_the_buffer() {
    let share = share();
    let mut client = Client::new(share.path());
    for length in [0, 1, 39, 40, 41, 4096, 1 << 20, u32::MAX] {
        for opcode in 0..64 {
            let bytes = client.header(length, opcode, ROOT);
            client.raw(&bytes, BUFFER);
            client.raw(&bytes, 0);
            client.raw(&bytes, 8);
        }
    }
    // A listing larger than any buffer.
    let handle = client.open(OPENDIR, ROOT, 0);
    if let Ok(handle) = handle {
        assert!(client.read(READDIRPLUS, ROOT, handle, 0, u32::MAX).is_err());
    }
    assert!(
        client.lookup(ROOT, "file").is_ok(),
        "and the server goes on"
    );
}

#[test]
fn a_chain_without_end_needs_a_reset() {
    let share = share();
    let mut client = Client::new(share.path());
    let queue = &mut client.harness.queues[usize::from(REQUEST)];
    queue.raw_descriptor(0, client.request, 64, crate::virtio::testing::NEXT, 0);
    queue.make_available(0);
    queue.kick();
    assert!(matches!(
        client.harness.try_run(),
        Err(DeviceError::Guest { .. })
    ));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn no_request_brings_the_server_down(
        // Not DESTROY, SETATTR and the like on purpose: all of them, on a throw-away directory.
        opcode in 0u32..60,
        node in prop_oneof![Just(ROOT), 0u64..8, any::<u64>()],
        length in prop_oneof![Just(None), any::<u32>().prop_map(Some)],
        body in proptest::collection::vec(any::<u8>(), 0..200),
        room in prop_oneof![Just(0u32), Just(BUFFER), 1u32..200],
    ) {
        let share = share();
        let mut client = Client::new(share.path());
        client.lookup(ROOT, "dir").unwrap();
        let length = length.unwrap_or(u32::try_from(40 + body.len()).unwrap());
        let mut bytes = client.header(length, opcode, node);
        bytes.extend(body);
        let written = client.raw(&bytes, room);
        prop_assert!(written <= room as usize);
    }
}
