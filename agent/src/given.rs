//! Devices of the node that a container asked for, by the nodes that the guest's drivers have made for them.
//!
//! The specification names them as the host does (`/dev/vfio/12`), which means nothing here. Trusts the host.
use brig_agent_protocol::agent::{DeviceNode, GivenDevice};

use crate::{
    error::Result,
    pci,
    spec::{Device, DeviceRule, Linux},
};

/// Replaces the entries of `linux.devices` that name them.
///
/// # Errors
/// `NotFound` for a device that is not there.
pub async fn apply(linux: &mut Linux, given: &[GivenDevice]) -> Result<()> {
    for device in given {
        let mut nodes = Vec::new();
        for function in &device.functions {
            nodes.extend(pci::nodes(*function).await?);
        }
        replace(linux, &device.path, &nodes);
    }
    Ok(())
}

/// The nodes have the owner of the entry whose place they take, and its access: a device that was given is given whole.
fn replace(linux: &mut Linux, path: &str, nodes: &[DeviceNode]) {
    let Some(place) = linux.devices.iter().position(|entry| entry.path == path) else {
        return;
    };
    let entry = linux.devices.remove(place);
    if let Some(resources) = &mut linux.resources {
        // The host's numbers may be another device's here.
        let numbers = (Some(entry.major), Some(entry.minor));
        resources.devices.retain(|rule| {
            !(rule.allow && rule.kind == entry.kind && (rule.major, rule.minor) == numbers)
        });
    }
    for node in nodes {
        let kind = if node.block { "b" } else { "c" };
        let (major, minor) = (i64::from(node.major), i64::from(node.minor));
        linux.devices.push(Device {
            path: format!("/dev/{}", node.name),
            kind: kind.to_owned(),
            major,
            minor,
            ..entry.clone()
        });
        // Without rules everything is allowed.
        if let Some(resources) = &mut linux.resources {
            resources.devices.push(DeviceRule {
                allow: true,
                kind: kind.to_owned(),
                major: Some(major),
                minor: Some(minor),
                access: "rwm".to_owned(),
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_nodes_of_the_guest_take_the_place_of_the_hosts_with_its_owner_and_a_rule_of_their_own() {
        let mut linux: Linux = serde_json::from_value(json!({
            "devices": [
                {"path": "/dev/vfio/12", "type": "c", "major": 240, "minor": 0, "uid": 1000, "gid": 7, "fileMode": 384},
                {"path": "/dev/vfio/vfio", "type": "c", "major": 10, "minor": 196},
                {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229},
            ],
            "resources": {"devices": [
                {"allow": false, "access": "rwm"},
                {"allow": true, "type": "c", "major": 240, "minor": 0, "access": "rw"},
                {"allow": true, "type": "c", "major": 10, "minor": 229, "access": "rw"},
            ]},
        }))
        .unwrap();
        let node = |name: &str, block, minor| DeviceNode {
            name: name.to_owned(),
            block,
            major: 259,
            minor,
            ..DeviceNode::default()
        };
        replace(
            &mut linux,
            "/dev/vfio/12",
            &[node("nvme0", false, 3), node("nvme0n1", true, 0)],
        );
        replace(&mut linux, "/dev/vfio/vfio", &[]);
        replace(&mut linux, "/dev/none", &[node("x", true, 9)]);
        let shown: Vec<_> = linux
            .devices
            .iter()
            .map(|device| {
                (
                    device.path.as_str(),
                    device.kind.as_str(),
                    device.minor,
                    device.uid,
                )
            })
            .collect();
        assert_eq!(
            shown,
            [
                ("/dev/fuse", "c", 229, None),
                ("/dev/nvme0", "c", 3, Some(1000)),
                ("/dev/nvme0n1", "b", 0, Some(1000)),
            ]
        );
        let rules = linux.resources.unwrap().devices;
        // The one for the host's numbers has gone.
        let minors: Vec<_> = rules.iter().map(|rule| rule.minor).collect();
        assert_eq!(minors, [None, Some(229), Some(3), Some(0)]);
        assert_eq!((rules[3].kind.as_str(), rules[3].major), ("b", Some(259)));
    }
}
