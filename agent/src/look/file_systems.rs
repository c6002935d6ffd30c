//! How full the file systems are that the pod's files are on: the root of each container that runs, and each volume of the
//! guest.
use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use rustix::fs::{StatFs, statfs};

use crate::{error::Result, places::Places, volume};

/// The most of each kind that are told of.
const MOST: usize = 256;
/// `linux/magic.h`, of those that a guest has.
const TYPES: [(u64, &str); 10] = [
    (0xef53, "ext4"),
    (0x5846_5342, "xfs"),
    (0x9123_683e, "btrfs"),
    (0xe0f5_e1e2, "erofs"),
    (0x7371_7368, "squashfs"),
    (0x794c_7630, "overlay"),
    (0x0102_1994, "tmpfs"),
    (0x9584_58f6, "hugetlbfs"),
    (0x6573_5546, "virtiofs"),
    (0x8584_58f6, "ramfs"),
];

/// A line each: what it is of, its name, type, bytes, those used and those that can be used, and files likewise.
///
/// # Errors
/// None in practice: what is not there is left out.
pub(super) fn list(places: &Places) -> Result<String> {
    let mut text = "OF NAME TYPE BYTES USED AVAILABLE FILES USED AVAILABLE\n".to_owned();
    for id in names(&places.cgroup_base) {
        // A container's own processes may be in cgroups that it has made below.
        let root = first_process(&places.cgroup_base.join(&id));
        if let Some(pid) = root {
            add(
                &mut text,
                "container",
                &id,
                &PathBuf::from(format!("/proc/{pid}/root")),
            );
        }
    }
    let volumes = volume::directory(&places.run);
    for id in names(&volumes) {
        add(&mut text, "volume", &id, &volumes.join(&id));
    }
    Ok(text)
}

/// Directories and files that the agent has made, in the order of their names.
fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| crate::names::id(name).is_ok())
        .collect();
    names.sort();
    names.truncate(MOST);
    names
}

fn first_process(cgroup: &Path) -> Option<u32> {
    let first = |directory: &Path| {
        let text = fs::read_to_string(directory.join("cgroup.procs")).ok()?;
        text.lines().next()?.parse().ok()
    };
    first(cgroup).or_else(|| {
        let below = fs::read_dir(cgroup).ok()?.flatten().take(MOST);
        below
            .map(|entry| entry.path())
            .find_map(|path| first(&path))
    })
}

fn add(text: &mut String, of: &str, name: &str, path: &Path) {
    let Ok(found) = statfs(path) else { return };
    let _ = writeln!(text, "{of} {name} {}", line(&found));
}

fn line(found: &StatFs) -> String {
    let number = |value: i64| u64::try_from(value).unwrap_or(0);
    // Blocks are counted in fragments, where there are such.
    let unit = match number(found.f_frsize) {
        0 => number(found.f_bsize),
        fragment => fragment,
    };
    let bytes = |blocks: u64| blocks.saturating_mul(unit);
    let kind = found.f_type.cast_unsigned();
    let kind = TYPES.iter().find(|(magic, _)| *magic == kind);
    format!(
        "{} {} {} {} {} {} {}",
        kind.map_or("other", |(_, name)| name),
        bytes(found.f_blocks),
        bytes(found.f_blocks.saturating_sub(found.f_bfree)),
        bytes(found.f_bavail),
        found.f_files,
        found.f_files.saturating_sub(found.f_ffree),
        found.f_ffree,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_volume_has_a_line_of_figures_and_what_is_not_ours_has_none() {
        let run = tempfile::tempdir().unwrap();
        for name in ["v1", "not an id", "d2"] {
            fs::create_dir_all(run.path().join("volumes").join(name)).unwrap();
        }
        let places = Places {
            run: run.path().to_owned(),
            share: run.path().to_owned(),
            cgroup_root: run.path().join("none"),
            cgroup_base: run.path().join("none"),
            owns_machine: false,
        };
        let text = list(&places).unwrap();
        let lines: Vec<Vec<&str>> = text
            .lines()
            .skip(1)
            .map(|line| line.split(' ').collect())
            .collect();
        let names: Vec<&str> = lines.iter().map(|words| words[1]).collect();
        assert_eq!(names, ["d2", "v1"]);
        for words in lines {
            assert_eq!((words.len(), words[0]), (9, "volume"));
            let figures: Vec<u64> = words[3..]
                .iter()
                .map(|word| word.parse().unwrap())
                .collect();
            assert!(
                figures[0] > 0 && figures[1] <= figures[0] && figures[2] <= figures[0],
                "{figures:?}"
            );
        }
    }
}
