//! PCI devices: what the node as a whole has for giving them to pods, each of them, and the lists of configurations. Pods
//! run without any, so nothing here is fatal.

use std::fs;

use brig_shim::asked::config::Config;
use brig_shim::node::daemon::Daemon;
use brig_shim::node::vfio::{Node, Refusal, Room, Survey, Surveyed};
use serde_json::json;

use super::drivers::Drivers;
use super::finding::Finding;

/// All about devices, for pods with this configuration, whose guests have these `drivers`, started by `containerd`.
pub fn findings(
    config: &Config,
    node: &Node,
    survey: &Survey<'_>,
    drivers: &Drivers,
    containerd: Option<&Daemon>,
) -> Vec<Finding> {
    let room = room(config);
    let mut findings = vec![
        of("iommu", node.iommu()),
        of("vfio", node.interface()),
        of("locked memory", node.pinnable(config.memory, containerd)),
    ];
    let devices = survey.devices(&room).into_iter();
    findings.extend(devices.map(|surveyed| device(surveyed, drivers)));
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

/// One that can be given is of no use to a guest that has no driver for it.
fn device(surveyed: Surveyed, drivers: &Drivers) -> Finding {
    let Surveyed {
        address,
        id,
        alias,
        group,
        driver,
        verdict,
    } = surveyed;
    let can_be_given = verdict.is_ok();
    let in_guest = drivers.of(&alias);
    let told = verdict.and_then(|said| match in_guest.as_deref() {
        None => Ok(said),
        Some([]) => Err(Refusal {
            why: format!("{said}, but no driver of the guest takes it"),
            fix: "have a handler with a driver bundle that brings one (driver_bundle; docs/driver-bundles.md)".to_owned(),
        }),
        Some(names) => Ok(format!("{said}; its driver in the guest: {}", names.join(", "))),
    });
    let say = |said: String| format!("{address} ({id}): {said}");
    let told = told.map(say).map_err(|mut refusal| {
        refusal.why = say(refusal.why);
        refusal
    });
    let parts = json!({
        "address": address,
        "id": id,
        "iommu_group": group.and_then(|group| group.parse::<u32>().ok()),
        "driver": driver,
        "guest_drivers": in_guest,
        "can_be_given": can_be_given,
    });
    of("pci device", told).about("device", parts)
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
            alias: "pci:v000010DEd00002330sv*".to_owned(),
            group: Some("12".to_owned()),
            driver: Some("nouveau".to_owned()),
            verdict,
        };
        let refusal = Refusal {
            why: "the node uses it".to_owned(),
            fix: "bind it".to_owned(),
        };
        let dir = tempfile::tempdir().unwrap();
        let config = Config {
            modules: dir.path().join("modules.erofs"),
            driver_bundle: None,
            ..Config::installed()
        };
        let drivers = |list: Option<&str>| {
            if let Some(list) = list {
                fs::write(dir.path().join("modules.alias"), list).unwrap();
            }
            let mut drivers = Drivers::default();
            drivers.add(&config);
            drivers
        };
        let unknown = drivers(None);
        let finding = device(surveyed(Err(refusal.clone())), &unknown);
        let mut expected = json!({"check": "pci device", "outcome": "note",
            "detail": "0000:3b:00.0 (10de:2330): the node uses it", "fix": "bind it",
            "device": {"address": "0000:3b:00.0", "id": "10de:2330", "iommu_group": 12, "driver": "nouveau",
                "guest_drivers": null, "can_be_given": false}});
        assert_eq!(finding.json(), expected);
        let given =
            |drivers: &Drivers| device(surveyed(Ok("can be given".to_owned())), drivers).json();
        assert_eq!(given(&unknown)["device"]["can_be_given"], json!(true));
        assert_eq!(given(&unknown)["outcome"], json!("ok"));
        let none = drivers(Some("builtin pci:v00001AF4d* virtio_pci\n"));
        // What keeps it from being given comes first.
        expected["device"]["guest_drivers"] = json!([]);
        assert_eq!(device(surveyed(Err(refusal)), &none).json(), expected);
        let told = given(&none);
        assert_eq!(told["outcome"], json!("note"));
        assert_eq!(told["device"]["can_be_given"], json!(true));
        let said = told["detail"].as_str().unwrap();
        assert!(
            said.ends_with("can be given, but no driver of the guest takes it"),
            "{said}"
        );
        assert!(told["fix"].as_str().unwrap().contains("driver_bundle"));
        let told = given(&drivers(Some("builtin pci:v000010DEd* nova\n")));
        assert_eq!(told["outcome"], json!("ok"));
        assert_eq!(told["device"]["guest_drivers"], json!(["nova"]));
        let said = told["detail"].as_str().unwrap();
        assert!(said.ends_with("; its driver in the guest: nova"), "{said}");
    }
}
