//! What a process of this node uses, from /proc, which the node's kernel writes.

use std::fs;

use brig_shim::node::network;

/// Proportional set size in KiB; `None` for a process that has gone.
pub fn pss(pid: u32) -> Option<u64> {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:"))?;
    line.trim().strip_suffix("kB")?.trim().parse().ok()
}

/// From `/proc/PID/stat`.
#[derive(Debug, PartialEq)]
pub struct Usage {
    /// Seconds.
    pub cpu: f64,
    /// Now.
    pub threads: f64,
}

impl Usage {
    /// `None` for a process that has gone.
    pub fn read(pid: u32) -> Option<Self> {
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

/// Seconds that the threads of a process have been ready without a CPU (proc(5), `schedstat`: the second number).
pub fn cpu_wait(pid: u32) -> Option<f64> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).ok()?.flatten();
    let waited = threads.filter_map(|thread| {
        let schedstat = fs::read_to_string(thread.path().join("schedstat")).ok()?;
        schedstat.split_whitespace().nth(1)?.parse::<f64>().ok()
    });
    Some(waited.sum::<f64>() / 1e9)
}

/// Bytes that a process has had read from disks and written to them, by direction.
pub fn disk_bytes(pid: u32) -> Vec<(&'static str, f64)> {
    let io = fs::read_to_string(format!("/proc/{pid}/io")).unwrap_or_default();
    let field = |name: &str| {
        let line = io.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().parse().ok()
    };
    [("read", "read_bytes:"), ("written", "write_bytes:")]
        .into_iter()
        .filter_map(|(direction, name)| Some((direction, field(name)?)))
        .collect()
}

/// The interfaces of a process's network namespace but its loopback, with the bytes received and sent.
pub fn interfaces(pid: u32) -> Vec<(String, f64, f64)> {
    let table = fs::read_to_string(format!("/proc/{pid}/net/dev")).unwrap_or_default();
    devices(&table)
}

fn devices(table: &str) -> Vec<(String, f64, f64)> {
    let lines = table.lines().skip(2);
    lines
        .filter_map(|line| {
            let (name, counts) = line.split_once(':')?;
            let counts: Vec<&str> = counts.split_whitespace().collect();
            let count = |at: usize| counts.get(at)?.parse().ok();
            Some((name.trim().to_owned(), count(0)?, count(8)?))
        })
        // The taps carry what the interfaces beside them do.
        .filter(|(name, ..)| name != "lo" && !network::is_our_tap(name))
        .collect()
}

/// Size and resident KiB of the guest's memory, by far the largest mapping of a VMM.
pub fn largest_mapping(pid: u32) -> Option<(u64, u64)> {
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
    fn of_interfaces_bytes_received_and_sent_are_told() {
        let table = "Inter-|   Receive\n face |bytes\n    lo: 5 1 0 0 0 0 0 0 5 1 0 0 0 0 0 0\n\
             eth0:123 1 0 0 0 0 0 0     456 1 0 0 0 0 0 0\n  brig0: 1 0 0 0 0 0 0 0 1 0 0 0 0 0 0 0\n";
        assert_eq!(devices(table), [("eth0".to_owned(), 123.0, 456.0)]);
        assert!(devices("").is_empty());
        assert!(cpu_wait(std::process::id()).is_some_and(|seconds| seconds >= 0.0));
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
}
