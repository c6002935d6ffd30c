//! Devices of the node that a container asked for: by the nodes that the guest's drivers have made for them, and in
//! what the specification says of their numbers.
//!
//! The specification names them as the host does (`/dev/vfio/12`, block device 8:16), which means nothing here, or
//! another device. Trusts the host.
use std::{fs, os::unix::fs::PermissionsExt as _, path::Path};

use brig_agent_protocol::agent::{DeviceNode, GivenDevice, GivenDisk};

use crate::{
    error::{Error, Result},
    pci,
    spec::{Device, DeviceRule, Linux, Resources},
};

/// Major numbers that Linux gives to drivers as they come (`block/genhd.c`, Documentation/admin-guide/devices.txt): the
/// node's are not the guest's.
const DYNAMIC: [std::ops::RangeInclusive<i64>; 2] = [240..=254, 259..=259];

/// What a container was given.
#[derive(Debug, Default)]
pub struct Given {
    /// Nodes to make for it, with the guest's numbers, as the specification would name them.
    pub nodes: Vec<Device>,
    /// Its disks.
    pub disks: Disks,
}

/// The numbers of the node that mean something else here: those of block devices that a container has as disks, and
/// of devices that it was given whole.
#[derive(Clone, Debug, Default)]
pub struct Disks {
    disks: Vec<Disk>,
    /// Kind and numbers, on the node.
    whole: Vec<(String, (i64, i64))>,
    /// What always holds, whatever rules there are: those of nodes that were given whole.
    rules: Vec<DeviceRule>,
}

#[derive(Clone, Debug)]
struct Disk {
    /// On the node.
    theirs: (i64, i64),
    /// In the guest.
    ours: (i64, i64),
    /// Below /dev.
    name: String,
}

/// Takes what was given out of the specification, and says of the guest's numbers what it says of the node's.
///
/// # Errors
/// `NotFound` for a device that is not there.
pub async fn apply(
    linux: &mut Linux,
    devices: &[GivenDevice],
    disks: &[GivenDisk],
) -> Result<Given> {
    let mut given = Given::default();
    for disk in disks {
        let nodes = pci::nodes(disk.function).await?;
        // Its partitions come after it.
        let node = nodes.into_iter().find(|node| node.block).ok_or_else(|| {
            Error::NotFound(format!(
                "function {} of the guest's bus is no disk",
                disk.function
            ))
        })?;
        if let Some((owner, mode)) = owner_shown(disk) {
            let own = Path::new("/dev").join(&node.name);
            let failed = |error| Error::io(own.display(), error);
            std::os::unix::fs::chown(&own, Some(owner.0), Some(owner.1)).map_err(failed)?;
            fs::set_permissions(&own, fs::Permissions::from_mode(mode)).map_err(failed)?;
        }
        given.disks.disks.push(Disk {
            theirs: (disk.major.into(), disk.minor.into()),
            ours: (node.major.into(), node.minor.into()),
            name: node.name,
        });
    }
    given.nodes = given.disks.take(&mut linux.devices);
    for device in devices {
        let mut nodes = Vec::new();
        for function in &device.functions {
            nodes.extend(pci::nodes(*function).await?);
        }
        let replaced = given
            .disks
            .replace(&mut linux.devices, &device.path, &nodes);
        given.nodes.extend(replaced);
    }
    if let Some(resources) = &mut linux.resources {
        given.disks.translate(resources);
    } else if !given.nodes.is_empty() {
        // As without rules, but for what was given.
        let nothing = DeviceRule {
            access: "rwm".to_owned(),
            ..DeviceRule::default()
        };
        let mut resources = Resources {
            devices: vec![nothing],
            ..Resources::default()
        };
        given.disks.translate(&mut resources);
        linux.resources = Some(resources);
    }
    Ok(given)
}

/// Owner and permissions of the node's node, if the container has a mount of that, which shows the guest's own. An entry of
/// the specification gets a node of its own, and leaves the guest's, which others may have mounted, as it is: it comes
/// without a mode, which that of a mount never is, because it has the node's type.
fn owner_shown(disk: &GivenDisk) -> Option<((u32, u32), u32)> {
    (disk.mode != 0).then_some(((disk.uid, disk.gid), disk.mode & 0o7777))
}

impl Given {
    /// A node more, in the place of one at its path, which `access` is allowed to.
    pub fn add(&mut self, linux: &mut Linux, node: Device, access: &str) {
        let rule = DeviceRule {
            allow: true,
            kind: node.kind.clone(),
            major: Some(node.major),
            minor: Some(node.minor),
            access: access.to_owned(),
        };
        // Without rules everything is allowed.
        if let Some(resources) = &mut linux.resources {
            resources.devices.push(rule.clone());
        }
        self.disks.rules.push(rule);
        let path = &node.path;
        linux.devices.retain(|device| device.path != *path);
        self.nodes.retain(|other| other.path != *path);
        self.nodes.push(node);
    }
}

impl Disks {
    /// Names below /dev.
    pub fn names(&self) -> Vec<String> {
        self.disks.iter().map(|disk| disk.name.clone()).collect()
    }

    /// Whether it has devices that the node may take back from a living container.
    pub fn may_be_revoked(&self) -> bool {
        !self.rules.is_empty()
    }

    /// Says from now on that nothing of these kinds and numbers is allowed; false if nothing of it was given.
    pub fn revoke(&mut self, nodes: &[(String, (i64, i64))]) -> bool {
        let is_of = |rule: &DeviceRule, (kind, (major, minor)): &(String, (i64, i64))| {
            rule.kind == *kind && (rule.major, rule.minor) == (Some(*major), Some(*minor))
        };
        let before = self.rules.len();
        self.rules
            .retain(|rule| !nodes.iter().any(|node| is_of(rule, node)));
        if self.rules.len() == before {
            return false;
        }
        self.rules.extend(nodes.iter().map(DeviceRule::none_of));
        true
    }

    fn by(&self, theirs: (i64, i64)) -> Option<&Disk> {
        self.disks.iter().find(|disk| disk.theirs == theirs)
    }

    /// The entries that name them, as nodes to be made.
    fn take(&self, devices: &mut Vec<Device>) -> Vec<Device> {
        let mut nodes = Vec::new();
        devices.retain(|entry| {
            let disk = (entry.kind == "b").then(|| self.by((entry.major, entry.minor)));
            let Some(disk) = disk.flatten() else {
                return true;
            };
            let (major, minor) = disk.ours;
            nodes.push(Device {
                major,
                minor,
                ..entry.clone()
            });
            false
        });
        nodes
    }

    /// Takes the entry of a device out that was given whole: its nodes have the owner of the entry, and rules of their
    /// own. One without a path was given without having been asked for.
    fn replace(
        &mut self,
        devices: &mut Vec<Device>,
        path: &str,
        nodes: &[DeviceNode],
    ) -> Vec<Device> {
        let place = devices.iter().position(|entry| entry.path == path);
        let entry = match place {
            Some(place) => {
                let entry = devices.remove(place);
                let theirs = (entry.major, entry.minor);
                self.whole.push((entry.kind.clone(), theirs));
                entry
            }
            None if path.is_empty() => Device::default(),
            None => return Vec::new(),
        };
        let mut given = Vec::new();
        for node in nodes {
            let kind = if node.block { "b" } else { "c" };
            let (major, minor) = (i64::from(node.major), i64::from(node.minor));
            given.push(Device {
                path: format!("/dev/{}", node.name),
                kind: kind.to_owned(),
                major,
                minor,
                ..entry.clone()
            });
            self.rules.push(DeviceRule {
                allow: true,
                kind: kind.to_owned(),
                major: Some(major),
                minor: Some(minor),
                access: "rwm".to_owned(),
            });
        }
        given
    }

    /// Says of the numbers here what `resources` says of the node's. Limits of devices of the node that are no disks here are
    /// the shim's to apply, there, and are dropped.
    pub fn translate(&self, resources: &mut Resources) {
        // All by the rules as they came: the guest's number of one may be the node's of another.
        let rules = resources.devices.clone();
        resources.devices.retain(|rule| !self.is_of_the_node(rule));
        if !rules.is_empty() {
            for disk in &self.disks {
                let allowed = |letter: &char| is_allowed(&rules, disk.theirs, *letter);
                // Where the rules that are left say the same, as in a privileged container, they say it.
                let other = |letter: &char| {
                    is_allowed(&resources.devices, disk.ours, *letter) != allowed(letter)
                };
                let other = "rwm".chars().filter(other);
                let (yes, no): (String, String) = other.partition(allowed);
                resources.devices.extend(rule(false, disk.ours, no));
                resources.devices.extend(rule(true, disk.ours, yes));
            }
        }
        // An update without rules changes none.
        if !rules.is_empty() {
            resources.devices.extend(self.rules.iter().cloned());
        }
        let Some(block_io) = &mut resources.block_io else {
            return;
        };
        let number = |major: &mut i64, minor: &mut i64| {
            let disk = self.by((*major, *minor));
            if let Some(disk) = disk {
                (*major, *minor) = disk.ours;
            }
            disk.is_some()
        };
        let weights = &mut block_io.weight_device;
        weights.retain_mut(|device| number(&mut device.major, &mut device.minor));
        for devices in [
            &mut block_io.throttle_read_bps_device,
            &mut block_io.throttle_write_bps_device,
            &mut block_io.throttle_read_iops_device,
            &mut block_io.throttle_write_iops_device,
        ] {
            devices.retain_mut(|device| number(&mut device.major, &mut device.minor));
        }
    }

    /// Whether a rule is about one device of the node alone: one that the container was given, or a block device that it
    /// was not given and whose number may be another container's disk here.
    fn is_of_the_node(&self, rule: &DeviceRule) -> bool {
        let of_one_given = self.whole.iter().any(|(kind, (major, minor))| {
            rule.allow
                && rule.kind == *kind
                && (rule.major, rule.minor) == (Some(*major), Some(*minor))
        });
        if of_one_given {
            return true;
        }
        let Some(major) = rule.major.filter(|_| rule.kind == "b") else {
            return false;
        };
        let of_a_disk = rule
            .minor
            .is_some_and(|minor| self.by((major, minor)).is_some());
        of_a_disk || rule.allow && DYNAMIC.iter().any(|range| range.contains(&major))
    }
}

fn rule(allow: bool, (major, minor): (i64, i64), access: String) -> Option<DeviceRule> {
    (!access.is_empty()).then(|| DeviceRule {
        allow,
        kind: "b".to_owned(),
        major: Some(major),
        minor: Some(minor),
        access,
    })
}

/// What the rules say of a block device and one kind of access: the last that matches counts.
fn is_allowed(rules: &[DeviceRule], (major, minor): (i64, i64), letter: char) -> bool {
    let covers = |rule: Option<i64>, number| rule.is_none_or(|rule| rule < 0 || rule == number);
    let matching = rules.iter().rev().find(|rule| {
        matches!(rule.kind.as_str(), "" | "a" | "b")
            && covers(rule.major, major)
            && covers(rule.minor, minor)
            && (rule.access.is_empty() || rule.access.contains(letter))
    });
    matching.is_some_and(|rule| rule.allow)
}

#[cfg(test)]
mod tests;
