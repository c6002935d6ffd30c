//! PCI devices: what the node as a whole has for giving them to pods, each of them, and the lists of configurations. Pods
//! run without any, so nothing here is fatal.

use std::fs;

use brig_shim::asked::config::Config;
use brig_shim::node::daemon::Daemon;
use brig_shim::node::vfio::{Node, Refusal, Room, Survey, Surveyed};
use serde_json::json;

use super::finding::Finding;

/// All about devices, for pods with this configuration, started by `containerd`.
pub fn findings(
    config: &Config,
    node: &Node,
    survey: &Survey<'_>,
    containerd: Option<&Daemon>,
) -> Vec<Finding> {
    let room = room(config);
    let mut findings = vec![
        of("iommu", node.iommu()),
        of("vfio", node.interface()),
        of("locked memory", node.pinnable(config.memory, containerd)),
    ];
    findings.extend(survey.devices(&room).into_iter().map(device));
    findings.extend(listed(survey, config, &room, "the configuration"));
    findings
}

/// What a VM with this configuration has for devices.
pub(super) fn room(config: &Config) -> Room {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    Room {
        memory: config.memory,
        max_memory: config.max_memory,
        vcpus: config.vcpus,
        phys_bits: Room::phys_bits_of(&cpuinfo),
    }
}

fn of(what: &'static str, result: Result<String, Refusal>) -> Finding {
    match result {
        Ok(detail) => Finding::of(what, Ok(detail)),
        Err(refusal) => Finding::of(what, Err(refusal.why)).or(refusal.fix).noted(),
    }
}

fn device(surveyed: Surveyed) -> Finding {
    let Surveyed {
        address,
        id,
        group,
        driver,
        verdict,
    } = surveyed;
    let say = |said: String| format!("{address} ({id}): {said}");
    let told = verdict.map(say).map_err(|mut refusal| {
        refusal.why = say(refusal.why);
        refusal
    });
    let finding = of("pci device", told);
    let parts = json!({
        "address": address,
        "id": id,
        "iommu_group": group.and_then(|group| group.parse::<u32>().ok()),
        "driver": driver,
        "can_be_given": finding.is_good(),
    });
    finding.about("device", parts)
}

/// Entries of a handler's list that no device of the node is meant by, or none that can be given.
pub(super) fn listed(
    survey: &Survey<'_>,
    config: &Config,
    room: &Room,
    whose: &str,
) -> Vec<Finding> {
    let missing = survey.missing(&config.devices, room).into_iter();
    let finding = |(wish, why)| {
        let detail =
            format!("{wish} is on the list of {whose}, but {why}, so its pods are refused");
        let finding = Finding::of("devices", Err(detail));
        finding
            .or("name one that a line above says can be given")
            .noted()
    };
    missing.map(finding).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_told_to_programs_by_its_parts() {
        let surveyed = |verdict| Surveyed {
            address: "0000:3b:00.0".to_owned(),
            id: "10de:2330".to_owned(),
            group: Some("12".to_owned()),
            driver: Some("nouveau".to_owned()),
            verdict,
        };
        let refusal = Refusal {
            why: "the node uses it".to_owned(),
            fix: "bind it".to_owned(),
        };
        let finding = device(surveyed(Err(refusal)));
        let expected = json!({"check": "pci device", "outcome": "note",
            "detail": "0000:3b:00.0 (10de:2330): the node uses it", "fix": "bind it",
            "device": {"address": "0000:3b:00.0", "id": "10de:2330", "iommu_group": 12, "driver": "nouveau",
                "can_be_given": false}});
        assert_eq!(finding.json(), expected);
        let given = device(surveyed(Ok("can be given".to_owned()))).json();
        assert_eq!(given["device"]["can_be_given"], json!(true));
        assert_eq!(given["outcome"], json!("ok"));
    }
}
