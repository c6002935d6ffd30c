//! The edits of a driver bundle in a container's specification, as CDI says: variables replace those of their name, a node
//! replaces one at its path, mounts come after the container's own.
use super::numbers::{self, Numbers};
use crate::{
    bundle::cdi::{Edits, Mount, Node},
    control::MountSource,
    given::Given,
    spec::{self, Spec},
    variables,
};

/// What a mount without options has.
const OPTIONS: [&str; 4] = ["ro", "nosuid", "nodev", "rbind"];

/// # Errors
/// Names a device that there is not.
pub fn apply(
    spec: &mut Spec,
    given: &mut Given,
    edits: &[Edits],
) -> Result<Vec<(u32, MountSource)>, String> {
    let mut sources = Vec::new();
    for edits in edits {
        if let Some(process) = &mut spec.process {
            for entry in &edits.env {
                variables::set(&mut process.env, entry);
            }
            let gids = &mut process.user.additional_gids;
            for gid in &edits.additional_gids {
                if !gids.contains(gid) {
                    gids.push(*gid);
                }
            }
        }
        for node in &edits.device_nodes {
            let numbers =
                numbers::find(node).map_err(|error| format!("the driver bundle: {error}"))?;
            add_node(spec, given, node, numbers);
        }
        for mount in &edits.mounts {
            add_mount(spec, mount, &mut sources);
        }
    }
    Ok(sources)
}

fn add_node(spec: &mut Spec, given: &mut Given, node: &Node, (kind, major, minor): Numbers) {
    let device = spec::Device {
        path: node.path.clone(),
        kind: kind.to_string(),
        major: i64::from(major),
        minor: i64::from(minor),
        file_mode: node.file_mode,
        uid: node.uid,
        gid: node.gid,
    };
    let access = match node.permissions.as_str() {
        "" => "rwm",
        given => given,
    };
    given.add(&mut spec.linux, device, access);
}

fn add_mount(spec: &mut Spec, mount: &Mount, sources: &mut Vec<(u32, MountSource)>) {
    let is_bind = matches!(mount.kind.as_str(), "" | "bind" | "none");
    if is_bind && let Ok(index) = u32::try_from(spec.mounts.len()) {
        sources.push((index, MountSource::Bundle(mount.host_path.clone())));
    }
    let options = match mount.options.as_slice() {
        [] if is_bind => OPTIONS.map(str::to_owned).to_vec(),
        given => given.to_vec(),
    };
    spec.mounts.push(spec::Mount {
        destination: mount.container_path.clone(),
        kind: if is_bind {
            "bind".into()
        } else {
            mount.kind.clone()
        },
        source: mount.host_path.clone(),
        options,
        ..spec::Mount::default()
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn edits_replace_variables_and_nodes_and_add_mounts_rules_and_groups() {
        let mut spec: Spec = serde_json::from_value(json!({
            "process": {"env": ["PATH=/bin", "LIBRARY=old", "LIBRARY_2=x"], "user": {"additionalGids": [5]}},
            "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
            "linux": {
                "devices": [{"path": "/dev/gpu0", "type": "c", "major": 9, "minor": 9}],
                "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            },
        }))
        .unwrap();
        let edits: Edits = serde_json::from_value(json!({
            "env": ["LIBRARY=new"],
            "additionalGids": [5, 44],
            "deviceNodes": [{"path": "/dev/gpu0", "hostPath": "/dev/null", "fileMode": 432, "gid": 44, "permissions": "rw"}],
            "mounts": [
                {"hostPath": "/usr/lib/libgpu.so", "containerPath": "/usr/lib/libgpu.so"},
                {"hostPath": "tmpfs", "containerPath": "/run/gpu", "type": "tmpfs", "options": ["size=1m"]},
            ],
        }))
        .unwrap();
        let mut given = Given::default();
        let sources = apply(&mut spec, &mut given, &[edits]).unwrap();
        let process = spec.process.unwrap();
        assert_eq!(process.env, ["PATH=/bin", "LIBRARY_2=x", "LIBRARY=new"]);
        assert_eq!(process.user.additional_gids, [5, 44]);
        assert!(spec.linux.devices.is_empty());
        let [device] = given.nodes.as_slice() else {
            panic!("{:?}", given.nodes)
        };
        assert_eq!((device.major, device.minor, device.gid), (1, 3, Some(44)));
        assert_eq!(device.path, "/dev/gpu0");
        let mut resources = spec.linux.resources.unwrap();
        let rules = &resources.devices;
        assert_eq!((rules.len(), rules[1].access.as_str()), (2, "rw"));
        // An update of all rules leaves the node to the container.
        resources.devices.truncate(1);
        given.disks.translate(&mut resources);
        let rules = &resources.devices;
        assert_eq!((rules.len(), rules[1].access.as_str()), (2, "rw"));
        assert_eq!(spec.mounts[1].options, OPTIONS);
        assert_eq!(spec.mounts[2].kind, "tmpfs");
        let [(1, MountSource::Bundle(path))] = sources.as_slice() else {
            panic!("{sources:?}")
        };
        assert_eq!(path, "/usr/lib/libgpu.so");
    }

    #[test]
    fn a_node_that_the_guest_lacks_is_named() {
        let mut spec: Spec = serde_json::from_value(json!({"process": {}})).unwrap();
        let edits: Edits =
            serde_json::from_value(json!({"deviceNodes": [{"path": "/dev/brig-none"}]})).unwrap();
        assert!(
            apply(&mut spec, &mut Given::default(), &[edits])
                .unwrap_err()
                .contains("/dev/brig-none")
        );
    }
}
