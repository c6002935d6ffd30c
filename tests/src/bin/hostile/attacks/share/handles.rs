//! Handles and inodes: never given, given back, counted wrong, and too many.

use anyhow::{Context, Result, ensure};

use super::refused;
use crate::attacks::files::{Files, ROOT, name, op, read_in, u32_at, u64_at, words};

pub fn foreign_handles(files: &mut Files<'_>) -> Result<()> {
    let file = files.walk(&["vol", "canary"])?;
    for handle in (0..48).chain([1 << 32, 1 << 63, u64::MAX]) {
        refused(
            "READ",
            &files.call(op::READ, file, &read_in(handle, 0, 64))?,
        )?;
        refused(
            "READDIR",
            &files.call(op::READDIR, file, &read_in(handle, 0, 64))?,
        )?;
        let mut body = handle.to_le_bytes().to_vec();
        body.extend([0; 16]);
        let _ = files.call(op::RELEASE, file, &body)?;
    }
    Ok(())
}

pub fn stale_handles(files: &mut Files<'_>) -> Result<()> {
    let file = files.walk(&["vol", "canary"])?;
    let directory = files.walk(&["vol", "dir"])?;
    let handle = files.opened(op::OPEN, file, libc::O_RDONLY)?;
    let handle = handle.ok().context("OPEN")?;
    let other = files.opened(op::OPENDIR, directory, 0)?;
    let other = other.ok().context("OPENDIR")?;
    refused(
        "READ of a directory",
        &files.call(op::READ, file, &read_in(other, 0, 64))?,
    )?;
    let _ = files.call(op::READDIR, directory, &read_in(handle, 0, 512))?;
    let mut body = handle.to_le_bytes().to_vec();
    body.extend([0; 16]);
    let released = files.call(op::RELEASE, file, &body)?;
    ensure!(released.is_ok(), "RELEASE: {released:?}");
    refused(
        "READ after RELEASE",
        &files.call(op::READ, file, &read_in(handle, 0, 64))?,
    )?;
    refused("a second RELEASE", &files.call(op::RELEASE, file, &body)?)
}

pub fn forgets(files: &mut Files<'_>) -> Result<()> {
    let file = files.walk(&["vol", "canary"])?;
    for count in [0, 1, 2, u64::MAX] {
        for node in [file, ROOT, 0, u64::MAX] {
            files.tell(op::FORGET, node, &count.to_le_bytes())?;
        }
    }
    let again = files.walk(&["vol", "canary"])?;
    for announced in [0u32, 1, 3, 1000, u32::MAX] {
        let mut body = words(&[announced, 0]);
        for _ in 0..3 {
            body.extend(again.to_le_bytes());
            body.extend(u64::MAX.to_le_bytes());
        }
        files.tell(op::BATCH_FORGET, 0, &body)?;
    }
    // Known no more, or known again: never somebody else's.
    let _ = files.call(op::GETATTR, again, &[0; 16])?;
    Ok(())
}

pub fn after_the_end(files: &mut Files<'_>) -> Result<()> {
    for unique in [0, 1, u64::MAX] {
        files.tell(op::INTERRUPT, 0, &unique.to_le_bytes())?;
    }
    let file = files.walk(&["vol", "canary"])?;
    let handle = files.opened(op::OPEN, file, 0)?.ok().context("OPEN")?;
    files.offer(op::DESTROY, 0, &[])?;
    let message = files.message(op::READ, file, &read_in(handle, 0, 64));
    if let Some(answer) = files.raw(&message, 4096)? {
        refused("READ after DESTROY", &answer)?;
    }
    files.init()
}

/// The judge has made more files than the VMM may have descriptors.
pub fn budget(files: &mut Files<'_>) -> Result<()> {
    const ENFILE: i32 = 23;
    let directory = files.walk(&["vol", "many"])?;
    let handle = files
        .opened(op::OPENDIR, directory, 0)?
        .ok()
        .context("OPENDIR")?;
    let (mut offset, mut known, mut refused) = (0, Vec::new(), false);
    'listing: loop {
        let entries =
            match files.call(op::READDIRPLUS, directory, &read_in(handle, offset, 4080))? {
                Ok(entries) if entries.is_empty() => break,
                Ok(entries) => entries,
                Err(error) => {
                    ensure!(error == ENFILE, "READDIRPLUS: {error}");
                    refused = true;
                    break;
                }
            };
        let mut at = 0;
        while at + 152 <= entries.len() {
            let node = u64_at(&entries, at);
            if node != 0 {
                known.push(node);
            } else if u32_at(&entries, at + 144) > 2 {
                // Listed without a node: there was no descriptor for it.
                refused = true;
                break 'listing;
            }
            offset = u64_at(&entries, at + 136);
            at += (152 + usize::try_from(u32_at(&entries, at + 144))?).next_multiple_of(8);
        }
    }
    if !refused {
        let answer = files.call(op::LOOKUP, directory, &name("f2999"))?;
        refused = answer == Err(ENFILE);
    }
    ensure!(refused, "{} inodes and no end of descriptors", known.len());
    ensure!(known.len() > 200, "only {} inodes", known.len());
    // Letting go of them is all it takes.
    for node in known {
        files.tell(op::FORGET, node, &1u64.to_le_bytes())?;
    }
    files.canary()
}
