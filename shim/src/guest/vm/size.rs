//! What size a running VM has and may have, in memory and CPUs; who changes it is beside this.

use std::sync::atomic::{AtomicU8, AtomicU64};

use tokio::sync::Mutex;

use crate::asked::config::MIB;

/// Memory comes and goes in blocks of this many bytes, as the VMM gives it.
pub(super) const BLOCK: u64 = 2 * MIB;

/// The memory of one VM.
#[derive(Debug)]
pub(super) struct Memory {
    /// Bytes it was started with.
    pub(super) built: u64,
    /// Bytes it may have, in whole blocks.
    pub(super) most: u64,
    /// Bytes it is to have.
    pub(super) now: AtomicU64,
    /// Held over a change: one after another.
    pub(super) changing: Mutex<()>,
}

impl Memory {
    /// That of a VM that is about to start.
    pub(super) fn new(built: u64, most: u64) -> Self {
        let built = built.next_multiple_of(BLOCK);
        // A node's memory is seldom a multiple: the last part of a block is had by nobody.
        let whole = most / BLOCK * BLOCK;
        Self {
            built,
            most: whole.max(built),
            now: AtomicU64::new(built),
            changing: Mutex::default(),
        }
    }
}

/// The CPUs of one VM.
#[derive(Debug)]
pub(super) struct Cpus {
    pub(super) built: u8,
    pub(super) most: u8,
    /// Online.
    pub(super) now: AtomicU8,
    /// Held over a change: one after another.
    pub(super) changing: Mutex<()>,
}

impl Cpus {
    /// Those of a VM that is about to start.
    pub(super) fn new(built: u8, most: u8) -> Self {
        Self {
            built,
            most: most.max(built),
            now: AtomicU8::new(built),
            changing: Mutex::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_may_have_whole_blocks() {
        let most = |built, most| Memory::new(built, most).most;
        assert_eq!(most(256 * MIB, 7885 * MIB + 4096), 7884 * MIB);
        assert_eq!(most(255 * MIB, 255 * MIB), 256 * MIB);
        assert_eq!(most(256 * MIB, 0), 256 * MIB);
        assert_eq!(most(256 * MIB, u64::MAX) % BLOCK, 0);
    }
}
