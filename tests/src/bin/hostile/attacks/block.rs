//! Against the block device (virtio 1.3 §5.2): sectors, lengths, kinds of requests, and a disk that may
//! only be read. The judge compares the files afterwards.

use anyhow::{Context, Result};

use super::{BLOCK, Guest};
use crate::dma::Page;
use crate::pci::Function;
use crate::virtio::{NEXT, WRITE};

/// A request: kind, sector, bytes of data, and whether the device writes them.
fn ask(
    function: &Function,
    page: &Page,
    kind: u32,
    sector: u64,
    length: u32,
    write: bool,
) -> Result<()> {
    let rings = function.start()?;
    let ring = rings.first().context("no queue")?;
    page.write(0, &kind.to_le_bytes());
    page.write(8, &sector.to_le_bytes());
    let flags = if write { WRITE } else { 0 };
    ring.descriptor(0, page.address, 16, NEXT, 1);
    ring.descriptor(1, page.address + 512, length, NEXT | flags, 2);
    ring.descriptor(2, page.address + 100, 1, WRITE, 0);
    ring.offer(0);
    function.kick(0);
    ring.wait_used(1, std::time::Duration::from_millis(300));
    Ok(())
}

fn disks(guest: &Guest) -> impl Iterator<Item = &Function> {
    guest
        .functions
        .iter()
        .filter(|function| function.kind == BLOCK)
}

/// Sectors at, over and far beyond the end; sums that wrap.
pub fn sectors(guest: &Guest) -> Result<()> {
    let page = Page::new()?;
    for function in disks(guest) {
        let capacity: u32 = function.bar.read(function.device.offset);
        let end = u64::from(capacity);
        for sector in [
            end - 1,
            end,
            end + 1,
            1 << 32,
            u64::MAX / 512,
            u64::MAX - 1,
            u64::MAX,
        ] {
            // Two sectors: the first of them may be the disk's last.
            ask(function, &page, 0, sector, 1024, true)?;
            ask(function, &page, 1, sector, 1024, false)?;
            guest.done(function)?;
        }
    }
    Ok(())
}

/// Lengths that are no sectors, and none at all.
pub fn lengths(guest: &Guest) -> Result<()> {
    let page = Page::new()?;
    for function in disks(guest) {
        for length in [0u32, 1, 511, 513, 3000] {
            ask(function, &page, 0, 1, length, true)?;
            ask(function, &page, 1, 1, length, false)?;
            guest.done(function)?;
        }
    }
    Ok(())
}

/// Every kind of request, and those that do not exist, in either direction.
pub fn kinds(guest: &Guest) -> Result<()> {
    let page = Page::new()?;
    for function in disks(guest) {
        for kind in (0..32).chain([0x8000_0000, u32::MAX]) {
            // Not what may change a sector: that is the next attack's.
            if kind != 1 && kind != 13 {
                ask(function, &page, kind, 1, 512, true)?;
                ask(function, &page, kind, 1, 512, kind == 0)?;
            }
        }
        guest.done(function)?;
    }
    Ok(())
}

/// Discard and write-zeroes over ranges that leave the disk, overlap or have unknown flags.
pub fn ranges(guest: &Guest) -> Result<()> {
    let page = Page::new()?;
    for function in disks(guest) {
        for (sector, count, flags) in [
            (u64::MAX, u32::MAX, 0u32),
            (u64::MAX - 1, 2, 0),
            (1 << 55, u32::MAX, 1),
            (0, u32::MAX, 0),
            (1, 0, 0xffff_fffe),
            (u64::MAX / 512, 1, 1),
        ] {
            for kind in [11u32, 13] {
                for (at, step) in (0u64..31).zip((512usize..).step_by(16)) {
                    page.write(step, &sector.wrapping_add(at).to_le_bytes());
                    page.write(step + 8, &count.to_le_bytes());
                    page.write(step + 12, &flags.to_le_bytes());
                }
                for length in [15u32, 16, 31 * 16] {
                    ask(function, &page, kind, 0, length, false)?;
                }
            }
            guest.done(function)?;
        }
    }
    Ok(())
}

/// Writes to a disk that may only be read; the judge sees whether it has changed.
pub fn readonly(guest: &Guest) -> Result<()> {
    let page = Page::new()?;
    page.write(512, &[0x66; 1024]);
    let function = disks(guest).last().context("no disks")?;
    for sector in [0u64, 1, 7] {
        ask(function, &page, 1, sector, 512, false)?;
        for kind in [11u32, 13] {
            let mut range = sector.to_le_bytes().to_vec();
            range.extend(1u32.to_le_bytes());
            range.extend(0u32.to_le_bytes());
            page.write(512, &range);
            ask(function, &page, kind, 0, 16, false)?;
        }
        guest.done(function)?;
    }
    Ok(())
}

/// Headers and statuses that are cut, split into bytes, missing or of the wrong direction.
pub fn shapes(guest: &Guest) -> Result<()> {
    let page = Page::new()?;
    for function in disks(guest) {
        for shape in 0..6u16 {
            let rings = function.start()?;
            let ring = rings.first().context("no queue")?;
            page.write(0, &[0; 32]);
            match shape {
                0 => ring.descriptor(0, page.address, 15, 0, 0),
                1 => ring.descriptor(0, page.address, 16, 0, 0),
                2 => {
                    ring.descriptor(0, page.address, 16, NEXT, 1);
                    ring.descriptor(1, page.address + 512, 0, WRITE, 0);
                }
                3 => {
                    for part in 0..15 {
                        ring.descriptor(part, page.address + u64::from(part), 1, NEXT, part + 1);
                    }
                    ring.descriptor(15, page.address + 512, 514, WRITE, 0);
                }
                4 => ring.descriptor(0, page.address, 4096, WRITE, 0),
                _ => {
                    ring.descriptor(0, page.address, 16, NEXT, 1);
                    ring.descriptor(1, page.address, 1, 0, 0);
                }
            }
            ring.offer(0);
            function.kick(0);
            guest.done(function)?;
        }
    }
    Ok(())
}
