//! What KVM counts of a VM, the same way for every VMM.

use std::fs;

/// Since the VM was made.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    /// Times that the guest stopped, whoever went on with it.
    pub exits: u64,
    /// Of them, accesses to addresses that are not memory.
    pub mmio: u64,
    /// Of them, accesses to I/O ports.
    pub ports: u64,
    /// Of them, memory that KVM had not mapped for the guest, or not for writing.
    pub faults: u64,
    /// Of them, a CPU that had nothing to do.
    pub halts: u64,
}

impl Counts {
    /// Of the VM that process `pid` has made; zeros without debugfs.
    #[must_use]
    pub fn of(pid: i32) -> Self {
        let prefix = format!("{pid}-");
        let directory = fs::read_dir("/sys/kernel/debug/kvm")
            .ok()
            .and_then(|entries| {
                entries
                    .flatten()
                    .find(|entry| entry.file_name().to_string_lossy().starts_with(&prefix))
            });
        let Some(directory) = directory else {
            return Self::default();
        };
        let value = |name: &str| {
            fs::read_to_string(directory.path().join(name))
                .ok()
                .and_then(|text| text.trim().parse().ok())
                .unwrap_or(0)
        };
        Self {
            exits: value("exits"),
            mmio: value("mmio_exits"),
            ports: value("io_exits"),
            faults: value("pf_taken"),
            halts: value("halt_exits"),
        }
    }
}
