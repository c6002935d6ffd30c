//! A daemon of the node by the name of its program, and what /proc says of it: how it was started, when, and what it may.
//!
//! Anybody can give a process a name, so it is root's (or this process's user's) in this process's pid namespace: neither a
//! pod's nor that of a node in a container. Trusts root. Blocking.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::identity;

/// Bit of a process's capabilities (`linux/capability.h`).
const CAP_SYS_RESOURCE: u32 = 24;

/// A process.
#[derive(Debug, Clone)]
pub struct Daemon {
    /// Its directory in /proc.
    place: PathBuf,
}

impl Daemon {
    /// Those with this name, by their pids; `proc` is where procfs is.
    #[must_use]
    pub fn named(proc: &Path, name: &str) -> Vec<Self> {
        let own = namespace(&proc.join("self"));
        let user = rustix::process::geteuid().as_raw();
        let entries = fs::read_dir(proc).into_iter().flatten().flatten();
        let mut found: Vec<(u32, Self)> = entries
            .filter_map(|entry| {
                let pid = entry.file_name().to_str()?.parse().ok()?;
                let place = entry.path();
                let called = fs::read_to_string(place.join("comm")).ok()?;
                let owner = fs::metadata(&place).ok()?.uid();
                // Another user's namespaces cannot be seen.
                let elsewhere = match (&own, namespace(&place)) {
                    (Some(own), Some(its)) => *own != its,
                    _ => false,
                };
                let is_it = called.trim() == name && [0, user].contains(&owner) && !elsewhere;
                is_it.then_some((pid, Self { place }))
            })
            .collect();
        found.sort_by_key(|(pid, _)| *pid);
        found.into_iter().map(|(_, daemon)| daemon).collect()
    }

    /// The words of its command line.
    #[must_use]
    pub fn command(&self) -> Vec<String> {
        let line = fs::read(self.place.join("cmdline")).unwrap_or_default();
        let words = line.split(|byte| *byte == 0);
        words
            .filter(|word| !word.is_empty())
            .map(|word| String::from_utf8_lossy(word).into_owned())
            .collect()
    }

    /// The directory that it is in, where its relative paths begin.
    #[must_use]
    pub fn directory(&self) -> Option<PathBuf> {
        fs::read_link(self.place.join("cwd")).ok()
    }

    /// Its program's file, also where that has been replaced meanwhile.
    #[must_use]
    pub fn program(&self) -> Option<PathBuf> {
        let link = fs::read_link(self.place.join("exe")).ok()?;
        let name = link.as_os_str().as_bytes();
        let name = name.strip_suffix(b" (deleted)").unwrap_or(name);
        Some(PathBuf::from(OsStr::from_bytes(name)))
    }

    /// A variable of the environment that it was started with: `None` if that cannot be seen, and an empty one where it has
    /// none of this name.
    #[must_use]
    pub fn variable(&self, name: &str) -> Option<OsString> {
        let environment = fs::read(self.place.join("environ")).ok()?;
        let mut entries = environment.split(|byte| *byte == 0);
        let value = entries.find_map(|entry| {
            let rest = entry.strip_prefix(name.as_bytes())?;
            rest.strip_prefix(b"=")
        });
        Some(OsString::from_vec(value.unwrap_or_default().to_vec()))
    }

    /// When it was started, by this node's clock as it goes now.
    #[must_use]
    pub fn started(&self) -> Option<SystemTime> {
        let ticks = identity::start_time(&fs::read_to_string(self.place.join("stat")).ok()?)?;
        let per_second = rustix::param::clock_ticks_per_second();
        let started = Duration::from_millis(ticks.checked_mul(1000)?.checked_div(per_second)?);
        let uptime = fs::read_to_string(self.place.parent()?.join("uptime")).ok()?;
        let uptime: f64 = uptime.split_ascii_whitespace().next()?.parse().ok()?;
        let uptime = Duration::try_from_secs_f64(uptime).ok()?;
        SystemTime::now().checked_sub(uptime.checked_sub(started)?)
    }

    /// What it and what it starts may lock at most, in bytes, if it cannot lift that.
    #[must_use]
    pub fn lockable(&self) -> Option<u64> {
        let read = |file: &str| fs::read_to_string(self.place.join(file)).unwrap_or_default();
        let status = read("status");
        let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
        let effective = effective.and_then(|text| u64::from_str_radix(text.trim(), 16).ok());
        if effective.is_none_or(|bits| bits >> CAP_SYS_RESOURCE & 1 == 1) {
            return None;
        }
        let limits = read("limits");
        let line = limits
            .lines()
            .find_map(|line| line.strip_prefix("Max locked memory"));
        // The soft one can be raised to the hard one.
        line?.split_ascii_whitespace().nth(1)?.parse().ok()
    }
}

fn namespace(place: &Path) -> Option<PathBuf> {
    fs::read_link(place.join("ns/pid")).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn process(proc: &Path, pid: &str, name: &str, namespace: &str) -> PathBuf {
        let place = proc.join(pid);
        fs::create_dir_all(place.join("ns")).unwrap();
        fs::write(place.join("comm"), format!("{name}\n")).unwrap();
        symlink(namespace, place.join("ns/pid")).unwrap();
        place
    }

    #[test]
    fn those_of_another_name_or_pid_namespace_are_not_meant() {
        let proc = tempfile::tempdir().unwrap();
        let proc = proc.path();
        process(proc, "self", "brig", "pid:[1]");
        process(proc, "40", "containerd", "pid:[1]");
        process(proc, "7", "containerd", "pid:[1]");
        process(proc, "3", "containerd", "pid:[2]");
        process(proc, "2", "containerd-shim", "pid:[1]");
        let found = Daemon::named(proc, "containerd");
        let places: Vec<_> = found.iter().map(|daemon| daemon.place.clone()).collect();
        assert_eq!(places, [proc.join("7"), proc.join("40")]);
        assert!(Daemon::named(proc, "dockerd").is_empty());
    }

    #[test]
    fn how_it_was_started_is_what_proc_says() {
        let proc = tempfile::tempdir().unwrap();
        let place = process(proc.path(), "7", "containerd", "pid:[1]");
        let daemon = &Daemon::named(proc.path(), "containerd")[0];
        assert_eq!(daemon.variable("PATH"), None);
        assert_eq!(daemon.program(), None);
        fs::write(place.join("environ"), "XPATH=/x\0PATH=/a:/b\0").unwrap();
        fs::write(place.join("cmdline"), "/opt/containerd\0-c\0/x.toml\0").unwrap();
        symlink("/opt/containerd (deleted)", place.join("exe")).unwrap();
        symlink("/srv", place.join("cwd")).unwrap();
        assert_eq!(daemon.variable("PATH"), Some("/a:/b".into()));
        assert_eq!(daemon.variable("HOME"), Some("".into()));
        assert_eq!(daemon.command(), ["/opt/containerd", "-c", "/x.toml"]);
        assert_eq!(daemon.program(), Some("/opt/containerd".into()));
        assert_eq!(daemon.directory(), Some("/srv".into()));
    }

    #[test]
    fn a_process_was_started_when_it_was() {
        let before = SystemTime::now();
        let mut child = std::process::Command::new("sleep")
            .arg("100")
            .spawn()
            .unwrap();
        let place = PathBuf::from(format!("/proc/{}", child.id()));
        let started = Daemon { place }.started().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        // Clocks of this kind go in steps of 10 ms.
        let step = Duration::from_millis(50);
        assert!(started > before - step && started < SystemTime::now() + step);
    }
}
