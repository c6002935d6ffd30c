//! A sequence of file operations drawn from a seed, each with what came of it, one line each: the same seed on
//! the same kind of file system prints the same lines, whatever kernel serves it.
//!
//! What two runs may differ in is left out: inode numbers, times that nobody set, blocks, the order of names.

mod draw;
pub mod facts;
mod world;

use std::path::Path;

use anyhow::{Context, Result};
use rustix::fs::{
    AtFlags, CWD, FallocateFlags, FileType, FlockOperation, Mode, OFlags, RenameFlags, SeekFrom,
    Timespec, Timestamps, XattrFlags,
};
use rustix::io::Errno;

use draw::Draw;
use world::World;

/// Prints `count` operations of `seed` in a directory that it makes.
pub fn run(seed: u64, count: u32, directory: &str) -> Result<u8> {
    std::fs::create_dir(directory).with_context(|| format!("cannot make {directory}"))?;
    std::env::set_current_dir(directory).with_context(|| format!("cannot enter {directory}"))?;
    rustix::process::umask(Mode::from_raw_mode(0o022));
    let (mut draw, mut world) = (Draw::new(seed), World::default());
    for number in 0..count {
        let (what, outcome) = one(&mut draw, &mut world);
        let outcome = outcome.unwrap_or_else(name);
        println!("{number} {what}: {outcome}");
    }
    println!("end: {}", world.tree(Path::new(".")));
    Ok(0)
}

fn name(errno: Errno) -> String {
    format!("{:?}", nix::errno::Errno::from_raw(errno.raw_os_error()))
}

type Outcome = Result<String, Errno>;

fn done<T>(result: rustix::io::Result<T>) -> Outcome {
    result.map(|_| "ok".to_owned())
}

/// The outcome of one operation, and its sentence.
fn one(draw: &mut Draw, world: &mut World) -> (String, Outcome) {
    match draw.below(36) {
        0..=5 => open(draw, world),
        6 => {
            let slot = draw.slot();
            (format!("close {slot}"), done(world.close(slot)))
        }
        7..=9 => write(draw, world),
        10 | 11 => read(draw, world),
        12 => truncate(draw, world),
        13 => allocate(draw, world),
        14 => seek(draw, world),
        15 | 16 => names(draw),
        17 | 18 => moved(draw),
        19 => special(draw),
        20 => mode(draw),
        21 => owner(draw),
        22 => times(draw),
        23 | 24 => {
            let path = draw.path();
            (format!("stat {path}"), world::stat(path))
        }
        25 => {
            let slot = draw.slot();
            (format!("fstat {slot}"), world.fstat(slot))
        }
        26 | 27 => attribute(draw),
        28 | 29 => acl(draw),
        30 => {
            let path = draw.path();
            (format!("list {path}"), world::list(path))
        }
        31 | 32 => as_user(draw),
        33 => lock(draw, world),
        34 => {
            let slot = draw.slot();
            let byte = draw.byte();
            (format!("map {slot} {byte}"), world.map(slot, byte))
        }
        _ => other(draw, world),
    }
}

fn open(draw: &mut Draw, world: &mut World) -> (String, Outcome) {
    let (slot, path, mode) = (draw.slot(), draw.path(), draw.mode());
    let mut flags = *draw.of(&[OFlags::RDONLY, OFlags::WRONLY, OFlags::RDWR, OFlags::RDWR]);
    for (flag, of) in [
        (OFlags::CREATE, 2),
        (OFlags::EXCL, 5),
        (OFlags::TRUNC, 5),
        (OFlags::APPEND, 4),
        (OFlags::NOFOLLOW, 8),
        (OFlags::DIRECTORY, 10),
        (OFlags::SYNC, 10),
    ] {
        if draw.below(of) == 0 {
            flags |= flag;
        }
    }
    if draw.below(8) == 0 {
        flags = OFlags::TMPFILE | OFlags::RDWR | flags & OFlags::EXCL;
    }
    // A pipe of the tree would wait for its other end.
    let opened = rustix::fs::open(path, flags | OFlags::NONBLOCK, Mode::from_raw_mode(mode));
    let outcome = opened.and_then(|file| {
        world.put(slot, file);
        world.fstat(slot)
    });
    (
        format!("open {slot} {path} {:o} {mode:o}", flags.bits()),
        outcome,
    )
}

fn write(draw: &mut Draw, world: &mut World) -> (String, Outcome) {
    let (slot, offset, length, byte) = (draw.slot(), draw.offset(), draw.length(), draw.byte());
    let data = vec![byte; length];
    let at = draw.below(3) > 0;
    let written = world.file(slot).and_then(|file| {
        if at {
            rustix::io::pwrite(file, &data, offset)
        } else {
            rustix::io::write(file, &data)
        }
    });
    let outcome = written.and_then(|written| Ok(format!("{written} {}", world.fstat(slot)?)));
    (format!("write {slot} {at} {offset} {length}"), outcome)
}

fn read(draw: &mut Draw, world: &mut World) -> (String, Outcome) {
    let (slot, offset, length) = (draw.slot(), draw.offset(), draw.length());
    let mut data = vec![0; length];
    let outcome = world
        .file(slot)
        .and_then(|file| rustix::io::pread(file, &mut data[..], offset))
        .map(|read| format!("{read} {:x}", world::sum(&data[..read])));
    (format!("read {slot} {offset} {length}"), outcome)
}

fn truncate(draw: &mut Draw, world: &mut World) -> (String, Outcome) {
    let (slot, size) = (draw.slot(), draw.offset());
    let outcome = world
        .file(slot)
        .and_then(|file| rustix::fs::ftruncate(file, size));
    (format!("truncate {slot} {size}"), done(outcome))
}

fn allocate(draw: &mut Draw, world: &mut World) -> (String, Outcome) {
    let (slot, offset) = (draw.slot(), draw.offset());
    let length = draw.length() as u64;
    // What shifts a file's blocks, the guest's FUSE has no word for: docs/volumes.md.
    let mode = *draw.of(&[
        FallocateFlags::empty(),
        FallocateFlags::KEEP_SIZE,
        FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
        FallocateFlags::ZERO_RANGE,
        FallocateFlags::PUNCH_HOLE,
    ]);
    let outcome = world
        .file(slot)
        .and_then(|file| rustix::fs::fallocate(file, mode, offset, length))
        .and_then(|()| world.fstat(slot));
    (
        format!("fallocate {slot} {:x} {offset} {length}", mode.bits()),
        outcome,
    )
}

fn seek(draw: &mut Draw, world: &mut World) -> (String, Outcome) {
    let (slot, offset) = (draw.slot(), draw.offset());
    let position = *draw.of(&[
        SeekFrom::Start(offset),
        SeekFrom::Data(offset),
        SeekFrom::Hole(offset),
        SeekFrom::End(-1),
        SeekFrom::Current(0),
    ]);
    let outcome = world.file(slot).and_then(|file| {
        // A directory's end is a number of the file system's own: docs/volumes.md.
        let kind = FileType::from_raw_mode(rustix::fs::fstat(file)?.st_mode);
        match kind {
            FileType::Directory => Ok("a directory".to_owned()),
            _ => rustix::fs::seek(file, position).map(|at| at.to_string()),
        }
    });
    (format!("seek {slot} {position:?}"), outcome)
}

fn names(draw: &mut Draw) -> (String, Outcome) {
    let (path, mode) = (draw.path(), draw.mode());
    match draw.below(4) {
        0 | 1 => (
            format!("mkdir {path} {mode:o}"),
            rustix::fs::mkdir(path, Mode::from_raw_mode(mode)).and_then(|()| world::stat(path)),
        ),
        2 => (format!("rmdir {path}"), done(rustix::fs::rmdir(path))),
        _ => (format!("unlink {path}"), done(rustix::fs::unlink(path))),
    }
}

fn moved(draw: &mut Draw) -> (String, Outcome) {
    let (from, to) = (draw.path(), draw.path());
    match draw.below(6) {
        0 | 1 => (
            format!("rename {from} {to}"),
            done(rustix::fs::rename(from, to)),
        ),
        2 => (
            format!("rename-keep {from} {to}"),
            done(rustix::fs::renameat_with(
                CWD,
                from,
                CWD,
                to,
                RenameFlags::NOREPLACE,
            )),
        ),
        3 => (
            format!("exchange {from} {to}"),
            done(rustix::fs::renameat_with(
                CWD,
                from,
                CWD,
                to,
                RenameFlags::EXCHANGE,
            )),
        ),
        _ => (
            format!("link {from} {to}"),
            rustix::fs::link(from, to).and_then(|()| world::stat(to)),
        ),
    }
}

fn special(draw: &mut Draw) -> (String, Outcome) {
    let (path, target, mode) = (draw.path(), draw.path(), draw.mode());
    match draw.below(3) {
        0 => (
            format!("symlink {target} {path}"),
            done(rustix::fs::symlink(target, path)),
        ),
        1 => (
            format!("readlink {path}"),
            rustix::fs::readlink(path, Vec::new()).map(|link| format!("{link:?}")),
        ),
        _ => (
            format!("mkfifo {path} {mode:o}"),
            rustix::fs::mknodat(CWD, path, FileType::Fifo, Mode::from_raw_mode(mode), 0)
                .and_then(|()| world::stat(path)),
        ),
    }
}

fn mode(draw: &mut Draw) -> (String, Outcome) {
    let (path, mode) = (draw.path(), draw.mode());
    let outcome =
        rustix::fs::chmod(path, Mode::from_raw_mode(mode)).and_then(|()| world::stat(path));
    (format!("chmod {path} {mode:o}"), outcome)
}

fn owner(draw: &mut Draw) -> (String, Outcome) {
    let (path, uid, gid) = (draw.path(), draw.id(), draw.id());
    let (owner, group) = (
        Some(rustix::fs::Uid::from_raw(uid)),
        Some(rustix::fs::Gid::from_raw(gid)),
    );
    let flags = AtFlags::SYMLINK_NOFOLLOW;
    let outcome =
        rustix::fs::chownat(CWD, path, owner, group, flags).and_then(|()| world::stat(path));
    (format!("chown {path} {uid} {gid}"), outcome)
}

fn times(draw: &mut Draw) -> (String, Outcome) {
    let (path, seconds) = (draw.path(), i64::from(draw.byte()) * 10_000_000);
    let time = Timespec {
        tv_sec: seconds,
        tv_nsec: 123_456_789,
    };
    let times = Timestamps {
        last_access: time,
        last_modification: time,
    };
    let outcome = rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW)
        .and_then(|()| rustix::fs::lstat(path))
        .map(|stat| format!("{} {}", stat.st_mtime, stat.st_mtime_nsec));
    (format!("utimens {path} {seconds}"), outcome)
}

fn attribute(draw: &mut Draw) -> (String, Outcome) {
    let path = draw.path();
    let name = *draw.of(&[
        "user.a",
        "user.b",
        "trusted.a",
        "security.a",
        "system.a",
        "bad",
    ]);
    let value = vec![draw.byte(); draw.length().min(900)];
    match draw.below(4) {
        0 | 1 => {
            let flags = *draw.of(&[XattrFlags::empty(), XattrFlags::CREATE, XattrFlags::REPLACE]);
            let outcome = rustix::fs::lsetxattr(path, name, &value, flags);
            (
                format!("setxattr {path} {name} {} {flags:?}", value.len()),
                done(outcome),
            )
        }
        2 => (
            format!("removexattr {path} {name}"),
            done(rustix::fs::lremovexattr(path, name)),
        ),
        _ => (format!("xattrs {path}"), world::attributes(path)),
    }
}

fn acl(draw: &mut Draw) -> (String, Outcome) {
    let path = draw.path();
    let name = *draw.of(&["system.posix_acl_access", "system.posix_acl_default"]);
    if draw.below(5) == 0 {
        let outcome = rustix::fs::removexattr(path, name).and_then(|()| world::stat(path));
        return (format!("no-acl {path} {name}"), outcome);
    }
    let (value, text) = draw.acl();
    let outcome = rustix::fs::setxattr(path, name, &value, XattrFlags::empty()).and_then(|()| {
        Ok(format!(
            "{} {}",
            world::stat(path)?,
            world::attributes(path)?
        ))
    });
    (format!("acl {path} {name} {text}"), outcome)
}

fn as_user(draw: &mut Draw) -> (String, Outcome) {
    let (path, uid, gid) = (draw.path(), draw.user(), draw.user());
    let action = *draw.of(&["read", "write", "make", "remove", "chmod"]);
    let outcome = world::as_user(uid, gid, || {
        let mode = Mode::from_raw_mode(0o666);
        match action {
            "read" => done(rustix::fs::open(
                path,
                OFlags::RDONLY | OFlags::NONBLOCK,
                mode,
            )),
            "write" => done(rustix::fs::open(
                path,
                OFlags::WRONLY | OFlags::NONBLOCK,
                mode,
            )),
            "make" => {
                done(rustix::fs::open(
                    path,
                    OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY,
                    mode,
                ))?;
                Ok(format!(
                    "{} {}",
                    world::stat(path)?,
                    world::attributes(path)?
                ))
            }
            "remove" => done(rustix::fs::unlink(path)),
            _ => done(rustix::fs::chmod(path, Mode::from_raw_mode(0o2775)))
                .and_then(|_| world::stat(path)),
        }
    });
    (format!("as {uid}:{gid} {action} {path}"), outcome)
}

fn lock(draw: &mut Draw, world: &mut World) -> (String, Outcome) {
    let slot = draw.slot();
    let operation = *draw.of(&[
        FlockOperation::NonBlockingLockShared,
        FlockOperation::NonBlockingLockExclusive,
        FlockOperation::Unlock,
    ]);
    let outcome = world.file(slot).and_then(|file| {
        if draw.below(2) == 0 {
            rustix::fs::flock(file, operation)
        } else {
            rustix::fs::fcntl_lock(file, operation)
        }
    });
    (format!("lock {slot} {operation:?}"), done(outcome))
}

fn other(draw: &mut Draw, world: &mut World) -> (String, Outcome) {
    let slot = draw.slot();
    match draw.below(4) {
        0 => (
            format!("fsync {slot}"),
            done(world.file(slot).and_then(rustix::fs::fsync)),
        ),
        1 => (
            format!("syncfs {slot}"),
            done(world.file(slot).and_then(rustix::fs::syncfs)),
        ),
        2 => {
            let mask = *draw.of(&[0, 0o022, 0o027, 0o077]);
            rustix::process::umask(Mode::from_raw_mode(mask));
            (format!("umask {mask:o}"), Ok("ok".to_owned()))
        }
        _ => (format!("born {slot}"), world.born(slot)),
    }
}
