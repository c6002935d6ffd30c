//! PCI devices: what the node as a whole has for giving them to pods, each of them, and the lists of the handlers. Pods
//! run without any, so nothing here is fatal.

use std::fs;
use std::path::{Path, PathBuf};

use brig_shim::asked::config::Config;
use brig_shim::node::vfio::{Node, Refusal, Room, Surveyed};
use serde_json::json;

use super::finding::{Finding, Outcome};
use crate::configured::{self, Configured};
use crate::handlers::CONTAINERD;

/// All about devices, for pods with this configuration and for those of containerd's handlers.
pub fn findings(config: &Config) -> Vec<Finding> {
    let node = Node::new();
    let room = room(config);
    let starter = node.process("containerd");
    let mut findings = vec![
        of("iommu", node.iommu()),
        of("vfio", node.interface()),
        of(
            "locked memory",
            node.pinnable(config.memory, starter.as_ref()),
        ),
    ];
    let devices = node.survey(&room);
    findings.extend(devices.into_iter().map(device));
    findings.extend(listed(&node, config, &room, "the configuration"));
    let command = starter.map(|process| process.command()).unwrap_or_default();
    let file = configured::file_of(&command).unwrap_or_else(|| PathBuf::from(CONTAINERD));
    for handler in configured::handlers(&file) {
        findings.extend(of_handler(&node, &handler));
    }
    findings
}

/// What a VM with this configuration has for devices.
fn room(config: &Config) -> Room {
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
    let mut finding = of("pci device", told);
    finding.device = Some(json!({
        "address": address,
        "id": id,
        "iommu_group": group.and_then(|group| group.parse::<u32>().ok()),
        "driver": driver,
        "can_be_given": finding.outcome == Outcome::Good,
    }));
    finding
}

/// Entries of a handler's list that no device of the node is meant by, or none that can be given.
fn listed(node: &Node, config: &Config, room: &Room, whose: &str) -> Vec<Finding> {
    let missing = node.missing(&config.devices, room).into_iter();
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

/// A handler of containerd's whose configuration is another one than what is checked as a whole.
fn of_handler(node: &Node, handler: &Configured) -> Vec<Finding> {
    let Some(file) = &handler.file else {
        return Vec::new();
    };
    let whose = format!("handler {} ({})", handler.name, file.display());
    let note = |detail: String, fix: &str| {
        let finding = Finding::of("handler", Err(format!("{whose}: {detail}")));
        finding.or(fix.to_owned()).noted()
    };
    let config = match Config::load(Some(Path::new(file))) {
        Ok(config) => config,
        Err(error) => {
            let fix = "mend that line: 'brig config default' explains every key";
            return vec![note(
                format!("{}, so its pods are refused", error.message),
                fix,
            )];
        }
    };
    let mut findings = listed(node, &config, &room(&config), &whose);
    if let Some(bundle) = config.driver_bundle.filter(|bundle| !bundle.is_file()) {
        findings.push(note(
            format!("its driver bundle {} is not there", bundle.display()),
            "put it there, or set driver_bundle in that file: until then containers that are given a device are refused",
        ));
    }
    if let Some(socket) = config.pod_resources.filter(|socket| !socket.exists()) {
        findings.push(note(
            format!("kubelet's socket {} (pod_resources) is not there", socket.display()),
            "start kubelet, or set pod_resources in that file to where its socket is: until then its pods are refused",
        ));
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(findings: &[Finding]) -> String {
        findings
            .iter()
            .map(|finding| format!("{finding}\n"))
            .collect()
    }

    #[test]
    fn a_handler_that_names_what_the_node_does_not_have_is_told_with_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("gpu.toml");
        let of = |text: &str| {
            fs::write(&file, text).unwrap();
            let handler = Configured {
                name: "brig-gpu".to_owned(),
                file: Some(file.clone()),
            };
            let found = of_handler(&Node::new(), &handler);
            assert!(found.iter().all(|finding| !finding.is_fatal()));
            said(&found)
        };
        assert_eq!(of("vcpus = 2\n"), "");
        let missing = of(
            "devices = [\"ffff:ff:1f.7\"]\ndriver_bundle = \"/nonexistent/b\"\npod_resources = \"/nonexistent/s\"\n",
        );
        for words in [
            "ffff:ff:1f.7 is on the list of handler brig-gpu (",
            "this node has no such device, so its pods are refused",
            "its driver bundle /nonexistent/b is not there",
            "kubelet's socket /nonexistent/s",
        ] {
            assert!(missing.contains(words), "{missing}");
        }
        let wrong = of("vcpu = 2\n");
        assert!(wrong.contains("so its pods are refused"), "{wrong}");
        let none = Configured {
            name: "brig".to_owned(),
            file: None,
        };
        assert!(of_handler(&Node::new(), &none).is_empty());
    }

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
