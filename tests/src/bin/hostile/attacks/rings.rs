//! Against what devices read from guest memory: rings, descriptors, buffers.

use std::time::Duration;

use anyhow::Result;

use super::transport::OUTSIDE;
use super::{FS, Guest};
use crate::dma::Page;
use crate::pci::Function;
use crate::virtio::{INDIRECT, MODES, NEXT, Ring, SIZE, WRITE};

/// Gives the device a moment to act on what it was told.
fn settle() {
    std::thread::sleep(Duration::from_millis(3));
}

/// For each device and mode: brings it up once for each variant of that mode, lets `prepare` fill each queue,
/// kicks it, and then sees whether the device still does its work. Each variant is tried in one mode, each mode
/// with one variant at least.
fn with_rings(guest: &Guest, variants: u32, prepare: impl Fn(&Ring, &Page, u32)) -> Result<()> {
    let (buffer, table) = (Page::new()?, Page::new()?);
    for (number, mode) in (0u32..).zip(MODES) {
        guest.each(|function| {
            for variant in (number..variants.max(number + 1)).step_by(MODES.len()) {
                let rings = function.start_as(mode)?;
                for ring in &rings {
                    prepare(ring, &buffer, variant % variants);
                    if mode.indirect {
                        ring.make_indirect(&table);
                    }
                    if mode.event_index {
                        ring.set_used_event([0, 1, 0x7fff, 0xffff][variant as usize / 4 % 4]);
                    }
                    function.kick(ring.index);
                }
                settle();
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// A descriptor that is its own successor, and longer circles.
pub fn loops(guest: &Guest) -> Result<()> {
    with_rings(guest, 4, |ring, buffer, variant| {
        let write = if variant % 2 == 0 { WRITE } else { 0 };
        let circle = if variant < 2 { 1 } else { SIZE };
        for index in 0..circle {
            let next = (index + 1) % circle;
            ring.descriptor(index, buffer.address, 64, NEXT | write, next);
        }
        ring.offer(0);
    })
}

/// Lengths whose sum with the address, or with each other, wraps.
pub fn lengths(guest: &Guest) -> Result<()> {
    const CASES: &[(u64, u32)] = &[
        (u64::MAX - 0xfff, 0x2000),
        (u64::MAX, 1),
        (0, u32::MAX),
        (0x10_0000, u32::MAX),
        (0x10_0000, 0x8000_0000),
    ];
    with_rings(guest, 10, |ring, buffer, variant| {
        let (address, length) = CASES[variant as usize % CASES.len()];
        let write = if variant < 5 { WRITE } else { 0 };
        ring.descriptor(0, buffer.address, 16, NEXT | write, 1);
        ring.descriptor(1, address, length, NEXT | write, 2);
        ring.descriptor(2, address, length, NEXT | write, 3);
        ring.descriptor(3, buffer.address, u32::MAX, write, 0);
        ring.offer(0);
    })
}

/// Buffers where there is no RAM.
pub fn buffers_outside(guest: &Guest) -> Result<()> {
    let bars: Vec<u64> = guest.functions.iter().map(Function::bar_address).collect();
    let targets: Vec<u64> = OUTSIDE.iter().copied().chain(bars).collect();
    let count = u32::try_from(targets.len()).unwrap_or(0);
    with_rings(guest, count * 2, |ring, _, variant| {
        let write = if variant < count { WRITE } else { 0 };
        let target = targets[variant as usize % targets.len()];
        for index in 0..SIZE {
            ring.descriptor(index, target, 4096, write, 0);
            ring.offer(index);
        }
    })
}

/// Heads and successors beyond the table.
pub fn indexes(guest: &Guest) -> Result<()> {
    with_rings(guest, 4, |ring, buffer, variant| {
        let write = if variant % 2 == 0 { WRITE } else { 0 };
        ring.descriptor(0, buffer.address, 64, NEXT | write, 0xffff);
        ring.descriptor(1, buffer.address, 64, NEXT | write, SIZE);
        for head in [0, 1, SIZE, 0x7fff, 0xffff] {
            ring.offer(head);
        }
    })
}

/// More available than the ring has.
pub fn position(guest: &Guest) -> Result<()> {
    with_rings(guest, 3, |ring, buffer, variant| {
        for index in 0..SIZE {
            ring.descriptor(index, buffer.address, 64, WRITE, 0);
        }
        let ahead = [SIZE + 1, 1000, 0xffff][variant as usize % 3];
        ring.set_position(ring.position().wrapping_add(ahead));
    })
}

/// Indirect tables: not offered, nested, cut, too long, looped.
pub fn indirect(guest: &Guest) -> Result<()> {
    with_rings(guest, 6, |ring, buffer, variant| {
        let table = buffer.address;
        let (length, flags) = [
            (16u32, INDIRECT),
            (15, INDIRECT),
            (u32::MAX, INDIRECT),
            (0, INDIRECT),
            (64, INDIRECT | NEXT),
            (64, INDIRECT | WRITE),
        ][variant as usize % 6];
        // The table's first entry refers to the table itself, as a table.
        let mut entry = [0u8; 16];
        entry[..8].copy_from_slice(&table.to_le_bytes());
        entry[8..12].copy_from_slice(&64u32.to_le_bytes());
        entry[12..14].copy_from_slice(&(INDIRECT | NEXT).to_le_bytes());
        buffer.write(0, &entry);
        ring.descriptor(0, table, length, flags, 1);
        ring.descriptor(1, table, 64, WRITE, 0);
        ring.offer(0);
    })
}

/// Readable where the device writes, writable where it reads, readable after writable, empty.
pub fn directions(guest: &Guest) -> Result<()> {
    with_rings(guest, 4, |ring, buffer, variant| {
        match variant {
            0 => ring.descriptor(0, buffer.address, 4096, 0, 0),
            1 => ring.descriptor(0, buffer.address, 4096, WRITE, 0),
            2 => {
                ring.descriptor(0, buffer.address, 64, WRITE | NEXT, 1);
                ring.descriptor(1, buffer.address + 64, 64, NEXT, 2);
                ring.descriptor(2, buffer.address + 128, 64, WRITE, 0);
            }
            _ => {
                ring.descriptor(0, buffer.address, 0, NEXT, 1);
                ring.descriptor(1, buffer.address, 0, WRITE, 0);
            }
        }
        ring.offer(0);
    })
}

/// The device is told to write into its own rings.
pub fn self_reference(guest: &Guest) -> Result<()> {
    with_rings(guest, 1, |ring, _, _| {
        for index in 0..SIZE {
            ring.descriptor(index, ring.page.address, 4096, WRITE, 0);
            ring.offer(index);
        }
    })
}

/// Requests to the file server with headers that lie.
pub fn file_requests(guest: &Guest) -> Result<()> {
    let function = guest.of_kind(FS)?;
    let request = Page::new()?;
    let answer = Page::new()?;
    for (length, body) in [(40u32, 0xffu8), (0, 0), (u32::MAX, 0x41), (4096, 0xff)] {
        for opcode in 0..80u32 {
            let rings = function.start()?;
            request.write(0, &[body; 4096]);
            request.write(0, &length.to_le_bytes());
            request.write(4, &opcode.to_le_bytes());
            for ring in &rings {
                ring.descriptor(0, request.address, length.clamp(1, 4096), NEXT, 1);
                ring.descriptor(1, answer.address, 4096, WRITE, 0);
                ring.offer(0);
                function.kick(ring.index);
            }
        }
        guest.done(function)?;
    }
    Ok(())
}
