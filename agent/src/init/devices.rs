//! Device nodes and the usual links of /dev.
use std::{
    fs::File,
    os::fd::{AsFd as _, OwnedFd},
};

use rustix::{
    fs::{AtFlags, FileType, Gid, Mode, Uid, chownat, fstat, fstatfs, makedev, mknodat, symlinkat},
    io::Errno,
};

use super::{
    agent::Agent,
    failure::{Context as _, Failure, Result},
    guest_devices,
    idmap::Ids,
    place::Last,
    root::{Missing, Root},
};
use crate::{
    detached::{attach_on, clone_mount},
    given,
    spec::Linux,
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

/// statfs(2) f_type of tmpfs.
const TMPFS_MAGIC: i64 = 0x0102_1994;

const LINKS: [(&str, &str); 6] = [
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
    ("/dev/core", "/proc/kcore"),
    ("/dev/ptmx", "pts/ptmx"),
];

/// The guest's own /dev/null, for masks: the container's could be anything (CVE-2025-31133).
pub fn open_null() -> Result<OwnedFd> {
    let null = File::options()
        .read(true)
        .custom_flags_path()
        .open("/dev/null")
        .during("/dev/null")?;
    let stat = fstat(&null).during("/dev/null")?;
    if stat.st_rdev != makedev(1, 3) {
        return Err(Failure(
            "the guest's /dev/null is not the null device".into(),
        ));
    }
    Ok(null.into())
}

/// O_PATH through std's options.
trait PathOnly {
    fn custom_flags_path(&mut self) -> &mut Self;
}

impl PathOnly for std::fs::OpenOptions {
    fn custom_flags_path(&mut self) -> &mut Self {
        use std::os::unix::fs::OpenOptionsExt as _;
        self.custom_flags(libc::O_PATH)
    }
}

/// Makes the default devices, those of the specification that the guest has, those that were given, and the links.
pub fn make(
    agent: &Agent,
    root: &Root,
    (linux, given): (&Linux, &[given::Node]),
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
            let kind = FileType::CharacterDevice;
            node(root, (path, path), kind, (major, minor), 0o666, ids.root()?)?;
        }
    }
    let mut nodes: Vec<_> = chosen.into_iter().map(|own| (own, None)).collect();
    for given in given {
        let own = guest_devices::parse(&given.device)?;
        nodes.retain(|(other, _)| other.path != own.path);
        nodes.push((own, Some(given.source.as_str())));
    }
    for (own, source) in nodes {
        let owner = (ids.uid(own.owner.0)?, ids.gid(own.owner.1)?);
        let path = (own.path.as_str(), source.unwrap_or(&own.path));
        node(root, path, own.kind, own.numbers, own.mode, owner)?;
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

/// Makes a node, or shows `source`, the guest's own.
fn node(
    root: &Root,
    (path, source): (&str, &str),
    kind: FileType,
    (major, minor): (u32, u32),
    mode: u32,
    owner: (u32, u32),
) -> Result<()> {
    let place = root.place(path, Last::Followed)?;
    let Some((parent, name)) = root.parent_of(path, &place)? else {
        let stat = fstat(&place.found).during(format_args!("device {path}"))?;
        let same = FileType::from_raw_mode(stat.st_mode) == kind
            && (kind == FileType::Fifo || stat.st_rdev == makedev(major, minor));
        return if same {
            Ok(())
        } else {
            bind_node(root, path, source)
        };
    };
    let mode = Mode::from_raw_mode(mode & 0o7777);
    match mknodat(&parent, &name, kind, mode, makedev(major, minor)) {
        Ok(()) => {}
        // A file system that takes no device nodes: the guest's own node is shown there instead.
        Err(Errno::PERM) => return bind_node(root, path, source),
        Err(error) => return Err(error).during(format_args!("device {path}{}", place.why())),
    }
    let owner = (Some(Uid::from_raw(owner.0)), Some(Gid::from_raw(owner.1)));
    chownat(&parent, &name, owner.0, owner.1, AtFlags::SYMLINK_NOFOLLOW)
        .during(format_args!("device {path}"))
}

fn bind_node(root: &Root, path: &str, source: &str) -> Result<()> {
    let own = File::options()
        .read(true)
        .custom_flags_path()
        .open(source)
        .during(format_args!("the guest's {source}"))?;
    let tree = clone_mount(own.as_fd(), false).during(format_args!("the guest's {source}"))?;
    let target = root.open_or_make(path, Missing::File)?;
    attach_on(&tree, target.as_fd()).during(format_args!("device {path}"))
}
