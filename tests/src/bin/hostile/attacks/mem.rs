//! Against the memory device (virtio 1.3 §5.15): blocks that are not there, counts that wrap, more than was asked
//! for, the same block twice, requests that end early. A guest may only lose memory of its own, and never has more
//! than it was given.

use anyhow::{Context, Result, ensure};

use super::{Guest, MEM};
use crate::attacks::health::PATIENCE;
use crate::dma::Page;
use crate::pci::Function;
use crate::virtio::{NEXT, Ring, WRITE};

pub const PLUG: u16 = 0;
pub const UNPLUG: u16 = 1;
pub const UNPLUG_ALL: u16 = 2;
pub const STATE: u16 = 3;
const ACK: u16 = 0;

/// The device's word on itself.
#[derive(Clone, Copy, Debug)]
pub struct Space {
    pub block: u64,
    pub start: u64,
    pub region: u64,
    pub usable: u64,
    pub requested: u64,
}

impl Space {
    pub fn of(function: &Function) -> Self {
        Self {
            block: function.device64(0),
            start: function.device64(16),
            region: function.device64(24),
            usable: function.device64(32),
            requested: function.device64(48),
        }
    }

    fn plugged(function: &Function) -> u64 {
        function.bar.read(function.device.offset + 40)
    }
}

/// One request; the type and the state of its answer, if there is one.
pub fn ask(
    function: &Function,
    ring: &Ring,
    page: &Page,
    (kind, address, count): (u16, u64, u16),
) -> Result<(u16, u16)> {
    let mut bytes = [0xffu8; 24];
    bytes[..2].copy_from_slice(&kind.to_le_bytes());
    bytes[8..16].copy_from_slice(&address.to_le_bytes());
    bytes[16..18].copy_from_slice(&count.to_le_bytes());
    page.write(0, &bytes);
    page.write(1024, &[0xaa; 10]);
    ensure!(
        ring.ask(function, page, 24, (1024, 10), PATIENCE),
        "request {kind} of {count} blocks at {address:#x} is not answered"
    );
    Ok((page.read16(1024), page.read16(1032)))
}

/// Ranges outside what may be plugged, also such as leave the address space, and odd ones.
pub fn ranges(guest: &Guest) -> Result<()> {
    let function = guest.of_kind(MEM)?;
    let page = Page::new()?;
    let space = Space::of(function);
    for kind in [PLUG, UNPLUG, STATE] {
        let rings = function.start()?;
        let ring = rings.first().context("no queue")?;
        for address in [
            0,
            0x10_0000,
            0xe000_0000,
            space.start - space.block,
            space.start + 1,
            space.start + space.block / 2,
            space.start + space.usable,
            space.start + space.region,
            u64::MAX,
            u64::MAX - space.block + 1,
            1 << 63,
        ] {
            for count in [1, 2, u16::MAX] {
                let (answer, _) = ask(function, ring, &page, (kind, address, count))?;
                ensure!(
                    answer != ACK,
                    "request {kind} of {count} blocks at {address:#x} is carried out"
                );
            }
        }
        let none = ask(function, ring, &page, (kind, space.start, 0))?;
        ensure!(none.0 != ACK, "a range of nothing is one");
        guest.done(function)?;
    }
    Ok(())
}

/// More than was requested, by one, by many and twice the same.
pub fn greed(guest: &Guest) -> Result<()> {
    let function = guest.of_kind(MEM)?;
    let page = Page::new()?;
    let rings = function.start()?;
    let ring = rings.first().context("no queue")?;
    let space = Space::of(function);
    let blocks = space.usable / space.block;
    ask(function, ring, &page, (UNPLUG_ALL, 0, 0))?;
    for round in 0..2 {
        for block in 0..blocks {
            let at = space.start + block * space.block;
            ask(function, ring, &page, (PLUG, at, 1))?;
        }
        let plugged = Space::plugged(function);
        ensure!(
            plugged == space.requested,
            "round {round}: {plugged} bytes are plugged of {} requested",
            space.requested
        );
    }
    guest.done(function)
}

/// Requests of any length and any kind, and answers without room.
pub fn shapes(guest: &Guest) -> Result<()> {
    let function = guest.of_kind(MEM)?;
    let page = Page::new()?;
    let space = Space::of(function);
    for kind in [PLUG, UNPLUG, 4, 0x8000, u16::MAX] {
        for (request, answer) in [
            (0u32, 10u32),
            (8, 10),
            (23, 10),
            (24, 0),
            (24, 1),
            (4096, 10),
        ] {
            let rings = function.start()?;
            let ring = rings.first().context("no queue")?;
            let mut bytes = [0u8; 24];
            bytes[..2].copy_from_slice(&kind.to_le_bytes());
            bytes[8..16].copy_from_slice(&(space.start + 7 * space.block).to_le_bytes());
            bytes[16] = 1;
            page.write(0, &bytes);
            ring.descriptor(0, page.address, request, NEXT, 1);
            ring.descriptor(1, page.address + 64, answer, WRITE, 0);
            ring.offer(0);
            function.kick(0);
            ensure!(ring.wait_used(1, PATIENCE), "a request is not taken");
        }
        guest.done(function)?;
    }
    Ok(())
}
