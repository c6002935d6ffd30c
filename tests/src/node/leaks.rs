//! What a runtime leaves on the node: a snapshot before, one after, and the difference.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use super::process;

/// Programs whose processes belong to a runtime.
const PROGRAMS: &[&str] = &[
    "containerd-shim-brig-v2",
    "brig-vmm",
    "brig",
    "containerd-shim-runc-v2",
    "runc",
];

/// Directories in which every entry belongs to a running container.
const DIRECTORIES: &[&str] = &[
    "/run/brig",
    "/run/netns",
    "/run/containerd/s",
    "/run/containerd/fifo",
    "/run/containerd/runc",
];

/// Everything of a runtime that can be seen on the node, by kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    kinds: BTreeMap<&'static str, BTreeSet<String>>,
}

/// Pids whose program has this name.
#[must_use]
pub fn pids_of(program: &str) -> Vec<i32> {
    processes()
        .into_iter()
        .filter(|(_, name)| name == program)
        .map(|(pid, _)| pid)
        .collect()
}

/// Live processes with their program's name. Zombies are processes too.
#[must_use]
pub fn processes() -> Vec<(i32, String)> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| {
            let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
            let cmdline = fs::read(entry.path().join("cmdline")).ok()?;
            let first = cmdline.split(|byte| *byte == 0).next()?;
            let name = if first.is_empty() {
                // A kernel thread or a zombie; the latter keeps its (shortened) name.
                fs::read_to_string(entry.path().join("comm")).ok()?
            } else {
                String::from_utf8_lossy(first).into_owned()
            };
            let name = name.trim().rsplit('/').next()?.to_owned();
            Some((pid, name))
        })
        .collect()
}

fn belongs(name: &str) -> bool {
    PROGRAMS
        .iter()
        // comm of a zombie is cut to 15 bytes.
        .any(|program| *program == name || (name.len() == 15 && program.starts_with(name)))
}

fn directories_below(root: &Path, into: &mut BTreeSet<String>) {
    let Ok(entries) = fs::read_dir(root) else {
        return;
    };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            into.insert(entry.path().display().to_string());
            directories_below(&entry.path(), into);
        }
    }
}

fn files_below(root: &Path, into: &mut BTreeSet<String>) {
    let Ok(entries) = fs::read_dir(root) else {
        return;
    };
    for entry in entries.flatten() {
        into.insert(entry.path().display().to_string());
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            files_below(&entry.path(), into);
        }
    }
}

fn names(root: &str) -> BTreeSet<String> {
    fs::read_dir(root)
        .map(|entries| {
            entries
                .flatten()
                .map(|entry| entry.path().display().to_string())
                .collect()
        })
        .unwrap_or_default()
}

/// Bundles of tasks, under any containerd's state directory.
fn bundles() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for base in ["/run/containerd", "/var/lib/containerd"] {
        let mut roots = vec![PathBuf::from(base)];
        roots.extend(names(base).into_iter().map(PathBuf::from));
        for root in roots {
            for namespace in names(&format!("{}/io.containerd.runtime.v2.task", root.display())) {
                found.extend(names(&namespace));
            }
        }
    }
    found
}

/// Descriptors of containerd that refer to a container's FIFOs.
fn containerd_fifos() -> BTreeSet<String> {
    pids_of("containerd")
        .into_iter()
        .flat_map(|pid| names(&format!("/proc/{pid}/fd")))
        .filter_map(|fd| {
            let target = fs::read_link(&fd).ok()?.display().to_string();
            target.contains("/fifo").then_some(target)
        })
        .collect()
}

impl Snapshot {
    /// What there is now.
    #[must_use]
    pub fn take() -> Self {
        let mut kinds = BTreeMap::new();
        kinds.insert(
            "process",
            processes()
                .into_iter()
                .filter(|(_, name)| belongs(name))
                .map(|(pid, name)| format!("{name} ({pid})"))
                .collect(),
        );
        kinds.insert(
            "mount",
            fs::read_to_string("/proc/1/mountinfo")
                .unwrap_or_default()
                .lines()
                .filter_map(|line| line.split(' ').nth(4).map(str::to_owned))
                .collect(),
        );
        let mut cgroups = BTreeSet::new();
        directories_below(Path::new("/sys/fs/cgroup"), &mut cgroups);
        kinds.insert("cgroup", cgroups);
        kinds.insert("network interface", names("/sys/class/net"));
        // KVM makes one directory here for each VM.
        kinds.insert(
            "virtual machine",
            names("/sys/kernel/debug/kvm")
                .into_iter()
                .filter(|path| Path::new(path).is_dir())
                .collect(),
        );
        let mut files = BTreeSet::new();
        for directory in DIRECTORIES {
            files_below(Path::new(directory), &mut files);
        }
        kinds.insert("file", files);
        kinds.insert("bundle", bundles());
        kinds.insert("descriptor of containerd", containerd_fifos());
        Self { kinds }
    }

    /// What there is in `later` and not here.
    #[must_use]
    pub fn added(&self, later: &Self) -> Vec<String> {
        let empty = BTreeSet::new();
        later
            .kinds
            .iter()
            .flat_map(|(kind, entries)| {
                entries
                    .difference(self.kinds.get(kind).unwrap_or(&empty))
                    .map(move |entry| format!("{kind} {entry}"))
            })
            .collect()
    }

    /// Fails if something is left that was not there before, after the time that a runtime may take
    /// to clean up.
    ///
    /// # Errors
    /// Lists what is left.
    pub fn nothing_left(&self, within: Duration) -> Result<()> {
        self.nothing_left_but(&[], within)
    }

    /// As [`Self::nothing_left`], with exceptions: what contains one of `known` is not counted.
    ///
    /// # Errors
    /// Lists what is left.
    pub fn nothing_left_but(&self, known: &[&str], within: Duration) -> Result<()> {
        let end = Instant::now() + within;
        // Processes that end say so.
        for (pid, name) in processes() {
            if belongs(&name) && !self.kinds["process"].contains(&format!("{name} ({pid})")) {
                process::exited(pid, end.saturating_duration_since(Instant::now()))?;
            }
        }
        loop {
            let mut added = self.added(&Self::take());
            added.retain(|entry| !known.iter().any(|known| entry.contains(known)));
            if added.is_empty() {
                return Ok(());
            }
            if Instant::now() >= end {
                bail!("left behind: {}", added.join(", "));
            }
            // Directories and mounts that go away tell nobody; this is the one place that looks again.
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_new_is_found_and_what_went_is_not() {
        let with = |entries: &[&str]| Snapshot {
            kinds: BTreeMap::from([(
                "mount",
                entries.iter().map(|entry| (*entry).to_owned()).collect(),
            )]),
        };
        let before = with(&["/a", "/b"]);
        assert_eq!(before.added(&with(&["/a", "/c"])), ["mount /c"]);
        assert!(before.added(&with(&["/a"])).is_empty());
    }

    #[test]
    fn this_test_is_seen_as_a_process_but_not_as_a_leak() {
        let own = i32::try_from(std::process::id()).unwrap();
        let (_, name) = processes()
            .into_iter()
            .find(|(pid, _)| *pid == own)
            .unwrap();
        assert!(!belongs(&name));
    }
}
