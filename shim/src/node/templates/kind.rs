//! What decides whether a pod can go on from a template: everything that the captured guest has seen of its node and its machine.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;

use brig_hypervisor::arch::x86_64::cpuid;
use rustix::fs::{Stat, fstat, stat};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// Bytes of a key's hash that its name shows.
const SHOWN: usize = 16;

/// The machine of a template. What a pod needs beyond it comes later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    /// Memory in bytes.
    pub memory: u64,
    /// As much as it may become.
    pub max_memory: u64,
    /// CPUs that there may be; one is there.
    pub most_cpus: u8,
}

/// The files that a guest is made from.
pub struct Files<'a> {
    /// vmlinux, open.
    pub kernel: BorrowedFd<'a>,
    /// The initramfs, open.
    pub initramfs: BorrowedFd<'a>,
    /// brig-vmm.
    pub vmm: &'a Path,
}

/// One kind of template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kind {
    key: String,
}

/// What a captured guest has seen of its node.
struct Host {
    /// Of this boot.
    boot: String,
    /// Of the CPU. Not every kernel tells it, as that of a VM.
    microcode: Option<String>,
    /// Model and features of the CPU.
    cpu: String,
}

impl Host {
    fn now() -> io::Result<Self> {
        Ok(Self {
            boot: fs::read_to_string("/proc/sys/kernel/random/boot_id")?,
            microcode: fs::read_to_string("/sys/devices/system/cpu/cpu0/microcode/version").ok(),
            cpu: format!("{:x?}", cpuid::host_model()),
        })
    }
}

impl Kind {
    /// The kind that these files make on this node.
    ///
    /// A file is known by where it is and by when it was changed last, not by its contents: to hash 30 MiB takes longer than a clone's start,
    /// and the time of change is the kernel's, which nobody sets.
    ///
    /// # Errors
    /// What the host says.
    pub fn of(files: &Files<'_>, machine: &Machine) -> io::Result<Self> {
        Self::on(&Host::now()?, files, machine)
    }

    fn on(host: &Host, files: &Files<'_>, machine: &Machine) -> io::Result<Self> {
        let mut text = String::from("1\n");
        let identities = [
            fstat(files.kernel)?,
            fstat(files.initramfs)?,
            stat(files.vmm)?,
        ];
        for file in identities {
            identify(&mut text, &file);
        }
        let Host {
            boot,
            microcode,
            cpu,
        } = host;
        let microcode = microcode.as_deref().unwrap_or("");
        let _ = writeln!(text, "{boot}{microcode}\n{cpu}\n{machine:?}");
        let mut key = String::new();
        for byte in Sha256::digest(text).iter().take(SHOWN) {
            let _ = write!(key, "{byte:02x}");
        }
        Ok(Self { key })
    }

    /// Its name.
    #[must_use]
    pub fn key(&self) -> &str {
        &self.key
    }
}

fn identify(text: &mut String, file: &Stat) {
    let _ = writeln!(
        text,
        "{} {} {} {}.{} {}.{}",
        file.st_dev,
        file.st_ino,
        file.st_size,
        file.st_mtime,
        file.st_mtime_nsec,
        file.st_ctime,
        file.st_ctime_nsec
    );
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd as _;

    use super::*;

    #[test]
    fn another_file_another_machine_and_a_file_that_was_changed_are_other_kinds() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        for name in ["kernel", "initramfs", "vmm"] {
            fs::write(path(name), name).unwrap();
        }
        let machine = Machine {
            memory: 128 << 20,
            max_memory: 1 << 30,
            most_cpus: 1,
        };
        let key = |machine: &Machine| {
            let (kernel, initramfs) = (
                File::open(path("kernel")).unwrap(),
                File::open(path("initramfs")).unwrap(),
            );
            let files = Files {
                kernel: kernel.as_fd(),
                initramfs: initramfs.as_fd(),
                vmm: &path("vmm"),
            };
            Kind::of(&files, machine).unwrap().key().to_owned()
        };
        let first = key(&machine);
        assert_eq!(first.len(), 2 * SHOWN);
        assert_eq!(first, key(&machine));
        let larger = Machine {
            memory: 256 << 20,
            ..machine
        };
        assert_ne!(first, key(&larger));
        let mut keys = vec![first];
        for name in ["kernel", "initramfs", "vmm"] {
            // Of the same name, length and time of modification.
            let other = path("other");
            fs::write(&other, name).unwrap();
            let modified = fs::metadata(path(name)).unwrap().modified().unwrap();
            File::options()
                .write(true)
                .open(&other)
                .unwrap()
                .set_modified(modified)
                .unwrap();
            fs::rename(&other, path(name)).unwrap();
            let next = key(&machine);
            assert!(!keys.contains(&next), "{name}");
            keys.push(next);
        }
    }
    #[test]
    fn new_microcode_another_cpu_and_another_boot_are_other_kinds() {
        let kernel = tempfile::NamedTempFile::new().unwrap();
        let files = Files {
            kernel: kernel.as_file().as_fd(),
            initramfs: kernel.as_file().as_fd(),
            vmm: kernel.path(),
        };
        let machine = Machine {
            memory: 128 << 20,
            max_memory: 1 << 30,
            most_cpus: 1,
        };
        let host = |boot: &str, microcode: Option<&str>, cpu: &str| Host {
            boot: boot.to_owned(),
            microcode: microcode.map(str::to_owned),
            cpu: cpu.to_owned(),
        };
        let key = |host: &Host| Kind::on(host, &files, &machine).unwrap().key;
        let hosts = [
            host("boot\n", Some("0x1\n"), "cpu"),
            host("boot\n", Some("0x2\n"), "cpu"),
            host("boot\n", None, "cpu"),
            host("boot\n", Some("0x1\n"), "other"),
            host("again\n", Some("0x1\n"), "cpu"),
        ];
        let keys: std::collections::BTreeSet<_> = hosts.iter().map(key).collect();
        assert_eq!(keys.len(), hosts.len());
        assert_eq!(key(&hosts[0]), key(&host("boot\n", Some("0x1\n"), "cpu")));
        assert_eq!(
            Kind::of(&files, &machine).unwrap(),
            Kind::on(&Host::now().unwrap(), &files, &machine).unwrap()
        );
    }
}
