//! What a process of this node uses, from /proc, which the node's kernel writes.

use std::collections::BTreeMap;
use std::fs;

use brig_hypervisor::arch::x86_64::layout;
use brig_shim::node::network;

/// Proportional set size in KiB; `None` for a process that has gone.
pub fn pss(pid: u32) -> Option<u64> {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:"))?;
    kib(line)
}

/// A size as the kernel writes it, `12 kB`, in KiB.
pub fn kib(text: &str) -> Option<u64> {
    text.trim().strip_suffix("kB")?.trim().parse().ok()
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

/// Seconds that each CPU of a VMM's guest has been ready without a CPU of the node, by its number (proc(5), `schedstat`: the
/// second number). Told by thread, and of no thread that may end before the VM does: the sum over those that live falls.
pub fn vcpu_wait(pid: u32) -> BTreeMap<u8, f64> {
    let threads = fs::read_dir(format!("/proc/{pid}/task"));
    let waited = threads
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|thread| {
            let cpu = vcpu(&fs::read_to_string(thread.path().join("comm")).ok()?)?;
            let schedstat = fs::read_to_string(thread.path().join("schedstat")).ok()?;
            let nanos: f64 = schedstat.split_whitespace().nth(1)?.parse().ok()?;
            Some((cpu, nanos / 1e9))
        });
    waited.collect()
}

/// The number of the guest's CPU that a thread of this name runs, which is `vcpu0`, or `vcpu0-debug` where it may be debugged.
fn vcpu(name: &str) -> Option<u8> {
    let number = name.trim_end().strip_prefix("vcpu")?;
    number.strip_suffix("-debug").unwrap_or(number).parse().ok()
}

/// Descriptors that a process may have open, its soft limit (proc(5), `limits`); `None` for one without a limit and for
/// one that has gone.
pub fn open_files_limit(pid: u32) -> Option<f64> {
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).ok()?;
    soft_limit(&limits, "Max open files")
}

fn soft_limit(limits: &str, name: &str) -> Option<f64> {
    let line = limits.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
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

/// Memory of a guest in its VMM's address space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mapping {
    /// Where it begins.
    pub start: u64,
    /// Bytes.
    pub length: u64,
    /// Bytes that are resident.
    pub resident: u64,
}

/// Size and resident KiB of the guest's memory.
pub fn guest_memory_size(pid: u32) -> Option<(u64, u64)> {
    let mappings = guest_memory(&fs::read_to_string(format!("/proc/{pid}/smaps")).ok()?);
    let sum = |bytes: fn(&Mapping) -> u64| mappings.iter().map(bytes).sum::<u64>() / 1024;
    let size = sum(|mapping| mapping.length);
    (size > 0).then(|| (size, sum(|mapping| mapping.resident)))
}

/// The guest's memory: what a VMM has that it may write and that no core file of it would have. Advice on parts of it
/// makes several mappings of one; those that touch are one. All of it is in huge pages' sizes, and what the C library
/// keeps in such mappings is not.
pub fn guest_memory(smaps: &str) -> Vec<Mapping> {
    let mut found: Vec<Mapping> = Vec::new();
    let mut current: Option<Mapping> = None;
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        match words.next().unwrap_or("") {
            "Rss:" => {
                let kib = words.next().and_then(|word| word.parse::<u64>().ok());
                if let (Some(mapping), Some(kib)) = (&mut current, kib) {
                    mapping.resident = kib * 1024;
                }
            }
            "VmFlags:" => {
                let flags: Vec<&str> = words.collect();
                let is_guests = flags.contains(&"dd") && !flags.contains(&"io");
                let Some(mapping) = current.take().filter(|_| is_guests) else {
                    continue;
                };
                match found.last_mut() {
                    Some(last) if last.start + last.length == mapping.start => {
                        last.length += mapping.length;
                        last.resident += mapping.resident;
                    }
                    _ => found.push(mapping),
                }
            }
            first => {
                if let Some((start, end)) = range(first) {
                    current = (words.next() == Some("rw-p")).then_some(Mapping {
                        start,
                        length: end - start,
                        resident: 0,
                    });
                }
            }
        }
    }
    found.retain(|mapping| mapping.length.is_multiple_of(layout::HUGE_PAGE));
    found
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
    fn a_soft_limit_is_told_by_its_name() {
        let limits = "\
Limit                     Soft Limit           Hard Limit           Units
Max locked memory         unlimited            unlimited            bytes
Max open files            8192                 524288               files
";
        assert_eq!(soft_limit(limits, "Max open files"), Some(8192.0));
        assert_eq!(soft_limit(limits, "Max locked memory"), None);
        assert_eq!(soft_limit("", "Max open files"), None);
    }

    #[test]
    fn of_interfaces_bytes_received_and_sent_are_told() {
        let table = "Inter-|   Receive\n face |bytes\n    lo: 5 1 0 0 0 0 0 0 5 1 0 0 0 0 0 0\n\
             eth0:123 1 0 0 0 0 0 0     456 1 0 0 0 0 0 0\n  vethbrig0: 1 0 0 0 0 0 0 0 1 0 0 0 0 0 0 0\n";
        assert_eq!(devices(table), [("eth0".to_owned(), 123.0, 456.0)]);
        assert!(devices("").is_empty());
    }

    #[test]
    fn a_thread_that_ends_takes_nothing_from_what_cpus_of_the_guest_have_waited() {
        for (name, cpu) in [
            ("vcpu0\n", Some(0)),
            ("vcpu12-debug\n", Some(12)),
            ("vcpu\n", None),
            ("vcpu256\n", None),
            ("vcpu1-more\n", None),
            ("block-io\n", None),
        ] {
            assert_eq!(vcpu(name), cpu, "{name}");
        }
        let named = |name: &str| std::thread::Builder::new().name(name.to_owned());
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let cpu = named("vcpu7").spawn(move || ended.recv()).unwrap();
        let mut before = 0.0;
        for _ in 0..20 {
            let helper = named("block-io").spawn(std::thread::yield_now);
            let now = vcpu_wait(std::process::id());
            helper.unwrap().join().unwrap();
            // It has its name a moment after it was born.
            let Some(waited) = now.get(&7) else { continue };
            assert!(now.len() == 1 && *waited >= before, "{before}: {now:?}");
            before = *waited;
        }
        assert_eq!(vcpu_wait(std::process::id()).len(), 1);
        drop(end);
        assert!(cpu.join().unwrap().is_err());
        assert!(vcpu_wait(u32::MAX).is_empty());
    }

    #[test]
    fn guest_memory_in_several_mappings_is_one() {
        let smaps = "\
10000-20000 r-xp 00000000 fe:00 12 /opt/brig/brig-vmm
Rss: 9000 kB
VmFlags: rd ex mr mw me
7f000000-7f200000 rw-p 00000000 00:00 0
Rss: 3 kB
Pss: 3 kB
VmFlags: rd wr mr mw me ac dd hg
7f200000-7f600000 rw-p 00000000 00:00 0
Rss: 1 kB
VmFlags: rd wr mr mw me ac dd nh
7f600000-7f601000 ---p 00000000 00:00 0
Rss: 0 kB
VmFlags: mr mw me nr
7f800000-7fa00000 rw-p 00000000 00:00 0
Rss: 8 kB
VmFlags: rd wr mr mw me
80000000-80200000 rw-p 00000000 00:01 7 /memfd:template
Rss: 4 kB
VmFlags: rd wr mr mw me dd
80400000-80600000 rw-s 00000000 00:0e 7 anon_inode:[vfio-device]
Rss: 0 kB
VmFlags: rd wr sh mr mw me pf io dd
80800000-80801000 rw-p 00000000 00:00 0
Rss: 4 kB
VmFlags: rd wr mr mw me wf dd dp
";
        let mapping = |start, length, resident| Mapping {
            start,
            length,
            resident,
        };
        assert_eq!(
            guest_memory(smaps),
            [
                mapping(0x7f00_0000, 0x60_0000, 4096),
                mapping(0x8000_0000, 0x20_0000, 4096)
            ]
        );
        assert_eq!(guest_memory(""), []);
    }
}
