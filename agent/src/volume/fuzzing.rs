//! ConfigMap trees: generations that the host describes, in a volume whose containers change it at will
//! between them. Nothing beside the volume changes, and a volume that is left alone becomes exactly what
//! was described.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "a broken assumption is a finding, and a target says by its name what it feeds"
)]

use std::{
    ffi::OsStr,
    fs,
    os::unix::{
        ffi::OsStrExt as _,
        fs::{MetadataExt as _, symlink},
    },
    path::{Component, Path},
};

use brig_agent_protocol::agent::VolumeEntry;
use rustix::fs::Mode;

use super::{
    entry::{Entry, Kind},
    replica::{Replica, add_missing},
    tree::Tree,
};

const STEPS: usize = 24;
const NAMES: [&str; 12] = [
    "a",
    "b",
    "c",
    "..data",
    "..1",
    "..2",
    "..1/a",
    "..1/b",
    "..2/a",
    "d/a",
    "d",
    "..data_tmp",
];
const TARGETS: [&str; 8] = [
    "..1",
    "..2",
    "..data/a",
    "a",
    "../outside",
    "/",
    ".",
    "../outside/file",
];

/// Entries of a message: what is taken lies below the top.
pub fn entries(messages: Vec<VolumeEntry>) {
    for message in messages {
        if let Ok(entry) = Entry::parse(message) {
            let path = Path::new(OsStr::from_bytes(&entry.path));
            assert!(path.components().all(|c| matches!(c, Component::Normal(_))));
        }
    }
}

/// Bytes that are zero past their end.
struct Input<'d>(&'d [u8]);

impl Input<'_> {
    fn byte(&mut self) -> u8 {
        match self.0.split_first() {
            Some((first, rest)) => {
                self.0 = rest;
                *first
            }
            None => 0,
        }
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[usize::from(self.byte()) % of.len()]
    }
}

pub fn config_map_tree(data: &[u8]) {
    let base = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir());
    let base = base.unwrap();
    let (volume, outside) = (base.path().join("volume"), base.path().join("outside"));
    fs::create_dir(&volume).unwrap();
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("file"), "untouched").unwrap();
    let before = fs::metadata(&outside).unwrap();
    let tree = Tree::new(fs::File::open(&volume).unwrap().into());
    let mut replica = Replica::default();
    let mut input = Input(data);
    for _ in 0..STEPS {
        if input.0.is_empty() {
            break;
        }
        match input.byte() % 4 {
            0 | 1 => {
                let wanted = generation(&mut input);
                let _ = replica.become_exactly(&tree, wanted);
            }
            2 => {
                let wanted = generation(&mut input);
                let _ = add_missing(&tree, &wanted);
            }
            _ => interfere(&volume, &mut input),
        }
        let after = fs::metadata(&outside).unwrap();
        assert_eq!(fs::read(outside.join("file")).unwrap(), b"untouched");
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
        assert_eq!(
            (after.mode(), after.uid(), after.ino()),
            (before.mode(), before.uid(), before.ino())
        );
        assert_eq!(fs::read_dir(base.path()).unwrap().count(), 2);
    }
    // Left alone, two rounds are enough: the first may meet what a container left.
    let wanted = vec![
        entry("", Kind::Directory, "", 1),
        entry("..9", Kind::Directory, "", 900),
        entry("..9/k", Kind::File, "value", 901),
        entry("..data", Kind::Link, "..9", 902),
        entry("k", Kind::Link, "..data/k", 903),
    ];
    let first = replica.become_exactly(&tree, wanted.clone());
    if first.is_ok() {
        replica.become_exactly(&tree, wanted).unwrap();
        assert_eq!(fs::read(volume.join("k")).unwrap(), b"value");
        let link = fs::read_link(volume.join("..data")).unwrap();
        assert_eq!(link, Path::new("..9"));
    }
}

fn entry(path: &str, kind: Kind, content: &str, identity: u64) -> Entry {
    Entry {
        path: path.into(),
        kind,
        mode: Mode::from_raw_mode(if kind == Kind::Directory {
            0o755
        } else {
            0o644
        }),
        uid: rustix::process::getuid().as_raw(),
        gid: rustix::process::getgid().as_raw(),
        content: content.into(),
        identity,
        modified: None,
    }
}

fn generation(input: &mut Input<'_>) -> Vec<Entry> {
    let mut entries = vec![entry("", Kind::Directory, "", 1)];
    for _ in 0..input.byte() % 8 {
        let name = input.pick(&NAMES);
        let identity = u64::from(input.byte());
        entries.push(match input.byte() % 3 {
            0 => entry(name, Kind::Directory, "", identity),
            1 => entry(name, Kind::File, input.pick(&TARGETS), identity),
            _ => entry(name, Kind::Link, input.pick(&TARGETS), identity),
        });
    }
    entries
}

/// What a container with the volume mounted can do. Failing is fine: what is there decides.
fn interfere(volume: &Path, input: &mut Input<'_>) {
    let path = volume.join(input.pick(&NAMES));
    // As a container sees it: its own paths never lead out of the volume, only the links it makes.
    let inside = path
        .parent()
        .and_then(|parent| parent.canonicalize().ok())
        .zip(volume.canonicalize().ok())
        .is_some_and(|(parent, volume)| parent.starts_with(volume));
    if !inside {
        return;
    }
    let _ = match input.byte() % 6 {
        0 => fs::remove_file(&path),
        1 => fs::remove_dir_all(&path),
        2 => fs::create_dir(&path),
        3 => {
            let _ = fs::remove_file(&path);
            symlink(input.pick(&TARGETS), &path)
        }
        4 => {
            let to = volume.join(input.pick(&["a", "b", "c", "..data", "d"]));
            fs::rename(&path, to)
        }
        _ => {
            // Without following a link, as O_NOFOLLOW has it.
            if fs::symlink_metadata(&path).is_ok_and(|found| found.is_symlink()) {
                return;
            }
            fs::write(&path, "x")
        }
    };
}
