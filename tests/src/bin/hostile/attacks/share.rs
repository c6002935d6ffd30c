//! Against the file server past its first check: a valid INIT, then everything that a session can ask for.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::files::{Answer, Files, ROOT, name, op, read_in, u32_at, u64_at, words};
use super::{FS, Guest};
use crate::virtio::{NEXT, WRITE};

/// One attack on a session that has begun.
type Session = fn(&mut Files<'_>) -> Result<()>;

/// All of them, by what they do.
const SESSIONS: &[(&str, Session)] = &[
    ("a second INIT, other versions", versions),
    ("names that are no names", names),
    ("lookups through links that lead out", through_links),
    ("links opened and read as files", links_as_files),
    ("handles that were never given", foreign_handles),
    (
        "handles after their release, and of other files",
        stale_handles,
    ),
    ("nodes that were never given", foreign_nodes),
    ("FORGET of more than is known", forgets),
    ("directories read at any offset and size", directories),
    ("extended attributes of every kind", attributes),
    ("files without a name", unnamed),
    ("copies between any two files", copies),
    (
        "renames onto each other, below themselves and with every flag",
        renames,
    ),
    ("hard links to anything", links),
    ("devices, sockets and pipes", special_files),
    (
        "modes, owners, sizes and times of any value",
        set_attributes,
    ),
    ("writes and reads at the end of the world", offsets),
    ("creating with every flag", creates),
    ("removing what is not to be removed", removals),
    ("opcodes that nobody serves", opcodes),
    ("interrupts, and requests after DESTROY", after_the_end),
    ("requests in single bytes and answers without room", shapes),
    ("a directory and a link that change places", exchanged),
    ("a directory that the host turns into a link", raced),
    ("descriptors rewritten between parse and use", rewritten),
    ("more inodes than there are descriptors", budget),
];

pub fn sessions(guest: &Guest) -> Result<()> {
    let function = guest.of_kind(FS)?;
    let mut failed = Vec::new();
    for (what, session) in SESSIONS {
        crate::port::say(&format!("hostile: try {what}"));
        let outcome = Files::open(function).and_then(|mut files| session(&mut files));
        // Also when it failed, so that the next one begins with a device that is well.
        let after = guest.done(function);
        if let Err(error) = outcome.and(after) {
            failed.push(format!("{what}: {error:#}"));
        }
    }
    ensure!(failed.is_empty(), "{}", failed.join("; "));
    Ok(())
}

/// Requests of a session that never began.
pub fn before_init(guest: &Guest) -> Result<()> {
    let function = guest.of_kind(FS)?;
    for opcode in [
        op::LOOKUP,
        op::GETATTR,
        op::OPENDIR,
        op::CREATE,
        op::DESTROY,
    ] {
        let mut files = Files::bare(function)?;
        files.offer(opcode, ROOT, &name("vol"))?;
        guest.done(function)?;
    }
    Ok(())
}

fn refused(what: &str, answer: &Answer) -> Result<()> {
    ensure!(answer.is_err(), "{what} is granted");
    Ok(())
}

fn versions(files: &mut Files<'_>) -> Result<()> {
    for version in [
        [7u32, 0],
        [6, 99],
        [8, 0],
        [0, 0],
        [u32::MAX, u32::MAX],
        [7, 31],
    ] {
        let body = words(&[version[0], version[1], u32::MAX, u32::MAX]);
        files.offer(op::INIT, 0, &body)?;
    }
    Ok(())
}

fn names(files: &mut Files<'_>) -> Result<()> {
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

fn through_links(files: &mut Files<'_>) -> Result<()> {
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

fn links_as_files(files: &mut Files<'_>) -> Result<()> {
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

fn foreign_handles(files: &mut Files<'_>) -> Result<()> {
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

fn stale_handles(files: &mut Files<'_>) -> Result<()> {
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

fn foreign_nodes(files: &mut Files<'_>) -> Result<()> {
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

fn forgets(files: &mut Files<'_>) -> Result<()> {
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

fn directories(files: &mut Files<'_>) -> Result<()> {
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

fn attributes(files: &mut Files<'_>) -> Result<()> {
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

fn unnamed(files: &mut Files<'_>) -> Result<()> {
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

fn copies(files: &mut Files<'_>) -> Result<()> {
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

fn renames(files: &mut Files<'_>) -> Result<()> {
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

fn links(files: &mut Files<'_>) -> Result<()> {
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

fn special_files(files: &mut Files<'_>) -> Result<()> {
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

fn set_attributes(files: &mut Files<'_>) -> Result<()> {
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

fn offsets(files: &mut Files<'_>) -> Result<()> {
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

fn creates(files: &mut Files<'_>) -> Result<()> {
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

fn removals(files: &mut Files<'_>) -> Result<()> {
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

fn opcodes(files: &mut Files<'_>) -> Result<()> {
    let file = files.walk(&["vol", "file"])?;
    for opcode in (31..34)
        .chain([37, 39, 40, 41, 46, 48, 49, 50, 52])
        .chain(53..80)
        .chain([4096, u32::MAX])
    {
        for fill in [0u8, 0xff] {
            let message = files.message(opcode, file, &[fill; 64]);
            files.raw(&message, 4096)?;
        }
    }
    Ok(())
}

fn after_the_end(files: &mut Files<'_>) -> Result<()> {
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

fn shapes(files: &mut Files<'_>) -> Result<()> {
    for room in [0u32, 1, 15, 16, 17, 40] {
        let message = files.message(op::LOOKUP, ROOT, &name("vol"));
        files.raw(&message, room)?;
    }
    // The header in single bytes, then nothing of the rest.
    let message = files.message(op::LOOKUP, ROOT, &name("vol"));
    files.request.write(0, &message);
    for part in 0..14u16 {
        let at = files.request.address + u64::from(part);
        files.requests.descriptor(part, at, 1, NEXT, part + 1);
    }
    files
        .requests
        .descriptor(14, files.reply.address, 4096, WRITE, 0);
    files.requests.offer(0);
    files.function.kick(1);
    ensure!(
        files.settled(super::health::PATIENCE),
        "no end of a cut request"
    );
    Ok(())
}

fn exchange(files: &mut Files<'_>, parent: u64, one: &str, other: &str) -> Result<Answer> {
    let mut body = parent.to_le_bytes().to_vec();
    body.extend(words(&[2, 0]));
    body.extend(name(one));
    body.extend(name(other));
    files.call(op::RENAME2, parent, &body)
}

fn exchanged(files: &mut Files<'_>) -> Result<()> {
    let volume = files.walk(&["vol"])?;
    for _ in 0..6 {
        let directory = files.lookup(volume, "dir")?.ok().context("dir")?;
        let swapped = exchange(files, volume, "dir", "link-to-dir")?;
        ensure!(swapped.is_ok(), "RENAME_EXCHANGE: {swapped:?}");
        // The node is the directory still; its name leads elsewhere.
        let inner = files.lookup(directory, "inner")?;
        ensure!(inner.is_ok(), "the directory is lost: {inner:?}");
        refused(
            "secret",
            &files.call(op::LOOKUP, directory, &name("secret"))?,
        )?;
        let link = files.lookup(volume, "dir")?.ok().context("link")?;
        refused("secret", &files.call(op::LOOKUP, link, &name("secret"))?)?;
        let back = exchange(files, volume, "dir", "link-to-dir")?;
        ensure!(back.is_ok(), "RENAME_EXCHANGE: {back:?}");
    }
    Ok(())
}

/// The judge swaps `swap` all the time.
fn raced(files: &mut Files<'_>) -> Result<()> {
    let volume = files.walk(&["vol"])?;
    for _ in 0..150 {
        let Ok(node) = files.lookup(volume, "swap")? else {
            continue;
        };
        if let Ok(secret) = files.lookup(node, "secret")?
            && let Ok(handle) = files.opened(op::OPEN, secret, libc::O_RDONLY)?
        {
            // The directory has a file of this name too; `call` knows them apart.
            let _ = files.call(op::READ, secret, &read_in(handle, 0, 64))?;
        }
        files.tell(op::FORGET, node, &1u64.to_le_bytes())?;
    }
    Ok(())
}

/// Another CPU changes the request, its descriptors and their order while the server reads them.
fn rewritten(files: &mut Files<'_>) -> Result<()> {
    let good = files.message(op::LOOKUP, ROOT, &name("vol"));
    let climbing = files.message(op::LOOKUP, ROOT, &name("../outside"));
    let stop = AtomicBool::new(false);
    let mut lost = 0;
    {
        let (page, reply, ring) = (&files.request, &files.reply, &files.requests);
        let length = u32::try_from(good.len())?;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut turn = 0u32;
                while !stop.load(Ordering::Relaxed) {
                    turn = turn.wrapping_add(1);
                    match turn % 6 {
                        0 => page.write(0, &climbing),
                        1 => page.write(0, &u32::MAX.to_le_bytes()),
                        2 => ring.descriptor(0, page.address, u32::MAX, NEXT, 1),
                        3 => ring.descriptor(1, 0xfee0_0000, 4096, WRITE, 0),
                        4 => ring.descriptor(0, page.address, length, NEXT, 0),
                        _ => ring.descriptor(1, reply.address, 0, WRITE | NEXT, 1),
                    }
                }
            });
            for _ in 0..200 {
                page.write(0, &good);
                ring.descriptor(0, page.address, length, NEXT, 1);
                ring.descriptor(1, reply.address, 4096, WRITE, 0);
                ring.offer(0);
                files.function.kick(1);
                // A broken chain ends the device until its reset: the answer never comes.
                if !ring.wait_used(ring.position(), Duration::from_millis(40)) {
                    lost += 1;
                    if files.function.start_again(&[&files.hiprio, ring]).is_err() {
                        break;
                    }
                }
            }
            stop.store(true, Ordering::Relaxed);
        });
    }
    files.answer()?;
    ensure!(lost < 200, "no request was ever answered");
    Ok(())
}

/// The judge has made more files than the VMM may have descriptors.
fn budget(files: &mut Files<'_>) -> Result<()> {
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
