//! The guest's memory as it grows and shrinks: the driver (virtio-mem) takes and gives back what the host asks for, and
//! this says where it goes and when it is there. Nothing tells of that, so it is looked at; only while somebody waits.
//!
//! Trusts the host, and the guest's kernel.
mod sockets;

use std::{fs, sync::Mutex, time::Duration};

use brig_agent_protocol::agent::MemoryFigures;
use tokio::time::{Instant, sleep};

use crate::{
    error::{Error, Result},
    pci,
    sync::lock,
};
use sockets::Sockets;

/// New memory is used without being asked for...
const ONLINE: (&str, &str) = ("/sys/devices/system/memory/auto_online_blocks", "online");
/// ...for what can be moved away again, as long as there is a fourth of all for the kernel's own.
const POLICY: (&str, &str) = (
    "/sys/module/memory_hotplug/parameters/online_policy",
    "auto-movable",
);
/// The kernel keeps one part in 32 of what can be moved free below it, for itself: of two GiB 52 MiB that a container
/// could not use. What it needs is in the VM's size (docs/overhead.md), so no more is kept than where all is of one kind.
const RESERVE: (&str, &str) = ("/proc/sys/vm/lowmem_reserve_ratio", "256 0 0 0 0");
/// Between two looks.
const LOOK: Duration = Duration::from_millis(10);
/// The longest wait.
const MAX_WAIT: Duration = Duration::from_secs(3600);
/// Memory that has not changed for this long while it should shrink does not change any more: the driver gives up
/// what it can at once, and tries again after the better part of a minute.
const STUCK: Duration = Duration::from_secs(3);
/// While it should grow: the driver tries again by itself, after longer and longer times, and a slow machine takes some to
/// begin.
const STUCK_GROWING: Duration = Duration::from_secs(30);

/// What the guest was started with.
pub struct Memory {
    built: u64,
    sockets: Mutex<[Sockets; 2]>,
}

impl Memory {
    /// To be made before any comes.
    #[must_use]
    pub fn new() -> Self {
        Self {
            built: total(),
            sockets: Mutex::new(Sockets::all()),
        }
    }

    /// What there is now.
    ///
    /// # Errors
    /// `Internal`.
    pub fn figures(&self) -> Result<MemoryFigures> {
        let text =
            fs::read_to_string("/proc/meminfo").map_err(|e| Error::io("/proc/meminfo", e))?;
        Ok(MemoryFigures {
            added: total().saturating_sub(self.built),
            available: field(&text, "MemAvailable:").unwrap_or(0),
            ..MemoryFigures::default()
        })
    }

    /// Waits until the guest has `added` bytes beyond what it was started with, as long as it gets nearer to that and at most
    /// for `wait`; what it has then. An answer before that with less means that nothing moves any more. `function` is where
    /// the device is.
    ///
    /// # Errors
    /// That of a device that is not there or has no driver.
    pub async fn settle(&self, function: u32, added: u64, wait: Duration) -> Result<MemoryFigures> {
        let deadline = Instant::now() + wait.min(MAX_WAIT);
        let mut now = total().saturating_sub(self.built);
        if added > now {
            for (path, value) in [ONLINE, POLICY, RESERVE] {
                fs::write(path, value).map_err(|e| Error::io(path, e))?;
            }
        }
        pci::find(function, wait).await?;
        let stuck = if added > now { STUCK_GROWING } else { STUCK };
        let mut moved = Instant::now();
        while now != added && Instant::now() < deadline && moved.elapsed() < stuck {
            sleep(LOOK).await;
            let before = std::mem::replace(&mut now, total().saturating_sub(self.built));
            if now != before {
                moved = Instant::now();
            }
        }
        for sockets in lock(&self.sockets).iter_mut() {
            sockets.follow(self.built, total());
        }
        self.figures()
    }
}

/// Bytes that the kernel manages; 0 if it does not say.
fn total() -> u64 {
    nix::sys::sysinfo::sysinfo().map_or(0, |info| info.ram_total())
}

/// A figure of `/proc/meminfo`, in bytes.
pub(crate) fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_read_in_bytes() {
        let text =
            "MemTotal:         237568 kB\nMemAvailable:     123 kB\nHugePages_Total:       0\n";
        assert_eq!(field(text, "MemAvailable:"), Some(123 << 10));
        assert_eq!(field(text, "HugePages_Total:"), None);
        assert_eq!(field(text, "Nothing:"), None);
    }

    #[test]
    fn nothing_has_been_added_to_begin_with() {
        let memory = Memory::new();
        let figures = memory.figures().unwrap();
        assert_eq!(figures.added, 0);
        assert!(figures.available > 0 && memory.built > figures.available);
    }
}
