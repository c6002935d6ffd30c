//! Against the file server past its first check: a valid INIT, then everything that a session can ask for.

mod changes;
mod handles;
mod own;
mod paths;
mod races;

use anyhow::{Result, bail, ensure};

use super::files::{Answer, Files, ROOT, name, op, words};
use super::{FS, Guest};
use crate::virtio::{NEXT, WRITE};

/// One attack on a session that has begun.
type Session = fn(&mut Files<'_>) -> Result<()>;

/// All of them, by what they do.
const SESSIONS: &[(&str, Session)] = &[
    ("a second INIT, other versions", versions),
    ("names that are no names", paths::names),
    ("lookups through links that lead out", paths::through_links),
    ("links opened and read as files", paths::links_as_files),
    ("handles that were never given", handles::foreign_handles),
    (
        "handles after their release, and of other files",
        handles::stale_handles,
    ),
    ("nodes that were never given", paths::foreign_nodes),
    ("FORGET of more than is known", handles::forgets),
    (
        "directories read at any offset and size",
        paths::directories,
    ),
    ("extended attributes of every kind", changes::attributes),
    ("files without a name", changes::unnamed),
    ("copies between any two files", changes::copies),
    (
        "renames onto each other, below themselves and with every flag",
        changes::renames,
    ),
    ("hard links to anything", changes::links),
    ("devices, sockets and pipes", changes::special_files),
    (
        "modes, owners, sizes and times of any value",
        changes::set_attributes,
    ),
    ("writes and reads at the end of the world", changes::offsets),
    ("creating with every flag", changes::creates),
    ("removing what is not to be removed", changes::removals),
    ("opcodes that nobody serves", opcodes),
    (
        "interrupts, and requests after DESTROY",
        handles::after_the_end,
    ),
    ("requests in single bytes and answers without room", shapes),
    (
        "a directory and a link that change places",
        races::exchanged,
    ),
    ("a directory that the host turns into a link", races::raced),
    (
        "descriptors rewritten between parse and use",
        races::rewritten,
    ),
    ("more inodes than there are descriptors", handles::budget),
];

/// Those with what is the pod's own, where files have no handles.
const OWN_SESSIONS: &[(&str, Session)] = &[
    ("a second INIT, other versions, of the pod's own", versions),
    ("names that are no names, of the pod's own", paths::names),
    (
        "lookups through links that lead out, of the pod's own",
        paths::through_links,
    ),
    ("what is no file, by its number", own::no_files),
    ("numbers after FORGET, and of removed files", own::gone),
    ("opcodes that nobody serves, of the pod's own", opcodes),
    (
        "requests in single bytes and answers without room, of the pod's own",
        shapes,
    ),
];

pub fn sessions(guest: &Guest) -> Result<()> {
    let [shared, own] = guest.all_of_kind(FS)[..] else {
        bail!("there are not two file servers");
    };
    let of = |function, sessions: &'static [(&'static str, Session)]| {
        sessions.iter().map(move |session| (function, session))
    };
    let mut failed = Vec::new();
    for (function, (what, session)) in of(shared, SESSIONS).chain(of(own, OWN_SESSIONS)) {
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
