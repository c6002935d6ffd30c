//! Which devices a container gets: those of the specification that the guest has, and all of the
//! guest's for a privileged container.
//!
//! A specification names the devices of the node by path and number. Those numbers mean something else
//! in the guest, or nothing; a block device of the same number may be another container's disk. Trusts
//! the guest's devtmpfs.
use std::{
    fs, io,
    os::{fd::OwnedFd, unix::fs::MetadataExt as _},
    path::Path,
};

use brig_agent_protocol::identity;
use rustix::{
    fs::{FileType, Mode, OFlags, ResolveFlags, fstat, major, minor, openat2},
    io::Errno,
};

use super::failure::{Context as _, Failure, Result};
use crate::spec::{Device, DeviceRule, Linux};

/// Deepest directory below /dev that is looked into.
const MAX_DEPTH: usize = 4;
/// What a container has of its own, or mounts.
const SKIPPED: [&str; 8] = [
    "console",
    "core",
    "fd",
    "hugepages",
    "mqueue",
    "ptmx",
    "pts",
    "shm",
];
/// Names of devices in one log line.
const NAMED: usize = 16;

/// A device node to make.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Where, in the container.
    pub path: String,
    /// Character or block device, or FIFO.
    pub kind: FileType,
    /// Major and minor number.
    pub numbers: (u32, u32),
    /// Permissions.
    pub mode: u32,
    /// User and group, in the container's ids.
    pub owner: (u32, u32),
}

/// The devices of the guest.
///
/// # Errors
/// When /dev cannot be read.
pub fn list() -> io::Result<Vec<Node>> {
    let mut nodes = Vec::new();
    walk(Path::new("/dev"), 0, &mut nodes)?;
    Ok(nodes)
}

fn walk(dir: &Path, depth: usize, nodes: &mut Vec<Node>) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let (path, name) = (entry.path(), entry.file_name());
        if depth == 0 && SKIPPED.iter().any(|skipped| name == *skipped) {
            continue;
        }
        let Ok(meta) = fs::symlink_metadata(&path) else {
            // Gone meanwhile.
            continue;
        };
        let kind = FileType::from_raw_mode(meta.mode());
        if kind == FileType::Directory && depth < MAX_DEPTH {
            walk(&path, depth + 1, nodes)?;
        }
        if let (FileType::CharacterDevice | FileType::BlockDevice, Some(path)) =
            (kind, path.to_str())
        {
            nodes.push(Node {
                path: path.to_owned(),
                kind,
                numbers: (major(meta.rdev()), minor(meta.rdev())),
                mode: meta.mode() & 0o7777,
                owner: (0, 0),
            });
        }
    }
    Ok(())
}

/// Opens (O_PATH) the guest's character device of a name below /dev, or one of its disks, to be shown in a container.
///
/// # Errors
/// What containers have of their own, and what the guest lacks.
pub fn open(name: &str, disks: &[String]) -> Result<OwnedFd> {
    let top = name.split('/').next().unwrap_or_default();
    if SKIPPED.contains(&top) {
        return Err(Failure(format!(
            "/dev/{name} of the node means nothing in a VM, and each container has a /dev/{top} of its own"
        )));
    }
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let dev = rustix::fs::open("/dev", flags | OFlags::DIRECTORY, Mode::empty()).during("/dev")?;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    let node = openat2(&dev, name, flags, Mode::empty(), resolve);
    match node {
        Ok(node) if kind(&node).during(name)? == FileType::CharacterDevice => Ok(node),
        Ok(node)
            if kind(&node).during(name)? == FileType::BlockDevice
                && disks.iter().any(|disk| disk == name) =>
        {
            Ok(node)
        }
        Ok(_) | Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {
            Err(Failure(format!("/dev/{name}: {}", lacking(name))))
        }
        Err(error) => Err(error).during(format_args!("the guest's /dev/{name}")),
    }
}

fn kind(node: &OwnedFd) -> rustix::io::Result<FileType> {
    Ok(FileType::from_raw_mode(fstat(node)?.st_mode))
}

/// Why a device of the node is not to be had, and what to do instead.
fn lacking(name: &str) -> String {
    let advice = match name {
        "kvm" => "a pod's VM offers no virtualisation of its own",
        _ => "hardware is given to a pod as a device (VFIO, CDI), not by its node",
    };
    format!("the guest has no such device, and those of the node do not reach into it; {advice}")
}

/// The nodes to make, of those that the guest has, and the paths of those left out: a privileged
/// container names every device of the node, and none of them reaches into the guest.
///
/// # Errors
/// What is no device, and for an ordinary container a device that the guest lacks.
pub fn choose(linux: &Linux, guest: &[Node]) -> Result<(Vec<Node>, Vec<String>)> {
    let privileged = is_privileged(linux);
    let mut chosen = Vec::new();
    let mut left_out = Vec::new();
    for device in &linux.devices {
        let node = parse(device)?;
        let here = node.kind == FileType::Fifo
            || guest.iter().any(|own| {
                own.kind == node.kind
                    && own.numbers == node.numbers
                    && (node.kind == FileType::CharacterDevice || own.path == node.path)
            });
        if here {
            chosen.push(node);
        } else if privileged {
            left_out.push(node.path);
        } else {
            let (major, minor) = node.numbers;
            let name = node.path.strip_prefix("/dev/").unwrap_or(&node.path);
            return Err(Failure(format!(
                "linux.devices {} ({} {major}:{minor}): {}",
                node.path,
                device.kind,
                lacking(name)
            )));
        }
    }
    if privileged {
        for own in guest {
            if chosen.iter().all(|node| node.path != own.path) {
                chosen.push(own.clone());
            }
        }
    }
    Ok((chosen, left_out))
}

/// The last rule about everything allows it: containerd's way to say it. Rules for single devices may follow.
pub fn is_privileged(linux: &Linux) -> bool {
    let of_all = |rule: &&DeviceRule| {
        matches!(rule.kind.as_str(), "" | "a")
            && rule.major.is_none_or(|n| n < 0)
            && rule.minor.is_none_or(|n| n < 0)
    };
    let mut rules = linux.resources.iter().flat_map(|own| &own.devices).rev();
    rules
        .find(of_all)
        .is_some_and(|rule| rule.allow && "rwm".chars().all(|access| rule.access.contains(access)))
}

/// A node of the specification.
///
/// # Errors
/// What is no device.
pub fn parse(device: &Device) -> Result<Node> {
    let kind = match device.kind.as_str() {
        "c" | "u" => FileType::CharacterDevice,
        "b" => FileType::BlockDevice,
        "p" => FileType::Fifo,
        other => {
            return Err(Failure(format!(
                "linux.devices {}: type {other:?} is none of c, u, b, p",
                device.path
            )));
        }
    };
    let number = |n: i64| {
        u32::try_from(n).map_err(|_| {
            Failure(format!(
                "linux.devices {}: number {n} is out of range",
                device.path
            ))
        })
    };
    let numbers = match kind {
        FileType::Fifo => (0, 0),
        _ => (number(device.major)?, number(device.minor)?),
    };
    let owner = |field: &str, id: Option<u32>| {
        let id = id.unwrap_or(0);
        identity::check(&format!("linux.devices {}: {field}", device.path), id)
            .map(|()| id)
            .map_err(Failure)
    };
    Ok(Node {
        path: device.path.clone(),
        kind,
        numbers,
        mode: device.file_mode.unwrap_or(0o666),
        owner: (owner("uid", device.uid)?, owner("gid", device.gid)?),
    })
}

/// The log line for devices that were left out.
pub fn left_out(paths: &[String]) -> String {
    let named = paths.get(..NAMED.min(paths.len())).unwrap_or_default();
    let more = paths.len() - named.len();
    let rest = if more == 0 {
        String::new()
    } else {
        format!(" and {more} more")
    };
    format!(
        "devices of the node were left out: {}{rest}",
        named.join(" ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn node(path: &str, kind: FileType, numbers: (u32, u32)) -> Node {
        Node {
            path: path.into(),
            kind,
            numbers,
            mode: 0o600,
            owner: (0, 0),
        }
    }

    fn guest() -> Vec<Node> {
        vec![
            node("/dev/fuse", FileType::CharacterDevice, (10, 229)),
            node("/dev/vda", FileType::BlockDevice, (254, 0)),
        ]
    }

    fn linux(devices: serde_json::Value, privileged: bool) -> Linux {
        let mut rules = vec![json!({"allow": false, "access": "rwm"})];
        if privileged {
            rules.push(json!({"allow": true, "access": "rwm"}));
        }
        serde_json::from_value(json!({"devices": devices, "resources": {"devices": rules}}))
            .unwrap()
    }

    fn paths(nodes: &[Node]) -> Vec<&str> {
        nodes.iter().map(|node| node.path.as_str()).collect()
    }

    #[test]
    fn an_ordinary_container_gets_what_the_guest_has_and_nothing_else() {
        let fuse = json!([{"path": "/dev/f", "type": "c", "major": 10, "minor": 229},
            {"path": "/dev/pipe", "type": "p"}]);
        let (chosen, _) = choose(&linux(fuse, false), &guest()).unwrap();
        assert_eq!(paths(&chosen), ["/dev/f", "/dev/pipe"]);
        // A disk of the node that has the number of one in the guest.
        for (path, minor) in [("/dev/data", 0), ("/dev/vda", 16)] {
            let disk = json!([{"path": path, "type": "b", "major": 254, "minor": minor}]);
            let refused = choose(&linux(disk, false), &guest()).unwrap_err();
            assert!(refused.to_string().contains(path), "{refused}");
        }
        let (none, _) = choose(&linux(json!([]), false), &guest()).unwrap();
        assert!(none.is_empty());
    }

    #[test]
    fn a_privileged_container_gets_all_of_the_guest_and_none_of_the_node() {
        let node_has = json!([{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 0o640},
            {"path": "/dev/sda", "type": "b", "major": 8, "minor": 0},
            {"path": "/dev/sdb", "type": "b", "major": 254, "minor": 0}]);
        let (chosen, dropped) = choose(&linux(node_has, true), &guest()).unwrap();
        assert_eq!(paths(&chosen), ["/dev/fuse", "/dev/vda"]);
        assert_eq!(chosen[0].mode, 0o640);
        assert_eq!(dropped, ["/dev/sda", "/dev/sdb"]);
        assert_eq!(
            left_out(&dropped),
            "devices of the node were left out: /dev/sda /dev/sdb"
        );
        assert!(left_out(&vec!["/dev/x".into(); 40]).ends_with("and 24 more"));
    }

    #[test]
    fn rules_for_single_devices_leave_a_container_privileged_and_one_for_all_does_not() {
        let with = |rule: serde_json::Value| {
            let all = json!({"allow": true, "access": "rwm"});
            let rules = json!({"resources": {"devices": [all, rule]}});
            is_privileged(&serde_json::from_value(rules).unwrap())
        };
        let one = json!({"allow": true, "type": "b", "major": 7, "minor": 0, "access": "rwm"});
        assert!(with(one));
        assert!(!with(json!({"allow": false, "access": "m"})));
    }

    #[test]
    fn what_is_no_device_is_refused() {
        for bad in [
            json!([{"path": "/dev/x", "type": "z"}]),
            json!([{"path": "/dev/x", "type": "c", "major": -1, "minor": 0}]),
            json!([{"path": "/dev/x", "type": "p", "uid": u32::MAX}]),
            json!([{"path": "/dev/x", "type": "p", "gid": u32::MAX}]),
        ] {
            assert!(choose(&linux(bad, true), &guest()).is_err());
        }
    }

    #[test]
    fn a_device_is_opened_by_its_name_and_one_that_is_not_there_is_refused_with_advice() {
        let null = open("null", &[]).unwrap();
        assert_eq!(kind(&null).unwrap(), FileType::CharacterDevice);
        for (name, words) in [
            ("kvm-of-nobody", "VFIO, CDI"),
            ("null/x", "no such device"),
            ("../dev/null", "/dev/"),
            ("pts/0", "of its own"),
            ("ptmx", "of its own"),
        ] {
            let refused = open(name, &[name.to_owned()]).unwrap_err().to_string();
            assert!(refused.contains(words), "{refused}");
        }
        assert!(lacking("kvm").contains("virtualisation"));
    }

    #[test]
    fn the_devices_of_this_machine_are_found() {
        let all = list().unwrap();
        let null = all.iter().find(|node| node.path == "/dev/null").unwrap();
        assert_eq!(null.numbers, (1, 3));
        assert!(all.iter().all(|node| !node.path.starts_with("/dev/pts")));
    }
}
