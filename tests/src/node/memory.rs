//! What a process costs in memory: its proportional share, split into its own and its guest's.

use std::fs;

use anyhow::{Context, Result};
use serde::Serialize;

/// Proportional set sizes in KiB.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Share {
    /// All of it.
    pub total: u64,
    /// Guest RAM that has been touched, in a VMM.
    pub guest: u64,
    /// Resident, not divided among sharers.
    pub rss: u64,
}

impl Share {
    /// Without guest RAM.
    #[must_use]
    pub fn own(&self) -> u64 {
        self.total - self.guest
    }
}

/// One mapping of /proc/PID/smaps, or several of guest RAM that touch: advice on a part of it makes more of one, a template is mapped over parts of
/// it, and so they count as one.
struct Mapping {
    range: String,
    permissions: String,
    size: u64,
    rss: u64,
    pss: u64,
    name: String,
    /// Left out of core dumps, as guest RAM is.
    left_out: bool,
}

impl Mapping {
    /// Whether it goes on where `before` ends.
    fn continues(&self, before: &Self) -> bool {
        let end = before.range.split_once('-').map(|(_, end)| end);
        let start = self.range.split_once('-').map(|(start, _)| start);
        let unnamed = self.name.is_empty() && before.name.is_empty();
        (unnamed || self.left_out && before.left_out)
            && self.permissions == before.permissions
            && start == end
    }
}

fn mappings(smaps: &str) -> Vec<Mapping> {
    let mut joined: Vec<Mapping> = Vec::new();
    for mapping in listed(smaps) {
        match joined.last_mut() {
            Some(last) if mapping.continues(last) => {
                last.range = mapping.range;
                last.left_out |= mapping.left_out;
                last.size += mapping.size;
                last.rss += mapping.rss;
                last.pss += mapping.pss;
            }
            _ => joined.push(mapping),
        }
    }
    joined
}

fn listed(smaps: &str) -> Vec<Mapping> {
    let mut found: Vec<Mapping> = Vec::new();
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let Some(first) = words.next() else { continue };
        if first == "VmFlags:" {
            if let Some(mapping) = found.last_mut() {
                let flags: Vec<&str> = words.collect();
                mapping.left_out = flags.contains(&"dd") && !flags.contains(&"io");
            }
        } else if let Some(field) = first.strip_suffix(':') {
            let value: u64 = words.next().and_then(|word| word.parse().ok()).unwrap_or(0);
            if let Some(mapping) = found.last_mut() {
                match field {
                    "Size" => mapping.size = value,
                    "Rss" => mapping.rss = value,
                    "Pss" => mapping.pss = value,
                    _ => {}
                }
            }
        } else if first.contains('-') {
            found.push(Mapping {
                range: first.to_owned(),
                permissions: words.next().unwrap_or_default().to_owned(),
                size: 0,
                rss: 0,
                pss: 0,
                name: line
                    .split_whitespace()
                    .skip(5)
                    .collect::<Vec<_>>()
                    .join(" "),
                left_out: false,
            });
        }
    }
    found
}

/// Guest RAM is the big anonymous mapping with the template that is mapped over it, and the kernel and initramfs mapped into it.
fn is_guest(mapping: &Mapping, guest_kib: u64) -> bool {
    let anonymous = mapping.name.is_empty() || mapping.name.starts_with("[anon");
    ((anonymous || mapping.left_out) && guest_kib > 0 && mapping.size >= guest_kib / 4)
        || mapping.name.contains("vmlinux")
        || mapping.name.contains("initramfs")
}

/// The memory of a process; `guest_kib` is the size of its guest's RAM, 0 if it has none.
///
/// # Errors
/// If the process is gone.
pub fn of(pid: i32, guest_kib: u64) -> Result<Share> {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps"))
        .with_context(|| format!("cannot read the mappings of process {pid}"))?;
    let mut share = Share::default();
    for mapping in mappings(&smaps) {
        share.total += mapping.pss;
        share.rss += mapping.rss;
        if is_guest(&mapping, guest_kib) {
            share.guest += mapping.pss;
        }
    }
    Ok(share)
}

/// KiB of a process that are its own and have been written.
///
/// # Errors
/// If the process is gone.
pub fn private(pid: i32) -> Result<u64> {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))
        .with_context(|| format!("cannot read the mappings of process {pid}"))?;
    let line = rollup
        .lines()
        .find_map(|line| line.strip_prefix("Private_Dirty:"));
    let word = line.and_then(|line| line.split_whitespace().next());
    Ok(word.context("no Private_Dirty")?.parse()?)
}

/// KiB of the largest mapping, which in a VMM is its guest's RAM.
///
/// # Errors
/// If the process is gone.
pub fn largest(pid: i32) -> Result<u64> {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps"))
        .with_context(|| format!("cannot read the mappings of process {pid}"))?;
    let sizes = mappings(&smaps).into_iter().map(|mapping| mapping.size);
    sizes.max().context("no mappings")
}

/// Descendants of a process, itself included.
#[must_use]
pub fn tree(root: i32) -> Vec<i32> {
    let mut found = vec![root];
    let mut next = 0;
    while let Some(pid) = found.get(next).copied() {
        next += 1;
        let tasks = fs::read_dir(format!("/proc/{pid}/task"))
            .map(|tasks| tasks.flatten().map(|task| task.path()).collect::<Vec<_>>())
            .unwrap_or_default();
        for task in tasks {
            let children = fs::read_to_string(task.join("children")).unwrap_or_default();
            for child in children
                .split_whitespace()
                .filter_map(|pid| pid.parse().ok())
            {
                if !found.contains(&child) {
                    found.push(child);
                }
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
7f0000000000-7f0010000000 rw-p 00000000 00:00 0
Size:             262144 kB
Rss:               40000 kB
Pss:               40000 kB
55d000000000-55d000100000 r-xp 00000000 fe:00 12 /opt/brig/brig-vmm
Size:               1024 kB
Rss:                 900 kB
Pss:                 450 kB
7f0020000000-7f0021000000 r--p 00000000 fe:00 13 /opt/brig/vmlinux
Size:              16384 kB
Rss:                8000 kB
Pss:                2000 kB
";

    #[test]
    fn guest_ram_is_told_from_the_vmm_s_own_memory() {
        let total: u64 = mappings(SMAPS).iter().map(|mapping| mapping.pss).sum();
        assert_eq!(total, 42_450);
        let guest: u64 = mappings(SMAPS)
            .iter()
            .filter(|mapping| is_guest(mapping, 262_144))
            .map(|mapping| mapping.pss)
            .sum();
        assert_eq!(guest, 42_000);
    }

    #[test]
    fn guest_ram_in_pieces_is_one_mapping_and_its_neighbours_are_not_of_it() {
        let smaps = "\
7f0000000000-7f0000200000 ---p 00000000 00:00 0
Size:               2048 kB
7f0000200000-7f0008000000 rw-p 00000000 00:00 0
Size:             129024 kB
Pss:               30000 kB
7f0008000000-7f0008200000 rw-p 00000000 00:00 0
Size:               2048 kB
Pss:                1000 kB
7f0008200000-7f0010200000 rw-p 00000000 00:00 0
Size:             131072 kB
Pss:                 500 kB
7f0010300000-7f0010400000 rw-p 00000000 00:00 0
Size:               1024 kB
Pss:                1024 kB
";
        let sizes: Vec<_> = mappings(smaps)
            .iter()
            .map(|mapping| (mapping.size, mapping.pss))
            .collect();
        assert_eq!(sizes, [(2048, 0), (262_144, 31_500), (1024, 1024)]);
    }

    #[test]
    fn guest_ram_with_a_template_over_it_is_one_mapping() {
        let smaps = "\
7f0000000000-7f0000100000 rw-p 00000000 00:00 0
Size:               1024 kB
Pss:                 100 kB
VmFlags: rd wr mr mw me ac dd hg
7f0000100000-7f0000200000 rw-p 00005000 00:1a 9 /
Size:               1024 kB
Pss:                 200 kB
VmFlags: rd wr mr mw me dd
7f0000400000-7f0000500000 rw-p 00000000 00:00 0
Size:               1024 kB
Pss:                  10 kB
VmFlags: rd wr mr mw me ac
";
        let found = mappings(smaps);
        let sizes: Vec<_> = found.iter().map(|one| (one.size, one.pss)).collect();
        assert_eq!(sizes, [(2048, 300), (1024, 10)]);
        assert!(is_guest(&found[0], 2048) && !is_guest(&found[1], 8192));
    }

    #[test]
    fn a_process_is_in_its_own_tree() {
        let own = i32::try_from(std::process::id()).unwrap();
        assert_eq!(tree(own)[0], own);
    }
}
