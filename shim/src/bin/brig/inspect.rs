//! `brig inspect`: one pod with all that is known of it but secrets: no environments, arguments or values of
//! annotations.

use std::fmt::Write as _;
use std::path::Path;

use brig_shim::error::{Error, Result};
use serde_json::{Value, json};

use crate::cli;
use crate::configuration;
use crate::file_systems;
use crate::look;
use crate::pods;
use crate::seen::{self, Seen};
use crate::terminal::printable_line;

/// The pod, as text or JSON.
///
/// # Errors
/// `NotFound`, or if several are meant.
pub fn pod(base: &Path, pod: &cli::Pod, as_json: bool) -> Result<String> {
    let whole = described(base, pod)?;
    Ok(if as_json {
        format!("{whole:#}\n")
    } else {
        text(&whole)
    })
}

/// Everything of a pod for programs.
///
/// # Errors
/// As of [`pod`].
pub fn described(base: &Path, pod: &cli::Pod) -> Result<Value> {
    let found = pods::find(base, pod)?;
    let mut seen = seen::all(base, |row| {
        (&row.namespace, &row.id) == (&found.namespace, &found.id)
    })?;
    let gone = || Error::not_found(format!("pod {} has just ended", found.id));
    let seen = seen.pop().ok_or_else(gone)?;
    let mut whole = seen.json();
    whole["versions"] = versions(&seen);
    // The guest's own word on its network, which it may have changed.
    let asked = found
        .to_ask()
        .map(|socket| look::bytes(&socket, &["ip".to_owned()]));
    let lines = asked.and_then(Result::ok).map(|answer| {
        let text = String::from_utf8_lossy(&answer).into_owned();
        text.lines().map(str::to_owned).collect::<Vec<_>>()
    });
    // Likewise on its file systems.
    let asked = found
        .to_ask()
        .map(|socket| look::bytes(&socket, &["df".to_owned()]));
    whole["fileSystems"] = match asked {
        Some(Ok(answer)) => file_systems::rows(&answer, &whole["shim"]).into(),
        _ => Value::Null,
    };
    whole["network"] = json!({ "netns": whole["shim"]["netns"], "guest": lines });
    Ok(whole)
}

fn versions(seen: &Seen) -> Value {
    // That of the VMM cannot be read: its jail hides it. It is the shim's.
    let shim = seen.row.processes().find(|(name, _)| *name == "shim");
    let shim = shim.and_then(|(_, pid)| seen::version_of(pid));
    json!({
        "brig": seen.shim["version"],
        "shim": shim,
        "guestKernel": seen.shim["kernelRelease"],
        "kernelFile": seen.configured("kernel"),
    })
}

fn text(whole: &Value) -> String {
    let shim = &whole["shim"];
    let shown = |value: &Value| match value {
        Value::Null => "-".to_owned(),
        Value::String(text) if text.is_empty() => "-".to_owned(),
        Value::String(text) => printable_line(text),
        other => printable_line(&other.to_string()),
    };
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "{name:<12} {value}");
    };
    line("id", shown(&whole["id"]));
    line("namespace", shown(&whole["namespace"]));
    if let Some(pod) = whole["pod"].as_object() {
        line(
            "pod",
            format!("{}/{}", shown(&pod["namespace"]), shown(&pod["name"])),
        );
        line("uid", shown(&pod["uid"]));
    }
    line(
        "state",
        shown(if shim.is_null() {
            &whole["state"]
        } else {
            &shim["state"]
        }),
    );
    line("since", shown(&shim["stateSince"]));
    if !shim["failure"].is_null() {
        line("failure", shown(&shim["failure"]));
    }
    line(
        "processes",
        format!(
            "shim {}, vmm {}",
            shown(&whole["shimPid"]),
            shown(&whole["vmmPid"])
        ),
    );
    let versions = &whole["versions"];
    line(
        "version",
        format!(
            "brig {} in {}",
            shown(&versions["brig"]),
            shown(&versions["shim"])
        ),
    );
    line(
        "kernel",
        format!(
            "{} from {}",
            shown(&versions["guestKernel"]),
            shown(&versions["kernelFile"])
        ),
    );
    line("template", shown(&shim["template"]));
    let memory = &whole["guestMemory"];
    line(
        "memory KiB",
        format!(
            "{} PSS on the node; of {} of the VM {} are resident, {} used by the guest, {} reclaimable",
            shown(&whole["pssKiB"]),
            shown(&memory["sizeKiB"]),
            shown(&memory["residentKiB"]),
            shown(&memory["usedKiB"]),
            shown(&memory["reclaimableKiB"])
        ),
    );
    let size = &shim["size"];
    line(
        "size",
        format!(
            "{} MiB, started with {}, at most {}; {} vCPU, at most {}",
            shown(&size["memoryMiB"]),
            shown(&size["startedWithMiB"]),
            shown(&size["maxMemoryMiB"]),
            shown(&size["vcpus"]),
            shown(&size["maxVcpus"])
        ),
    );
    line("cgroup", shown(&shim["cgroup"][0]));
    line("log level", shown(&shim["logLevel"]));
    let _ = writeln!(text, "\nnetwork (namespace {})", shown(&shim["netns"]));
    for interface in shim["interfaces"].as_array().into_iter().flatten() {
        let _ = writeln!(
            text,
            "  {}: frames by {}",
            shown(&interface["mac"]),
            shown(&interface["framesBy"])
        );
    }
    for entry in whole["network"]["guest"].as_array().into_iter().flatten() {
        let _ = writeln!(text, "  {}", shown(entry).trim_end());
    }
    let devices = shim["devices"].as_array().into_iter().flatten();
    for device in devices {
        let _ = writeln!(
            text,
            "\ndevices of IOMMU group {}: {} on the guest's bus, for container {}",
            shown(&device["iommuGroup"]),
            shown(&device["guestFunctions"]),
            shown(&device["container"])
        );
    }
    for disk in shim["disks"].as_array().into_iter().flatten() {
        let access = if disk["writable"] == true { "rw" } else { "ro" };
        let _ = writeln!(
            text,
            "\nblock device {} of the node: {} in the guest ({access}), for containers {}",
            shown(&disk["device"]),
            shown(&disk["guestName"]),
            shown(&disk["containers"])
        );
    }
    for sentence in shim["unsettledDevices"].as_array().into_iter().flatten() {
        let _ = writeln!(text, "\n{}", shown(sentence));
    }
    for volume in shim["volumes"].as_array().into_iter().flatten() {
        let access = if volume["writable"] == true {
            "rw"
        } else {
            "ro"
        };
        let _ = writeln!(
            text,
            "\nvolume {} on {}: {} mounted in the guest ({access})",
            shown(&volume["path"]),
            shown(&volume["device"]),
            shown(&volume["fileSystem"])
        );
    }
    let rows = whole["fileSystems"].as_array();
    if rows.is_some_and(|rows| !rows.is_empty()) {
        text.push_str("\nfile systems, as the guest tells\n");
    }
    for row in rows.into_iter().flatten() {
        let line = printable_line(&file_systems::line(row));
        let _ = writeln!(text, "  {line}");
    }
    for container in shim["containers"].as_array().into_iter().flatten() {
        let _ = writeln!(
            text,
            "\ncontainer {} {} ({}) {} {}",
            shown(&container["id"]),
            shown(&container["name"]),
            shown(&container["kind"]),
            shown(&container["state"]),
            shown(&container["image"])
        );
        for mount in container["mounts"].as_array().into_iter().flatten() {
            let access = if mount["readonly"] == true {
                "ro"
            } else {
                "rw"
            };
            let _ = writeln!(
                text,
                "  {} {} from {} ({access})",
                shown(&mount["destination"]),
                shown(&mount["type"]),
                shown(&mount["source"])
            );
        }
    }
    if !shim["config"].is_null() {
        let lines = configuration::lines(&shim["config"]);
        let _ = write!(text, "\nconfiguration in force\n{lines}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_a_guest_or_a_user_has_named_moves_the_cursor() {
        let evil = "\u{1b}[2Jx\ny";
        let whole = json!({
            "id": evil, "pod": { "namespace": evil, "name": evil, "uid": evil },
            "network": { "guest": [evil] }, "versions": { "guestKernel": evil },
            "shim": { "state": evil, "failure": evil, "devices": [{ "container": evil }],
                "containers": [{ "id": evil, "name": evil, "mounts": [{ "source": evil }] }] },
        });
        let text = text(&whole);
        assert!(!text.contains('\u{1b}') && !text.contains("x\ny"), "{text}");
        assert!(text.matches("\\u{1b}[2Jx y").count() >= 10, "{text}");
    }
}
