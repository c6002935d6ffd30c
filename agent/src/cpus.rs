//! Brings CPUs online and takes them offline. The host has given each a thread before it asks; the first always runs.
//!
//! Trusts the host, and the guest's sysfs.
use std::{fs, io, path::Path};

use crate::error::{Error, Result};

/// Where the kernel has them.
const CPUS: &str = "/sys/devices/system/cpu";

/// Has `count` CPUs online: the first ones. Blocking.
///
/// # Errors
/// `InvalidArgument` for none or more than there are, `FailedPrecondition` if the kernel keeps one as it is.
pub fn set(count: u32) -> Result<()> {
    set_in(Path::new(CPUS), count)
}

fn set_in(cpus: &Path, count: u32) -> Result<()> {
    let present = fs::read_to_string(cpus.join("present"));
    let present = present.map_err(|e| Error::io("the CPUs that are present", e))?;
    let there = number(&present).ok_or_else(|| {
        Error::Internal(format!("the kernel's CPUs are {present:?}, not from 0 on"))
    })?;
    if count == 0 || count > there {
        return Err(Error::InvalidArgument(format!(
            "{count} CPUs cannot be online: the guest has 1 to {there}"
        )));
    }
    for cpu in 1..count {
        switch(cpus, cpu, "1").map_err(|e| kept(cpu, "online", &e))?;
    }
    for cpu in (count..there).rev() {
        switch(cpus, cpu, "0").map_err(|e| kept(cpu, "offline", &e))?;
    }
    Ok(())
}

/// What the kernel answers to a state that the CPU has already is no error.
fn switch(cpus: &Path, cpu: u32, state: &str) -> io::Result<()> {
    let file = cpus.join(format!("cpu{cpu}/online"));
    if fs::read_to_string(&file)?.trim() == state {
        return Ok(());
    }
    fs::write(&file, state)
}

fn kept(cpu: u32, wanted: &str, error: &io::Error) -> Error {
    Error::FailedPrecondition(format!(
        "CPU {cpu} of the guest does not go {wanted}: {error}"
    ))
}

/// How many CPUs a list of the form `0-3` names.
fn number(list: &str) -> Option<u32> {
    match list.trim().split_once('-') {
        Some(("0", last)) => last.parse::<u32>().ok()?.checked_add(1),
        None if list.trim() == "0" => Some(1),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(online: &[&str]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let last = online.len();
        let present = if last == 0 {
            "0\n".into()
        } else {
            format!("0-{last}\n")
        };
        fs::write(dir.path().join("present"), present).unwrap();
        for (cpu, state) in (1..).zip(online) {
            let cpu = dir.path().join(format!("cpu{cpu}"));
            fs::create_dir(&cpu).unwrap();
            fs::write(cpu.join("online"), format!("{state}\n")).unwrap();
        }
        dir
    }

    fn online(dir: &tempfile::TempDir, cpus: u32) -> Vec<String> {
        let read = |cpu: u32| fs::read_to_string(dir.path().join(format!("cpu{cpu}/online")));
        (1..=cpus)
            .map(|cpu| read(cpu).unwrap().trim().to_owned())
            .collect()
    }

    #[test]
    fn the_first_cpus_are_online_and_the_others_are_not() {
        let dir = machine(&["0", "0", "0"]);
        set_in(dir.path(), 3).unwrap();
        assert_eq!(online(&dir, 3), ["1", "1", "0"]);
        set_in(dir.path(), 2).unwrap();
        assert_eq!(online(&dir, 3), ["1", "0", "0"]);
        set_in(dir.path(), 1).unwrap();
        assert_eq!(online(&dir, 3), ["0", "0", "0"]);
        for count in [0, 5] {
            let refused = set_in(dir.path(), count).unwrap_err().to_string();
            assert!(refused.contains("1 to 4"), "{refused}");
        }
    }

    #[test]
    fn a_guest_of_one_cpu_has_nothing_to_switch() {
        let dir = machine(&[]);
        set_in(dir.path(), 1).unwrap();
        assert!(set_in(dir.path(), 2).is_err());
    }

    #[test]
    fn lists_that_do_not_begin_with_the_first_are_none() {
        assert_eq!((number("0-63\n"), number("0\n")), (Some(64), Some(1)));
        for list in ["", "1", "1-2", "0-1,3", "0-", "0-x"] {
            assert_eq!(number(list), None, "{list}");
        }
    }
}
