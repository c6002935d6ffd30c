//! Compares a living VMM with the list in [`super::allow`], from outside, through the node's procfs.
//!
//! For tests, and for an operator who wants to know. Trusts the node's kernel, not the process.

pub mod filters;

use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt;

use super::allow;

/// How far a process must have confined itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// [`super::enter`] is done.
    Jailed,
    /// And every thread has its filter.
    Filtered,
}

/// The differences between a process and the list, one sentence each; empty if there is none.
///
/// # Errors
/// If the process has ended or its `/proc` entry cannot be read.
pub fn differences(pid: u32, extent: Extent) -> io::Result<Vec<String>> {
    let proc = format!("/proc/{pid}");
    let mut found = Vec::new();
    for task in fs::read_dir(format!("{proc}/task"))? {
        let status = fs::read_to_string(task?.path().join("status"))?;
        thread(&status, extent, &mut found);
    }
    mounts(
        &fs::read_to_string(format!("{proc}/mountinfo"))?,
        &mut found,
    );
    for entry in fs::read_dir(format!("{proc}/fd"))? {
        let entry = entry?;
        // Standard error is the log, whatever the shim chose.
        if entry.file_name() == "2" {
            continue;
        }
        // Container streams are containerd's FIFOs, wherever it keeps them.
        if fs::metadata(entry.path())?.file_type().is_fifo() {
            continue;
        }
        let target = fs::read_link(entry.path())?;
        let target = target.to_string_lossy();
        if !allow::descriptor(&target) {
            found.push(format!(
                "descriptor {} is {target}",
                entry.file_name().to_string_lossy()
            ));
        }
    }
    for namespace in ["user", "mnt", "pid", "ipc", "uts"] {
        let its = fs::read_link(format!("{proc}/ns/{namespace}"))?;
        if its == fs::read_link(format!("/proc/self/ns/{namespace}"))? {
            found.push(format!("it shares the caller's {namespace} namespace"));
        }
    }
    if !fs::read(format!("{proc}/environ"))?.is_empty() {
        found.push("its environment is not empty".into());
    }
    Ok(found)
}

fn thread(status: &str, extent: Extent, found: &mut Vec<String>) {
    let field = |name: &str| {
        status
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
            .map_or("", str::trim)
    };
    let name = field("Name");
    let allowed: u64 = allow::CAPABILITIES
        .iter()
        .map(|capability| capability.bitmask())
        .sum();
    for (set, wanted) in [
        ("CapPrm", allowed),
        ("CapEff", allowed),
        ("CapInh", 0),
        ("CapBnd", 0),
        ("CapAmb", 0),
    ] {
        if u64::from_str_radix(field(set), 16) != Ok(wanted) {
            found.push(format!(
                "thread {name} has {set} {}, not {wanted:016x}",
                field(set)
            ));
        }
    }
    let seccomp = if extent == Extent::Filtered { "2" } else { "0" };
    for (what, wanted) in [
        ("NoNewPrivs", "1"),
        ("Seccomp", seccomp),
        ("Groups", ""),
        ("Umask", "0000"),
    ] {
        // At work it is that of the guest's process for which the file server has made the last file.
        if what == "Umask" && extent == Extent::Filtered {
            continue;
        }
        if field(what) != wanted {
            found.push(format!(
                "thread {name} has {what} {:?}, not {wanted:?}",
                field(what)
            ));
        }
    }
    // Real, effective, saved and file system id.
    if field("Uid").split_ascii_whitespace().next() == Some("0") {
        found.push(format!("thread {name} is on root's account"));
    }
    // pid in the caller's namespace, then 1 or, for a thread's own line, the process's still.
    if field("NSpid").split_ascii_whitespace().count() < 2 {
        found.push(format!("thread {name} has no pid namespace of its own"));
    }
}

fn mounts(table: &str, found: &mut Vec<String>) {
    let mut base: Vec<&str> = Vec::new();
    for line in table.lines() {
        let Some((mount, file_system)) = line.split_once(" - ") else {
            found.push(format!("mount line {line:?} is not understood"));
            continue;
        };
        let words: Vec<&str> = mount.split(' ').collect();
        let [_, _, _, _, point, flags, optional @ ..] = words.as_slice() else {
            found.push(format!("mount line {line:?} is not understood"));
            continue;
        };
        let flags: Vec<&str> = flags.split(',').collect();
        for flag in allow::MOUNT_FLAGS {
            if !flags.contains(flag) {
                found.push(format!("mount {point} lacks {flag}"));
            }
        }
        if optional.iter().any(|field| field.starts_with("shared:")) {
            found.push(format!("mount {point} is a peer of another"));
        }
        let kind = file_system.split(' ').next().unwrap_or_default();
        match allow::MOUNTS.iter().find(|(known, _, _)| known == point) {
            Some((_, wanted, readonly)) => {
                if kind != *wanted || flags.contains(&"ro") != *readonly {
                    found.push(format!("mount {point} is {kind} {}", flags.join(",")));
                }
                base.push(point);
            }
            None if point.starts_with("/shared/") => {}
            None => found.push(format!("there is a mount at {point}")),
        }
    }
    for (point, _, _) in allow::MOUNTS {
        if base.iter().filter(|known| *known == point).count() != 1 {
            found.push(format!("there is not exactly one mount at {point}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "1 0 0:1 / / ro,nosuid,nodev,noexec - tmpfs none ro\n\
        2 1 0:2 / /proc ro,nosuid,nodev,noexec - proc none rw\n\
        3 1 0:3 / /shared ro,nosuid,nodev,noexec - tmpfs none rw\n";

    fn check(table: &str) -> Vec<String> {
        let mut found = Vec::new();
        mounts(table, &mut found);
        found
    }

    #[test]
    fn a_mount_that_is_not_on_the_list_is_told() {
        assert_eq!(check(GOOD), Vec::<String>::new());
        let volume = "4 3 0:4 / /shared/v rw,nosuid,nodev,noexec - ext4 x rw\n";
        assert_eq!(check(&format!("{GOOD}{volume}")), Vec::<String>::new());
        let peer = "4 3 0:4 / /shared/v rw,nosuid,nodev shared:1 - ext4 x rw\n";
        assert_eq!(
            check(&format!("{GOOD}{peer}")),
            [
                "mount /shared/v lacks noexec",
                "mount /shared/v is a peer of another"
            ]
        );
        let host = "5 1 0:5 / /sys rw,nosuid,nodev,noexec - sysfs x rw\n";
        assert_eq!(
            check(&format!("{GOOD}{host}")),
            ["there is a mount at /sys"]
        );
        assert_eq!(check(&GOOD.replace(" ro,", " rw,")).len(), 3);
        assert_eq!(check("").len(), 3);
    }

    #[test]
    fn a_thread_with_more_than_the_list_is_told() {
        let allowed: u64 = allow::CAPABILITIES.iter().map(|one| one.bitmask()).sum();
        let status = format!(
            "Name:\tx\nUid:\t7\t0\t0\t0\nUmask:\t0000\nGroups:\t \nNSpid:\t7\t1\nCapInh:\t0\nCapPrm:\t{allowed:x}\n\
             CapEff:\t{allowed:x}\nCapBnd:\t0\nCapAmb:\t0\nNoNewPrivs:\t1\nSeccomp:\t2\n"
        );
        let check = |status: &str| {
            let mut found = Vec::new();
            thread(status, Extent::Filtered, &mut found);
            found.len()
        };
        assert_eq!(check(&status), 0);
        assert_eq!(check(&status.replace("Seccomp:\t2", "Seccomp:\t0")), 1);
        assert_eq!(check(&status.replace("CapBnd:\t0", "CapBnd:\t1ff")), 1);
        assert_eq!(check(&status.replace("NSpid:\t7\t1", "NSpid:\t7")), 1);
        assert_eq!(check(&status.replace("Uid:\t7", "Uid:\t0")), 1);
        assert!(check("") > 5);
    }
}
