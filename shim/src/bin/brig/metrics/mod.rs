//! What all pods of this node use and how they started, in the OpenMetrics text format: once, for a collector that reads
//! a command's output or a file (node_exporter's textfile collector), or for each scrape of the exporter.
//!
//! Figures are read from /proc and from the pods' shims, which are asked side by side and have a second; what one
//! does not tell is left out. What is counted beyond a pod's end is in files beside the state directory, which the shims write.
//! Nothing is kept from one scrape to the next. Names in labels come from containerd and from guests' boot marks.

mod family;
mod queues;
mod starts;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use brig_shim::containerd::debug_service::Method;
use brig_shim::error::Result;
use brig_shim::node::remains::Remains;
use brig_shim::pod::account;
use brig_shim::pod::starts::Starts;
use serde_json::Value;

use crate::pods::{self, Row};
use crate::processes::{
    Usage, disk_bytes, guest_memory_size, interfaces, open_files_limit, pss as pss_of, vcpu_wait,
};
use crate::shims;
use crate::timelines;
use family::exact;
pub use family::{Family, json, text};
use queues::Queues;

/// How long a shim may take.
const PATIENCE: Duration = Duration::from_secs(1);

/// All families, of all pods below `base`.
///
/// # Errors
/// If no runtime is to be had to ask the shims with.
pub fn scrape(base: &Path) -> Result<Vec<Family>> {
    let rows = pods::rows(base);
    let sockets = rows.iter().map(Row::to_ask).collect();
    let counters = shims::ask_all_json(sockets, Method::Counters, PATIENCE)?;
    let mut pods = Family::new("brig_pods", "gauge", "", "Pods of this node by state.");
    let mut info = Family::new(
        "brig_pod_info",
        "gauge",
        "",
        "1 for each pod, with its namespace, name and uid in Kubernetes; pod is the id of one that Kubernetes has not named.",
    );
    let mut pss = Family::new(
        "brig_pod_pss_bytes",
        "gauge",
        "bytes",
        "Proportional set size of a process; the VMM's has the guest's memory in it.",
    );
    let mut guest = Family::new(
        "brig_pod_guest_memory_bytes",
        "gauge",
        "bytes",
        "Memory of the node that the guest's memory takes up.",
    );
    let mut size = Family::new(
        "brig_pod_guest_memory_size_bytes",
        "gauge",
        "bytes",
        "Size of the VM's memory.",
    );
    let mut cpu = Family::new(
        "brig_pod_cpu_seconds",
        "counter",
        "seconds",
        "CPU time of a process, its guest's in it.",
    );
    let mut threads = Family::new("brig_pod_threads", "gauge", "", "Threads of a process.");
    let mut files = Family::new(
        "brig_pod_open_files",
        "gauge",
        "",
        "Open descriptors of a process.",
    );
    let mut files_limit = Family::new(
        "brig_pod_open_files_limit",
        "gauge",
        "",
        "Descriptors that a process may have open; a VMM's is max_files.",
    );
    let mut age = Family::new(
        "brig_pod_age_seconds",
        "gauge",
        "seconds",
        "Time since the pod's shim began.",
    );
    let mut start = Family::new(
        "brig_pod_start_seconds",
        "gauge",
        "seconds",
        "Moments of the pod's start, since containerd asked for it; of a moment that happened again the last.",
    );
    let mut exits = Family::new(
        "brig_pod_vm_exits",
        "counter",
        "",
        "VM exits that the VMM served, by reason.",
    );
    let mut wait = Family::new(
        "brig_pod_cpu_wait_seconds",
        "counter",
        "seconds",
        "Time that a CPU of the guest was ready and had none of the node: what the guest sees as steal.",
    );
    let mut disk = Family::new(
        "brig_pod_disk_bytes",
        "counter",
        "bytes",
        "Bytes that the VMM has had read from and written to the node's disks.",
    );
    let mut network = Family::new(
        "brig_pod_network_bytes",
        "counter",
        "bytes",
        "Bytes of an interface in the pod's network namespace, as the node counts them.",
    );
    let mut requests = Family::new(
        "brig_pod_file_requests",
        "counter",
        "",
        "Requests of the guest to its file server.",
    );
    let mut queues = Queues::new();
    let mut failures = Family::new(
        "brig_failures",
        "counter",
        "",
        "Pods that failed since the node has booted, by class of error.",
    );
    // What there is none of is told too: an increase from nothing is none to Prometheus, and neither is nothing at all.
    let mut states: BTreeMap<&str, u32> = pods::STATES.iter().map(|state| (*state, 0)).collect();
    for (row, counters) in rows.iter().zip(counters) {
        *states.entry(row.state).or_default() += 1;
        let pod = [
            ("namespace", row.namespace.as_str()),
            ("id", row.id.as_str()),
        ];
        let with = |name, value| [pod[0], pod[1], (name, value)];
        // Of every pod: what a join with it does not find is in no alert.
        let named = row.pod.as_ref();
        let names = [
            pod[0],
            pod[1],
            (
                "pod_namespace",
                named.map_or("", |named| named.namespace.as_str()),
            ),
            (
                "pod",
                named.map_or(row.id.as_str(), |named| named.name.as_str()),
            ),
            ("uid", named.map_or("", |named| named.uid.as_str())),
        ];
        info.add(&names, 1.0);
        if let Some(seconds) = row.age {
            age.add(&pod, seconds.as_secs_f64());
        }
        for (name, pid) in row.processes() {
            let labels = with("process", name);
            if let Some(kib) = pss_of(pid) {
                pss.add(&labels, bytes(kib));
            }
            if let Some(usage) = Usage::read(pid) {
                cpu.add(&labels, usage.cpu);
                threads.add(&labels, usage.threads);
            }
            if let Some(open) = fs::read_dir(format!("/proc/{pid}/fd"))
                .ok()
                .and_then(|fds| u32::try_from(fds.count()).ok())
            {
                files.add(&labels, f64::from(open));
            }
            if let Some(limit) = open_files_limit(pid) {
                files_limit.add(&labels, limit);
            }
            if name == "vmm"
                && let Some((whole, touched)) = guest_memory_size(pid)
            {
                size.add(&pod, bytes(whole));
                guest.add(&pod, bytes(touched));
            }
            if name == "vmm" {
                for (cpu, seconds) in vcpu_wait(pid) {
                    let cpu = cpu.to_string();
                    wait.add(&[pod[0], pod[1], ("cpu", &cpu)], seconds);
                }
                for (direction, count) in disk_bytes(pid) {
                    disk.add(&with("direction", direction), count);
                }
                for (interface, received, sent) in interfaces(pid) {
                    for (direction, count) in [("received", received), ("sent", sent)] {
                        let labels = [
                            pod[0],
                            pod[1],
                            ("interface", interface.as_str()),
                            ("direction", direction),
                        ];
                        network.add(&labels, count);
                    }
                }
            }
        }
        for (moment, seconds) in moments(base, row) {
            start.add(&[pod[0], pod[1], ("moment", &moment)], seconds);
        }
        let asked = counters
            .as_ref()
            .and_then(|counters| counters["file_requests"].as_f64());
        if let Some(count) = asked {
            requests.add(&pod, count);
        }
        if let Some(counters) = &counters {
            queues.add(&pod, counters);
        }
        let reasons = counters.as_ref().and_then(|counters| counters.get("exits"));
        for (reason, count) in reasons.and_then(Value::as_object).into_iter().flatten() {
            if let Some(count) = count.as_f64() {
                exits.add(&with("reason", reason), count);
            }
        }
    }
    for (state, count) in states {
        pods.add(&[("state", state)], f64::from(count));
    }
    let remains = Remains::beside(base);
    if let Some(counted) = remains.failures() {
        let none = account::codes().map(|code| (code.to_owned(), 0));
        let mut codes: BTreeMap<String, u64> = none.collect();
        codes.extend(counted);
        for (code, count) in codes {
            failures.add(&[("code", &code)], exact(count));
        }
    }
    let mut families = vec![
        pods,
        info,
        pss,
        guest,
        size,
        cpu,
        wait,
        threads,
        files,
        files_limit,
        disk,
        network,
        requests,
        age,
        start,
        exits,
        failures,
    ];
    families.extend(queues.families());
    families.push(starts::family(Starts::of(&remains).as_ref()));
    Ok(families)
}

fn moments(base: &Path, row: &Row) -> BTreeMap<String, f64> {
    let timeline = timelines::read(base, &row.namespace, &row.id);
    let marks = timeline.into_iter().flat_map(|timeline| timeline.marks);
    marks
        .map(|mark| (mark.name, Duration::from_micros(mark.micros).as_secs_f64()))
        .collect()
}

fn bytes(kib: u64) -> f64 {
    exact(kib) * 1024.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use brig_shim::asked::pod_name::PodName;
    use brig_shim::node::journal::StateDir;

    #[test]
    fn a_node_without_pods_tells_of_every_state_code_and_stage_that_there_is_none() {
        let base = tempfile::tempdir().unwrap();
        let told = text(&scrape(base.path()).unwrap());
        for line in [
            "brig_pods{state=\"running\"} 0\n",
            "brig_pods{state=\"damaged\"} 0\n",
            "brig_failures_total{code=\"unavailable\"} 0\n",
            "brig_failures_total{code=\"killed\"} 0\n",
            "brig_start_stage_seconds_bucket{stage=\"total\",le=\"+Inf\"} 0\n",
        ] {
            assert!(told.contains(line), "{line}{told}");
        }
    }

    #[test]
    fn a_pod_without_a_shim_to_ask_is_counted_and_measured() {
        let base = tempfile::tempdir().unwrap();
        pods::fake(base.path(), "default", "web");
        let told = text(&scrape(base.path()).unwrap());
        assert!(told.contains("brig_pods{state=\"starting\"} 1\n"), "{told}");
        let labels = "{namespace=\"default\",id=\"web\",process=\"shim\"}";
        for family in [
            "brig_pod_pss_bytes",
            "brig_pod_threads",
            "brig_pod_cpu_seconds_total",
            "brig_pod_open_files_limit",
        ] {
            assert!(told.contains(&format!("{family}{labels} ")), "{told}");
        }
        assert!(told.ends_with("# EOF\n"));
    }

    #[test]
    fn each_pod_has_its_name_once_and_whatever_that_is_in_one_line() {
        let base = tempfile::tempdir().unwrap();
        pods::fake(base.path(), "default", "web");
        pods::fake(base.path(), "k8s.io", "3f0c");
        let dir = StateDir::new(base.path(), "k8s.io", "3f0c").unwrap();
        let unnamed = "brig_pod_info{namespace=\"default\",id=\"web\",pod_namespace=\"\",pod=\"web\",uid=\"\"} 1";
        let hostile = "web-0\"} 1\nbrig_pods{state=\"x\\";
        for name in ["web-0", hostile] {
            let mut journal = dir.read().unwrap().unwrap();
            journal.pod = PodName::of_metadata("shop", name, "7-11");
            dir.write(&journal).unwrap();
            let families = scrape(base.path()).unwrap();
            let told = text(&families);
            let mut lines = told
                .lines()
                .filter(|line| line.starts_with("brig_pod_info"));
            let quoted = name
                .replace('\\', "\\\\")
                .replace('"', "\\\"")
                .replace('\n', "\\n");
            let expected = format!(
                "brig_pod_info{{namespace=\"k8s.io\",id=\"3f0c\",pod_namespace=\"shop\",pod=\"{quoted}\",uid=\"7-11\"}} 1"
            );
            assert_eq!(lines.next(), Some(unnamed));
            assert_eq!(lines.next(), Some(expected.as_str()));
            assert_eq!(lines.next(), None);
            assert_eq!(told.matches("\nbrig_pods{").count(), pods::STATES.len());
            let told: Value = serde_json::from_str(&json(&families)).unwrap();
            let mut all = told.as_array().unwrap().iter();
            let info = all.find(|family| family["name"] == "brig_pod_info");
            assert_eq!(info.unwrap()["samples"][1]["labels"]["pod"], name);
        }
    }

    /// The samples of counters and histograms.
    fn counted(base: &Path) -> BTreeMap<String, f64> {
        let told: Value = serde_json::from_str(&json(&scrape(base).unwrap())).unwrap();
        let families = told.as_array().unwrap().iter();
        let counters = families.filter(|family| family["type"] != "gauge");
        let samples = counters.flat_map(|family| family["samples"].as_array().unwrap());
        let named = |sample: &Value| {
            let name = format!("{}{}", sample["name"], sample["labels"]);
            (name, sample["value"].as_f64().unwrap())
        };
        samples.map(named).collect()
    }

    #[test]
    fn no_sample_of_the_node_falls_or_goes_when_pods_do() {
        let root = tempfile::tempdir().unwrap();
        let base = root.path().join("brig");
        let remains = Remains::beside(&base);
        let start = |id: &str| {
            pods::fake(&base, "default", id);
            brig_shim::pod::starts::count(&remains, &[("boot", 30_000), ("total", 90_000)])
        };
        for id in ["web", "db"] {
            start(id).unwrap();
        }
        remains
            .keep(std::time::SystemTime::now(), "internal", &Value::Null)
            .unwrap();
        let before = counted(&base);
        fs::remove_dir_all(base.join("default/web")).unwrap();
        // One that is not there for any scrape.
        start("job").unwrap();
        fs::remove_dir_all(base.join("default/job")).unwrap();
        let after = counted(&base);
        for (name, value) in &before {
            let ended = name.contains("\"web\"");
            let now = after.get(name).copied();
            assert!(ended || now >= Some(*value), "{name}: {value}, {now:?}");
        }
        let total = "\"brig_start_stage_seconds_count\"{\"stage\":\"total\"}";
        assert_eq!((before[total], after[total]), (2.0, 3.0));
    }

    #[test]
    fn counts_that_are_damaged_are_not_told() {
        let root = tempfile::tempdir().unwrap();
        let ended = root.path().join("brig.ended");
        fs::create_dir(&ended).unwrap();
        for file in ["counts", "starts"] {
            fs::write(ended.join(file), "{\"stages\":").unwrap();
        }
        assert_eq!(counted(&root.path().join("brig")), BTreeMap::new());
    }
}
