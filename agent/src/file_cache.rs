//! Gives back what the guest's kernel keeps of files that nobody uses, once the guest rests: the coldest first, and never
//! what a program has mapped. Only where the operator has said so, because what is read again has to be fetched again.
//!
//! Trusts the guest's kernel.
use std::{fs, io, path::Path};

use crate::memory;

/// What is left of it, in bytes: less is not worth fetching anything again.
const KEPT: u64 = 16 << 20;

/// What there is beyond that, by `/proc/meminfo`: cached, not in memory for good, neither mapped nor still to be written.
///
/// # Errors
/// If the kernel does not say.
pub fn excess() -> io::Result<u64> {
    Ok(excess_of(&fs::read_to_string("/proc/meminfo")?))
}

/// Has the kernel free `bytes` of it, as far as it can; `root` is the root of the cgroups. Blocking.
///
/// # Errors
/// If the kernel does not know how.
pub fn reclaim(root: &Path, bytes: u64) -> io::Result<()> {
    match fs::write(root.join("memory.reclaim"), bytes.to_string()) {
        // It has freed less.
        Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => Ok(()),
        done => done,
    }
}

fn excess_of(meminfo: &str) -> u64 {
    let field = |name: &str| memory::field(meminfo, name).unwrap_or(0);
    let cached = field("Cached:").saturating_add(field("Buffers:"));
    ["Shmem:", "Mapped:", "Dirty:", "Writeback:"]
        .into_iter()
        .map(field)
        .fold(cached, u64::saturating_sub)
        .saturating_sub(KEPT)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMINFO: &str = "MemTotal: 240000 kB\nBuffers: 1024 kB\nCached: 204800 kB\nSwapCached: 7 kB\nDirty: 512 kB\n\
        Writeback: 512 kB\nMapped: 10240 kB\nShmem: 1024 kB\n";

    #[test]
    fn what_is_mapped_dirty_or_in_memory_for_good_stays() {
        assert_eq!(
            excess_of(MEMINFO),
            (204_800 - 1024 - 10_240) * 1024 + 1024 * 1024 - (1 << 20) - KEPT
        );
        assert_eq!(excess_of("Cached: 1024 kB\n"), 0);
        assert_eq!(excess_of("Cached: x kB\nMapped: 5 kB\n"), 0);
    }

    #[test]
    fn the_kernel_is_asked_for_so_many_bytes() {
        let dir = tempfile::tempdir().unwrap();
        reclaim(dir.path(), 4096).unwrap();
        assert_eq!(
            fs::read_to_string(dir.path().join("memory.reclaim")).unwrap(),
            "4096"
        );
        assert!(reclaim(&dir.path().join("nothing"), 1).is_err());
    }
}
