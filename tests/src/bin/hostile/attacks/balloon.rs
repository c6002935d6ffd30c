//! Against the balloon (virtio 1.3 §5.5): pages that are not the guest's, numbers without end, reports of
//! anything. A guest may only lose memory of its own.

use std::time::Duration;

use anyhow::{Context, Result};

use super::{BALLOON, Guest};
use crate::dma::{PAGE, Page};
use crate::virtio::{NEXT, SIZE, WRITE};

/// Page numbers of no RAM, and of the last page there can be.
pub fn foreign_pages(guest: &Guest) -> Result<()> {
    let function = guest.of_kind(BALLOON)?;
    let page = Page::new()?;
    for number in [
        u32::MAX,
        u32::MAX - 1,
        0xa0,
        0xc_0000,
        0xe_0000,
        0xf_ec00,
        0xf_ee00,
        0x10_0000,
        0x8000_0000,
    ] {
        for queue in [0u16, 1] {
            let rings = function.start()?;
            let ring = rings.get(usize::from(queue)).context("no such queue")?;
            // One number again and again, then a run that leaves the address space.
            let mut numbers = Vec::new();
            for step in 0..1024u32 {
                let number = if step < 512 {
                    number
                } else {
                    number.wrapping_add(step) | 0xf_0000
                };
                numbers.extend(number.to_le_bytes());
            }
            page.write(0, &numbers);
            ring.descriptor(0, page.address, 4096, 0, 0);
            ring.offer(0);
            function.kick(queue);
            ring.wait_used(1, Duration::from_millis(300));
        }
        guest.done(function)?;
    }
    Ok(())
}

/// Lists whose length is no number of pages, and far too long ones.
pub fn lists(guest: &Guest) -> Result<()> {
    let function = guest.of_kind(BALLOON)?;
    let page = Page::new()?;
    page.write(0, &[0xff; PAGE]);
    for length in [0u32, 1, 3, 5, 4095, 4096] {
        for queue in [0u16, 1] {
            let rings = function.start()?;
            let ring = rings.get(usize::from(queue)).context("no such queue")?;
            for part in 0..SIZE {
                let next = if part + 1 == SIZE { 0 } else { NEXT };
                ring.descriptor(part, page.address, length, next, part + 1);
            }
            for _ in 0..4 {
                ring.offer(0);
            }
            function.kick(queue);
        }
        guest.done(function)?;
    }
    Ok(())
}

/// Reports of parts of pages, of nothing, and of memory that only may be read.
pub fn reports(guest: &Guest) -> Result<()> {
    let function = guest.of_kind(BALLOON)?;
    let page = Page::new()?;
    let kept = Page::new()?;
    for (offset, length, flags) in [
        (0u64, 0u32, WRITE),
        (1, 4095, WRITE),
        (4095, 1, WRITE),
        (2048, 2048, WRITE),
        (0, 4095, WRITE),
        (0, 4096, 0),
    ] {
        for queue in [2u16, 3, 4] {
            kept.write(0, &[9; 64]);
            page.write(0, &[9; 64]);
            let rings = function.start()?;
            let ring = rings.get(usize::from(queue)).context("no such queue")?;
            ring.descriptor(0, page.address + offset, length, flags, 0);
            ring.offer(0);
            function.kick(queue);
            ring.wait_used(1, Duration::from_millis(300));
            anyhow::ensure!(page.read(0, 64) == [9; 64], "part of a page was given up");
            anyhow::ensure!(kept.read(0, 64) == [9; 64], "a neighbour was given up");
        }
        guest.done(function)?;
    }
    Ok(())
}
