//! POSIX ACLs, which the guest's kernel enforces and the host's file system inherits and masks.

use nix::mount::{MsFlags, mount};

use super::*;
use brig_fixtures::needs::needs;

const ACCESS: &str = "system.posix_acl_access";
const DEFAULT: &str = "system.posix_acl_default";
/// Tags of linux/posix_acl.h.
const OWNER: u16 = 1;
const USER: u16 = 2;
const GROUP: u16 = 4;
const MASK: u16 = 16;
const OTHER: u16 = 32;
const UNNAMED: u32 = u32::MAX;
/// `FUSE_SETXATTR_ACL_KILL_SGID`.
const KILL_SGID: u32 = 1;

/// linux/posix_acl_xattr.h.
fn acl(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let mut value = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        value.extend(tag.to_le_bytes());
        value.extend(permissions.to_le_bytes());
        value.extend(id.to_le_bytes());
    }
    value
}

/// rw for the owner and one user, nothing for anybody else.
fn for_user(user: u32) -> Vec<u8> {
    acl(&[
        (OWNER, 6, UNNAMED),
        (USER, 6, user),
        (GROUP, 0, UNNAMED),
        (MASK, 6, UNNAMED),
        (OTHER, 0, UNNAMED),
    ])
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

#[test]
fn the_guests_kernel_is_told_to_enforce_them_and_to_leave_the_umask() {
    let share = share();
    let mut client = Client::bare(share.path());
    let mut body = Vec::new();
    for word in [7u32, 41, 0x2_0000, u32::MAX] {
        body.extend(word.to_le_bytes());
    }
    body.extend([0xff; 48]);
    let reply = client.call(INIT, 0, &body).unwrap();
    let agreed = u32_at(&reply, 12);
    const DONT_MASK: u32 = 1 << 6;
    const POSIX_ACL: u32 = 1 << 20;
    assert_eq!(agreed & DONT_MASK, DONT_MASK);
    assert_eq!(agreed & POSIX_ACL, POSIX_ACL);
}

#[test]
fn a_directorys_default_acl_decides_and_the_umask_only_without_one() {
    let share = share();
    let mut client = Client::new(share.path());
    let directory = client.walk("dir").node;
    for (umask, expected) in [(0o022, 0o644), (0o077, 0o600), (0, 0o666), (0o022, 0o644)] {
        let name = format!("plain-{umask:o}-{expected:o}");
        let _ = fs::remove_file(share.path().join("dir").join(&name));
        let reply = client.make(CREATE, directory, &name, libc::S_IFREG | 0o666, umask);
        assert_eq!(Found::parse(&reply.unwrap()).mode & 0o7777, expected);
    }
    let set = client.set_attribute(directory, DEFAULT, &for_user(1000));
    if !needs(set != Err(libc::EOPNOTSUPP), ATTRIBUTES) {
        return;
    }
    set.unwrap();
    let reply = client.make(CREATE, directory, "new", libc::S_IFREG | 0o666, 0o077);
    let found = Found::parse(&reply.unwrap());
    assert_eq!(found.mode & 0o7777, 0o660, "the mask shows as the group");
    assert_eq!(
        client.attribute(found.node, ACCESS).unwrap(),
        for_user(1000)
    );
    // A directory hands it on.
    let mut body = 0o777u32.to_le_bytes().to_vec();
    body.extend(0o077u32.to_le_bytes());
    body.extend(b"below\0");
    let below = Found::parse(&client.call(MKDIR, directory, &body).unwrap());
    assert_eq!(
        client.attribute(below.node, DEFAULT).unwrap(),
        for_user(1000)
    );
    // And so does a file without a name.
    let reply = client.make(TMPFILE, directory, "x", libc::S_IFREG | 0o666, 0o077);
    assert_eq!(Found::parse(&reply.unwrap()).mode & 0o7777, 0o660);
}

#[test]
fn somebody_outside_the_group_who_sets_one_loses_the_set_group_id_bit() {
    let share = share();
    let path = share.path().join("file");
    let mut client = Client::new(share.path());
    let file = client.walk("file").node;
    let set = |bits| {
        let mode = std::os::unix::fs::PermissionsExt::from_mode(bits);
        fs::set_permissions(&path, mode).unwrap();
    };
    set(0o2755);
    let kept = client.set_attribute(file, ACCESS, &for_user(7));
    if !needs(kept != Err(libc::EOPNOTSUPP), ATTRIBUTES) {
        return;
    }
    assert_eq!(mode(&path), 0o2660);
    client
        .set_attribute_with(file, ACCESS, &for_user(7), KILL_SGID)
        .unwrap();
    assert_eq!(mode(&path), 0o660);
    assert_eq!(client.attribute(file, ACCESS).unwrap(), for_user(7));
    set(0o2755);
    client
        .set_attribute_with(file, "user.a", b"1", KILL_SGID)
        .or_else(|error| {
            if error == libc::EOPNOTSUPP {
                Ok(())
            } else {
                Err(error)
            }
        })
        .unwrap();
    assert_eq!(mode(&path), 0o2755, "for an ACL alone");
}

/// The guest's kernel asks for every file that somebody but its owner opens, and takes an error for a refusal.
#[test]
fn where_the_host_has_no_acls_the_guest_is_told_that_there_is_none() {
    let Some(share) = mounted_share() else { return };
    let volume = share.path().join("v");
    mount(
        None::<&str>,
        &volume,
        Some("ramfs"),
        MsFlags::empty(),
        None::<&str>,
    )
    .unwrap();
    fs::write(volume.join("plain"), "").unwrap();
    let mut client = Client::new(share.path());
    let file = client.walk("v/plain").node;
    for name in [ACCESS, DEFAULT] {
        assert_eq!(client.attribute(file, name).unwrap_err(), libc::ENODATA);
    }
    let refused = client.set_attribute(file, ACCESS, &for_user(7));
    assert_eq!(
        refused,
        Err(libc::EOPNOTSUPP),
        "nothing is kept that is not enforced"
    );
    client.handle.forget("");
}

#[test]
fn ids_inside_an_acl_are_seen_through_the_mounts_map() {
    let Some(share) = mounted_share() else { return };
    let volume = share.path().join("v");
    map_to_200_000(&volume);
    let mut client = Client::new(share.path());
    let file = client.walk("v/same").node;
    let kept = client.set_attribute(file, ACCESS, &for_user(201_000));
    if !needs(kept != Err(libc::EOPNOTSUPP), ATTRIBUTES) {
        return;
    }
    assert_eq!(client.attribute(file, ACCESS).unwrap(), for_user(201_000));
    // Another view of the same files, without the map.
    let mut stored = [0u8; 64];
    client.handle.forget("");
    unmount(&volume);
    let length = rustix::fs::getxattr(volume.join("same"), ACCESS, &mut stored[..]).unwrap();
    assert_eq!(stored[..length], for_user(1000));
    let outside = {
        map_to_200_000(&volume);
        let mut client = Client::new(share.path());
        let file = client.walk("v/same").node;
        let outside = client.set_attribute(file, ACCESS, &for_user(5));
        client.handle.forget("");
        outside
    };
    assert!(outside.is_err(), "who is in no map can be given nothing");
}
