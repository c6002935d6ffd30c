//! Timers of the guest's kernel that would wake an idle guest, and a CPU of the node, for what a VM has no use of.

use std::fs;

/// Files below `/proc/sys/vm`, and what is written to them.
const SETTINGS: [(&str, &str); 2] = [
    // Twice a second the kernel looks whether it should compact memory that nobody has asked for. Who asks for a large page still gets it.
    ("compaction_proactiveness", "0"),
    // Once a second it adds up counters that a CPU that falls idle, or who reads them, adds up anyway.
    ("stat_interval", "60"),
];

/// Sets them. A kernel without one of them has no such timer.
pub fn still_timers() {
    for (name, value) in SETTINGS {
        let _ = fs::write(format!("/proc/sys/vm/{name}"), value);
    }
}
