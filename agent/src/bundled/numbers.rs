//! The numbers of a device node that a CDI file names: those of the guest's own node, the file's, or those that the driver has
//! registered under the node's name. Drivers that make no nodes leave that to user space (nvidia, whose `nvidia-uvm` has a
//! number of the kernel's choice).
use std::{fs, os::unix::fs::MetadataExt as _, path::Path};

use rustix::fs::{FileType, major, minor};

use crate::bundle::cdi::Node;

/// Character or block device, major and minor.
pub type Numbers = (char, u32, u32);

/// # Errors
/// Says that there is no such device.
pub fn find(node: &Node) -> Result<Numbers, String> {
    let path = node.host_path.as_deref().unwrap_or(&node.path);
    let drivers = fs::read_to_string("/proc/devices").unwrap_or_default();
    of_guest(Path::new(path))
        .or_else(|| of_file(node))
        .or_else(|| of_driver(path, node.minor, &drivers))
        .ok_or_else(|| {
            format!("{path} is no device of the guest, and no driver has registered its name")
        })
}

fn of_guest(path: &Path) -> Option<Numbers> {
    let meta = fs::metadata(path).ok()?;
    let kind = match FileType::from_raw_mode(meta.mode()) {
        FileType::CharacterDevice => 'c',
        FileType::BlockDevice => 'b',
        _ => return None,
    };
    Some((kind, major(meta.rdev()), minor(meta.rdev())))
}

fn of_file(node: &Node) -> Option<Numbers> {
    let kind = if node.kind == "b" { 'b' } else { 'c' };
    Some((kind, node.major?, node.minor.unwrap_or(0)))
}

/// The longest registered name with which the node's begins, as a whole or before a `-`: `nvidia-uvm` for `nvidia-uvm-tools`.
fn of_driver(path: &str, minor: Option<u32>, drivers: &str) -> Option<Numbers> {
    let base = path.rsplit('/').next()?;
    let mut best: Option<(&str, u32)> = None;
    let characters = drivers
        .lines()
        .take_while(|line| !line.starts_with("Block"));
    for line in characters {
        let mut words = line.split_whitespace();
        let (Some(number), Some(name)) = (words.next(), words.next()) else {
            continue;
        };
        let Ok(number) = number.parse() else { continue };
        let rest = base.strip_prefix(name);
        if rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
            && best.is_none_or(|(other, _)| other.len() < name.len())
        {
            best = Some((name, number));
        }
    }
    best.map(|(_, number)| ('c', number, minor.unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DRIVERS: &str = "\
Character devices:
  1 mem
195 nvidia
510 nvidia-uvm

Block devices:
  7 loop
";

    #[test]
    fn a_driver_is_found_by_the_longest_name_that_a_node_begins_with() {
        for (path, minor, expected) in [
            ("/dev/nvidia-uvm", None, Some(('c', 510, 0))),
            ("/dev/nvidia-uvm-tools", Some(1), Some(('c', 510, 1))),
            ("/dev/nvidia-modeset", Some(254), Some(('c', 195, 254))),
            ("/dev/nvidiactl", None, None),
            ("/dev/loop", None, None),
        ] {
            assert_eq!(of_driver(path, minor, DRIVERS), expected, "{path}");
        }
    }

    #[test]
    fn the_guests_own_node_counts_before_the_files_numbers() {
        let node = Node {
            path: "/dev/null".into(),
            major: Some(240),
            ..Node::default()
        };
        assert_eq!(find(&node), Ok(('c', 1, 3)));
        let node = Node {
            path: "/dev/brig-none".into(),
            kind: "b".into(),
            major: Some(240),
            minor: Some(5),
            ..Node::default()
        };
        assert_eq!(find(&node), Ok(('b', 240, 5)));
        let node = Node {
            path: "/dev/brig-none".into(),
            ..Node::default()
        };
        assert!(find(&node).unwrap_err().contains("/dev/brig-none"));
    }
}
