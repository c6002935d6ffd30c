//! `brig ps` and `brig top`: the pods of this node and what they really use.

use std::collections::HashMap;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use brig_shim::error::Result;
use serde_json::Value;

use crate::pods::show_age;
use crate::seen::{self, Seen};
use crate::terminal;

const HEAD: [&str; 13] = [
    "NAMESPACE",
    "POD",
    "ID",
    "STATE",
    "CONTAINERS",
    "VM",
    "PSS",
    "GUEST USED",
    "RECLAIMABLE",
    "CPU",
    "AGE",
    "DEVICES",
    "CONTAINER NAMES",
];
/// Of an id: as many letters as crictl shows.
const ID: usize = 13;

/// All pods, once. CPU is the mean since each pod began.
///
/// # Errors
/// As of [`seen::all`].
pub fn once(base: &Path, as_json: bool) -> Result<String> {
    let all = seen::all(base, |_| true)?;
    if as_json {
        let all: Value = all.iter().map(Seen::json).collect();
        return Ok(format!("{all}\n"));
    }
    let mean = |pod: &Seen| {
        let age = pod.row.age.filter(|age| !age.is_zero())?;
        Some(pod.cpu / age.as_secs_f64())
    };
    Ok(table(&all, &mean))
}

/// The same again and again until the process is ended; CPU is that of the interval, and the busiest pods come first.
///
/// # Errors
/// As of [`seen::all`], and of standard output.
pub fn live(base: &Path, interval: Duration) -> Result<()> {
    let mut before: HashMap<String, f64> = HashMap::new();
    let mut at = Instant::now();
    loop {
        let mut all = seen::all(base, |_| true)?;
        let passed = at.elapsed().as_secs_f64();
        at = Instant::now();
        let used = |pod: &Seen| {
            let before = before.get(&key(pod))?;
            Some((pod.cpu - before).max(0.0) / passed)
        };
        all.sort_by(|a, b| {
            let order = used(b).unwrap_or(0.0).total_cmp(&used(a).unwrap_or(0.0));
            order.then_with(|| a.row.id.cmp(&b.row.id))
        });
        let whole = table(&all, &used);
        let pss: u64 = all.iter().map(|pod| pod.memory.pss).sum();
        let head = format!("{} pods, {}", all.len(), mib(Some(pss)));
        terminal::print(&screen(&head, &whole, terminal::size()))?;
        before = all.iter().map(|pod| (key(pod), pod.cpu)).collect();
        sleep(interval);
    }
}

/// What repaints a terminal of so many columns and lines: home, and what was there before is wiped away line by line, so
/// nothing flickers. A line that is longer is cut: one that went on in the next would move all that follow.
fn screen(head: &str, table: &str, (columns, lines): (usize, usize)) -> String {
    let mut text = "\x1b[H".to_owned();
    // The last line stays free, as the cursor goes there.
    for line in std::iter::once(head).chain(table.lines()).take(lines - 1) {
        text.extend(line.chars().take(columns));
        text.push_str("\x1b[K\n");
    }
    text.push_str("\x1b[J");
    text
}

fn key(pod: &Seen) -> String {
    format!("{}/{}", pod.row.namespace, pod.row.id)
}

fn table(all: &[Seen], cpu: &dyn Fn(&Seen) -> Option<f64>) -> String {
    let rows: Vec<Vec<String>> = all.iter().map(|pod| row(pod, cpu(pod))).collect();
    terminal::table(&HEAD, &rows)
}

fn row(pod: &Seen, cpu: Option<f64>) -> Vec<String> {
    let dash = || "-".to_owned();
    let name = pod.row.pod.as_ref();
    let memory = pod.memory;
    let workload = pod.containers().iter();
    let workload: Vec<&Value> = workload
        .filter(|container| container["kind"] != "sandbox")
        .collect();
    let running = workload.iter().filter(|one| one["state"] == "running");
    let names = workload.iter().filter_map(|one| one["name"].as_str());
    let count = |kind: &str| pod.shim[kind].as_array().map_or(0, Vec::len);
    let devices = count("devices") + count("disks");
    let vm = match (pod.configured("vcpus").as_u64(), memory.size) {
        (Some(vcpus), size) => format!("{vcpus} x {}", mib(size)),
        (None, _) => dash(),
    };
    vec![
        name.map_or_else(|| pod.row.namespace.clone(), |pod| pod.namespace.clone()),
        name.map_or_else(dash, |pod| pod.name.clone()),
        pod.row.id.chars().take(ID).collect(),
        pod.state().to_owned(),
        if pod.shim.is_null() {
            dash()
        } else {
            format!("{}/{}", running.count(), workload.len())
        },
        vm,
        mib(Some(memory.pss)),
        mib(memory.guest_used),
        mib(memory.reclaimable()),
        cpu.map_or_else(dash, |cpu| format!("{:.1}%", cpu * 100.0)),
        pod.row.age.map_or_else(dash, show_age),
        devices.to_string(),
        names.collect::<Vec<_>>().join(","),
    ]
}

fn mib(kib: Option<u64>) -> String {
    kib.map_or_else(
        || "-".to_owned(),
        |kib| format!("{} MiB", kib.div_ceil(1024)),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::fake;

    #[test]
    fn a_screen_is_filled_and_no_line_of_it_goes_on_in_the_next() {
        let text = screen("2 pods", "HEAD OF ALL\nöne\ntwo\n", (4, 4));
        assert_eq!(text, "\x1b[H2 po\x1b[K\nHEAD\x1b[K\nöne\x1b[K\n\x1b[J");
        let whole = screen("2 pods", "HEAD\n", (usize::MAX, usize::MAX));
        assert_eq!(whole, "\x1b[H2 pods\x1b[K\nHEAD\x1b[K\n\x1b[J");
    }

    #[test]
    fn a_pod_whose_shim_does_not_answer_is_shown_with_what_is_known() {
        let base = tempfile::tempdir().unwrap();
        fake(base.path(), "default", "web");
        let text = once(base.path(), false).unwrap();
        let line = text.lines().nth(1).unwrap();
        assert!(line.starts_with("default"), "{text}");
        assert!(line.contains("starting") && line.contains(" MiB"), "{text}");
        let all: Value = serde_json::from_str(&once(base.path(), true).unwrap()).unwrap();
        assert_eq!(
            (&all[0]["id"], &all[0]["shim"]),
            (&"web".into(), &Value::Null)
        );
        assert!(all[0]["pssKiB"].as_u64().unwrap() > 100);
    }
}
