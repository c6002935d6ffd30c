//! Everything that changes a file or makes one.

use anyhow::{Context, Result, ensure};

use super::refused;
use crate::attacks::files::{Files, ROOT, name, op, read_in, u32_at, u64_at, words};

pub fn attributes(files: &mut Files<'_>) -> Result<()> {
    let file = files.walk(&["vol", "file"])?;
    for of in [
        "user.a",
        "user.",
        "",
        "trusted.overlay.opaque",
        "trusted.a",
        "security.capability",
        "security.selinux",
        "system.posix_acl_access",
        "system.posix_acl_default",
        "nothing",
    ] {
        for size in [0u32, 8, 100, 65_536, u32::MAX] {
            for flags in [0u32, 1, 2, 3, u32::MAX] {
                let mut body = words(&[size, flags]);
                body.extend(name(of));
                body.extend([0xff; 8]);
                files.offer(op::SETXATTR, file, &body)?;
            }
            let mut body = words(&[size, 0]);
            body.extend(name(of));
            let _ = files.call(op::GETXATTR, file, &body)?;
        }
    }
    for size in [0u32, 1, 4096, u32::MAX] {
        let _ = files.call(op::LISTXATTR, file, &words(&[size, 0]))?;
    }
    // Of a link: that of the link, never of what it leads to.
    let link = files.walk(&["vol", "link-to-file"])?;
    let mut body = words(&[8, 0]);
    body.extend(name("user.a"));
    body.extend([0xff; 8]);
    files.offer(op::SETXATTR, link, &body)?;
    Ok(())
}

pub fn unnamed(files: &mut Files<'_>) -> Result<()> {
    let directory = files.walk(&["vol", "dir"])?;
    for flags in [
        libc::O_TMPFILE | libc::O_RDWR,
        libc::O_TMPFILE | libc::O_WRONLY | libc::O_EXCL,
        libc::O_TMPFILE,
    ] {
        if let Ok(handle) = files.opened(op::OPEN, directory, flags)? {
            let _ = files.call(op::READ, directory, &read_in(handle, 0, 64))?;
        }
        let mut body = words(&[flags.cast_unsigned(), 0o100_644, 0, 0]);
        body.extend(name(""));
        let _ = files.call(op::TMPFILE, directory, &body)?;
        body.extend(name("new"));
        let _ = files.call(op::CREATE, directory, &body)?;
    }
    Ok(())
}

pub fn copies(files: &mut Files<'_>) -> Result<()> {
    let file = files.walk(&["vol", "file"])?;
    let other = files.walk(&["vol", "canary"])?;
    let handle = files
        .opened(op::OPEN, file, libc::O_RDWR)?
        .ok()
        .context("OPEN")?;
    let source = files
        .opened(op::OPEN, other, libc::O_RDONLY)?
        .ok()
        .context("OPEN")?;
    for length in [0, 1, 1 << 62, u64::MAX] {
        for offset in [0, 5, i64::MAX.cast_unsigned(), u64::MAX] {
            for (from, to) in [
                (source, handle),
                (handle, handle),
                (source, u64::MAX),
                (handle, source),
            ] {
                let mut body = Vec::new();
                for long in [from, offset, file, to, offset, length, 0] {
                    body.extend(long.to_le_bytes());
                }
                let _ = files.call(op::COPY_FILE_RANGE, other, &body)?;
            }
        }
    }
    Ok(())
}

pub fn renames(files: &mut Files<'_>) -> Result<()> {
    let volume = files.walk(&["vol"])?;
    let directory = files.walk(&["vol", "dir"])?;
    for (parent, from, target, to) in [
        (volume, "dir", directory, "itself"),
        (volume, "file", volume, ".."),
        (volume, "..", volume, "up"),
        (volume, "link-to-dir", directory, "link"),
        (ROOT, "vol", ROOT, "moved"),
        (ROOT, "vol", volume, "into"),
        (volume, "file", ROOT, "out"),
        (volume, "file", u64::MAX, "out"),
        (volume, "a/b", volume, "c/d"),
    ] {
        for flags in [0u32, 1, 2, 4, 3, 6, u32::MAX] {
            let mut body = target.to_le_bytes().to_vec();
            body.extend(words(&[flags, 0]));
            body.extend(name(from));
            body.extend(name(to));
            let _ = files.call(op::RENAME2, parent, &body)?;
        }
        let mut body = target.to_le_bytes().to_vec();
        body.extend(name(from));
        body.extend(name(to));
        let _ = files.call(op::RENAME, parent, &body)?;
        // Back, if it went.
        let mut body = parent.to_le_bytes().to_vec();
        body.extend(name(to));
        body.extend(name(from));
        let _ = files.call(op::RENAME, target, &body)?;
    }
    Ok(())
}

pub fn links(files: &mut Files<'_>) -> Result<()> {
    let volume = files.walk(&["vol"])?;
    for of in ["file", "dir", "link-to-file"] {
        let node = files.walk(&["vol", of])?;
        for to in ["..", ".", "", "a/b", "hard"] {
            let mut body = node.to_le_bytes().to_vec();
            body.extend(name(to));
            let answer = files.call(op::LINK, volume, &body)?;
            if to != "hard" {
                refused(&format!("a link called {to:?}"), &answer)?;
            } else if answer.is_ok() {
                let _ = files.call(op::UNLINK, volume, &name(to))?;
            }
        }
    }
    let mut body = ROOT.to_le_bytes().to_vec();
    body.extend(name("root"));
    refused("a link to the root", &files.call(op::LINK, volume, &body)?)
}

pub fn special_files(files: &mut Files<'_>) -> Result<()> {
    let volume = files.walk(&["vol"])?;
    // mem, null, a disk, a pipe, a socket, and nothing.
    for (mode, device) in [
        (0o020_666u32, 0x101u32),
        (0o020_666, 0x103),
        (0o060_666, 0xfd00),
        (0o010_666, 0),
        (0o140_666, 0),
        (0o170_666, u32::MAX),
    ] {
        let mut body = words(&[mode, device, 0, 0]);
        body.extend(name("special"));
        if let Ok(entry) = files.call(op::MKNOD, volume, &body)? {
            let node = u64_at(&entry, 0);
            let opened = files.opened(op::OPEN, node, libc::O_RDWR | libc::O_NONBLOCK)?;
            ensure!(
                opened.is_err() || mode & libc::S_IFMT == libc::S_IFIFO,
                "a special file of mode {mode:o} is opened on the host"
            );
        }
        let _ = files.call(op::UNLINK, volume, &name("special"))?;
    }
    for (from, to) in [
        ("/etc/passwd", "sym"),
        ("", "sym"),
        ("../../..", "sym"),
        ("x", ".."),
    ] {
        let mut body = name(to);
        body.extend(name(from));
        let _ = files.call(op::SYMLINK, volume, &body)?;
        let _ = files.call(op::UNLINK, volume, &name("sym"))?;
    }
    Ok(())
}

pub fn set_attributes(files: &mut Files<'_>) -> Result<()> {
    for of in ["file", "link-to-file", "dir"] {
        let node = files.walk(&["vol", of])?;
        for valid in [1u32, 2, 4, 8, 0x30, 0x1b0, 0x7ff, u32::MAX] {
            for value in [0u64, 1 << 40, i64::MAX.cast_unsigned(), u64::MAX] {
                let mut body = words(&[valid, 0]);
                for long in [u64::MAX, value, 0, value, value, value] {
                    body.extend(long.to_le_bytes());
                }
                let word = u32_at(&value.to_le_bytes(), 0);
                body.extend(words(&[word, word, word, 0o7777, 0, word, word, 0]));
                let _ = files.call(op::SETATTR, node, &body)?;
            }
        }
    }
    Ok(())
}

pub fn offsets(files: &mut Files<'_>) -> Result<()> {
    let file = files.walk(&["vol", "file"])?;
    let handle = files
        .opened(op::OPEN, file, libc::O_RDWR)?
        .ok()
        .context("OPEN")?;
    for offset in [1 << 62, i64::MAX.cast_unsigned(), 1 << 63, u64::MAX] {
        for size in [0u32, 16, 4096, 1 << 20, u32::MAX] {
            let _ = files.call(op::READ, file, &read_in(handle, offset, size))?;
            let mut body = handle.to_le_bytes().to_vec();
            body.extend(offset.to_le_bytes());
            body.extend(words(&[size, 0, 0, 0, 0, 0]));
            body.extend([0x77; 16]);
            let _ = files.call(op::WRITE, file, &body)?;
        }
        for mode in [0u32, 1, 2, 3, 8, 16, u32::MAX] {
            let mut body = handle.to_le_bytes().to_vec();
            body.extend(offset.to_le_bytes());
            body.extend(offset.to_le_bytes());
            body.extend(words(&[mode, 0]));
            let _ = files.call(op::FALLOCATE, file, &body)?;
        }
    }
    Ok(())
}

pub fn creates(files: &mut Files<'_>) -> Result<()> {
    let volume = files.walk(&["vol"])?;
    for of in ["..", ".", "", "a/b", "link-to-file", "dir", "fresh"] {
        for bit in 0..32u32 {
            let flags = 1 << bit | libc::O_CREAT.cast_unsigned();
            let mut body = words(&[flags, 0o106_777, 0, 0]);
            body.extend(name(of));
            let answer = files.call(op::CREATE, volume, &body)?;
            if matches!(of, ".." | "." | "" | "a/b") {
                refused(&format!("a file called {of:?}"), &answer)?;
            }
        }
        let mut body = words(&[0o777, 0]);
        body.extend(name(of));
        let _ = files.call(op::MKDIR, volume, &body)?;
    }
    let _ = files.call(op::UNLINK, volume, &name("fresh"))?;
    let _ = files.call(op::RMDIR, volume, &name("fresh"))?;
    Ok(())
}

pub fn removals(files: &mut Files<'_>) -> Result<()> {
    let volume = files.walk(&["vol"])?;
    for (parent, of) in [
        (ROOT, "vol"),
        (ROOT, ".."),
        (ROOT, "."),
        (volume, ".."),
        (volume, "."),
        (volume, "dir/inner"),
        (volume, "link-to-dir/secret"),
    ] {
        for opcode in [op::UNLINK, op::RMDIR] {
            refused(of, &files.call(opcode, parent, &name(of))?)?;
        }
    }
    Ok(())
}
