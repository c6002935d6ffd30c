//! What of a node may not grow with the number of pods that came and went.
//!
//! Growth is the slope of a least-squares line over the second half of the samples: the first half
//! may fill caches.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use brig_suite::results::Place;
use brig_suite::run::Totals;
use brig_tests::node::clock;
use serde_json::{Value, json};

/// Fewer samples in the half that is judged say nothing about a count that jumps by more than its limit.
const FEWEST: usize = 8;
/// The pause between two looks at what may still be on its way out.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// One thing that is counted, and how much of it a pod may leave behind on average. Each count jumps by what runs
/// beside the suite; a pod that left one thing would show as a slope of 1.
struct Count {
    what: &'static str,
    limit: f64,
    /// Of containerd itself: comparable between pods only while it is not restarted, or just after.
    of_containerd: bool,
    /// Memory breathes; other counts come to rest when a pod is gone.
    settles: bool,
}

const fn count(what: &'static str, limit: f64) -> Count {
    Count {
        what,
        limit,
        of_containerd: false,
        settles: true,
    }
}

const fn memory(what: &'static str, limit: f64) -> Count {
    Count {
        settles: false,
        ..count(what, limit)
    }
}

const COUNTS: [Count; 12] = [
    count("processes", 0.1),
    count("threads of shims and VMMs", 0.1),
    count("file descriptors of shims and VMMs", 0.1),
    count("mounts", 0.1),
    count("cgroups", 0.1),
    count("network namespaces", 0.1),
    count("entries of /run/brig", 0.1),
    count("files in /run and /var/lib", 0.2),
    // KiB: the shims' heaps, and what the kernel and all other processes have.
    memory("memory of shims in KiB", 16.0),
    memory("memory beside containerd and VMMs in KiB", 64.0),
    Count {
        of_containerd: true,
        ..memory("file descriptors of containerd", 0.2)
    },
    Count {
        of_containerd: true,
        ..memory("memory of containerd in KiB", 64.0)
    },
];

type Sample = [u64; COUNTS.len()];

/// Counts of the node, by how many pods there had been.
#[derive(Default)]
pub struct Growth {
    samples: BTreeMap<usize, Vec<(u32, u64)>>,
    pods: u32,
    last: Option<Sample>,
}

impl Growth {
    /// Takes a sample after one more pod, once what the last pod left on its way out is gone; `of_containerd` if containerd is now as
    /// old as at its other samples.
    pub fn sample(&mut self, of_containerd: bool) -> Result<()> {
        let end = Instant::now() + clock::seconds(1);
        let mut now = sample()?;
        while let Some(last) = self.last
            && Instant::now() < end
            && more(&now, &last)
        {
            std::thread::sleep(LOOK_AGAIN);
            now = sample()?;
        }
        self.pods += 1;
        for (at, value) in now.into_iter().enumerate() {
            if of_containerd || !COUNTS[at].of_containerd {
                let samples = self.samples.entry(at).or_default();
                samples.push((self.pods, value));
            }
        }
        self.last = Some(now);
        Ok(())
    }

    /// Judges each count, and writes the samples to `file` with what else is to be told.
    pub fn judge(
        &self,
        title: &str,
        file: &str,
        more: serde_json::Map<String, Value>,
        results: &Place,
        totals: &mut Totals,
    ) -> Result<()> {
        let mut report = more;
        for (at, Count { what, limit, .. }) in COUNTS.iter().enumerate() {
            let all = self.samples.get(&at).map_or(&[][..], Vec::as_slice);
            let half = &all[all.len() / 2..];
            let slope = slope(half);
            report.insert((*what).to_owned(), json!({"slope": slope, "samples": all}));
            let name = format!("{title}/{what}");
            let sizes = format!(
                "{slope:.3} a pod, {} to {} in {} samples",
                half.first().copied().unwrap_or_default().1,
                half.last().copied().unwrap_or_default().1,
                half.len()
            );
            if half.len() < FEWEST {
                println!("----  {name}  ({sizes}: too few to judge)");
                continue;
            }
            let steady = slope <= *limit;
            if steady {
                println!("PASS  {name}  ({sizes})");
            } else {
                println!(
                    "FAIL  {name}\n      it grows by {sizes}; at most {limit} is taken for noise"
                );
            }
            totals.count(steady, &name);
        }
        results.write(file, &Value::Object(report))
    }
}

/// Whether a count that settles is above what it was.
fn more(now: &Sample, last: &Sample) -> bool {
    (now.iter().zip(last).zip(&COUNTS)).any(|((now, last), count)| count.settles && now > last)
}

/// What a process has.
#[derive(Default)]
struct Held {
    threads: u64,
    descriptors: u64,
    /// KiB that nothing but its end gives back.
    memory: u64,
}

impl Held {
    fn add(&mut self, process: &Path) {
        let status = fs::read_to_string(process.join("status")).unwrap_or_default();
        let field = |name: &str| -> u64 {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            let number = line.and_then(|line| line.split_whitespace().next());
            number.and_then(|number| number.parse().ok()).unwrap_or(0)
        };
        self.threads += field("Threads:");
        self.memory += field("RssAnon:") + field("RssShmem:");
        let descriptors = fs::read_dir(process.join("fd")).map_or(0, Iterator::count);
        self.descriptors += u64::try_from(descriptors).unwrap_or(u64::MAX);
    }
}

fn sample() -> Result<Sample> {
    let mut processes = 0;
    let (mut containerd, mut shims, mut vmms) = (Held::default(), Held::default(), Held::default());
    for entry in fs::read_dir("/proc")?.flatten() {
        let path = entry.path();
        // Kernel threads come and go; they have no command line.
        let line = fs::read(path.join("cmdline")).unwrap_or_default();
        if line.is_empty() {
            continue;
        }
        processes += 1;
        match fs::read_to_string(path.join("comm"))
            .unwrap_or_default()
            .trim()
        {
            "containerd" => containerd.add(&path),
            "brig-vmm" => vmms.add(&path),
            name if name.starts_with("containerd-shim") => shims.add(&path),
            _ => {}
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
        shims.threads + vmms.threads,
        shims.descriptors + vmms.descriptors,
        u64::try_from(mounts)?,
        tree(Path::new("/sys/fs/cgroup"), true),
        tree(Path::new("/run/netns"), false),
        tree(&PathBuf::from("/run/brig"), false),
        files,
        shims.memory,
        unreclaimable()?.saturating_sub(containerd.memory + vmms.memory),
        containerd.descriptors,
        containerd.memory,
    ])
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

/// KiB of memory that neither a cache's end nor swapping would give back: the kernel's own and the
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

/// The slope of the least-squares line through samples of (pods so far, count).
fn slope(samples: &[(u32, u64)]) -> f64 {
    let mut sum = [0.0_f64; 4];
    let mut count = 0.0_f64;
    for (pods, value) in samples {
        let x = f64::from(*pods);
        // Counts stay far below 2^32 here; more would be a failure in itself.
        let y = f64::from(u32::try_from(*value).unwrap_or(u32::MAX));
        sum[0] += x;
        sum[1] += y;
        sum[2] += x * x;
        sum[3] += x * y;
        count += 1.0;
    }
    let divisor = count * sum[2] - sum[0] * sum[0];
    if divisor == 0.0 {
        return 0.0;
    }
    (count * sum[3] - sum[0] * sum[1]) / divisor
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One sample a pod.
    fn each(values: &[u64]) -> Vec<(u32, u64)> {
        (1..).zip(values.iter().copied()).collect()
    }

    #[test]
    fn a_slope_is_growth_per_pod() {
        assert!((slope(&each(&[10, 11, 12, 13])) - 1.0).abs() < 1e-9);
        assert!((slope(&each(&[10, 8, 6])) + 2.0).abs() < 1e-9);
        assert!(slope(&each(&[5, 5, 5, 5])).abs() < 1e-9);
        assert!(slope(&each(&[5])).abs() < 1e-9);
        assert!(slope(&[]).abs() < 1e-9);
        // Samples that are pods apart.
        assert!((slope(&[(10, 100), (15, 110), (25, 130)]) - 2.0).abs() < 1e-9);
    }

    #[test]
    fn one_jump_is_no_growth_of_one_a_pod() {
        let mut samples = vec![100; 25];
        samples.extend([103; 25]);
        assert!(slope(&each(&samples)) < 0.1);
    }

    #[test]
    fn memory_is_not_waited_for() {
        let last = [5; COUNTS.len()];
        for (at, count) in COUNTS.iter().enumerate() {
            let mut now = last;
            now[at] += 1;
            assert_eq!(more(&now, &last), count.settles, "{}", count.what);
        }
    }
}
