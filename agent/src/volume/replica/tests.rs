use super::*;
use proptest::prelude::*;
use rustix::fs::Mode;
use std::{
    ffi::OsStr,
    fs,
    os::unix::{
        ffi::OsStrExt as _,
        fs::{MetadataExt as _, PermissionsExt as _, symlink},
    },
    path::Path,
};

fn entry(path: &str, kind: Kind, content: &str, identity: u64) -> Entry {
    Entry {
        path: path.into(),
        kind,
        mode: Mode::from_raw_mode(if kind == Kind::Directory {
            0o755
        } else {
            0o644
        }),
        uid: 0,
        gid: 0,
        content: content.into(),
        identity,
        modified: None,
    }
}

/// The same with times of their own.
fn dated(mut entries: Vec<Entry>) -> Vec<Entry> {
    for (n, entry) in (1..).zip(&mut entries) {
        entry.modified = Some(rustix::fs::Timespec {
            tv_sec: n * 1000,
            tv_nsec: n,
        });
    }
    entries
}

fn assert_dated(dir: &Path, entries: &[Entry]) {
    for entry in entries {
        let path = Path::new(OsStr::from_bytes(&entry.path));
        let stat = fs::symlink_metadata(dir.join(path)).unwrap();
        let wanted = entry.modified.unwrap();
        let seen = (stat.mtime(), stat.mtime_nsec());
        assert_eq!(seen, (wanted.tv_sec, wanted.tv_nsec), "{path:?}");
    }
}

#[test]
fn times_are_as_told_and_what_stays_is_left_alone() {
    use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
    let (dir, tree) = volume();
    let mut replica = Replica::default();
    let first = dated(generation(1, &["a", "b"]));
    replica.become_exactly(&tree, first.clone()).unwrap();
    assert_dated(dir.path(), &first);
    let inotify = Inotify::init(InitFlags::IN_NONBLOCK).unwrap();
    for path in ["", "..2026_1", "..2026_1/a"] {
        let mask = AddWatchFlags::IN_ATTRIB | AddWatchFlags::IN_MODIFY;
        inotify.add_watch(&dir.path().join(path), mask).unwrap();
    }
    replica.become_exactly(&tree, first.clone()).unwrap();
    assert_eq!(
        inotify.read_events().unwrap_err(),
        nix::errno::Errno::EAGAIN
    );
    let second = dated(generation(2, &["a", "b"]));
    replica.become_exactly(&tree, second.clone()).unwrap();
    // The top stays, so its time is that of the change.
    assert_dated(dir.path(), &second[1..]);
    let touched = dated(second.into_iter().rev().collect());
    replica.become_exactly(&tree, touched.clone()).unwrap();
    let files: Vec<_> = touched
        .into_iter()
        .filter(|entry| entry.kind != Kind::Directory)
        .collect();
    assert_dated(dir.path(), &files);
}

#[test]
fn what_is_added_has_its_time_and_what_is_there_keeps_its_own() {
    let (dir, tree) = volume();
    let entries = dated(vec![
        entry("", Kind::Directory, "", 1),
        entry("d", Kind::Directory, "", 2),
        entry("d/f", Kind::File, "x", 3),
    ]);
    add_missing(&tree, &entries).unwrap();
    assert_dated(dir.path(), &entries);
    let later = dated(vec![
        entry("d/f", Kind::File, "y", 3),
        entry("d", Kind::Directory, "", 2),
    ]);
    add_missing(&tree, &later).unwrap();
    assert_dated(dir.path(), &entries);
}

/// What kubelet's writer makes: one generation with these keys.
fn generation(number: u64, keys: &[&str]) -> Vec<Entry> {
    let directory = format!("..2026_{number}");
    let mut entries = vec![
        entry("", Kind::Directory, "", 1),
        entry(&directory, Kind::Directory, "", number * 100),
        entry("..data", Kind::Link, &directory, number * 100 + 1),
    ];
    for (n, key) in (0..).zip(keys) {
        let (file, text) = (format!("{directory}/{key}"), format!("{key} {number}"));
        entries.push(entry(&file, Kind::File, &text, number * 100 + 2 + n));
        entries.push(entry(key, Kind::Link, &format!("..data/{key}"), 50 + n));
    }
    entries
}

fn volume() -> (tempfile::TempDir, Tree) {
    let dir = tempfile::tempdir().unwrap();
    let tree = Tree::new(fs::File::open(dir.path()).unwrap().into());
    (dir, tree)
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_generation_replaces_the_one_before_and_leaves_nothing_of_it() {
    let (dir, tree) = volume();
    let mut replica = Replica::default();
    replica
        .become_exactly(&tree, generation(1, &["color", "shape"]))
        .unwrap();
    assert_eq!(
        fs::read_to_string(dir.path().join("color")).unwrap(),
        "color 1"
    );
    replica
        .become_exactly(&tree, generation(2, &["color", "size"]))
        .unwrap();
    assert_eq!(names(dir.path()), ["..2026_2", "..data", "color", "size"]);
    assert_eq!(
        fs::read_to_string(dir.path().join("size")).unwrap(),
        "size 2"
    );
    assert_eq!(
        fs::read_link(dir.path().join("..data")).unwrap(),
        Path::new("..2026_2")
    );
}

#[test]
fn the_swap_of_the_data_link_is_one_rename_after_its_files_and_before_removals() {
    use nix::sys::inotify::{AddWatchFlags as Flags, InitFlags, Inotify};
    let (dir, tree) = volume();
    let mut replica = Replica::default();
    replica
        .become_exactly(&tree, generation(1, &["a"]))
        .unwrap();
    let inotify = Inotify::init(InitFlags::IN_NONBLOCK).unwrap();
    let mask = Flags::IN_CREATE | Flags::IN_DELETE | Flags::IN_MOVED_TO;
    inotify.add_watch(dir.path(), mask).unwrap();
    replica
        .become_exactly(&tree, generation(2, &["a"]))
        .unwrap();
    let events: Vec<String> = inotify
        .read_events()
        .unwrap()
        .into_iter()
        .map(|event| {
            let kind = event.mask & (Flags::IN_CREATE | Flags::IN_DELETE | Flags::IN_MOVED_TO);
            format!("{kind:?} {}", event.name.unwrap().to_str().unwrap())
        })
        .collect();
    let at = |what: &str| {
        events
            .iter()
            .position(|event| event.ends_with(what))
            .unwrap_or_else(|| panic!("no {what} in {events:?}"))
    };
    assert!(events[at("..2026_2")].contains("IN_CREATE"), "{events:?}");
    assert!(events[at(" ..data")].contains("IN_MOVED_TO"), "{events:?}");
    assert!(events[at("..2026_1")].contains("IN_DELETE"), "{events:?}");
    assert!(at("..2026_2") < at(" ..data") && at(" ..data") < at("..2026_1"));
    assert!(!events.iter().any(|event| event.ends_with(" a")));
}

#[test]
fn a_file_that_stays_keeps_its_inode_and_a_successor_has_a_new_one() {
    let (dir, tree) = volume();
    let mut replica = Replica::default();
    let inode = || fs::metadata(dir.path().join("f")).unwrap().ino();
    let write = |replica: &mut Replica, text: &str, identity| {
        let entries = vec![entry("f", Kind::File, text, identity)];
        replica.become_exactly(&tree, entries).unwrap();
        assert_eq!(fs::read_to_string(dir.path().join("f")).unwrap(), text);
    };
    write(&mut replica, "a long first text", 1);
    let first = inode();
    write(&mut replica, "short", 1);
    assert_eq!(inode(), first);
    write(&mut replica, "next", 2);
    assert_ne!(inode(), first);
    assert_eq!(names(dir.path()), ["f"]);
}

#[test]
fn owner_and_mode_are_kept_and_followed() {
    let (dir, tree) = volume();
    let mut replica = Replica::default();
    let mut file = entry("f", Kind::File, "x", 1);
    (file.uid, file.gid, file.mode) = (1000, 2000, Mode::from_raw_mode(0o2440));
    replica.become_exactly(&tree, vec![file.clone()]).unwrap();
    let seen = |path: &str| {
        let stat = fs::symlink_metadata(dir.path().join(path)).unwrap();
        (stat.uid(), stat.gid(), stat.mode() & 0o7777)
    };
    assert_eq!(seen("f"), (1000, 2000, 0o2440));
    (file.gid, file.mode) = (3000, Mode::from_raw_mode(0o400));
    let mut top = entry("", Kind::Directory, "", 1);
    (top.gid, top.mode) = (2000, Mode::from_raw_mode(0o2770));
    replica.become_exactly(&tree, vec![top, file]).unwrap();
    assert_eq!(seen("f"), (1000, 3000, 0o400));
    assert_eq!(seen(""), (0, 2000, 0o2770));
}

#[test]
fn a_kind_that_changes_is_replaced_with_all_below() {
    let (dir, tree) = volume();
    let mut replica = Replica::default();
    let directory = vec![
        entry("x", Kind::Directory, "", 1),
        entry("x/y", Kind::Directory, "", 2),
        entry("x/y/z", Kind::File, "deep", 3),
    ];
    replica.become_exactly(&tree, directory.clone()).unwrap();
    replica
        .become_exactly(&tree, vec![entry("x", Kind::File, "file", 4)])
        .unwrap();
    assert_eq!(fs::read_to_string(dir.path().join("x")).unwrap(), "file");
    replica.become_exactly(&tree, directory).unwrap();
    assert_eq!(
        fs::read_to_string(dir.path().join("x/y/z")).unwrap(),
        "deep"
    );
    replica.become_exactly(&tree, Vec::new()).unwrap();
    assert_eq!(names(dir.path()), Vec::<String>::new());
}

#[test]
fn what_a_container_puts_in_the_way_does_not_lead_outside() {
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("f"), "kept").unwrap();
    let (dir, tree) = volume();
    let mut replica = Replica::default();
    let entries = vec![
        entry("d", Kind::Directory, "", 1),
        entry("d/f", Kind::File, "ours", 2),
    ];
    replica.become_exactly(&tree, entries.clone()).unwrap();
    fs::remove_dir_all(dir.path().join("d")).unwrap();
    symlink(outside.path(), dir.path().join("d")).unwrap();
    replica.become_exactly(&tree, entries.clone()).unwrap();
    assert_eq!(fs::read_to_string(dir.path().join("d/f")).unwrap(), "ours");
    fs::remove_file(dir.path().join("d/f")).unwrap();
    symlink(outside.path().join("f"), dir.path().join("d/f")).unwrap();
    replica.become_exactly(&tree, entries).unwrap();
    symlink(outside.path(), dir.path().join("e")).unwrap();
    assert!(add_missing(&tree, &[entry("e/g", Kind::File, "x", 1)]).is_ok());
    assert_eq!(names(outside.path()), ["f"]);
    assert_eq!(
        fs::read_to_string(outside.path().join("f")).unwrap(),
        "kept"
    );
}

#[test]
fn what_is_missing_is_added_and_nothing_else_is_touched() {
    let (dir, tree) = volume();
    fs::create_dir(dir.path().join("real")).unwrap();
    symlink("real", dir.path().join("link")).unwrap();
    fs::write(dir.path().join("f"), "theirs").unwrap();
    let mut made = entry("link/sub", Kind::Directory, "", 1);
    made.mode = Mode::from_raw_mode(0o2777);
    made.gid = 2000;
    let entries = [
        entry("link", Kind::Directory, "", 2),
        made,
        entry("f", Kind::Directory, "", 3),
        entry("f/below", Kind::Directory, "", 4),
        entry("new", Kind::File, "seed", 5),
    ];
    add_missing(&tree, &entries).unwrap();
    assert_eq!(fs::read_to_string(dir.path().join("f")).unwrap(), "theirs");
    let sub = fs::metadata(dir.path().join("real/sub")).unwrap();
    assert_eq!(
        (sub.gid(), sub.permissions().mode() & 0o7777),
        (2000, 0o2777)
    );
    assert_eq!(fs::read_to_string(dir.path().join("new")).unwrap(), "seed");
}

/// A small file system: names of one letter, two levels.
fn any_tree() -> impl Strategy<Value = Vec<Entry>> {
    let leaf = ("[a-c]", "[a-c]", 0..3_u8, "[x-z]{0,3}", 0..3_u64);
    proptest::collection::vec(leaf, 0..8).prop_map(|leaves| {
        let mut entries: BTreeMap<Vec<u8>, Entry> = BTreeMap::new();
        for (parent, name, kind, content, identity) in leaves {
            let path = match kind {
                0 => name,
                _ => {
                    entries.insert(
                        parent.clone().into(),
                        entry(&parent, Kind::Directory, "", identity),
                    );
                    format!("{parent}/{name}")
                }
            };
            let kind = if kind == 2 { Kind::Link } else { Kind::File };
            let content = format!("-{content}");
            entries.insert(path.clone().into(), entry(&path, kind, &content, identity));
        }
        // What lies below something that is no directory cannot be.
        let all = entries.clone();
        entries.retain(|path, _| match path.iter().position(|b| *b == b'/') {
            Some(at) => all
                .get(&path[..at])
                .is_some_and(|parent| parent.kind == Kind::Directory),
            None => true,
        });
        entries.into_values().collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn every_state_can_follow_every_other(states in proptest::collection::vec(any_tree(), 1..5)) {
        let (dir, tree) = volume();
        let mut replica = Replica::default();
        for wanted in states {
            replica.become_exactly(&tree, wanted.clone()).unwrap();
            for entry in &wanted {
                let path = dir.path().join(OsStr::from_bytes(&entry.path));
                let got = match entry.kind {
                    Kind::Directory => { prop_assert!(fs::symlink_metadata(&path).unwrap().is_dir()); Vec::new() }
                    Kind::File => fs::read(&path).unwrap(),
                    Kind::Link => fs::read_link(&path).unwrap().into_os_string().as_bytes().to_vec(),
                };
                prop_assert_eq!(&got, &entry.content);
            }
            let count: usize = names(dir.path()).iter().map(|name| {
                let path = dir.path().join(name);
                1 + if fs::symlink_metadata(&path).unwrap().is_dir() { names(&path).len() } else { 0 }
            }).sum();
            prop_assert_eq!(count, wanted.len());
        }
    }
}
