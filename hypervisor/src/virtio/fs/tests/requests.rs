//! What the library has no word for, and what the answers to OPEN promise.

use super::*;

const FLUSH: u32 = 25;
const KEEP_CACHE: u32 = 1 << 1;
const NO_FLUSH: u32 = 1 << 5;

fn names(bytes: &[u8], before: usize) -> Vec<String> {
    let mut names = Vec::new();
    let mut at = before;
    while at + 24 <= bytes.len() {
        let length = u32_at(bytes, at + 16) as usize;
        let name = bytes[at + 24..at + 24 + length].to_vec();
        names.push(String::from_utf8(name).unwrap());
        at += (24 + length).next_multiple_of(8) + before;
    }
    names.sort();
    names
}

#[test]
fn an_empty_directory_lists_itself_and_its_parent() {
    let share = share();
    fs::create_dir(share.path().join("empty")).unwrap();
    let mut client = Client::new(share.path());
    let directory = client.walk("empty").node;
    let handle = client.open(OPENDIR, directory, 0).unwrap();
    for (opcode, before) in [(READDIR, 0), (READDIRPLUS, 128)] {
        let bytes = client.read(opcode, directory, handle, 0, 4096).unwrap();
        assert_eq!(names(&bytes, before), [".", ".."], "{opcode}");
        // Their entries name no file, or the guest would have to forget them.
        if opcode == READDIRPLUS {
            assert_eq!(u64_at(&bytes, 0), 0);
        }
    }
}

#[test]
fn a_long_directory_is_listed_whole_however_small_the_answers() {
    let share = share();
    let directory = share.path().join("dir");
    let mut expected: Vec<String> = [".", "..", "inner"].map(str::to_owned).into();
    for number in 0..300 {
        let name = format!("{number:0>100}");
        fs::write(directory.join(&name), "").unwrap();
        expected.push(name);
    }
    expected.sort();
    let mut client = Client::new(share.path());
    let node = client.walk("dir").node;
    let handle = client.open(OPENDIR, node, 0).unwrap();
    for (opcode, before, size) in [
        (READDIR, 0, 4096),
        (READDIR, 0, 200),
        (READDIRPLUS, 128, 4096),
        (READDIRPLUS, 128, 300),
    ] {
        let (mut listed, mut offset) = (Vec::new(), 0);
        loop {
            let bytes = client.read(opcode, node, handle, offset, size).unwrap();
            if bytes.is_empty() {
                break;
            }
            // The last entry says where the next one is.
            let mut at = before;
            while at + 24 <= bytes.len() {
                offset = u64_at(&bytes, at + 8);
                at += (24 + u32_at(&bytes, at + 16) as usize).next_multiple_of(8) + before;
            }
            listed.extend(names(&bytes, before));
        }
        listed.sort();
        assert_eq!(listed, expected, "{opcode} by {size}");
    }
    let none = client.read(READDIR, node, handle, 0, 10);
    assert_eq!(none.unwrap_err(), libc::EINVAL, "no room is no end");
}

#[test]
fn a_file_without_a_name_is_written_and_then_linked() {
    let share = share();
    let mut client = Client::new(share.path());
    let directory = client.walk("dir").node;
    let reply = client
        .make(TMPFILE, directory, "ignored", libc::S_IFREG | 0o640, 0)
        .unwrap();
    let (file, handle) = (Found::parse(&reply), u64_at(&reply, 128));
    assert_eq!(client.list(directory).len(), 3, "it has no name");
    client.write(file.node, handle, b"data").unwrap();
    let mut body = file.node.to_le_bytes().to_vec();
    body.extend(b"named\0");
    let linked = Found::parse(&client.call(LINK, directory, &body).unwrap());
    assert_eq!((linked.node, linked.ino), (file.node, file.ino));
    assert_eq!(fs::read(share.path().join("dir/named")).unwrap(), b"data");
}

#[test]
fn the_time_of_birth_is_told_where_the_host_knows_it() {
    let share = share();
    let mut client = Client::new(share.path());
    let file = client.walk("file");
    let reply = client.call(STATX, file.node, &[0; 24]).unwrap();
    assert_eq!(reply.len(), 288);
    assert_eq!(u64_at(&reply, 32 + 32), file.ino, "as everywhere");
    assert_eq!(u64_at(&reply, 32 + 40), 7);
    const BTIME: u32 = 0x800;
    let native = fs::metadata(share.path().join("file")).unwrap().created();
    assert_eq!(u32_at(&reply, 32) & BTIME != 0, native.is_ok());
    if let Ok(born) = native {
        let born = born.duration_since(std::time::UNIX_EPOCH).unwrap();
        assert_eq!(u64_at(&reply, 32 + 64 + 16), born.as_secs());
        assert_eq!(u32_at(&reply, 32 + 64 + 24), born.subsec_nanos());
    }
}

#[test]
fn everything_can_be_written_back_at_once() {
    let Some(share) = mounted_share() else { return };
    let mut client = Client::new(share.path());
    client.walk("v/same");
    client.walk("c/rootfs/same");
    assert_eq!(client.call(SYNCFS, ROOT, &[0; 8]).unwrap(), b"");
    client.handle.forget("");
}

#[test]
fn flags_of_files_are_the_hosts_and_no_other_ioctl_is() {
    let share = share();
    let mut client = Client::new(share.path());
    let file = client.walk("file").node;
    let handle = client.open(OPEN, file, libc::O_RDONLY).unwrap();
    let mut ask = |command: u32, out_size: u32| {
        let mut body = handle.to_le_bytes().to_vec();
        body.extend([0; 4]);
        body.extend(command.to_le_bytes());
        body.extend([0; 12]);
        body.extend(out_size.to_le_bytes());
        client.call(IOCTL, file, &body)
    };
    const GETFLAGS: u32 = 0x8008_6601;
    const TCGETS: u32 = 0x5401;
    let native = fs::File::open(share.path().join("file")).unwrap();
    let mut flags: libc::c_long = 0;
    // SAFETY: the command writes an int or a long.
    let native = unsafe {
        libc::ioctl(
            std::os::fd::AsRawFd::as_raw_fd(&native),
            libc::Ioctl::from(GETFLAGS),
            &raw mut flags,
        )
    };
    match ask(GETFLAGS, 4) {
        Ok(reply) => {
            assert_eq!(native, 0);
            assert_eq!(u32_at(&reply, 0), 0, "result");
            assert_eq!(i64::from(u32_at(&reply, 16)), flags);
        }
        Err(_) => assert_eq!(native, -1),
    }
    assert_eq!(ask(GETFLAGS, 8).unwrap_err(), libc::EINVAL);
    assert_eq!(ask(TCGETS, 60).unwrap_err(), libc::ENOTTY);
    assert_eq!(ask(GETFLAGS, u32::MAX).unwrap_err(), libc::EINVAL);
}

#[test]
fn nothing_is_flushed_that_nobody_waits_for() {
    let Some(share) = mounted_share() else { return };
    let mut client = Client::new(share.path());
    for (path, flags, expected) in [
        ("c/rootfs/same", libc::O_RDWR, KEEP_CACHE | NO_FLUSH),
        ("v/same", libc::O_RDONLY, NO_FLUSH),
        // Pages that were mapped must be the host's when a file is closed.
        ("v/same", libc::O_RDWR, 0),
    ] {
        let file = client.walk(path).node;
        let mut body = flags.to_le_bytes().to_vec();
        body.extend([0; 4]);
        let reply = client.call(OPEN, file, &body).unwrap();
        assert_eq!(u32_at(&reply, 8), expected, "{path} {flags}");
        let mut body = reply[..8].to_vec();
        body.extend([0; 16]);
        client.call(FLUSH, file, &body).unwrap();
    }
    client.handle.forget("");
}

/// It is asked for before the first write to each file that the guest looked at again.
#[test]
fn a_file_capability_that_is_set_is_found_though_its_absence_was_known() {
    let Some(share) = mounted_share() else { return };
    let mut client = Client::new(share.path());
    const NAME: &str = "security.capability";
    // `struct vfs_cap_data`, version 2: CAP_NET_BIND_SERVICE, effective.
    let mut capability = vec![0u8; 20];
    capability[0] = 1;
    capability[3] = 2;
    capability[5] = 4;
    for directory in ["c/rootfs", "v"] {
        let parent = client.walk(directory).node;
        let file = client.create(parent, "capable", 0o755).unwrap().node;
        assert_eq!(client.attribute(file, NAME).unwrap_err(), libc::ENODATA);
        client.set_attribute(file, NAME, &capability).unwrap();
        assert_eq!(client.attribute(file, NAME).unwrap(), capability);
    }
    client.handle.forget("");
}

#[test]
fn an_appending_file_takes_cached_pages_at_their_place() {
    let share = share();
    let mut client = Client::new(share.path());
    let file = client.walk("file").node;
    let handle = client
        .open(OPEN, file, libc::O_RDWR | libc::O_APPEND)
        .unwrap();
    let mut write = |flags: i32, data: &[u8]| {
        let mut body = handle.to_le_bytes().to_vec();
        body.extend(0u64.to_le_bytes());
        body.extend(u32::try_from(data.len()).unwrap().to_le_bytes());
        body.extend([0; 12]);
        body.extend(flags.to_le_bytes());
        body.extend([0; 4]);
        body.extend(data);
        client.call(WRITE, file, &body).unwrap();
    };
    write(libc::O_RDWR | libc::O_APPEND, b"!");
    // As the guest's kernel writes back what was mapped: without flags.
    write(0, b"C");
    write(libc::O_RDWR | libc::O_APPEND, b"?");
    let content = fs::read(share.path().join("file")).unwrap();
    assert_eq!(content, b"Content!?");
}

/// In the jail's user namespace the host's kernel takes them whoever writes, as it does from this thread.
#[test]
fn set_id_bits_go_only_when_the_guest_says_so() {
    let share = share();
    let path = share.path().join("file");
    if !jailed_credentials() {
        return;
    }
    let capability = caps::Capability::CAP_FSETID;
    caps::drop(None, caps::CapSet::Effective, capability).unwrap();
    let mut client = Client::new(share.path());
    let mode = || fs::metadata(&path).unwrap().mode() & 0o7777;
    const KILL: u32 = 1 << 2;
    for (kill, expected) in [(0, 0o6755), (KILL, 0o755)] {
        let bits = std::os::unix::fs::PermissionsExt::from_mode(0o6755);
        fs::set_permissions(&path, bits).unwrap();
        let file = client.walk("file").node;
        let handle = client.open(OPEN, file, libc::O_RDWR).unwrap();
        let mut body = handle.to_le_bytes().to_vec();
        body.extend(0u64.to_le_bytes());
        body.extend(1u32.to_le_bytes());
        body.extend(kill.to_le_bytes());
        body.extend([0; 16]);
        body.push(b'x');
        client.call(WRITE, file, &body).unwrap();
        assert_eq!(mode(), expected, "write");
    }
    // SETATTR of a size, without and with FATTR_KILL_SUIDGID.
    for (kill, expected) in [(0, 0o6755), (1 << 11, 0o755)] {
        let bits = std::os::unix::fs::PermissionsExt::from_mode(0o6755);
        fs::set_permissions(&path, bits).unwrap();
        let file = client.walk("file").node;
        let mut body = (1u32 << 3 | kill).to_le_bytes().to_vec();
        body.extend([0; 12]);
        body.extend(3u64.to_le_bytes());
        body.extend([0; 64]);
        client.call(4, file, &body).unwrap();
        assert_eq!(mode(), expected, "truncate");
    }
    // OPEN with O_TRUNC, without and with FUSE_OPEN_KILL_SUIDGID.
    for (kill, expected) in [(0u32, 0o6755), (1, 0o755)] {
        let bits = std::os::unix::fs::PermissionsExt::from_mode(0o6755);
        fs::set_permissions(&path, bits).unwrap();
        fs::write(&path, "x").unwrap();
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o6755)).unwrap();
        let file = client.walk("file").node;
        let mut body = (libc::O_RDWR | libc::O_TRUNC).to_le_bytes().to_vec();
        body.extend(kill.to_le_bytes());
        client.call(OPEN, file, &body).unwrap();
        assert_eq!(mode(), expected, "open");
    }
}

#[test]
fn a_volume_is_a_submount_where_the_guest_holds_acls_in_it() {
    let Some(share) = mounted_share() else { return };
    const SUBMOUNTS: u32 = 1 << 27;
    const ENFORCED: u32 = 1 << 31;
    fs::write(share.path().join("single"), "").unwrap();
    mount_over(&share.path().join("v/same"), &share.path().join("single"));
    let all = INIT_EXT | SUBMOUNTS;
    for (offered, marked) in [
        (vec![!INIT_EXT], false),
        (vec![all, 0], false),
        (vec![all, !ENFORCED], false),
        (vec![INIT_EXT, ENFORCED], false),
        (vec![all, ENFORCED], true),
    ] {
        let mut client = Client::offering(share.path(), &offered);
        let flags = |found: Found| found.flags;
        assert_eq!(flags(client.walk("v")), u32::from(marked), "{offered:x?}");
        for path in ["c", "c/rootfs", "v/same", "single", "dir"] {
            assert_eq!(flags(client.walk(path)), 0, "{path}");
        }
        client.handle.forget("");
    }
    // And as it is listed.
    let mut client = Client::offering(share.path(), &[all, ENFORCED]);
    let handle = client.open(OPENDIR, ROOT, 0).unwrap();
    let bytes = client.read(READDIRPLUS, ROOT, handle, 0, 4096).unwrap();
    let mut marked = Vec::new();
    let mut at = 0;
    while at + 152 <= bytes.len() {
        let length = u32_at(&bytes, at + 144) as usize;
        if Found::parse(&bytes[at..]).flags != 0 {
            marked.extend(names(&bytes[at..at + 152 + length], 128));
        }
        at += (152 + length).next_multiple_of(8);
    }
    assert_eq!(marked, ["v"]);
    client.handle.forget("");
}
