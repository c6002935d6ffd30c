//! Against the network device (virtio 1.3 §5.1): headers, frames, receive buffers and the control queue.

use anyhow::{Context, Result};

use super::{Guest, NET};
use crate::dma::Page;
use crate::virtio::{NEXT, SIZE, WRITE};

/// Headers that promise what was not negotiated or what the frame does not have.
pub fn headers(guest: &Guest) -> Result<()> {
    let function = guest.of_kind(NET)?;
    let page = Page::new()?;
    // flags, gso type, header length, segment size, checksum start, checksum offset.
    let cases: [[u16; 6]; 12] = [
        [0xff, 0xff, 0xffff, 0xffff, 0xffff, 0xffff],
        [1, 0, 0, 0, 0xffff, 0xffff],
        [1, 0, 0, 0, 59, 0],
        [1, 0, 0, 0, 34, 0xfffe],
        [0, 1, 0, 1460, 0, 0],
        [1, 1, 54, 0, 34, 16],
        [1, 1, 54, 1, 34, 16],
        [1, 4, 0xffff, 1, 34, 16],
        [1, 3, 0, 1, 34, 6],
        [1, 5, 0, 1, 34, 6],
        [0, 0x80, 0, 0, 0, 0],
        [2, 0, 0, 0, 0, 0],
    ];
    for case in cases {
        let rings = function.start()?;
        let transmit = rings.get(1).context("no transmit queue")?;
        for length in [13u32, 72, 1514 + 12] {
            let mut header = vec![u8::try_from(case[0] & 0xff)?, u8::try_from(case[1] & 0xff)?];
            for field in &case[2..] {
                header.extend(field.to_le_bytes());
            }
            header.extend([0, 0]);
            header.extend([0xab; 64]);
            page.write(0, &header);
            transmit.descriptor(0, page.address, length, 0, 0);
            transmit.offer(0);
            function.kick(1);
        }
        guest.done(function)?;
    }
    Ok(())
}

/// Frames without bytes, cut in their header, in single bytes, and far larger than any.
pub fn frames(guest: &Guest) -> Result<()> {
    let function = guest.of_kind(NET)?;
    let page = Page::new()?;
    for (length, parts) in [
        (0u32, 1u16),
        (1, 1),
        (11, 1),
        (12, 1),
        (1, SIZE),
        (4096, SIZE),
        (4096, SIZE - 1),
        (0, SIZE),
    ] {
        let rings = function.start()?;
        let transmit = rings.get(1).context("no transmit queue")?;
        for part in 0..parts {
            let next = if part + 1 == parts { 0 } else { NEXT };
            transmit.descriptor(part, page.address, length, next, part + 1);
        }
        transmit.offer(0);
        function.kick(1);
        guest.done(function)?;
    }
    Ok(())
}

/// Buffers to receive into that hold no header, or nothing.
pub fn receive_buffers(guest: &Guest) -> Result<()> {
    let function = guest.of_kind(NET)?;
    let page = Page::new()?;
    for (length, flags) in [
        (0u32, WRITE),
        (1, WRITE),
        (11, WRITE),
        (12, WRITE),
        (4096, 0),
    ] {
        let rings = function.start()?;
        let (receive, transmit) = (
            rings.first().context("no receive queue")?,
            rings.get(1).context("no transmit queue")?,
        );
        for head in 0..SIZE {
            receive.descriptor(head, page.address, length, flags, 0);
            receive.offer(head);
        }
        function.kick(0);
        // Something arrives: the host answers a broadcast.
        page.write(0, &[0; 12]);
        transmit.descriptor(0, page.address, 72, 0, 0);
        transmit.offer(0);
        function.kick(1);
        guest.done(function)?;
    }
    Ok(())
}

/// Commands that do not exist, are cut or have nowhere to answer.
pub fn control(guest: &Guest) -> Result<()> {
    let function = guest.of_kind(NET)?;
    let page = Page::new()?;
    for (class, command, length) in [
        (0u8, 0u8, 2u32),
        (4, 0, 4),
        (4, 0, 2),
        (4, 1, 4),
        (5, 0, 10),
        (0xff, 0xff, 4096),
        (4, 0, 0),
    ] {
        for pairs in [0u16, 2, 0xffff] {
            let rings = function.start()?;
            // The last queue, if it was offered.
            if let Some(ring) = rings.last().filter(|ring| ring.index >= 2) {
                page.write(0, &[class, command]);
                page.write(2, &pairs.to_le_bytes());
                ring.descriptor(0, page.address, length, NEXT, 1);
                ring.descriptor(1, page.address + 2048, u32::from(pairs & 1), WRITE, 0);
                ring.offer(0);
                function.kick(ring.index);
            }
        }
        guest.done(function)?;
    }
    Ok(())
}
