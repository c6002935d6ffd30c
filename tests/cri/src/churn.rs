//! Churn: many pods come and go, and nothing of the node may grow with their number.
//!
//! Growth is the slope of a least-squares line over the second half of the samples: the first half
//! may fill caches.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use brig_suite::results::Place;
use brig_suite::run::Totals;
use brig_tests::node::check::equal;
use serde_json::{Value, json};

use crate::suite::{SLEEP, Suite};

/// What is counted, and how much of it a pod may leave behind on average. Each count jumps by what
/// runs beside the suite; a pod that left one thing would show as a slope of 1.
const LIMITS: [(&str, f64); 6] = [
    ("processes", 0.1),
    ("file descriptors of containerd", 0.2),
    ("mounts", 0.1),
    ("cgroups", 0.1),
    ("files in /run and /var/lib", 0.2),
    // KiB: containerd's own heap and the kernel's slabs breathe by a few hundred.
    ("unreclaimable memory in KiB", 64.0),
];

/// Runs the pods with a handler; each count that may not grow is judged.
pub fn run(handler: &str, pods: u32, results: &Place, totals: &mut Totals) -> Result<()> {
    let suite = Suite::new(handler)?;
    let mut samples = Vec::new();
    for number in 0..pods {
        one(&suite, number).with_context(|| format!("pod {number} of {handler}"))?;
        samples.push(sample()?);
    }
    let mut report = serde_json::Map::new();
    for (at, (what, limit)) in LIMITS.iter().enumerate() {
        let all: Vec<u64> = samples.iter().map(|sample| sample[at]).collect();
        let half = &all[all.len() / 2..];
        let slope = slope(half);
        let name = format!(
            "{handler} on {}: churn of {pods} pods/{what}",
            suite.containerd
        );
        let sizes = format!(
            "{slope:.3} a pod, {} to {}",
            half.first().copied().unwrap_or_default(),
            half.last().copied().unwrap_or_default()
        );
        let steady = slope <= *limit;
        if steady {
            println!("PASS  {name}  ({sizes})");
        } else {
            println!("FAIL  {name}\n      it grows by {sizes}; at most {limit} is taken for noise");
        }
        totals.count(steady, &name);
        report.insert((*what).to_owned(), json!({"slope": slope, "samples": all}));
    }
    let file = format!("churn-{handler}-{}.json", suite.containerd);
    results.write(&file, &Value::Object(report))
}

/// A pod with two containers, an exec and an exit code.
fn one(suite: &Suite, number: u32) -> Result<()> {
    let pod = suite.run("churn")?;
    let main = pod.container("main", SLEEP).start()?;
    equal("an exec", "alive", main.sh("echo alive")?)?;
    let script = format!("exit {}", number % 100);
    let (_job, status) = pod.container("job", &["sh", "-c", &script]).finish()?;
    equal("exit code", i32::try_from(number % 100)?, status.exit_code)
}

fn sample() -> Result<[u64; LIMITS.len()]> {
    let mut processes = 0;
    let mut descriptors = 0;
    for entry in fs::read_dir("/proc")?.flatten() {
        let path = entry.path();
        // Kernel threads come and go; they have no command line.
        let line = fs::read(path.join("cmdline")).unwrap_or_default();
        if line.is_empty() {
            continue;
        }
        processes += 1;
        let program = line.split(|byte| *byte == 0).next().unwrap_or_default();
        if program.ends_with(b"containerd") {
            descriptors += count(fs::read_dir(path.join("fd"))?.count())?;
        }
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo")?.lines().count();
    let files = [
        "/run",
        "/var/lib/cni",
        "/var/lib/containerd",
        "/var/log/brig-cri",
    ]
    .iter()
    .map(|directory| tree(Path::new(directory), false))
    .sum();
    Ok([
        processes,
        descriptors,
        count(mounts)?,
        tree(Path::new("/sys/fs/cgroup"), true),
        files,
        unreclaimable()?,
    ])
}

fn count(number: usize) -> Result<u64> {
    Ok(u64::try_from(number)?)
}

/// Entries below a directory; of a snapshot's content only the top, which is the snapshot.
fn tree(directory: &Path, only_directories: bool) -> u64 {
    let Ok(entries) = fs::read_dir(directory) else {
        return 0;
    };
    let mut total = 0;
    for entry in entries.flatten() {
        let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if is_directory || !only_directories {
            total += 1;
        }
        let content = entry.file_name() == "fs" || entry.file_name() == "rootfs";
        if is_directory && !content {
            total += tree(&entry.path(), only_directories);
        }
    }
    total
}

/// Memory that neither a cache's end nor swapping would give back: the kernel's own and the
/// processes' anonymous pages.
fn unreclaimable() -> Result<u64> {
    let info = fs::read_to_string("/proc/meminfo")?;
    let field = |name: &str| -> Result<u64> {
        let line = info
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
            .with_context(|| format!("/proc/meminfo has no {name}"))?;
        let number = line.split_whitespace().next().context("no number")?;
        Ok(number.parse()?)
    };
    Ok(field("SUnreclaim")?
        + field("KernelStack")?
        + field("PageTables")?
        + field("AnonPages")?
        + field("Shmem")?
        + field("VmallocUsed")?)
}

/// The slope of the least-squares line through equally spaced samples.
fn slope(samples: &[u64]) -> f64 {
    let mut sum = [0.0_f64; 4];
    let mut x = 0.0_f64;
    for sample in samples {
        // Counts stay far below 2^32 here; more would be a failure in itself.
        let y = f64::from(u32::try_from(*sample).unwrap_or(u32::MAX));
        sum[0] += x;
        sum[1] += y;
        sum[2] += x * x;
        sum[3] += x * y;
        x += 1.0;
    }
    let divisor = x * sum[2] - sum[0] * sum[0];
    if divisor == 0.0 {
        return 0.0;
    }
    (x * sum[3] - sum[0] * sum[1]) / divisor
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slope_is_growth_per_sample() {
        assert!((slope(&[10, 11, 12, 13]) - 1.0).abs() < 1e-9);
        assert!((slope(&[10, 8, 6]) + 2.0).abs() < 1e-9);
        assert!(slope(&[5, 5, 5, 5]).abs() < 1e-9);
        assert!(slope(&[5]).abs() < 1e-9);
        assert!(slope(&[]).abs() < 1e-9);
    }

    #[test]
    fn one_jump_is_no_growth_of_one_a_pod() {
        let mut samples = vec![100; 25];
        samples.extend([103; 25]);
        assert!(slope(&samples) < 0.1);
    }
}
