//! The null device of one container: what stands behind its masks and, where the host gives no stream, at its standard
//! descriptors.
//!
//! The guest's own is one file for everybody: who has it open, or mounted somewhere, may change its owner and mode for the
//! agent and for every other container. The container's `/dev/null` is an image's or a volume's in the worst case, so it is
//! taken only where it is the null device (CVE-2025-31133) and not the guest's.
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use rustix::fs::{FileType, Mode, OFlags, Stat, fstat, fstatfs, makedev, openat};

use super::{
    devices::{self, TMPFS_MAGIC},
    failure::{Context as _, Result},
    guest_devices::Node,
    idmap::Ids,
    root::Root,
};
use crate::detached::clone_mount;

const NULL: &str = "/dev/null";

fn is_null(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice
        && stat.st_rdev == makedev(1, 3)
}

fn is_same(one: &Stat, other: &Stat) -> bool {
    (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)
}

/// The container's own, if it has one where it usually is: in a tmpfs, and not in what the node or another container may
/// share with it.
fn of_container(root: &Root, flags: OFlags, guests: &Stat) -> Option<OwnedFd> {
    let own = root.open(NULL, flags | OFlags::NOFOLLOW).ok()?;
    let stat = fstat(&own).ok()?;
    let in_tmpfs = fstatfs(&own).ok()?.f_type == TMPFS_MAGIC;
    (in_tmpfs && is_null(&stat) && !is_same(&stat, guests)).then_some(own)
}

fn node(ids: &Ids) -> Result<(Node, (u32, u32))> {
    let node = Node {
        path: NULL.to_owned(),
        kind: FileType::CharacterDevice,
        numbers: (1, 3),
        mode: 0o666,
        owner: (0, 0),
    };
    Ok((node, ids.root()?))
}

/// A mount of it, attached nowhere. Before the pivot, while the guest's is in sight.
pub fn mount(root: &Root, ids: &Ids) -> Result<OwnedFd> {
    let guests = rustix::fs::stat(NULL).during("the guest's /dev/null")?;
    if let Some(own) = of_container(root, OFlags::PATH, &guests) {
        return clone_mount(own.as_fd(), false).during("the container's /dev/null");
    }
    let (node, owner) = node(ids)?;
    devices::detached_node(&node, owner).during("a null device for the container")
}

/// Makes a descriptor one of the three.
type Put = fn(&OwnedFd) -> rustix::io::Result<()>;

/// Puts it in the place of the guest's at descriptors 0, 1 and 2, as runc does. In the container.
pub fn replace_stdio(ids: &Ids) -> Result<()> {
    let mut own: Option<OwnedFd> = None;
    let all: [(BorrowedFd<'static>, Put); 3] = [
        (rustix::stdio::stdin(), |fd| rustix::stdio::dup2_stdin(fd)),
        (rustix::stdio::stdout(), |fd| rustix::stdio::dup2_stdout(fd)),
        (rustix::stdio::stderr(), |fd| rustix::stdio::dup2_stderr(fd)),
    ];
    for (fd, put) in all {
        let stat = fstat(fd).during("stdio")?;
        if !is_null(&stat) {
            continue;
        }
        let null = match own.take() {
            Some(null) => null,
            None => open(&stat, ids)?,
        };
        put(&null).during("stdio")?;
        own = Some(null);
    }
    Ok(())
}

fn open(guests: &Stat, ids: &Ids) -> Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let root = Root::current()?;
    // Looked at before it is opened: what else is there may act on that.
    if of_container(&root, OFlags::PATH, guests).is_some()
        && let Some(own) = of_container(&root, flags, guests)
    {
        return Ok(own);
    }
    let (node, owner) = node(ids)?;
    let (directory, name) = devices::lone_node(&node, owner).during("a null device for stdio")?;
    openat(&directory, name, flags | OFlags::NOFOLLOW, Mode::empty())
        .during("a null device for stdio")
}
