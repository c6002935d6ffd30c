//! Gives out the addresses of BARs: naturally aligned ranges of a window of guest-physical memory.
//!
//! The guest may move a BAR wherever it likes; what is reserved here is that there is a place for each, so that a
//! device that cannot fit is refused before the guest sees it. Sizes come from devices, bases from us.

use std::collections::BTreeMap;
use std::ops::Range;

/// There is no room for a BAR.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a BAR of {size:#x} bytes does not fit the VM's MMIO window {:#x} to {:#x}, of which {free:#x} bytes are free, \
     but not in one aligned piece",
    window.start, window.end
)]
pub struct WindowFull {
    /// Bytes wanted.
    pub size: u64,
    /// Where.
    pub window: Range<u64>,
    /// Bytes that nothing has.
    pub free: u64,
}

/// A window, and what of it is taken.
#[derive(Debug)]
pub struct Window {
    range: Range<u64>,
    /// Sizes by base.
    taken: BTreeMap<u64, u64>,
}

impl Window {
    /// All of `range` is free; an inverted range is empty.
    #[must_use]
    pub fn new(range: Range<u64>) -> Self {
        Self {
            range,
            taken: BTreeMap::new(),
        }
    }

    /// The lowest free range of `size` bytes, a power of two, at a multiple of its size.
    ///
    /// # Errors
    /// [`WindowFull`], also for a size that is no power of two.
    pub fn allocate(&mut self, size: u64) -> Result<u64, WindowFull> {
        let base = self.find(size).ok_or_else(|| self.full(size))?;
        self.taken.insert(base, size);
        Ok(base)
    }

    /// Frees what was given out at `base`.
    pub fn free(&mut self, base: u64) {
        self.taken.remove(&base);
    }

    fn find(&self, size: u64) -> Option<u64> {
        if !size.is_power_of_two() {
            return None;
        }
        let mut base = self.range.start.checked_next_multiple_of(size)?;
        for (taken, length) in &self.taken {
            if base.checked_add(size)? <= *taken {
                break;
            }
            base = base.max((taken + length).checked_next_multiple_of(size)?);
        }
        (base.checked_add(size)? <= self.range.end).then_some(base)
    }

    fn full(&self, size: u64) -> WindowFull {
        let all = self.range.end.saturating_sub(self.range.start);
        let taken: u64 = self.taken.values().sum();
        WindowFull {
            size,
            window: self.range.clone(),
            free: all.saturating_sub(taken),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn two_bars_of_256_gib_and_their_small_ones_fit_a_window_of_a_tebibyte() {
        // Beside 5 GiB of RAM, as GPUs of that size come.
        let mut window = Window::new(6 * GIB..1 << 40);
        let bases: Vec<u64> = [32 << 20, 256 * GIB, 32 << 20, 256 * GIB]
            .map(|size| window.allocate(size).unwrap())
            .into();
        assert_eq!(bases, [6 * GIB, 256 * GIB, 6 * GIB + (32 << 20), 512 * GIB]);
        assert_eq!(window.allocate(256 * GIB).unwrap(), 768 * GIB);
        let full = window.allocate(256 * GIB).unwrap_err();
        assert_eq!(full.size, 256 * GIB);
        assert!(full.to_string().contains("0x4000000000"), "{full}");
    }

    #[test]
    fn an_empty_window_and_an_impossible_size_are_refused() {
        assert!(Window::new(GIB..GIB).allocate(16).is_err());
        let inverted = Range {
            start: 2 * GIB,
            end: GIB,
        };
        assert!(Window::new(inverted).allocate(16).is_err());
        for size in [0, 3, u64::MAX, 1 << 63] {
            assert!(Window::new(GIB..1 << 46).allocate(size).is_err());
        }
    }

    proptest! {
        #[test]
        fn whatever_is_given_out_and_freed_each_range_is_aligned_inside_and_alone(
            start in 0u64..1 << 40, pages in 0u64..1 << 34,
            steps in prop::collection::vec((12u32..39, any::<bool>(), any::<prop::sample::Index>()), 1..60)
        ) {
            let range = start..start + pages * 4096;
            let mut window = Window::new(range.clone());
            let mut held: Vec<(u64, u64)> = Vec::new();
            for (bits, frees, which) in steps {
                if frees && !held.is_empty() {
                    let (base, size) = held.swap_remove(which.index(held.len()));
                    window.free(base);
                    // What was freed can be had again.
                    let again = window.allocate(size).unwrap();
                    prop_assert!(again <= base);
                    window.free(again);
                    continue;
                }
                let size = 1u64 << bits;
                let Ok(base) = window.allocate(size) else {
                    // Then there is none: every aligned place meets something or leaves the window.
                    let places = (range.end / size).min(4096);
                    for place in (0..places).map(|n| n * size).filter(|base| *base >= range.start) {
                        let meets = held.iter().any(|(b, s)| place < b + s && *b < place + size);
                        prop_assert!(meets || place + size > range.end);
                    }
                    continue;
                };
                prop_assert!(base.is_multiple_of(size));
                prop_assert!(range.start <= base && base + size <= range.end);
                for (other, length) in &held {
                    prop_assert!(base + size <= *other || other + length <= base);
                }
                held.push((base, size));
            }
        }
    }
}
