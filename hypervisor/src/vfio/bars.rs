//! The mapped parts of a device's BARs, and the guest's memory slots over them, which follow as BARs move.
//!
//! The guest decides where a BAR is, within the bus's windows. What cannot be mapped there, because another slot is,
//! is answered by exits: slower, and no harm.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use super::config::{Bar, MsixCapability};
use super::device::{Device, Mapping, Region};
use super::peers::Placed;
use crate::arch::x86_64::layout::PAGE;
use crate::pci::msix::ENTRY_SIZE;
use crate::sync::lock;

/// Large mappings of the processor are this at most.
const MAX_ALIGNMENT: u64 = 1 << 30;

/// Memory slots of the VM. Implemented over KVM, and by tests.
pub trait MemorySlots: Send + Sync {
    /// The guest's `guest..guest + size` is this process's memory at `host`, until [`Self::clear`]. The slot's number.
    ///
    /// # Errors
    /// If the hypervisor refuses: `EEXIST` where another slot is.
    ///
    /// # Safety
    /// The memory must stay mapped until then.
    unsafe fn set(&self, guest: u64, size: u64, host: u64) -> io::Result<u32>;
    /// Takes a slot away.
    fn clear(&self, slot: u32);
}

/// A part of a BAR.
struct Part {
    bar: u8,
    range: Range<u64>,
    mapping: Box<dyn Mapping>,
    slot: Option<u32>,
}

/// The mapped parts of all BARs of a device.
pub struct MappedBars {
    slots: Arc<dyn MemorySlots>,
    parts: Mutex<Vec<Part>>,
}

impl MappedBars {
    /// Maps what can be mapped. The pages of the MSI-X table cannot: what the guest writes there must not reach the device.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn new(
        device: &dyn Device,
        bars: &[Bar],
        regions: &[Region; 6],
        msix: Option<MsixCapability>,
        slots: Arc<dyn MemorySlots>,
    ) -> io::Result<Self> {
        let mut parts = Vec::new();
        for bar in bars {
            let table = msix
                .filter(|msix| msix.table.0 == bar.index)
                .map(|msix| pages(msix.table.1, u64::from(msix.count) * ENTRY_SIZE));
            let region = regions.get(usize::from(bar.index));
            for area in region.iter().flat_map(|region| &region.mappable) {
                for range in without(area, table.as_ref()) {
                    let alignment = bar.size.clamp(PAGE, MAX_ALIGNMENT);
                    let mapping = device.map(bar.index.into(), &range, alignment)?;
                    parts.push(Part {
                        bar: bar.index,
                        range,
                        mapping,
                        slot: None,
                    });
                }
            }
        }
        Ok(Self {
            slots,
            parts: Mutex::new(parts),
        })
    }

    /// The mapped parts of a BAR whose start is at `base`.
    #[must_use]
    pub fn placed(&self, bar: u8, base: u64) -> Vec<Placed> {
        let parts = lock(&self.parts);
        let own = parts.iter().filter(|part| part.bar == bar);
        own.filter_map(|part| {
            Some(Placed {
                guest: base.checked_add(part.range.start)?,
                size: part.range.end - part.range.start,
                host: part.mapping.host(),
            })
        })
        .collect()
    }

    /// The BAR is at `base` from now on, or nowhere.
    pub fn moved(&self, bar: u8, base: Option<u64>) {
        let mut parts = lock(&self.parts);
        // All first: a part's new place may be where another one was.
        for part in parts.iter_mut().filter(|part| part.bar == bar) {
            if let Some(slot) = part.slot.take() {
                self.slots.clear(slot);
            }
        }
        for part in parts.iter_mut().filter(|part| part.bar == bar) {
            if let Some(guest) = base.and_then(|base| base.checked_add(part.range.start)) {
                let size = part.range.end - part.range.start;
                // SAFETY: the mapping goes with its part, and the part's slot is cleared before (`Drop`).
                part.slot = unsafe { self.slots.set(guest, size, part.mapping.host()) }.ok();
            }
        }
    }
}

impl Drop for MappedBars {
    fn drop(&mut self) {
        for part in lock(&self.parts).iter_mut() {
            if let Some(slot) = part.slot.take() {
                self.slots.clear(slot);
            }
        }
    }
}

/// The whole pages around a range.
fn pages(start: u64, length: u64) -> Range<u64> {
    start / PAGE * PAGE..(start + length).next_multiple_of(PAGE)
}

/// The whole pages of `area` beside `hole`.
fn without(area: &Range<u64>, hole: Option<&Range<u64>>) -> Vec<Range<u64>> {
    let whole = area.start.next_multiple_of(PAGE)..area.end / PAGE * PAGE;
    let pieces = match hole {
        Some(hole) => vec![
            whole.start..hole.start.min(whole.end),
            hole.end.max(whole.start)..whole.end,
        ],
        None => vec![whole],
    };
    pieces
        .into_iter()
        .filter(|piece| piece.start < piece.end)
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::testing::{Mock, Record, nvme_regions};
    use super::*;

    #[derive(Default)]
    struct Slots(Mutex<Vec<(u32, u64, u64, u64)>>);

    impl MemorySlots for Slots {
        unsafe fn set(&self, guest: u64, size: u64, host: u64) -> io::Result<u32> {
            let mut slots = lock(&self.0);
            if slots
                .iter()
                .any(|(_, at, length, _)| *at < guest + size && guest < at + length)
            {
                return Err(io::Error::from_raw_os_error(libc::EEXIST));
            }
            let used = |slot: &u32| slots.iter().any(|(other, ..)| other == slot);
            let slot = (7..).find(|slot| !used(slot)).unwrap();
            slots.push((slot, guest, size, host));
            Ok(slot)
        }
        fn clear(&self, slot: u32) {
            lock(&self.0).retain(|(other, ..)| *other != slot);
        }
    }

    const MSIX: MsixCapability = MsixCapability {
        at: 0x40,
        count: 65,
        table: (0, 0x2000),
        pending: (0, 0x3000),
    };

    fn mapped(slots: &Arc<Slots>, record: &Arc<Record>) -> MappedBars {
        let mock = Mock::nvme(Arc::clone(record));
        let bar = Bar {
            index: 0,
            size: 0x4000,
            wide: true,
        };
        let slots = Arc::<Slots>::clone(slots);
        MappedBars::new(&mock, &[bar], &nvme_regions(), Some(MSIX), slots).unwrap()
    }

    #[test]
    fn slots_follow_a_bar_leave_the_table_out_and_are_gone_before_the_mapping() {
        let (slots, record) = (Arc::new(Slots::default()), Arc::new(Record::default()));
        let bars = mapped(&slots, &record);
        bars.moved(0, Some(0x10_0000));
        let host = 0x7000_0000_0000;
        // 65 entries are 1040 bytes: one page.
        let at = |base: u64| vec![(base, 0x2000, host), (base + 0x3000, 0x1000, host + 0x3000)];
        let now = || -> Vec<(u64, u64, u64)> {
            lock(&slots.0)
                .iter()
                .map(|(_, a, b, c)| (*a, *b, *c))
                .collect()
        };
        assert_eq!(now(), at(0x10_0000));
        // Over its own old place.
        bars.moved(0, Some(0x10_1000));
        assert_eq!(now(), at(0x10_1000));
        bars.moved(0, None);
        assert!(now().is_empty());
        bars.moved(0, Some(u64::MAX - 0xfff));
        drop(bars);
        assert!(now().is_empty());
        assert!(record.all().contains(&"unmapped 0x700000000000".to_owned()));
    }

    #[test]
    fn where_another_slot_is_a_part_stays_unmapped() {
        let (slots, record) = (Arc::new(Slots::default()), Arc::new(Record::default()));
        let (one, two) = (mapped(&slots, &record), mapped(&slots, &record));
        one.moved(0, Some(0x10_0000));
        two.moved(0, Some(0x10_0000));
        assert_eq!(lock(&slots.0).len(), 2);
        one.moved(0, None);
        two.moved(0, Some(0x10_0000));
        assert_eq!(lock(&slots.0).len(), 2);
    }

    proptest! {
        #[test]
        fn pieces_are_whole_pages_of_the_area_and_none_of_the_hole(
            area in (0u64..1 << 20, 0u64..1 << 20), hole in (0u64..1 << 20, 1u64..0x8000)
        ) {
            let area = area.0..area.0 + area.1;
            let hole = pages(hole.0, hole.1);
            let pieces = without(&area, Some(&hole));
            let mut covered = 0;
            for piece in &pieces {
                prop_assert!(piece.start.is_multiple_of(PAGE) && piece.end.is_multiple_of(PAGE));
                prop_assert!(area.start <= piece.start && piece.end <= area.end);
                prop_assert!(piece.end <= hole.start || hole.end <= piece.start);
                covered += (piece.end - piece.start) / PAGE;
            }
            let all = (0..1u64 << 9).map(|page| page * PAGE).filter(|page| {
                area.start <= *page && page + PAGE <= area.end && !hole.contains(page)
            });
            prop_assert_eq!(covered, all.count() as u64);
        }
    }
}
