//! Against memory that is a file of the node (virtio 1.3 §5.19): devices are told to write there, and to keep their rings
//! there; the device itself is asked what it does not know, and to flush without an end. The judge looks at the file.

use std::ops::Range;

use anyhow::{Context, Result, ensure};

use super::{BLOCK, Guest, PMEM};
use crate::attacks::health::PATIENCE;
use crate::dma::Page;
use crate::pci::Function;
use crate::virtio::{NEXT, Ring, SIZE, WRITE};

const FLUSH: u32 = 0;
const DONE: u32 = 0;
const FAILED: u32 = 1;
/// Where the file begins, behind what reads as zeros.
const FILE: u64 = 8192;
/// What the judge has written to the file.
const CONTENT: &[u8] = b"brig-hostile-disk";
/// Flushes in a row.
const MANY: u32 = 300;

/// Where the memory is.
pub fn range(function: &Function) -> Range<u64> {
    let start = function.device64(0);
    start..start + function.device64(8)
}

/// Places in it: the file's first page and its second, what is behind it, and the end, over which a page goes.
pub fn places(guest: &Guest) -> Result<[u64; 4]> {
    let range = range(guest.of_kind(PMEM)?);
    let file = range.start + FILE;
    Ok([file, file + 4096, range.end - 4096, range.end - 512])
}

/// One request; the answer.
pub fn ask(function: &Function, ring: &Ring, page: &Page, request: u32) -> Result<u32> {
    page.write(0, &request.to_le_bytes());
    page.write(1024, &[0xaa; 4]);
    ensure!(
        ring.ask(function, page, 4, (1024, 4), PATIENCE),
        "request {request:#x} is not answered"
    );
    let answer = page.read(1024, 4);
    Ok(u32::from_le_bytes(answer.try_into().unwrap_or_default()))
}

/// A flush is done.
pub fn flushed(function: &Function) -> Result<()> {
    let rings = function.start()?;
    let ring = rings.first().context("no queue")?;
    let answer = ask(function, ring, &Page::new()?, FLUSH)?;
    ensure!(answer == DONE, "a flush was answered {answer:#x}");
    Ok(())
}

/// Requests that there are not, and flush after flush.
pub fn requests(guest: &Guest) -> Result<()> {
    let function = guest.of_kind(PMEM)?;
    let page = Page::new()?;
    let rings = function.start()?;
    let ring = rings.first().context("no queue")?;
    for request in [1, 2, 0x8000_0000, u32::MAX] {
        let answer = ask(function, ring, &page, request)?;
        ensure!(
            answer == FAILED,
            "request {request:#x} was answered {answer:#x}"
        );
    }
    guest.done(function)?;
    let rings = function.start()?;
    let ring = rings.first().context("no queue")?;
    for _ in 0..MANY {
        ensure!(
            ask(function, ring, &page, FLUSH)? == DONE,
            "a flush has failed"
        );
    }
    guest.done(function)
}

/// Each device is told to write into the file, in each of its queues.
pub fn written_by_devices(guest: &Guest) -> Result<()> {
    let places = places(guest)?;
    guest.each(|function| {
        for place in places {
            let rings = function.start()?;
            for ring in &rings {
                for index in 0..SIZE {
                    ring.descriptor(index, place, 4096, WRITE, 0);
                    ring.offer(index);
                }
                function.kick(ring.index);
            }
            std::thread::sleep(std::time::Duration::from_millis(3));
        }
        Ok(())
    })
}

/// A disk is told to read a sector into the file, and its rings are put there.
pub fn disk_and_rings(guest: &Guest) -> Result<()> {
    let places = places(guest)?;
    for function in guest.all_of_kind(BLOCK) {
        for place in places {
            let rings = function.start()?;
            let ring = rings.first().context("no queue")?;
            let page = Page::new()?;
            // A header of zeros: read sector 0.
            ring.descriptor(0, page.address, 16, NEXT, 1);
            ring.descriptor(1, place, 512, NEXT | WRITE, 2);
            ring.descriptor(2, page.address + 600, 1, WRITE, 0);
            ring.offer(0);
            function.kick(0);
            std::thread::sleep(std::time::Duration::from_millis(3));
        }
        guest.done(function)?;
    }
    guest.each(|function| {
        let good = Ring::new(0)?;
        let (desc, avail, used) = (
            good.page.address,
            good.page.address + 1024,
            good.page.address + 2048,
        );
        for place in places {
            for (desc, avail, used) in [
                (place, avail, used),
                (desc, place, used),
                (desc, avail, place),
                (place, place + 1024, place + 2048),
            ] {
                function.negotiate()?;
                function.set_queue(0, SIZE, desc, avail, used);
                function.set_status(0xf);
                function.kick(0);
            }
        }
        Ok(())
    })
}

/// What a device may do all the same: a disk is written straight from the file, as a program may ask that has it mapped.
pub fn read_by_devices(guest: &Guest) -> Result<()> {
    let [file, ..] = places(guest)?;
    let function = guest.of_kind(BLOCK)?;
    let rings = function.start()?;
    let ring = rings.first().context("no queue")?;
    let page = Page::new()?;
    let request = |kind: u32, place: u64, flags: u16| -> Result<()> {
        let before = ring.used();
        page.write(0, &kind.to_le_bytes());
        page.write(8, &9u64.to_le_bytes());
        page.write(600, &[0xee]);
        ring.descriptor(0, page.address, 16, NEXT, 1);
        ring.descriptor(1, place, 512, NEXT | flags, 2);
        ring.descriptor(2, page.address + 600, 1, WRITE, 0);
        ring.offer(0);
        function.kick(0);
        let answered = ring.wait_used(before.wrapping_add(1), PATIENCE);
        ensure!(answered && page.read(600, 1) == [0], "request {kind} fails");
        Ok(())
    };
    request(1, file, 0)?;
    request(0, page.address + 2048, WRITE)?;
    ensure!(
        page.read(2048, CONTENT.len()) == CONTENT,
        "something else was written"
    );
    guest.done(function)
}
