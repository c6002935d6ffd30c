//! Names, links and directories that lead out of the share, or nowhere.

use anyhow::{Context, Result, ensure};

use super::refused;
use crate::attacks::files::{Files, ROOT, name, op, read_in};

pub fn names(files: &mut Files<'_>) -> Result<()> {
    let volume = files.walk(&["vol"])?;
    for parent in [ROOT, volume] {
        for bad in [
            "..",
            ".",
            "",
            "a/b",
            "../outside",
            "/",
            "/etc/passwd",
            "vol/canary",
            "../../proc/self",
        ] {
            let answer = files.call(op::LOOKUP, parent, &name(bad))?;
            refused(bad, &answer)?;
        }
        let long = files.call(op::LOOKUP, parent, &name(&"n".repeat(3000)))?;
        refused("a name of 3000 bytes", &long)?;
        // Without its zero, and with more behind it.
        let _ = files.call(op::LOOKUP, parent, b"..")?;
        let _ = files.call(op::LOOKUP, parent, b"..\0..\0..")?;
        let _ = files.call(op::LOOKUP, parent, b"")?;
    }
    Ok(())
}

pub fn through_links(files: &mut Files<'_>) -> Result<()> {
    for link in ["link-to-dir", "link-to-root", "link-to-proc"] {
        let node = files.walk(&["vol", link])?;
        for below in ["secret", "etc", "self", "outside"] {
            let answer = files.call(op::LOOKUP, node, &name(below))?;
            refused(&format!("{below} through {link}"), &answer)?;
        }
        let answer = files.opened(op::OPENDIR, node, 0)?;
        ensure!(answer.is_err(), "{link} is opened as a directory");
    }
    Ok(())
}

pub fn links_as_files(files: &mut Files<'_>) -> Result<()> {
    let node = files.walk(&["vol", "link-to-file"])?;
    for flags in [
        libc::O_RDONLY,
        libc::O_RDWR,
        libc::O_PATH,
        libc::O_RDONLY | libc::O_NOFOLLOW,
        libc::O_PATH | libc::O_NOFOLLOW,
    ] {
        if let Ok(handle) = files.opened(op::OPEN, node, flags)? {
            // `call` says when the answer holds what lies beside the share.
            let _ = files.call(op::READ, node, &read_in(handle, 0, 64))?;
        }
    }
    let target = files.call(op::READLINK, node, &[])?;
    ensure!(target.is_ok(), "READLINK: {target:?}");
    let file = files.walk(&["vol", "canary"])?;
    refused("READLINK of a file", &files.call(op::READLINK, file, &[])?)
}

pub fn foreign_nodes(files: &mut Files<'_>) -> Result<()> {
    let known = files.walk(&["vol"])?;
    for node in [
        0,
        2,
        3,
        77,
        1 << 40,
        1 << 47,
        1 << 63,
        u64::MAX,
        known ^ (1 << 41),
        known + 9999,
    ] {
        for (opcode, body) in [
            (op::GETATTR, vec![0; 16]),
            (op::LOOKUP, name("canary")),
            (op::OPEN, vec![0; 8]),
            (op::OPENDIR, vec![0; 8]),
            (op::READLINK, Vec::new()),
        ] {
            let answer = files.call(opcode, node, &body)?;
            refused(&format!("request {opcode} of node {node:#x}"), &answer)?;
        }
    }
    Ok(())
}

pub fn directories(files: &mut Files<'_>) -> Result<()> {
    let directory = files.walk(&["vol"])?;
    let handle = files.opened(op::OPENDIR, directory, 0)?;
    let handle = handle.ok().context("OPENDIR")?;
    for opcode in [op::READDIR, op::READDIRPLUS] {
        for size in [0u32, 1, 23, 24, 151, 152, 4080, 4096, 1 << 20, u32::MAX] {
            for offset in [0, 1, 2, 1 << 31, i64::MAX.cast_unsigned(), u64::MAX] {
                let _ = files.call(opcode, directory, &read_in(handle, offset, size))?;
            }
        }
    }
    Ok(())
}
