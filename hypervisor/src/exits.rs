//! Counts VM exits by reason.
//!
//! Each CPU thread has its own counters and is the only one to write them, so counting is a load
//! and a store; the main thread reads them for [`crate::control::Counters`].

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::sync::lock;

/// Reasons.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
#[allow(missing_docs, reason = "named by NAMES below")]
pub enum Reason {
    OutBootMark,
    OutConsole,
    InConsole,
    OutAcpi,
    InAcpi,
    OutUnknown,
    InUnknown,
    EcamRead,
    EcamWrite,
    BarRead,
    BarWrite,
    MmioReadUnknown,
    MmioWriteUnknown,
    Halt,
    Interrupted,
    Debug,
    Shutdown,
    InternalError,
    Other,
}

const NAMES: [(Reason, &str); 19] = [
    (Reason::OutBootMark, "io_out:boot_mark"),
    (Reason::OutConsole, "io_out:console"),
    (Reason::InConsole, "io_in:console"),
    (Reason::OutAcpi, "io_out:acpi"),
    (Reason::InAcpi, "io_in:acpi"),
    (Reason::OutUnknown, "io_out:unknown"),
    (Reason::InUnknown, "io_in:unknown"),
    (Reason::EcamRead, "mmio_read:ecam"),
    (Reason::EcamWrite, "mmio_write:ecam"),
    (Reason::BarRead, "mmio_read:bar"),
    (Reason::BarWrite, "mmio_write:bar"),
    (Reason::MmioReadUnknown, "mmio_read:unknown"),
    (Reason::MmioWriteUnknown, "mmio_write:unknown"),
    (Reason::Halt, "hlt"),
    (Reason::Interrupted, "interrupted"),
    (Reason::Debug, "debug"),
    (Reason::Shutdown, "shutdown"),
    (Reason::InternalError, "internal_error"),
    (Reason::Other, "other"),
];

/// The counters of one CPU thread.
#[derive(Default)]
pub struct ExitCounters {
    counts: [AtomicU64; NAMES.len()],
}

impl ExitCounters {
    /// Counts one exit. Called by one thread only.
    pub fn count(&self, reason: Reason) {
        let counter = &self.counts[reason as usize];
        counter.store(counter.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    }

    /// Adds the counts to `totals`, leaving out zeros.
    pub fn add_to(&self, totals: &mut BTreeMap<String, u64>) {
        for (reason, name) in NAMES {
            let count = self.counts[reason as usize].load(Ordering::Relaxed);
            if count > 0 {
                *totals.entry(name.to_owned()).or_default() += count;
            }
        }
    }
}

/// Which unknown ports a guest touched: what to look at when boot makes too many exits. Bounded,
/// since a guest chooses the ports.
#[derive(Default)]
pub struct UnknownPorts(Mutex<BTreeMap<(bool, u16), u64>>);

impl UnknownPorts {
    const MAX: usize = 32;

    /// Counts an access.
    pub fn count(&self, write: bool, port: u16) {
        let mut ports = lock(&self.0);
        if let Some(count) = ports.get_mut(&(write, port)) {
            *count += 1;
        } else if ports.len() < Self::MAX {
            ports.insert((write, port), 1);
        }
    }

    /// Adds the counts to `totals`.
    pub fn add_to(&self, totals: &mut BTreeMap<String, u64>) {
        for ((write, port), count) in &*lock(&self.0) {
            let direction = if *write { "out" } else { "in" };
            totals.insert(format!("io_{direction}:port {port:#06x}"), *count);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_its_own_name() {
        let names: std::collections::BTreeSet<_> = NAMES.iter().map(|entry| entry.1).collect();
        assert_eq!(names.len(), NAMES.len());
        for (index, (reason, _)) in NAMES.iter().enumerate() {
            assert_eq!(*reason as usize, index);
        }
    }

    #[test]
    fn counts_of_several_cpus_add_up_and_zeros_are_left_out() {
        let (one, two) = (ExitCounters::default(), ExitCounters::default());
        one.count(Reason::Halt);
        two.count(Reason::Halt);
        two.count(Reason::EcamRead);
        let mut totals = BTreeMap::new();
        one.add_to(&mut totals);
        two.add_to(&mut totals);
        assert_eq!(totals["hlt"], 2);
        assert_eq!(totals.len(), 2);
    }

    #[test]
    fn a_guest_that_tries_every_port_does_not_grow_the_table() {
        let ports = UnknownPorts::default();
        for port in 0..1000 {
            ports.count(false, port);
        }
        let mut totals = BTreeMap::new();
        ports.add_to(&mut totals);
        assert_eq!(totals.len(), UnknownPorts::MAX);
    }
}
