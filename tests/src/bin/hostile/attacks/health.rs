//! What a device is for, done once by a driver that resets it and keeps to the rules: the oracle after
//! every attack.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::files::Files;
use super::mem::{self, Space};
use super::pmem;
use super::{BALLOON, BLOCK, FS, MEM, NET, PMEM, RNG, VSOCK};
use crate::dma::Page;
use crate::pci::Function;
use crate::virtio::{NEXT, WRITE};

/// How long a device may take, emulated and with a loaded host.
pub const PATIENCE: Duration = Duration::from_secs(20);
/// What the judge has written to the first sector of each disk.
const DISK: &[u8] = b"brig-hostile-disk";
/// The judge's end of the network.
const PEER: [u8; 4] = [10, 77, 0, 1];
const OURS: [u8; 4] = [10, 77, 0, 2];
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// Resets the device and lets it do its work.
pub fn works(function: &Function) -> Result<()> {
    function.enable();
    match function.kind {
        RNG => random(function)?,
        BLOCK => sector(function)?,
        NET => neighbour(function)?,
        BALLOON => reported(function)?,
        MEM => plugged(function)?,
        VSOCK => refused(function)?,
        FS => Files::open(function)?.canary()?,
        PMEM => pmem::flushed(function)?,
        other => anyhow::bail!("nothing is known of devices of kind {other}"),
    }
    function.reset()
}

fn random(function: &Function) -> Result<()> {
    let rings = function.start()?;
    let buffer = Page::new()?;
    let ring = rings.first().context("no queue")?;
    ring.descriptor(0, buffer.address, 64, WRITE, 0);
    ring.offer(0);
    function.kick(0);
    ensure!(ring.wait_used(1, PATIENCE), "the rng no longer answers");
    ensure!(buffer.read(0, 64) != [0; 64], "the rng gives zeros");
    Ok(())
}

fn sector(function: &Function) -> Result<()> {
    let rings = function.start()?;
    let ring = rings.first().context("no queue")?;
    let page = Page::new()?;
    page.write(600, &[0xee]);
    ring.descriptor(0, page.address + 1024, 16, NEXT, 1);
    ring.descriptor(1, page.address, 512, NEXT | WRITE, 2);
    ring.descriptor(2, page.address + 600, 1, WRITE, 0);
    ring.offer(0);
    function.kick(0);
    ensure!(ring.wait_used(1, PATIENCE), "the disk no longer answers");
    ensure!(page.read(600, 1) == [0], "a read fails");
    ensure!(page.read(0, DISK.len()) == DISK, "another sector's bytes");
    Ok(())
}

/// An ARP request of the host's address is answered.
fn neighbour(function: &Function) -> Result<()> {
    let rings = function.start()?;
    let (receive, transmit) = (
        rings.first().context("no receive queue")?,
        rings.get(1).context("no transmit queue")?,
    );
    let mut buffers = Vec::new();
    for head in 0..16u16 {
        let page = Page::new()?;
        receive.descriptor(head, page.address, 4096, WRITE, 0);
        receive.offer(head);
        buffers.push(page);
    }
    function.kick(0);
    let page = Page::new()?;
    let mut frame = vec![0u8; 12];
    frame.extend([0xff; 6]);
    frame.extend(MAC);
    frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend(MAC);
    frame.extend(OURS);
    frame.extend([0; 6]);
    frame.extend(PEER);
    frame.resize(12 + 60, 0);
    page.write(0, &frame);
    transmit.descriptor(0, page.address, 72, 0, 0);
    transmit.offer(0);
    function.kick(1);
    ensure!(transmit.wait_used(1, PATIENCE), "a frame is not sent");
    let end = Instant::now() + PATIENCE;
    let is_answer = |page: &Page| {
        let bytes = page.read(12, 42);
        bytes.get(12..14) == Some(&[8, 6])
            && bytes.get(21) == Some(&2)
            && bytes.get(28..32) == Some(&PEER)
    };
    while !buffers.iter().any(is_answer) {
        ensure!(Instant::now() < end, "the host's address is not answered");
        std::thread::yield_now();
    }
    Ok(())
}

/// A page that is reported free is given up.
fn reported(function: &Function) -> Result<()> {
    let rings = function.start()?;
    let ring = rings.get(2).context("no reporting queue")?;
    let page = Page::new()?;
    page.write(0, &[7; 64]);
    ring.descriptor(0, page.address, 4096, WRITE, 0);
    ring.offer(0);
    function.kick(2);
    ensure!(ring.wait_used(1, PATIENCE), "a report is not taken");
    ensure!(page.read(0, 64) == [0; 64], "a reported page is kept");
    Ok(())
}

/// A block is taken, seen to be the guest's, and given back.
fn plugged(function: &Function) -> Result<()> {
    let rings = function.start()?;
    let ring = rings.first().context("no queue")?;
    let page = Page::new()?;
    let at = Space::of(function).start;
    for (kind, expected) in [
        (mem::UNPLUG_ALL, (0, 0)),
        (mem::STATE, (0, 1)),
        (mem::PLUG, (0, 0)),
        (mem::STATE, (0, 0)),
        (mem::UNPLUG, (0, 0)),
    ] {
        let answer = mem::ask(function, ring, &page, (kind, at, 1))?;
        ensure!(
            answer == expected,
            "memory request {kind} is answered by {answer:?}"
        );
    }
    Ok(())
}

/// A connection to a port that nobody serves is refused, to us.
fn refused(function: &Function) -> Result<()> {
    let rings = function.start()?;
    let (receive, send) = (
        rings.first().context("no receive queue")?,
        rings.get(1).context("no transmit queue")?,
    );
    let (answer, page) = (Page::new()?, Page::new()?);
    receive.descriptor(0, answer.address, 4096, WRITE, 0);
    receive.offer(0);
    function.kick(0);
    page.write(0, &super::vsock::request(5001, 9));
    send.descriptor(0, page.address, 44, 0, 0);
    send.offer(0);
    function.kick(1);
    ensure!(receive.wait_used(1, PATIENCE), "a request is not answered");
    ensure!(
        answer.read16(30) == 3,
        "op {} instead of 3",
        answer.read16(30)
    );
    Ok(())
}
