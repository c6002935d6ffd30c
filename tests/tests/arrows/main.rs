//! The shape of the sources, kept by the gate: no two files use each other, however long the way round, and
//! each room of the shim uses only those below it (docs/architecture.md).
//!
//! Judged by the paths that the sources name (`use` lines and paths written out), tests left out. A name
//! that a module only hands on (`pub use`) counts as an arrow to where it is from.

// Helpers are no #[test] to clippy, and may fail a test in the same way.
#![allow(clippy::unwrap_used)]

mod crates;
mod tokens;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use crates::Crate;

/// The crates of the workspace and where their modules begin.
const ROOTS: &[&str] = &[
    "shim/src/lib.rs",
    "shim/src/bin/brig/main.rs",
    "agent/src/lib.rs",
];

/// The shim's rooms from the top down. What is fuzzed is of any room, and nothing uses that room.
const ROOMS: &[&str] = &["fuzzing", "containerd", "pod", "guest", "node", "asked"];

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(root: &str) -> Crate {
    Crate::read(&workspace().join(root))
}

/// All that can be reached from a file.
fn reachable<'a>(arrows: &'a BTreeMap<String, BTreeSet<String>>, from: &str) -> BTreeSet<&'a str> {
    let mut seen = BTreeSet::new();
    let mut next: Vec<&str> = arrows
        .get(from)
        .map(|to| to.iter().map(String::as_str).collect())
        .unwrap_or_default();
    while let Some(file) = next.pop() {
        if seen.insert(file) {
            next.extend(arrows.get(file).into_iter().flatten().map(String::as_str));
        }
    }
    seen
}

/// Sets of files that use one another in a circle.
fn circles(arrows: &BTreeMap<String, BTreeSet<String>>) -> BTreeSet<Vec<String>> {
    let reach: BTreeMap<&str, BTreeSet<&str>> = arrows
        .keys()
        .map(|file| (file.as_str(), reachable(arrows, file)))
        .collect();
    let mutual = |a: &str, b: &str| {
        let to = |from: &str, to: &str| reach.get(from).is_some_and(|all| all.contains(to));
        to(a, b) && to(b, a)
    };
    reach
        .keys()
        .filter(|file| mutual(file, file))
        .map(|file| {
            let others = reach.keys().filter(|other| mutual(file, other));
            others.map(|other| (*other).to_owned()).collect()
        })
        .collect()
}

#[test]
fn no_two_files_use_each_other() {
    let mut found = Vec::new();
    for root in ROOTS {
        let arrows = read(root).arrows();
        let count: usize = arrows.values().map(BTreeSet::len).sum();
        println!("{root}: {} files, {count} arrows", arrows.len());
        for circle in circles(&arrows) {
            let within = circle.iter().flat_map(|from| {
                let to = arrows.get(from).into_iter().flatten();
                to.filter(|to| circle.contains(to))
                    .map(move |to| format!("    {from} -> {to}\n"))
            });
            found.push(format!("{root}:\n{}", within.collect::<String>()));
        }
    }
    assert!(
        found.is_empty(),
        "circles, to be opened by moving the shared piece down or passing what is needed:\n{}",
        found.join("\n")
    );
}

#[test]
fn each_room_of_the_shim_uses_only_those_below_it() {
    let shim = read("shim/src/lib.rs");
    // The root's own files, `error` and `log`, are below all rooms; only `lib.rs` names the rooms.
    let level = |file: &str| {
        let room = file.split('/').next().unwrap_or(file);
        ROOMS
            .iter()
            .position(|&name| name == room)
            .unwrap_or(ROOMS.len())
    };
    let mut between = BTreeMap::new();
    let mut up = Vec::new();
    for (from, all) in shim.arrows() {
        for to in all {
            if level(&from) != level(&to) {
                *between.entry((level(&from), level(&to))).or_insert(0) += 1;
            }
            if level(&to) < level(&from) {
                up.push(format!("{from} -> {to}"));
            }
        }
    }
    for ((from, to), count) in between {
        let name = |level: usize| ROOMS.get(level).copied().unwrap_or("error, log");
        println!("{} -> {}: {count}", name(from), name(to));
    }
    assert!(up.is_empty(), "arrows that go up:\n{}", up.join("\n"));
}

#[test]
fn a_circle_is_found_whatever_its_length() {
    let arrows = |pairs: &[(&str, &str)]| {
        let mut all: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for (from, to) in pairs {
            all.entry((*to).to_owned()).or_default();
            all.entry((*from).to_owned())
                .or_default()
                .insert((*to).to_owned());
        }
        all
    };
    assert!(circles(&arrows(&[("a", "b"), ("b", "c"), ("a", "c")])).is_empty());
    let found = circles(&arrows(&[("a", "b"), ("b", "c"), ("c", "a"), ("c", "d")]));
    assert_eq!(found.into_iter().collect::<Vec<_>>(), [["a", "b", "c"]]);
}
