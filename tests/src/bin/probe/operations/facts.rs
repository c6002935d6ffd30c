//! What holds for files in a directory of any file system that has ACLs.

use std::fs;

use anyhow::{Context, Result};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, XattrFlags};
use serde_json::{Value, json};

use super::world::{as_user, list};
use super::{Outcome, done, name};

const ACCESS: &str = "system.posix_acl_access";
const DEFAULT: &str = "system.posix_acl_default";

/// rw for the owner and user 1000, nothing for the group and others (linux/posix_acl_xattr.h).
fn acl() -> Vec<u8> {
    const UNNAMED: u32 = u32::MAX;
    let mut value = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in [
        (1u16, 6u16, UNNAMED),
        (2, 6, 1000),
        (4, 0, UNNAMED),
        (16, 6, UNNAMED),
        (32, 0, UNNAMED),
    ] {
        value.extend(tag.to_le_bytes());
        value.extend(permissions.to_le_bytes());
        value.extend(id.to_le_bytes());
    }
    value
}

fn said(outcome: Outcome) -> String {
    outcome.unwrap_or_else(name)
}

/// The facts of a directory, in a new one below it.
pub fn all(directory: &str) -> Result<Value> {
    let top = format!("{directory}/facts");
    fs::create_dir(&top).with_context(|| format!("cannot make {top}"))?;
    std::env::set_current_dir(&top)?;
    rustix::fs::chmod(".", Mode::from_raw_mode(0o755))?;
    let mode = Mode::from_raw_mode(0o640);
    fs::create_dir("empty")?;
    let unnamed = rustix::fs::open(".", OFlags::TMPFILE | OFlags::RDWR, mode).and_then(|file| {
        let own = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
        rustix::fs::linkat(CWD, own, CWD, "named", AtFlags::SYMLINK_FOLLOW)
    });
    let here = rustix::fs::open(".", OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty())?;
    let born = rustix::fs::statx(
        &here,
        "",
        AtFlags::EMPTY_PATH,
        rustix::fs::StatxFlags::BTIME,
    )?;
    let known = born.stx_mask & rustix::fs::StatxFlags::BTIME.bits() != 0;
    Ok(json!({
        "acl": acls()?,
        "empty directory": said(list("empty")),
        "unnamed file, linked": said(done(unnamed)),
        "syncfs": said(done(rustix::fs::syncfs(&here))),
        "time of birth": if known { "known" } else { "unknown" },
        "immutable": said(immutable()),
    }))
}

/// A container without CAP_LINUX_IMMUTABLE may not.
fn immutable() -> Outcome {
    let file = rustix::fs::open("named", OFlags::RDONLY, Mode::empty())?;
    let flags = rustix::fs::ioctl_getflags(&file)?;
    done(rustix::fs::ioctl_setflags(
        &file,
        flags | rustix::fs::IFlags::IMMUTABLE,
    ))
}

fn acls() -> Result<Value> {
    fs::write("shared", "x")?;
    rustix::fs::chown("shared", None, Some(rustix::fs::Gid::from_raw(2000)))?;
    rustix::fs::setxattr("shared", ACCESS, &acl(), XattrFlags::empty())
        .context("cannot set an ACL")?;
    fs::create_dir("handed-on")?;
    rustix::fs::chmod("handed-on", Mode::from_raw_mode(0o755))?;
    rustix::fs::setxattr("handed-on", DEFAULT, &acl(), XattrFlags::empty())
        .context("cannot set a default ACL")?;
    rustix::process::umask(Mode::from_raw_mode(0o077));
    let flags = OFlags::CREATE | OFlags::WRONLY;
    let new = rustix::fs::open("handed-on/new", flags, Mode::from_raw_mode(0o666))?;
    rustix::process::umask(Mode::from_raw_mode(0o022));
    let inherited = rustix::fs::fstat(&new)?.st_mode & 0o7777;
    let reads = |uid, gid, path: &str| {
        said(as_user(uid, gid, || {
            done(rustix::fs::open(path, OFlags::RDWR, Mode::empty()))
        }))
    };
    Ok(json!({
        "named user": reads(1000, 1000, "shared"),
        "owning group": reads(1001, 2000, "shared"),
        "somebody": reads(1001, 1001, "shared"),
        "inherited mode": format!("{inherited:o}"),
        "inherits for the named user": reads(1000, 1000, "handed-on/new"),
    }))
}
