//! Files of the pod's own, which are read and written by their numbers.

use anyhow::{Result, ensure};

use super::refused;
use crate::attacks::files::{Files, ROOT, op, read_in, words};

/// WRITE of a byte at 0, by a number alone.
fn write_in(handle: u64) -> Vec<u8> {
    let mut body = handle.to_le_bytes().to_vec();
    body.extend(0u64.to_le_bytes());
    body.extend(words(&[1, 0, 0, 0, 2, 0]));
    body.push(b'!');
    body
}

/// SETATTR of a size, by an open file or not.
fn truncate_in(flags: u32) -> Vec<u8> {
    let mut body = words(&[1 << 3 | flags, 0]);
    body.resize(88, 0);
    body
}

/// Links, directories, pipes and what was never found are not opened for anybody.
pub fn no_files(files: &mut Files<'_>) -> Result<()> {
    let mut nodes = vec![ROOT, 0, ROOT + 999, u64::MAX];
    for name in ["dir", "link-to-file", "link-to-root", "link-to-proc"] {
        nodes.push(files.walk(&["vol", name])?);
    }
    for node in nodes {
        refused("READ", &files.call(op::READ, node, &read_in(0, 0, 64))?)?;
        refused("WRITE", &files.call(op::WRITE, node, &write_in(0))?)?;
        for flags in [0, 1 << 6] {
            let answer = files.call(op::SETATTR, node, &truncate_in(flags))?;
            refused("SETATTR", &answer)?;
        }
    }
    // A handle that was never given is none, of a file neither.
    let file = files.walk(&["vol", "file"])?;
    for handle in [1, 77, u64::MAX] {
        let answer = files.call(op::READ, file, &read_in(handle, 0, 64))?;
        refused("a handle", &answer)?;
        let answer = files.call(op::WRITE, file, &write_in(handle))?;
        refused("a handle", &answer)?;
    }
    Ok(())
}

/// A number that was taken back is nobody's, also of a file that is open because it was read.
pub fn gone(files: &mut Files<'_>) -> Result<()> {
    let file = files.walk(&["vol", "file"])?;
    let answer = files.call(op::READ, file, &read_in(0, 0, 64))?;
    ensure!(answer.is_ok(), "READ: {answer:?}");
    files.tell(op::FORGET, file, &u64::MAX.to_le_bytes())?;
    refused("READ", &files.call(op::READ, file, &read_in(0, 0, 64))?)?;
    refused("WRITE", &files.call(op::WRITE, file, &write_in(0))?)
}
