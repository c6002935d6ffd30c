//! Everything that can be seen of the pods of this node, from /proc, their shims, and their guests' own word on their
//! memory, which is the guests' to say.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use brig_shim::asked::spec::{self, Spec};
use brig_shim::containerd::debug_service::Method;
use brig_shim::error::Result;
use serde_json::{Value, json};

use crate::pods::{self, Row};
use crate::processes::{Usage, guest_memory_size, kib, pss};
use crate::shims;

/// How long one pod may keep the others waiting.
const PATIENCE: Duration = Duration::from_secs(3);

/// One pod.
#[derive(Debug)]
pub struct Seen {
    /// What its journal tells.
    pub row: Row,
    /// What its shim tells, with the containers' names; null without an answer.
    pub shim: Value,
    /// KiB.
    pub memory: Memory,
    /// CPU time of its processes in seconds.
    pub cpu: f64,
}

/// Memory of a pod in KiB, as far as it is known.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// Proportional set size of its processes, the guest's memory included.
    pub pss: u64,
    /// Size of the VM's memory.
    pub size: Option<u64>,
    /// Of that what takes up memory of the node.
    pub resident: Option<u64>,
    /// What the guest says that it uses and cannot do without (MemTotal less MemAvailable).
    pub guest_used: Option<u64>,
}

impl Memory {
    /// What the node could have back: memory of the guest that takes up the node's and that the guest could do
    /// without, as cached files.
    #[must_use]
    pub fn reclaimable(&self) -> Option<u64> {
        Some(self.resident?.saturating_sub(self.guest_used?))
    }
}

/// All pods below `base`, or those that `wanted` lets pass.
///
/// # Errors
/// If no runtime is to be had to ask the shims with.
pub fn all(base: &Path, wanted: impl Fn(&Row) -> bool) -> Result<Vec<Seen>> {
    let rows: Vec<Row> = pods::rows(base).into_iter().filter(wanted).collect();
    let sockets: Vec<_> = rows.iter().map(Row::to_ask).collect();
    let told = shims::ask_all_json(sockets.clone(), Method::Inspect, PATIENCE)?;
    let free = json!({ "words": ["free"] });
    let free = shims::ask_all(sockets, Method::Look, &free, PATIENCE)?;
    let seen = rows.into_iter().zip(told).zip(free);
    Ok(seen
        .map(|((row, shim), free)| {
            let mut memory = Memory {
                guest_used: free.and_then(|free| used(&String::from_utf8_lossy(&free))),
                ..Memory::default()
            };
            let mut cpu = 0.0;
            for (name, pid) in row.processes() {
                memory.pss += pss(pid).unwrap_or(0);
                cpu += Usage::read(pid).map_or(0.0, |usage| usage.cpu);
                if name == "vmm"
                    && let Some((size, resident)) = guest_memory_size(pid)
                {
                    (memory.size, memory.resident) = (Some(size), Some(resident));
                }
            }
            let mut shim = shim.unwrap_or(Value::Null);
            for container in shim
                .get_mut("containers")
                .and_then(Value::as_array_mut)
                .into_iter()
                .flatten()
            {
                name(container);
            }
            Seen {
                row,
                shim,
                memory,
                cpu,
            }
        })
        .collect())
}

impl Seen {
    /// The state as the shim knows it, else as the journal does.
    #[must_use]
    pub fn state(&self) -> &str {
        self.shim["state"].as_str().unwrap_or(self.row.state)
    }

    /// Its containers.
    #[must_use]
    pub fn containers(&self) -> &[Value] {
        self.shim["containers"]
            .as_array()
            .map_or(&[], Vec::as_slice)
    }

    /// A key of its configuration in force.
    #[must_use]
    pub fn configured(&self, key: &str) -> &Value {
        &self.shim["config"][key]["value"]
    }

    /// For programs.
    #[must_use]
    pub fn json(&self) -> Value {
        let mut all = self.row.json();
        let Memory {
            size,
            resident,
            guest_used,
            ..
        } = self.memory;
        all["cpuSeconds"] = json!(self.cpu);
        all["guestMemory"] = json!({
            "sizeKiB": size,
            "residentKiB": resident,
            "usedKiB": guest_used,
            "reclaimableKiB": self.memory.reclaimable(),
        });
        all["shim"] = self.shim.clone();
        all
    }
}

/// Adds to a container what its bundle tells of it: names, and where its mounts are. Nothing else of the
/// specification is shown.
fn name(container: &mut Value) {
    let bundle = container["bundle"].as_str().unwrap_or_default();
    let path = Path::new(bundle).join("config.json");
    let Ok(bytes) = spec::read(&path) else {
        return;
    };
    let Ok(spec) = Spec::parse(&bytes) else {
        return;
    };
    container["name"] = json!(spec.annotation("io.kubernetes.cri.container-name"));
    container["image"] = json!(spec.annotation("io.kubernetes.cri.image-name"));
    container["kind"] = json!(spec.annotation("io.kubernetes.cri.container-type"));
    let whole: Value = serde_json::from_slice(&bytes).unwrap_or_default();
    let mounts = whole["mounts"].as_array().into_iter().flatten();
    let mounts = mounts.map(|mount| {
        let options = mount["options"].as_array().into_iter().flatten();
        let readonly = options.into_iter().any(|option| option == "ro");
        json!({
            "destination": mount["destination"],
            "type": mount["type"],
            "source": mount["source"],
            "readonly": readonly,
        })
    });
    container["mounts"] = mounts.collect();
}

/// KiB that a guest cannot do without, from its /proc/meminfo.
fn used(meminfo: &str) -> Option<u64> {
    let fields: BTreeMap<&str, u64> = meminfo
        .lines()
        .filter_map(|line| {
            let (name, value) = line.split_once(':')?;
            Some((name, kib(value)?))
        })
        .collect();
    fields
        .get("MemTotal")?
        .checked_sub(*fields.get("MemAvailable")?)
}

/// The prefix of the installation, or the directory, that a process runs from: a version of Brig.
#[must_use]
pub fn version_of(pid: u32) -> Option<String> {
    let binary = fs::read_link(format!("/proc/{pid}/exe")).ok()?;
    Some(binary.parent()?.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_guest_uses_is_what_it_cannot_do_without() {
        let meminfo =
            "MemTotal:  200000 kB\nMemFree: 5 kB\nMemAvailable:   150000 kB\nHugePages_Total: 0\n";
        assert_eq!(used(meminfo), Some(50_000));
        for wrong in [
            "",
            "MemTotal: 1 kB\nMemAvailable: 2 kB",
            "MemTotal: x\nMemAvailable: 1",
        ] {
            assert_eq!(used(wrong), None);
        }
        let memory = Memory {
            resident: Some(70_000),
            guest_used: Some(50_000),
            ..Memory::default()
        };
        assert_eq!(memory.reclaimable(), Some(20_000));
        assert_eq!(Memory::default().reclaimable(), None);
    }

    #[test]
    fn of_a_specification_only_names_and_places_are_shown() {
        let dir = tempfile::tempdir().unwrap();
        let spec = r#"{"process":{"args":["a-secret"],"env":["PASSWORD=a-secret"]},"annotations":
            {"io.kubernetes.cri.container-name":"web","x":"a-secret"},"mounts":[{"destination":"/d","type":"bind",
            "source":"/s","options":["ro","password=a-secret"]}]}"#;
        fs::write(dir.path().join("config.json"), spec).unwrap();
        let mut container = json!({ "bundle": dir.path() });
        name(&mut container);
        assert_eq!(container["name"], "web");
        assert_eq!(container["mounts"][0]["readonly"], true);
        assert!(!container.to_string().contains("secret"), "{container}");
    }
}
