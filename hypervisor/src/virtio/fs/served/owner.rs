//! New files where somebody else than this kernel judges who may make them.
//!
//! The guest's kernel has checked the caller's groups, all of them, and a request names the first alone. For a
//! local file system that is enough: the capability to override modes stays. An NFS server has never heard
//! of that capability, and refuses in a directory that is the pod's by its fsGroup. There the file is made as root
//! and given away, which grants nothing that a guest could not do without it.

use std::io;

use fuse_backend_rs::abi::fuse_abi::{SetattrValid, stat64};
use fuse_backend_rs::api::filesystem::{Context, Entry, FileSystem};
use fuse_backend_rs::passthrough::PassthroughFs;

/// Makes an entry in `parent` as its caller, or as root for its caller. `remove` undoes what cannot be given
/// away.
pub(super) fn make<T>(
    fs: &PassthroughFs,
    ctx: &Context,
    parent: u64,
    make: impl Fn(&Context) -> io::Result<T>,
    entry: impl Fn(&mut T) -> &mut Entry,
    remove: impl Fn(&Context) -> io::Result<()>,
) -> io::Result<T> {
    let refused = match make(ctx) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied && ctx.uid != 0 => error,
        outcome => return outcome,
    };
    let mut root = Context::new();
    root.pid = ctx.pid;
    let Ok(mut made) = make(&root) else {
        return Err(refused);
    };
    let entry = entry(&mut made);
    match given(fs, &root, parent, entry, ctx) {
        Ok(attributes) => {
            entry.attr = attributes;
            Ok(made)
        }
        Err(_) => {
            let inode = entry.inode;
            let _ = remove(&root);
            fs.forget(&root, inode, 1);
            Err(refused)
        }
    }
}

/// Gives an entry to its owner; returns its attributes then. A directory with the set-group-ID bit has chosen
/// the group already.
fn given(
    fs: &PassthroughFs,
    root: &Context,
    parent: u64,
    entry: &Entry,
    owner: &Context,
) -> io::Result<stat64> {
    let (directory, _) = fs.getattr(root, parent, None)?;
    let mut attributes = entry.attr;
    attributes.st_uid = owner.uid;
    let mut valid = SetattrValid::UID;
    if directory.st_mode & libc::S_ISGID == 0 {
        attributes.st_gid = owner.gid;
        valid |= SetattrValid::GID;
    }
    let (attributes, _) = fs.setattr(root, entry.inode, attributes, None, valid)?;
    Ok(attributes)
}
