//! The blocks of a memory device: which of them the guest has, and what it may ask for (virtio 1.3 §5.15.5, §5.15.6).
//!
//! Addresses and counts come from the guest. None is believed before it is known to lie in the usable part.

use std::ops::Range;

/// Bytes of a block (`block_size`): a huge page of the host, so that giving one back gives all of it back.
pub const BLOCK: u64 = 2 << 20;

/// Why a request is not carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// It is wrong: not aligned, outside, or of blocks that are in another state (`VIRTIO_MEM_RESP_ERROR`).
    Wrong,
    /// More than was requested of the guest (`VIRTIO_MEM_RESP_NACK`).
    TooMuch,
}

/// What a range of blocks is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RangeState {
    /// The guest has all of them.
    Plugged,
    /// None of them.
    Unplugged,
    /// Some of them.
    Mixed,
}

/// The blocks of one device.
#[derive(Debug)]
pub struct Blocks {
    /// Guest-physical addresses.
    region: Range<u64>,
    /// Bytes of the region that may be plugged; only grows.
    usable: u64,
    /// Bytes that the guest should have.
    requested: u64,
    /// One bit a block of the usable part.
    plugged: Vec<u64>,
    /// How many are set.
    count: u64,
    /// Changes so far, from the start after 255.
    changes: u8,
}

impl Blocks {
    /// None is plugged and none usable. `region` is aligned to [`BLOCK`].
    #[must_use]
    pub fn new(region: Range<u64>) -> Self {
        Self {
            region,
            usable: 0,
            requested: 0,
            plugged: Vec::new(),
            count: 0,
            changes: 0,
        }
    }

    /// The whole region.
    #[must_use]
    pub fn region(&self) -> Range<u64> {
        self.region.clone()
    }

    /// Bytes that may be plugged.
    #[must_use]
    pub fn usable(&self) -> u64 {
        self.usable
    }

    /// Bytes that the guest should have.
    #[must_use]
    pub fn requested(&self) -> u64 {
        self.requested
    }

    /// Bytes that it has.
    #[must_use]
    pub fn plugged(&self) -> u64 {
        self.count * BLOCK
    }

    /// Differs after each change.
    #[must_use]
    pub fn changes(&self) -> u8 {
        self.changes
    }

    /// What the guest should have from now on, of the first `usable` bytes. Trusted: both are multiples of [`BLOCK`]
    /// within the region.
    pub fn request(&mut self, bytes: u64, usable: u64) {
        self.changes = self.changes.wrapping_add(1);
        self.requested = bytes;
        self.usable = self.usable.max(usable);
        let words = usize::try_from((self.usable / BLOCK).div_ceil(64)).unwrap_or(usize::MAX);
        self.plugged.resize(words, 0);
    }

    /// Numbers of the blocks that a request of the guest is about.
    fn range(&self, address: u64, count: u16) -> Result<Range<u64>, Refusal> {
        let offset = address.checked_sub(self.region.start);
        let offset = offset.filter(|offset| count > 0 && offset.is_multiple_of(BLOCK));
        let first = offset.ok_or(Refusal::Wrong)? / BLOCK;
        // Both are below 2^64 / BLOCK, and `count` below 2^16.
        let end = first + u64::from(count);
        if end > self.usable / BLOCK {
            return Err(Refusal::Wrong);
        }
        Ok(first..end)
    }

    fn bit(&self, block: u64) -> bool {
        let word = usize::try_from(block / 64)
            .ok()
            .and_then(|at| self.plugged.get(at));
        word.is_some_and(|word| word & (1 << (block % 64)) != 0)
    }

    fn set(&mut self, blocks: Range<u64>, plugged: bool) {
        self.changes = self.changes.wrapping_add(1);
        for block in blocks {
            let at = usize::try_from(block / 64).ok();
            if let Some(word) = at.and_then(|at| self.plugged.get_mut(at)) {
                *word = (*word & !(1 << (block % 64))) | (u64::from(plugged) << (block % 64));
            }
        }
    }

    fn state_of(&self, blocks: Range<u64>) -> RangeState {
        let all = blocks.end - blocks.start;
        let set = u64::try_from(blocks.filter(|block| self.bit(*block)).count()).unwrap_or(all);
        match set {
            0 => RangeState::Unplugged,
            set if set == all => RangeState::Plugged,
            _ => RangeState::Mixed,
        }
    }

    /// What `count` blocks from `address` on are.
    ///
    /// # Errors
    /// [`Refusal::Wrong`].
    pub fn state(&self, address: u64, count: u16) -> Result<RangeState, Refusal> {
        Ok(self.state_of(self.range(address, count)?))
    }

    /// The guest takes them.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn plug(&mut self, address: u64, count: u16) -> Result<(), Refusal> {
        let blocks = self.range(address, count)?;
        let more = u64::from(count) * BLOCK;
        if self.plugged() + more > self.requested {
            return Err(Refusal::TooMuch);
        }
        if self.state_of(blocks.clone()) != RangeState::Unplugged {
            return Err(Refusal::Wrong);
        }
        self.set(blocks, true);
        self.count += u64::from(count);
        Ok(())
    }

    /// The guest gives them back; the addresses whose memory is no longer its.
    ///
    /// # Errors
    /// [`Refusal::Wrong`].
    pub fn unplug(&mut self, address: u64, count: u16) -> Result<Range<u64>, Refusal> {
        let blocks = self.range(address, count)?;
        if self.state_of(blocks.clone()) != RangeState::Plugged {
            return Err(Refusal::Wrong);
        }
        self.set(blocks, false);
        self.count -= u64::from(count);
        Ok(address..address + u64::from(count) * BLOCK)
    }

    /// The guest gives all back; the addresses of the part that was usable.
    pub fn unplug_all(&mut self) -> Range<u64> {
        self.changes = self.changes.wrapping_add(1);
        self.plugged.fill(0);
        self.count = 0;
        self.region.start..self.region.start + self.usable
    }

    /// The addresses that the guest has, as runs in order.
    #[must_use]
    pub fn runs(&self) -> Vec<Range<u64>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        for block in (0..self.usable / BLOCK).filter(|block| self.bit(*block)) {
            let start = self.region.start + block * BLOCK;
            match runs.last_mut() {
                Some(last) if last.end == start => last.end += BLOCK,
                _ => runs.push(start..start + BLOCK),
            }
        }
        runs
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const START: u64 = 1 << 32;

    fn blocks(requested: u64, usable: u64) -> Blocks {
        let mut blocks = Blocks::new(START..START + 1024 * BLOCK);
        blocks.request(requested * BLOCK, usable * BLOCK);
        blocks
    }

    #[test]
    fn only_aligned_ranges_of_the_usable_part_can_be_named() {
        let mut blocks = blocks(64, 64);
        for (address, count) in [
            (START + 1, 1),
            (START - BLOCK, 1),
            (START + 64 * BLOCK, 1),
            (START + 63 * BLOCK, 2),
            (START, 65),
            (START, 0),
            (u64::MAX - BLOCK + 1, u16::MAX),
            (u64::MAX, 1),
            (0, u16::MAX),
        ] {
            assert_eq!(
                blocks.plug(address, count),
                Err(Refusal::Wrong),
                "{address:#x} {count}"
            );
            assert_eq!(blocks.state(address, count), Err(Refusal::Wrong));
            assert!(blocks.unplug(address, count).is_err());
        }
        assert_eq!(blocks.plug(START, 64), Ok(()));
    }

    #[test]
    fn no_more_is_plugged_than_was_requested_and_none_twice() {
        let mut blocks = blocks(3, 64);
        assert_eq!(blocks.plug(START, 4), Err(Refusal::TooMuch));
        assert_eq!(blocks.plug(START, 2), Ok(()));
        assert_eq!(blocks.plug(START + BLOCK, 1), Err(Refusal::Wrong));
        assert_eq!(blocks.plug(START + 9 * BLOCK, 1), Ok(()));
        assert_eq!(blocks.plug(START + 20 * BLOCK, 1), Err(Refusal::TooMuch));
        assert_eq!(blocks.state(START, 10), Ok(RangeState::Mixed));
        assert_eq!(blocks.unplug(START, 3), Err(Refusal::Wrong));
        assert_eq!(
            blocks.runs(),
            [
                START..START + 2 * BLOCK,
                START + 9 * BLOCK..START + 10 * BLOCK
            ]
        );
        assert_eq!(blocks.unplug(START, 2), Ok(START..START + 2 * BLOCK));
        assert_eq!(blocks.plugged(), BLOCK);
        assert_eq!(blocks.unplug_all(), START..START + 64 * BLOCK);
        assert_eq!(blocks.plugged(), 0);
    }

    #[test]
    fn a_smaller_request_takes_nothing_away_and_a_larger_one_opens_more() {
        let mut blocks = blocks(8, 8);
        blocks.plug(START, 8).unwrap();
        blocks.request(BLOCK, BLOCK);
        assert_eq!((blocks.plugged(), blocks.usable()), (8 * BLOCK, 8 * BLOCK));
        assert_eq!(blocks.plug(START, 1), Err(Refusal::TooMuch));
        blocks.request(100 * BLOCK, 128 * BLOCK);
        assert_eq!(blocks.plug(START + 8 * BLOCK, 92), Ok(()));
        assert_eq!(blocks.plugged(), 100 * BLOCK);
    }

    proptest! {
        #[test]
        fn whatever_is_asked_a_block_is_had_once_and_never_more_than_requested(
            steps in prop::collection::vec((0u8..5, 0u64..140, 0u16..70, 0u64..BLOCK * 2), 1..80)
        ) {
            let mut blocks = blocks(32, 64);
            let mut model = [false; 128];
            let mut requested = 32;
            for (kind, at, count, off) in steps {
                let off = off.saturating_sub(BLOCK);
                let address = START + at * BLOCK + off;
                let usable = usize::try_from(blocks.usable() / BLOCK).unwrap();
                let range = usize::try_from(at).unwrap()..usize::try_from(at).unwrap() + usize::from(count);
                let named = off == 0 && count > 0 && range.end <= usable;
                let held = model.iter().filter(|set| **set).count();
                match kind {
                    0 => {
                        let fits = held + usize::from(count) <= requested;
                        let free = named && model[range.clone()].iter().all(|set| !set);
                        let done = blocks.plug(address, count).is_ok();
                        prop_assert_eq!(done, named && fits && free);
                        if done { model[range].fill(true); }
                    }
                    1 => {
                        let all = named && model[range.clone()].iter().all(|set| *set);
                        let done = blocks.unplug(address, count);
                        prop_assert_eq!(done.is_ok(), all);
                        if let Ok(gone) = done {
                            prop_assert_eq!(gone.end - gone.start, u64::from(count) * BLOCK);
                            model[range].fill(false);
                        }
                    }
                    2 => {
                        requested = usize::try_from(at.min(128)).unwrap();
                        let bytes = at.min(128) * BLOCK;
                        blocks.request(bytes, bytes.next_multiple_of(64 * BLOCK).min(128 * BLOCK));
                    }
                    3 => {
                        blocks.unplug_all();
                        model.fill(false);
                    }
                    _ => prop_assert_eq!(blocks.state(address, count).is_ok(), named),
                }
                let held = model.iter().filter(|set| **set).count();
                prop_assert_eq!(blocks.plugged(), held as u64 * BLOCK);
                let in_runs: u64 = blocks.runs().iter().map(|run| run.end - run.start).sum();
                prop_assert_eq!(in_runs, blocks.plugged());
            }
        }
    }
}
