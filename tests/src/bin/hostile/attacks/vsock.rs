//! Against the socket device: packets that no honest driver sends (virtio 1.3 §5.10.6).

use std::time::Duration;

use anyhow::{Context, Result};

use super::{Guest, VSOCK};
use crate::dma::Page;
use crate::pci::Function;
use crate::virtio::{NEXT, Ring, SIZE, WRITE};

const HOST: u64 = 2;
const GUEST: u64 = 3;
const AGENT_PORT: u32 = 1024;

const REQUEST: u16 = 1;
const RW: u16 = 5;
const CREDIT_UPDATE: u16 = 6;

/// struct virtio_vsock_hdr.
#[derive(Clone, Copy)]
struct Packet {
    src_cid: u64,
    dst_cid: u64,
    src_port: u32,
    dst_port: u32,
    len: u32,
    kind: u16,
    op: u16,
    flags: u32,
    buf_alloc: u32,
    fwd_cnt: u32,
}

const HONEST: Packet = Packet {
    src_cid: GUEST,
    dst_cid: HOST,
    src_port: 5000,
    dst_port: AGENT_PORT,
    len: 0,
    kind: 1,
    op: REQUEST,
    flags: 0,
    buf_alloc: 65536,
    fwd_cnt: 0,
};

impl Packet {
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(44);
        bytes.extend(self.src_cid.to_le_bytes());
        bytes.extend(self.dst_cid.to_le_bytes());
        for port in [self.src_port, self.dst_port, self.len] {
            bytes.extend(port.to_le_bytes());
        }
        for half in [self.kind, self.op] {
            bytes.extend(half.to_le_bytes());
        }
        for word in [self.flags, self.buf_alloc, self.fwd_cnt] {
            bytes.extend(word.to_le_bytes());
        }
        bytes
    }
}

/// A socket device that is up, with buffers to receive into.
struct Socket<'a> {
    guest: &'a Guest,
    function: &'a Function,
    send: Ring,
    receive: Ring,
    page: Page,
}

impl<'a> Socket<'a> {
    fn open(guest: &'a Guest) -> Result<Self> {
        let function = guest.of_kind(VSOCK)?;
        let mut rings = function.start()?.into_iter();
        let receive = rings.next().context("no receive queue")?;
        let send = rings.next().context("no transmit queue")?;
        for head in 0..SIZE {
            // A page is never given back, so the device may write to it for ever.
            receive.descriptor(head, Page::new()?.address, 4096, WRITE, 0);
            receive.offer(head);
        }
        function.kick(0);
        Ok(Self {
            guest,
            function,
            send,
            receive,
            page: Page::new()?,
        })
    }

    /// Sends a header and `payload` bytes after it, whatever the header says.
    fn send(&self, packet: &Packet, payload: u32) {
        self.page.write(0, &packet.bytes());
        let head = self.send.position() % (SIZE / 2) * 2;
        if payload == 0 {
            self.send.descriptor(head, self.page.address, 44, 0, 0);
        } else {
            self.send
                .descriptor(head, self.page.address, 44, NEXT, head + 1);
            self.send
                .descriptor(head + 1, self.page.address + 64, payload, 0, 0);
        }
        self.send.offer(head);
        let position = self.send.position();
        self.function.kick(1);
        // One page carries all packets: the next is written once this one is used.
        self.send.wait_used(position, Duration::from_millis(500));
        // Received buffers go back at once.
        while self.receive.position() != self.receive.used().wrapping_add(SIZE) {
            self.receive.offer(self.receive.position() % SIZE);
        }
        self.function.kick(0);
    }

    fn close(self) -> Result<()> {
        self.guest.done(self.function)
    }
}

/// A request to connect, as an honest driver sends it.
pub fn request(src_port: u32, dst_port: u32) -> Vec<u8> {
    let packet = Packet {
        src_port,
        dst_port,
        ..HONEST
    };
    packet.bytes()
}

/// Sources that are not the guest's and destinations that are not the host's.
pub fn foreign_cids(guest: &Guest) -> Result<()> {
    let socket = Socket::open(guest)?;
    for cid in [0, 1, 2, 4, 100, 0xffff_ffff, 0x1_0000_0003, u64::MAX] {
        for op in 0..8 {
            socket.send(
                &Packet {
                    src_cid: cid,
                    op,
                    ..HONEST
                },
                0,
            );
            socket.send(
                &Packet {
                    dst_cid: cid,
                    op,
                    ..HONEST
                },
                0,
            );
        }
    }
    socket.close()
}

/// Operations, types and flags that do not exist.
pub fn bogus_operations(guest: &Guest) -> Result<()> {
    let socket = Socket::open(guest)?;
    for op in [0u16, 8, 9, 255, 0x7fff, 0xffff] {
        socket.send(&Packet { op, ..HONEST }, 0);
    }
    for kind in [0u16, 2, 3, 0xffff] {
        socket.send(&Packet { kind, ..HONEST }, 0);
    }
    for flags in [1u32, 2, 3, 4, u32::MAX] {
        for op in 0..8 {
            socket.send(
                &Packet {
                    op,
                    flags,
                    ..HONEST
                },
                0,
            );
        }
    }
    socket.close()
}

/// len larger and smaller than the buffers, and headers that are cut.
pub fn lengths(guest: &Guest) -> Result<()> {
    let socket = Socket::open(guest)?;
    for len in [1u32, 43, 4096, 0x1_0000, 0x7fff_ffff, u32::MAX] {
        for payload in [0u32, 1, 4000] {
            for op in [REQUEST, RW, CREDIT_UPDATE] {
                socket.send(&Packet { len, op, ..HONEST }, payload);
            }
        }
    }
    for length in [0u32, 1, 8, 43] {
        socket.send.descriptor(0, socket.page.address, length, 0, 0);
        socket.send.offer(0);
        socket.function.kick(1);
    }
    socket.close()
}

/// Requests to every kind of port, and far more of them than there may be connections.
pub fn connections(guest: &Guest) -> Result<()> {
    let socket = Socket::open(guest)?;
    for dst_port in [0u32, 1, 22, 1023, 1025, 0x7fff_ffff, u32::MAX] {
        socket.send(&Packet { dst_port, ..HONEST }, 0);
    }
    for src_port in 6000..6300 {
        socket.send(&Packet { src_port, ..HONEST }, 0);
    }
    socket.close()
}

/// More data than the host allowed, and credit that goes backwards.
pub fn credit(guest: &Guest) -> Result<()> {
    let socket = Socket::open(guest)?;
    socket.send(&HONEST, 0);
    for round in 0..600u32 {
        socket.send(
            &Packet {
                op: RW,
                len: 3900,
                fwd_cnt: round.wrapping_mul(0x1000_0001),
                ..HONEST
            },
            3900,
        );
    }
    for (buf_alloc, fwd_cnt) in [(0, 0), (u32::MAX, u32::MAX), (1, 0x8000_0000), (0, 1)] {
        socket.send(
            &Packet {
                op: CREDIT_UPDATE,
                buf_alloc,
                fwd_cnt,
                ..HONEST
            },
            0,
        );
    }
    socket.close()
}

/// Responses, resets, shutdowns and data for connections that are not there.
pub fn strays(guest: &Guest) -> Result<()> {
    let socket = Socket::open(guest)?;
    for op in 2..8u16 {
        for port in [1u32, 1024, 1025, 77_777] {
            socket.send(
                &Packet {
                    op,
                    src_port: port,
                    dst_port: port,
                    len: if op == RW { 100 } else { 0 },
                    ..HONEST
                },
                if op == RW { 100 } else { 0 },
            );
        }
    }
    socket.close()
}
