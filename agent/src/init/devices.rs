//! Device nodes and the usual links of /dev.
use std::{
    ffi::OsStr,
    io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::Path,
};

use nix::mount::{MntFlags, umount2};
use rustix::{
    fs::{
        AtFlags, FileType, Gid, Mode, OFlags, Uid, chownat, fstat, fstatfs, makedev, mknodat,
        openat, symlinkat,
    },
    io::Errno,
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount,
        fsopen,
    },
};

use super::{
    agent::Agent,
    failure::{Context as _, Result},
    guest_devices::{self, Node},
    idmap::Ids,
    place::Last,
    root::{Missing, Root},
};
use crate::{
    detached::{attach_at, attach_on, clone_mount},
    spec::{Device, Linux},
};

/// The nodes every container has (OCI runtime-spec, "Default Devices").
const DEFAULTS: [(&str, u32, u32); 6] = [
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];

/// Where the guest has its own.
const GUEST_DEVICES: &str = "/dev";

/// statfs(2) f_type of tmpfs.
pub const TMPFS_MAGIC: i64 = 0x0102_1994;

const LINKS: [(&str, &str); 6] = [
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
    ("/dev/core", "/proc/kcore"),
    ("/dev/ptmx", "pts/ptmx"),
];

/// Makes the default devices, those of the specification that the guest has, those that were given, and the links.
pub fn make(
    agent: &Agent,
    root: &Root,
    (linux, given): (&Linux, &[Device]),
    ids: &Ids,
) -> Result<()> {
    let (chosen, left_out) = if linux.devices.is_empty() {
        Default::default()
    } else {
        let guest = guest_devices::list().during("the guest's devices")?;
        guest_devices::choose(linux, &guest)?
    };
    if !left_out.is_empty() {
        agent.warn(guest_devices::left_out(&left_out));
    }
    for (path, major, minor) in DEFAULTS {
        if chosen.iter().all(|node| node.path != path) {
            let default = Node {
                path: path.to_owned(),
                kind: FileType::CharacterDevice,
                numbers: (major, minor),
                mode: 0o666,
                owner: (0, 0),
            };
            make_node(root, &default, ids)?;
        }
    }
    let mut nodes = chosen;
    for given in given {
        let own = guest_devices::parse(given)?;
        nodes.retain(|other| other.path != own.path);
        nodes.push(own);
    }
    for node in &nodes {
        make_node(root, node, ids)?;
    }
    if guest_devices::is_privileged(linux) && ids.is_identity() {
        let directory = root.open_or_make("/dev", Missing::Directory)?;
        // Nodes that come later are made in a file system of the container alone.
        if fstatfs(&directory).during("/dev")?.f_type == TMPFS_MAGIC {
            agent.give_devices(directory.as_fd())?;
        }
    }
    for (path, target) in LINKS {
        let place = root.place(path, Last::Itself)?;
        // What the image has there is the image's business, as with runc.
        if let Some((parent, name)) = root.parent_of(path, &place)? {
            symlinkat(target, &parent, &name).during(path)?;
            root.own(&parent, &name).during(path)?;
        }
    }
    Ok(())
}

/// Makes a node where the container is to have it.
fn make_node(root: &Root, node: &Node, ids: &Ids) -> Result<()> {
    let path = node.path.as_str();
    let owner = (ids.uid(node.owner.0)?, ids.gid(node.owner.1)?);
    let place = root.place(path, Last::Followed)?;
    let Some((parent, name)) = root.parent_of(path, &place)? else {
        let stat = fstat(&place.found).during(format_args!("device {path}"))?;
        let same = FileType::from_raw_mode(stat.st_mode) == node.kind
            && (node.kind == FileType::Fifo || stat.st_rdev == number(node));
        return if same {
            Ok(())
        } else {
            bind_node(root, node, owner)
        };
    };
    match make_in(parent.as_fd(), &name, node, owner) {
        // A file system that takes no device nodes, as virtio-fs.
        Err(Errno::PERM) => bind_node(root, node, owner),
        made => made.during(format_args!("device {path}{}", place.why())),
    }
}

fn number(node: &Node) -> u64 {
    makedev(node.numbers.0, node.numbers.1)
}

fn make_in(
    directory: BorrowedFd<'_>,
    name: &OsStr,
    node: &Node,
    (uid, gid): (u32, u32),
) -> rustix::io::Result<()> {
    let mode = Mode::from_raw_mode(node.mode & 0o7777);
    mknodat(directory, name, node.kind, mode, number(node))?;
    let (uid, gid) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
    chownat(directory, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)
}

/// Shows a node over what is there, or where none can be made. It is the container's own: the guest's has the owner and mode
/// of nobody in particular, and others see it too.
fn bind_node(root: &Root, node: &Node, owner: (u32, u32)) -> Result<()> {
    let path = node.path.as_str();
    let tree = detached_node(node, owner).during(format_args!("a node for device {path}"))?;
    let target = root.open_or_make(path, Missing::File)?;
    attach_on(&tree, target.as_fd()).during(format_args!("device {path}"))
}

/// A detached tmpfs with room for its top and one file.
fn tmpfs_of_one_file() -> io::Result<OwnedFd> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&context, "nr_inodes", "2")?;
    fsconfig_set_string(&context, "mode", "0755")?;
    fsconfig_create(&context)?;
    Ok(fsmount(
        &context,
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC,
    )?)
}

/// A node in a file system that has nothing else and is attached nowhere: its directory, and its name there.
pub fn lone_node(node: &Node, owner: (u32, u32)) -> io::Result<(OwnedFd, &'static OsStr)> {
    let directory = tmpfs_of_one_file()?;
    let name = OsStr::new("node");
    make_in(directory.as_fd(), name, node, owner)?;
    Ok((directory, name))
}

/// Such a node on a detached mount of its own. Before the pivot.
pub fn detached_node(node: &Node, owner: (u32, u32)) -> io::Result<OwnedFd> {
    let (directory, name) = lone_node(node, owner)?;
    // Only what is mounted can be mounted a second time; this mount namespace is the container's, and nobody looks at
    // this directory in the meantime.
    attach_at(&directory, Path::new(GUEST_DEVICES))?;
    let node = openat(
        &directory,
        name,
        OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    );
    let tree = node
        .map_err(io::Error::from)
        .and_then(|node| clone_mount(node.as_fd(), false));
    umount2(GUEST_DEVICES, MntFlags::MNT_DETACH)?;
    tree
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        fs,
        os::unix::fs::{FileTypeExt as _, MetadataExt as _},
    };

    use nix::{
        mount::{MsFlags, mount},
        sched::{CloneFlags, unshare},
    };

    #[test]
    fn a_node_that_is_shown_is_the_containers_own_with_its_owner_and_mode() {
        if !brig_fixtures::needs::root() {
            return;
        }
        let node = Node {
            path: "/mnt/block".to_owned(),
            kind: FileType::BlockDevice,
            numbers: (7, 77),
            mode: 0o640,
            owner: (1000, 5),
        };
        let shown = move || {
            // Of this thread alone.
            unshare(CloneFlags::CLONE_NEWNS).unwrap();
            let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
            mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
            let target = tempfile::NamedTempFile::new().unwrap();
            let tree = detached_node(&node, node.owner).unwrap();
            attach_on(&tree, target.as_file().as_fd()).unwrap();
            let found = fs::metadata(target.path()).unwrap();
            drop(tree);
            umount2(target.path(), MntFlags::empty()).unwrap();
            // The guest's own are where they were.
            assert!(
                fs::metadata("/dev/null")
                    .unwrap()
                    .file_type()
                    .is_char_device()
            );
            found
        };
        let found = std::thread::spawn(shown).join().unwrap();
        assert!(found.file_type().is_block_device());
        assert_eq!(found.rdev(), makedev(7, 77));
        assert_eq!(
            (found.mode() & 0o7777, found.uid(), found.gid()),
            (0o640, 1000, 5)
        );
    }
}
