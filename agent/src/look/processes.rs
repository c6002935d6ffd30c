//! Every process of the guest, its containers' included.
use std::{fmt::Write as _, fs};

use brig_agent_protocol::MAX_LISTED;

use crate::error::{Error, Result};

/// The longest command line and the longest path of a cgroup that are shown, in characters.
const MAX_COMMAND: usize = 200;
const MAX_CGROUP: usize = 80;

/// A line each: pid, parent, owner, state, threads, resident KiB, CPU seconds, cgroup and command line.
///
/// # Errors
/// Without /proc.
pub(super) fn list() -> Result<String> {
    let entries = fs::read_dir("/proc").map_err(|error| Error::io("/proc", error))?;
    let mut pids: Vec<u32> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    pids.sort_unstable();
    pids.truncate(MAX_LISTED);
    let mut text = format!(
        "{:>7} {:>7} {:>6} S {:>4} {:>9} {:>8} CGROUP COMMAND\n",
        "PID", "PPID", "UID", "THR", "RSS KiB", "CPU s"
    );
    for pid in pids {
        let read = |name: &str| fs::read(format!("/proc/{pid}/{name}")).unwrap_or_default();
        let text_of = |name: &str| String::from_utf8_lossy(&read(name)).into_owned();
        let Some(stat) = Stat::parse(&text_of("stat")) else {
            continue;
        };
        let uid = uid(&text_of("status")).unwrap_or_else(|| "?".to_owned());
        let cgroup = text_of("cgroup");
        let cgroup = cgroup.lines().find_map(|line| line.strip_prefix("0::"));
        let cgroup: String = cgroup.unwrap_or("-").chars().take(MAX_CGROUP).collect();
        let command = command(&read("cmdline"), &stat.name);
        let Stat {
            parent,
            state,
            threads,
            ticks,
            pages,
            ..
        } = stat;
        let _ = writeln!(
            text,
            "{pid:>7} {parent:>7} {uid:>6} {state} {threads:>4} {:>9} {:>8} {cgroup} {command}",
            pages * (u64::try_from(rustix::param::page_size()).unwrap_or(4096) / 1024),
            ticks / rustix::param::clock_ticks_per_second().max(1),
        );
    }
    Ok(text)
}

/// Of /proc/PID/stat (proc_pid_stat(5)).
#[derive(Debug, PartialEq)]
struct Stat {
    name: String,
    state: String,
    parent: u32,
    threads: u64,
    /// User and system time.
    ticks: u64,
    /// Resident.
    pages: u64,
}

impl Stat {
    /// A name may have spaces and brackets in it, so fields count from the last bracket.
    fn parse(stat: &str) -> Option<Self> {
        let (start, rest) = stat.rsplit_once(')')?;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        let number = |at: usize| fields.get(at)?.parse::<u64>().ok();
        Some(Self {
            name: start.split_once('(')?.1.to_owned(),
            state: (*fields.first()?).to_owned(),
            parent: fields.get(1)?.parse().ok()?,
            threads: number(17)?,
            ticks: number(11)?.checked_add(number(12)?)?,
            pages: number(21)?,
        })
    }
}

fn uid(status: &str) -> Option<String> {
    let line = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    Some(line.split_whitespace().next()?.to_owned())
}

/// A kernel thread has none but its name.
fn command(cmdline: &[u8], name: &str) -> String {
    let words = String::from_utf8_lossy(cmdline).replace('\0', " ");
    let words = words.trim_end();
    if words.is_empty() {
        return format!("[{name}]");
    }
    words.chars().take(MAX_COMMAND).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_brackets_and_spaces_does_not_shift_the_fields() {
        let stat = "42 (a) b (c) S 7 42 42 0 -1 4194560 1 2 3 4 50 25 0 0 20 0 3 0 9 1000 77 18446744073709551615";
        let parsed = Stat::parse(stat).unwrap();
        assert_eq!(parsed.name, "a) b (c");
        assert_eq!((parsed.parent, parsed.threads), (7, 3));
        assert_eq!((parsed.ticks, parsed.pages), (75, 77));
        assert_eq!(Stat::parse("42 (a"), None);
    }

    #[test]
    fn a_command_line_is_cut_and_a_kernel_thread_has_its_name() {
        assert_eq!(command(b"sleep\x0060\0", "sleep"), "sleep 60");
        assert_eq!(command(b"", "kworker/0:1"), "[kworker/0:1]");
        assert_eq!(command(&[b'x'; 5000], "x").len(), MAX_COMMAND);
    }

    #[test]
    fn this_process_is_listed() {
        let text = list().unwrap();
        let own = std::process::id().to_string();
        assert!(
            text.lines()
                .any(|line| line.split_whitespace().next() == Some(&own))
        );
    }
}
