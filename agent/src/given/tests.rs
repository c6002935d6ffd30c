//! What becomes of a specification that names devices of the node.

use proptest::prelude::*;
use serde_json::json;

use super::*;

fn disks() -> Disks {
    let disk = |theirs, ours, name: &str| Disk {
        theirs,
        ours,
        name: name.to_owned(),
    };
    // The second has the number in the guest that the first has on the node.
    Disks {
        disks: vec![
            disk((254, 0), (254, 16), "vdb"),
            disk((7, 3), (254, 0), "vda"),
        ],
        ..Disks::default()
    }
}

fn shown(rules: &[DeviceRule]) -> Vec<String> {
    let show = |rule: &DeviceRule| {
        let sign = if rule.allow { '+' } else { '-' };
        let number = |n: Option<i64>| n.map_or("*".to_owned(), |n| n.to_string());
        let (major, minor) = (number(rule.major), number(rule.minor));
        format!("{sign}{} {major}:{minor} {}", rule.kind, rule.access)
    };
    rules.iter().map(show).collect()
}

#[test]
fn a_device_that_nobody_asked_for_is_shown_with_a_rule_and_the_mode_of_any_device() {
    let node = DeviceNode {
        name: "dri/card0".to_owned(),
        major: 226,
        ..DeviceNode::default()
    };
    let mut devices = vec![Device {
        path: "/dev/other".to_owned(),
        ..Device::default()
    }];
    let mut given = Disks::default();
    let nodes = given.replace(&mut devices, "", std::slice::from_ref(&node));
    assert_eq!(devices.len(), 1);
    let own = &nodes[0];
    assert_eq!(
        (own.path.as_str(), own.kind.as_str()),
        ("/dev/dri/card0", "c")
    );
    assert_eq!((own.major, own.minor, own.file_mode), (226, 0, None));
    assert_eq!(shown(&given.rules), ["+c 226:0 rwm"]);
    assert!(given.whole.is_empty());
    // One that was asked for under a path that is not there is none.
    assert!(
        given
            .replace(&mut devices, "/dev/vfio/1", &[node])
            .is_empty()
    );
}

#[test]
fn a_device_that_has_gone_is_allowed_to_nobody_who_had_it_whatever_is_said_later() {
    let node = |minor| DeviceNode {
        name: format!("nvme{minor}"),
        major: 242,
        minor,
        ..DeviceNode::default()
    };
    let mut given = Disks::default();
    assert!(!given.may_be_revoked());
    given.replace(&mut Vec::new(), "", &[node(0), node(1)]);
    assert!(given.may_be_revoked());
    let gone = |kind: &str, minor| [(kind.to_owned(), (242, minor))];
    assert!(!given.revoke(&gone("b", 0)) && !given.revoke(&gone("c", 2)));
    assert!(given.revoke(&gone("c", 0)));
    let mut resources = Resources {
        devices: serde_json::from_value(json!([{"allow": true, "access": "rwm"}])).unwrap(),
        ..Resources::default()
    };
    given.translate(&mut resources);
    assert_eq!(
        shown(&resources.devices),
        ["+ *:* rwm", "+c 242:1 rwm", "-c 242:0 rwm"]
    );
}

#[test]
fn a_disk_is_shown_where_it_was_asked_for_with_the_number_that_it_has_here() {
    let mut devices: Vec<Device> = serde_json::from_value(json!([
        {"path": "/dev/data", "type": "b", "major": 7, "minor": 3, "fileMode": 384, "uid": 1000, "gid": 7},
        {"path": "/dev/same", "type": "b", "major": 7, "minor": 3},
        {"path": "/dev/other", "type": "b", "major": 7, "minor": 4},
        {"path": "/dev/char", "type": "c", "major": 7, "minor": 3},
    ]))
    .unwrap();
    let nodes = disks().take(&mut devices);
    let paths: Vec<_> = devices.iter().map(|device| &device.path).collect();
    assert_eq!(paths, ["/dev/other", "/dev/char"]);
    assert_eq!(nodes.len(), 2);
    assert_eq!(nodes[1].path, "/dev/same");
    let node = &nodes[0];
    assert_eq!(node.path, "/dev/data");
    assert_eq!((node.major, node.minor), (254, 0));
    assert_eq!(
        (node.file_mode, node.uid, node.gid),
        (Some(384), Some(1000), Some(7))
    );
}

#[test]
fn a_mount_shows_owner_and_mode_of_the_nodes_node_and_an_entry_changes_nothing_of_the_guests() {
    let disk = |mode, uid, gid| GivenDisk {
        mode,
        uid,
        gid,
        ..GivenDisk::default()
    };
    assert_eq!(owner_shown(&disk(0, 0, 0)), None);
    let mounted = disk(libc::S_IFBLK | 0o660, 0, 6);
    assert_eq!(owner_shown(&mounted), Some(((0, 6), 0o660)));
    // One that nobody may open is shown as that.
    assert_eq!(owner_shown(&disk(libc::S_IFBLK, 0, 0)), Some(((0, 0), 0)));
}

#[test]
fn rules_of_the_nodes_number_become_those_of_the_disks() {
    let mut resources: Resources = serde_json::from_value(json!({"devices": [
        {"allow": false, "access": "rwm"},
        {"allow": true, "type": "b", "major": 254, "minor": 0, "access": "r"},
        {"allow": true, "type": "b", "major": 7, "access": "rw"},
        {"allow": false, "type": "b", "major": 7, "minor": 3, "access": "w"},
        {"allow": true, "type": "b", "major": 253, "minor": 5, "access": "rwm"},
        {"allow": true, "type": "c", "major": 254, "minor": 9, "access": "rwm"},
    ]}))
    .unwrap();
    disks().translate(&mut resources);
    assert_eq!(
        shown(&resources.devices),
        [
            "- *:* rwm",
            // A rule for all loop devices holds for the guest's own too.
            "+b 7:* rw",
            // 253:5 of the node is nothing here, or another container's.
            "+c 254:9 rwm",
            "+b 254:16 r",
            "+b 254:0 r",
        ]
    );
    // The last rule still says that the container is privileged.
    let mut all: Resources = serde_json::from_value(json!({"devices": [
        {"allow": false, "access": "rwm"},
        {"allow": true, "access": "rwm"},
    ]}))
    .unwrap();
    disks().translate(&mut all);
    assert_eq!(shown(&all.devices), ["- *:* rwm", "+ *:* rwm"]);
}

#[test]
fn limits_of_a_disk_are_for_its_number_here_and_those_of_others_are_the_nodes_to_apply() {
    let parse = |value| serde_json::from_value::<Resources>(value).unwrap();
    let mut resources = parse(json!({"blockIO": {
        "weightDevice": [{"major": 8, "minor": 0, "weight": 20}, {"major": 254, "minor": 0, "weight": 10}],
        "throttleReadBpsDevice": [{"major": 254, "minor": 0, "rate": 1}, {"major": 7, "minor": 3, "rate": 2}],
        "throttleWriteIOPSDevice": [{"major": 7, "minor": 3, "rate": 3}],
    }}));
    disks().translate(&mut resources);
    let limits = resources.block_io.unwrap();
    assert_eq!(limits.weight_device.len(), 1);
    assert_eq!(limits.weight_device[0].minor, 16);
    let read = &limits.throttle_read_bps_device;
    assert_eq!((read[0].minor, read[1].major, read[1].minor), (16, 254, 0));
    assert_eq!(limits.throttle_write_iops_device[0].major, 254);
    let mut other = parse(json!({"blockIO": {
        "throttleWriteBpsDevice": [{"major": 8, "minor": 16, "rate": 2}],
    }}));
    disks().translate(&mut other);
    let limits = other.block_io.unwrap();
    assert!(limits.throttle_write_bps_device.is_empty());
}

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
    let nodes = [node("nvme0", false, 3), node("nvme0n1", true, 0)];
    let mut all = Disks::default();
    let given = all.replace(&mut linux.devices, "/dev/vfio/12", &nodes);
    for (path, nodes) in [
        ("/dev/vfio/vfio", &[][..]),
        ("/dev/none", &[node("x", true, 9)]),
    ] {
        assert!(all.replace(&mut linux.devices, path, nodes).is_empty());
    }
    // At its creation, and again by an update, which comes with all rules.
    let mut resources = linux.resources.unwrap();
    let mut update = resources.clone();
    all.translate(&mut resources);
    all.translate(&mut update);
    assert_eq!(shown(&update.devices), shown(&resources.devices));
    let left: Vec<_> = linux.devices.iter().map(|device| &device.path).collect();
    assert_eq!(left, ["/dev/fuse"]);
    let shown: Vec<_> = given
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
            ("/dev/nvme0", "c", 3, Some(1000)),
            ("/dev/nvme0n1", "b", 0, Some(1000)),
        ]
    );
    let mut none = Resources::default();
    all.translate(&mut none);
    assert!(none.devices.is_empty());
    let rules = resources.devices;
    // The one for the host's numbers has gone.
    let minors: Vec<_> = rules.iter().map(|rule| rule.minor).collect();
    assert_eq!(minors, [None, Some(229), Some(3), Some(0)]);
    assert_eq!((rules[3].kind.as_str(), rules[3].major), ("b", Some(259)));
}

fn any_rule() -> impl Strategy<Value = DeviceRule> {
    let number = || prop_oneof![Just(None), Just(Some(-1)), (0..4i64).prop_map(Some)];
    let (kind, access) = ("[abc]?", "r?w?m?");
    (any::<bool>(), kind, number(), number(), access).prop_map(
        |(allow, kind, major, minor, access)| DeviceRule {
            allow,
            kind,
            major,
            minor,
            access,
        },
    )
}

proptest! {
    /// Whatever the rules are, the disk may be used as the device could be.
    #[test]
    fn the_disk_has_the_access_that_the_device_had(
        rules in prop::collection::vec(any_rule(), 1..6),
        number in (0..4i64, 0..4i64),
    ) {
        let disk = Disk { theirs: number, ours: (254, 0), name: "vda".into() };
        let mut resources = Resources { devices: rules.clone(), ..Resources::default() };
        let all = Disks { disks: vec![disk], ..Disks::default() };
        all.translate(&mut resources);
        for letter in "rwm".chars() {
            prop_assert_eq!(
                is_allowed(&resources.devices, (254, 0), letter),
                is_allowed(&rules, number, letter)
            );
        }
    }
}
