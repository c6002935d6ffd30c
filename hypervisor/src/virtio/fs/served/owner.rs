//! New files where somebody else than this kernel judges who may make them.
//!
//! The guest's kernel has checked the caller's groups, all of them, and a request names the first alone. For a
//! local file system that is enough: the capability to override modes stays. An NFS server has never heard
//! of that capability, and refuses in a directory that is the pod's by its fsGroup. There the caller asks again
//! as a member of the directory's group, which it may be by the guest's word; the server judges by its own rules.

use std::io;

use fuse_backend_rs::api::filesystem::Context;

use super::tree::Tree;

/// Makes an entry in `parent` as its caller, or as its caller in the group of `parent`.
pub(super) fn make<T>(
    tree: &Tree,
    ctx: &Context,
    parent: u64,
    make: impl Fn(&Context) -> io::Result<T>,
) -> io::Result<T> {
    let refused = match make(ctx) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => error,
        outcome => return outcome,
    };
    let (directory, _) = tree.getattr(parent)?;
    let by_group = directory.st_mode & libc::S_IWGRP != 0 && directory.st_gid != ctx.gid;
    // Root's group is no fsGroup.
    if ctx.uid == 0 || !by_group || directory.st_gid == 0 {
        return Err(refused);
    }
    let mut member = Context::new();
    (member.uid, member.gid, member.pid) = (ctx.uid, directory.st_gid, ctx.pid);
    make(&member)
}
