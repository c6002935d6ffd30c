//! What a privileged container asks for. containerd puts every device of the node into its specification, and what was
//! asked for beside them: a device plugin's answer, a `volumeDevices`, `ctr run --device`.
//!
//! Trusted: containerd, who wrote it.

use crate::asked::spec::Device;

/// The null device, which every container has without asking, and every node.
const NULL: (u32, u32) = (1, 3);

/// Those of the entries that were asked for: there twice, or at a path where `node_has` none of their kind and numbers. All
/// of them if the list is not the node's (`privileged_without_host_devices`). None is the same as another. A node may have
/// one device at two paths.
pub(super) fn asked(devices: &[Device], node_has: impl Fn(&Device) -> bool) -> Vec<Device> {
    let is_the_nodes = devices
        .iter()
        .any(|device| device.character() == Some(NULL));
    let twice = |device: &Device| devices.iter().filter(|one| *one == device).nth(1).is_some();
    let mut asked: Vec<Device> = Vec::new();
    for device in devices {
        if !asked.contains(device) && (!is_the_nodes || twice(device) || !node_has(device)) {
            asked.push(device.clone());
        }
    }
    asked
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::asked::spec::Spec;

    /// `kind major minor path` of each.
    fn devices(entries: &[&str]) -> Vec<Device> {
        let entry = |entry: &&str| {
            let parts: Vec<&str> = entry.split(' ').collect();
            let number = |at: usize| parts[at].parse::<i64>().unwrap();
            json!({"type": parts[0], "major": number(1), "minor": number(2), "path": parts[3]})
        };
        let list: Vec<_> = entries.iter().map(entry).collect();
        let spec = json!({"linux": {"devices": list}}).to_string();
        Spec::parse(spec.as_bytes()).unwrap().devices().to_vec()
    }

    fn paths(entries: &[&str], node_has: impl Fn(&Device) -> bool) -> Vec<String> {
        let asked = asked(&devices(entries), node_has);
        asked.into_iter().map(|device| device.path).collect()
    }

    const NODE: [&str; 4] = [
        "c 1 3 /dev/null",
        "c 240 12 /dev/vfio/12",
        "b 7 3 /dev/loop3",
        "b 240 12 /dev/nvme0n1",
    ];

    #[test]
    fn of_a_list_of_all_of_the_node_nothing_was_asked_for() {
        assert!(paths(&NODE, |_| true).is_empty());
        assert!(asked(&[], |_| true).is_empty());
    }

    #[test]
    fn what_is_named_beside_the_nodes_list_was_asked_for_once() {
        let entry = |more: &'static str| {
            let mut entries = NODE.to_vec();
            entries.insert(0, more);
            entries
        };
        assert_eq!(
            paths(&entry("c 240 12 /dev/vfio/12"), |_| true),
            ["/dev/vfio/12"]
        );
        // Another name of it, at a place where the node has nothing.
        let here = |device: &Device| device.path != "/dev/data";
        assert_eq!(paths(&entry("b 7 3 /dev/data"), here), ["/dev/data"]);
        // The node's second name of one.
        assert!(paths(&entry("b 7 3 /dev/mapper/three"), |_| true).is_empty());
        // One that has come to the node since.
        let new = |device: &Device| device.path != "/dev/sdq";
        assert_eq!(paths(&entry("b 65 0 /dev/sdq"), new), ["/dev/sdq"]);
    }

    #[test]
    fn a_list_that_is_not_the_nodes_was_asked_for() {
        assert_eq!(paths(&NODE[1..3], |_| true), ["/dev/vfio/12", "/dev/loop3"]);
    }
}
