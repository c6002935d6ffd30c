//! A container's lists of CPUs and of NUMA nodes. Their numbers are the node's, where its VM is held to them; in the guest they hold where
//! it has them all, so that programs count as many CPUs as they were given.
use std::{fs, io, path::Path};

use super::file::set;

/// Where the kernel tells of both.
const DEVICES: &str = "/sys/devices/system";

/// Whether this file of a cgroup has a list.
pub(super) fn has_list(file: &str) -> bool {
    matches!(file, "cpuset.cpus" | "cpuset.mems")
}

/// Whether the guest has all of the list that is to be written to this file: a part of it would be less than was given. What cannot be told is
/// the kernel's to refuse.
pub(super) fn is_here(file: &str, list: &str) -> bool {
    told(file, "online").is_none_or(|online| all_within(list, &online))
}

/// Takes the list of a cgroup away. While there are processes in it the kernel does not take an empty one (`ENOSPC`): all that there can be,
/// then.
///
/// # Errors
/// What the kernel says.
pub(super) fn clear(directory: &Path, file: &str) -> io::Result<()> {
    let path = directory.join(file);
    match set(&path, "\n") {
        Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => {
            set(&path, told(file, "possible").as_deref().unwrap_or("0"))
        }
        cleared => cleared,
    }
}

fn told(file: &str, which: &str) -> Option<String> {
    let kind = if file == "cpuset.cpus" { "cpu" } else { "node" };
    let text = fs::read_to_string(format!("{DEVICES}/{kind}/{which}")).ok()?;
    Some(text.trim().to_owned())
}

fn all_within(list: &str, online: &str) -> bool {
    let there: Vec<_> = parts(online).flatten().collect();
    let is_there = |number: u32| {
        there
            .iter()
            .any(|(first, last)| (*first..=*last).contains(&number))
    };
    parts(list).all(|part| part.is_none_or(|(first, last)| (first..=last).all(is_there)))
}

/// First and last number of each part, if they are numbers.
fn parts(list: &str) -> impl Iterator<Item = Option<(u32, u32)>> {
    let parts = list.split([',', ' ', '\n']).filter(|part| !part.is_empty());
    parts.map(|part| {
        let range = part.split(':').next()?;
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        Some((first.parse().ok()?, last.parse().ok()?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_holds_where_all_of_it_is() {
        for (list, online, expected) in [
            ("0", "0", true),
            ("0-1", "0-1", true),
            ("1, 0", "0-1", true),
            ("2-3", "0-1", false),
            // One of two.
            ("1-2", "0-1", false),
            ("0-4294967295", "0-1", false),
            ("1-2", "0,2-3", false),
            ("0,3", "0,2-3", true),
            ("0-3:1/2", "0-1", false),
            // The kernel's to refuse.
            ("x", "0-1", true),
        ] {
            assert_eq!(all_within(list, online), expected, "{list} of {online}");
        }
    }

    #[test]
    fn a_list_is_taken_away_as_an_empty_one() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("cpuset.cpus"), "").unwrap();
        clear(dir.path(), "cpuset.cpus").unwrap();
        let text = fs::read_to_string(dir.path().join("cpuset.cpus")).unwrap();
        assert_eq!(text, "\n");
    }
}
