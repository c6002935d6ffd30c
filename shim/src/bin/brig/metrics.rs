//! One scrape of all pods of this node in the OpenMetrics text format, for a collector that reads a command's
//! output or a file (node_exporter's textfile collector).
//!
//! Figures are read from /proc and from the pods' shims, which are asked side by side and have a second; what one
//! does not tell is left out. Names in labels come from containerd and from guests' boot marks: they are escaped.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::time::Duration;

use brig_shim::error::Result;
use brig_shim::node::journal::StateDir;
use brig_shim::pod::timeline::Timeline;
use serde_json::Value;

use crate::pods::{self, Row};
use crate::shims;

/// How long a shim may take.
const PATIENCE: Duration = Duration::from_secs(1);

/// One family of samples.
struct Family {
    name: &'static str,
    /// `gauge` or `counter`, whose samples end in `_total`.
    kind: &'static str,
    unit: &'static str,
    help: &'static str,
    /// Labels, ready to be written, and the value.
    samples: Vec<(String, f64)>,
}

impl Family {
    fn new(name: &'static str, kind: &'static str, unit: &'static str, help: &'static str) -> Self {
        Self {
            name,
            kind,
            unit,
            help,
            samples: Vec::new(),
        }
    }

    fn add(&mut self, labels: &[(&str, &str)], value: f64) {
        let labels = labels
            .iter()
            .map(|(name, value)| format!("{name}=\"{}\"", escaped(value)));
        self.samples
            .push((labels.collect::<Vec<_>>().join(","), value));
    }

    fn write(&self, text: &mut String) {
        let Self {
            name,
            kind,
            unit,
            help,
            ..
        } = self;
        let _ = writeln!(text, "# TYPE {name} {kind}");
        if !unit.is_empty() {
            let _ = writeln!(text, "# UNIT {name} {unit}");
        }
        let _ = writeln!(text, "# HELP {name} {help}");
        let suffix = if *kind == "counter" { "_total" } else { "" };
        for (labels, value) in &self.samples {
            let _ = writeln!(text, "{name}{suffix}{{{labels}}} {value}");
        }
    }
}

/// As the format wants a label's value.
fn escaped(value: &str) -> String {
    value
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

/// All families, of all pods below `base`.
///
/// # Errors
/// If no runtime is to be had to ask the shims with.
pub fn scrape(base: &Path) -> Result<String> {
    let rows = pods::rows(base);
    let sockets = rows
        .iter()
        .map(|row| row.living().then(|| row.socket.clone()).flatten());
    let counters = shims::counters_of_all(sockets.collect(), PATIENCE)?;
    let mut pods = Family::new("brig_pods", "gauge", "", "Pods of this node by state.");
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
    let mut states: BTreeMap<&str, u32> = BTreeMap::new();
    for (row, counters) in rows.iter().zip(counters) {
        *states.entry(row.state).or_default() += 1;
        let pod = [
            ("namespace", row.namespace.as_str()),
            ("id", row.id.as_str()),
        ];
        let with = |name, value| [pod[0], pod[1], (name, value)];
        if let Some(seconds) = row.age {
            age.add(&pod, seconds.as_secs_f64());
        }
        for (name, pid) in row.processes() {
            let labels = with("process", name);
            if let Some(kib) = pods::pss(pid) {
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
            if name == "vmm"
                && let Some((whole, touched)) = largest_mapping(pid)
            {
                size.add(&pod, bytes(whole));
                guest.add(&pod, bytes(touched));
            }
        }
        for (moment, seconds) in moments(base, row) {
            start.add(&[pod[0], pod[1], ("moment", &moment)], seconds);
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
    let mut text = String::new();
    for family in [
        pods, pss, guest, size, cpu, threads, files, age, start, exits,
    ] {
        family.write(&mut text);
    }
    text.push_str("# EOF\n");
    Ok(text)
}

fn moments(base: &Path, row: &Row) -> BTreeMap<String, f64> {
    let dir = StateDir::new(base, &row.namespace, &row.id);
    let bytes = dir.and_then(|dir| dir.read_timeline()).unwrap_or_default();
    let timeline: Option<Timeline> = serde_json::from_slice(&bytes).ok();
    let marks = timeline.into_iter().flat_map(|timeline| timeline.marks);
    marks
        .map(|mark| (mark.name, Duration::from_micros(mark.micros).as_secs_f64()))
        .collect()
}

/// KiB, exact up to 8 EiB divided by 2^10.
fn bytes(kib: u64) -> f64 {
    let (high, low) = (kib >> 32, kib & u64::from(u32::MAX));
    let part = |n: u64| f64::from(u32::try_from(n).unwrap_or(u32::MAX));
    (part(high) * 4_294_967_296.0 + part(low)) * 1024.0
}

/// From `/proc/PID/stat`.
#[derive(Debug, PartialEq)]
struct Usage {
    /// Seconds.
    cpu: f64,
    threads: f64,
}

impl Usage {
    fn read(pid: u32) -> Option<Self> {
        let ticks = f64::from(u32::try_from(rustix::param::clock_ticks_per_second()).ok()?);
        Self::parse(
            &fs::read_to_string(format!("/proc/{pid}/stat")).ok()?,
            ticks,
        )
    }

    /// A program's name may have spaces and brackets in it, so fields count from the last bracket.
    fn parse(stat: &str, ticks: f64) -> Option<Self> {
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        let field = |number: usize| fields.get(number)?.parse::<f64>().ok();
        Some(Self {
            cpu: (field(11)? + field(12)?) / ticks,
            threads: field(17)?,
        })
    }
}

/// Size and resident KiB of the guest's memory, by far the largest mapping of a VMM.
fn largest_mapping(pid: u32) -> Option<(u64, u64)> {
    largest(&fs::read_to_string(format!("/proc/{pid}/smaps")).ok()?)
}

fn largest(smaps: &str) -> Option<(u64, u64)> {
    let mut largest: Option<(u64, u64)> = None;
    let mut size = 0;
    // Advice on parts of it makes several mappings of one: anonymous ones that touch belong together, if they
    // may be used alike.
    let mut run: Option<Run<'_>> = None;
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or("");
        let kib = |mut words: std::str::SplitWhitespace<'_>| words.next()?.parse::<u64>().ok();
        match first {
            "Size:" => size = kib(words)?,
            "Rss:" => {
                if let Some(run) = &mut run {
                    run.size += size;
                    run.resident += kib(words)?;
                    if largest.is_none_or(|(most, _)| most < run.size) {
                        largest = Some((run.size, run.resident));
                    }
                }
            }
            _ => {
                let Some((start, end)) = range(first) else {
                    continue;
                };
                let permissions = words.next().unwrap_or("");
                let is_anonymous = words.count() == 3;
                run = match run {
                    Some(run)
                        if is_anonymous && run.end == start && run.permissions == permissions =>
                    {
                        Some(Run { end, ..run })
                    }
                    _ => is_anonymous.then_some(Run {
                        end,
                        permissions,
                        size: 0,
                        resident: 0,
                    }),
                };
            }
        }
    }
    largest
}

/// Mappings that belong together, in KiB.
struct Run<'a> {
    end: u64,
    permissions: &'a str,
    size: u64,
    resident: u64,
}

fn range(word: &str) -> Option<(u64, u64)> {
    let (start, end) = word.split_once('-')?;
    Some((
        u64::from_str_radix(start, 16).ok()?,
        u64::from_str_radix(end, 16).ok()?,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_name_with_brackets_and_spaces_does_not_move_the_fields() {
        let stat = "12 (a) b) (c) S 1 1 1 0 -1 4194560 1 2 3 4 150 50 7 8 20 0 3 0 100 200 300";
        let usage = Usage::parse(stat, 100.0).unwrap();
        assert_eq!(
            usage,
            Usage {
                cpu: 2.0,
                threads: 3.0
            }
        );
        assert!(Usage::parse("12 (a", 100.0).is_none());
        assert!(Usage::read(std::process::id()).is_some_and(|usage| usage.threads >= 1.0));
    }

    #[test]
    fn guest_memory_in_several_mappings_is_one() {
        let smaps = "\
10000-20000 r-xp 00000000 fe:00 12 /opt/brig/brig-vmm
Size: 9000 kB
Rss: 9000 kB
7f0000-7f1000 rw-p 00000000 00:00 0
Size: 1000 kB
Rss: 100 kB
Pss: 100 kB
7f1000-7f2000 rw-p 00000000 00:00 0
Size: 2000 kB
Rss: 10 kB
7f2000-7f3000 ---p 00000000 00:00 0
Size: 2048 kB
Rss: 0 kB
7f4000-7f5000 rw-p 00000000 00:00 0
Size: 2500 kB
Rss: 2500 kB
";
        assert_eq!(largest(smaps), Some((3000, 110)));
        assert_eq!(largest(""), None);
    }

    #[test]
    fn a_pod_without_a_shim_to_ask_is_counted_and_measured() {
        let base = tempfile::tempdir().unwrap();
        pods::fake(base.path(), "default", "web");
        let text = scrape(base.path()).unwrap();
        assert!(text.contains("brig_pods{state=\"starting\"} 1\n"), "{text}");
        let labels = "{namespace=\"default\",id=\"web\",process=\"shim\"}";
        for family in [
            "brig_pod_pss_bytes",
            "brig_pod_threads",
            "brig_pod_cpu_seconds_total",
        ] {
            assert!(text.contains(&format!("{family}{labels} ")), "{text}");
        }
        assert!(text.ends_with("# EOF\n"));
    }

    proptest! {
        #[test]
        fn whatever_a_label_is_a_sample_is_one_line(value in any::<String>()) {
            let mut family = Family::new("brig_x", "counter", "", "Some.");
            family.add(&[("a", &value)], 1.5);
            let mut text = String::new();
            family.write(&mut text);
            prop_assert_eq!(text.matches('\n').count(), 3);
            let ends_well = text.ends_with("\"} 1.5\n");
            prop_assert!(ends_well, "{text}");
        }
    }
}
