//! Host system calls of a VMM up to agent ready, counted by strace over a whole boot.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use brig_tests::node::{clock, process};

const TRACE: &str = "/run/brig-bench-strace";

/// Runs `own flag` under strace and counts the calls of `program` and its threads.
pub fn count(own: &Path, flag: &str, program: &str) -> Result<BTreeMap<String, u64>> {
    let mut command = Command::new("strace");
    command
        .args([
            "--follow-forks",
            "--quiet=all",
            "--signal=none",
            "--string-limit=40",
            "--output",
            TRACE,
        ])
        .arg(own)
        .arg(flag);
    process::run(command, clock::seconds(60))?
        .success()
        .context("strace")?;
    let trace = fs::read(TRACE)?;
    let calls = parse(&String::from_utf8_lossy(&trace), program);
    ensure!(!calls.is_empty(), "strace saw no {program}");
    let _ = fs::remove_file(TRACE);
    Ok(calls)
}

/// Counts calls in `PID call(args) = result` lines: from the exec of `program`, in that process and
/// whatever it clones.
fn parse(trace: &str, program: &str) -> BTreeMap<String, u64> {
    let mut members: BTreeSet<&str> = BTreeSet::new();
    let mut calls: BTreeMap<String, u64> = BTreeMap::new();
    // What is executed is the first argument; brig-vmm is executed by descriptor, with an empty path.
    let executed = |call: &str| {
        call.starts_with("execveat(")
            || call
                .strip_prefix("execve(")
                .and_then(|arguments| arguments.split(',').next())
                .is_some_and(|path| path.contains(program))
    };
    for line in trace.lines() {
        let Some((pid, rest)) = line.split_once(char::is_whitespace) else {
            continue;
        };
        let rest = rest.trim_start();
        if executed(rest) {
            members.insert(pid);
        }
        if !members.contains(pid) {
            continue;
        }
        let name = match rest.strip_prefix("<... ") {
            // The second half of a call that was counted at its first.
            Some(resumed) => {
                let name = resumed.split_whitespace().next().unwrap_or_default();
                adopt(name, rest, &mut members);
                continue;
            }
            None => rest.split('(').next().unwrap_or_default(),
        };
        if name.is_empty() || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') {
            continue;
        }
        *calls.entry(name.to_owned()).or_default() += 1;
        adopt(name, rest, &mut members);
    }
    calls
}

/// A member that clones adds its child.
fn adopt<'a>(name: &str, rest: &'a str, members: &mut BTreeSet<&'a str>) {
    if matches!(name, "clone" | "clone3" | "fork" | "vfork")
        && let Some((_, result)) = rest.rsplit_once(" = ")
    {
        let child = result.split_whitespace().next().unwrap_or_default();
        if child.bytes().all(|byte| byte.is_ascii_digit()) {
            members.insert(child);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_of_the_vmm_and_its_threads_are_counted_and_no_others() {
        let trace = "\
10 execve(\"/host/bin/brig-bench\", [\"brig-bench\"], 0x7) = 0
10 read(3, \"\", 10) = 0
10 clone3({flags=CLONE_NEWUSER}, 88) = 11
11 setsid() = 11
11 execveat(5, \"\", [\"brig-vmm\"], [], AT_EMPTY_PATH) = 0
11 ioctl(3, KVM_RUN, 0) = 0
11 clone3({flags=CLONE_VM}, 88 <unfinished ...>
10 read(3, \"\", 10) = 0
11 <... clone3 resumed>) = 12
12 ioctl(3, KVM_RUN, 0) = 0
13 write(1, \"x\", 1) = 1
";
        let calls = parse(trace, "brig-vmm");
        assert_eq!(calls.get("ioctl"), Some(&2));
        assert_eq!(calls.get("clone3"), Some(&1));
        assert_eq!(calls.get("read"), None);
        assert_eq!(calls.get("write"), None);
        assert_eq!(calls.get("setsid"), None);
    }

    #[test]
    fn a_program_is_known_by_its_path_and_not_by_its_arguments() {
        let trace = "\
10 execve(\"/host/bin/brig-bench\", [\"brig-bench\", \"qemu-system-x86_64\"], 0x7) = 0
10 read(3, \"\", 10) = 0
11 execve(\"/usr/bin/qemu-system-x86_64\", [\"qemu\", \"/run/brig-bench-initramfs.cpio\"], 0x7) = 0
11 ioctl(3, KVM_RUN, 0) = 0
";
        let calls = parse(trace, "qemu-system-x86_64");
        assert_eq!(calls.get("ioctl"), Some(&1));
        assert_eq!(calls.get("read"), None);
    }
}
