//! One connection: its two directions, from the first packet to the last byte on the host's side.
//!
//! Host to guest: `header`, then `input` until end of file, then a shutdown. Guest to host: into
//! `output` directly, or into `backlog` while the output is blocked. A direction ends by itself;
//! the connection ends when both have. What the guest sends out of turn is a [`Violation`].

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::os::fd::BorrowedFd;

use super::credit::{Credit, Window};
use super::endpoint::{Direction, Endpoint, Outcome};
use super::packet::{Header, MAX_PAYLOAD, op, shutdown};
use crate::virtio::Sources;
use crate::virtio::chain::Buffers;

/// The ports of a connection; the context ids are always the same two.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key {
    /// Port on the host.
    pub host_port: u32,
    /// Port in the guest.
    pub guest_port: u32,
}

/// Whose connection it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// The one the guest opens.
    Agent,
    /// A stream of the shim, by number.
    Stream(u64),
}

/// The guest has broken the protocol; the connection is to be reset.
#[derive(Debug, PartialEq, Eq)]
pub struct Violation;

/// A packet to send: everything in its header that is not the same for each of the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet {
    /// Operation.
    pub op: u16,
    /// Its flags.
    pub flags: u32,
    /// Bytes of payload, already in the guest's buffer.
    pub length: u32,
}

impl Packet {
    fn control(op: u16) -> Self {
        Self {
            op,
            flags: 0,
            length: 0,
        }
    }
}

/// One connection.
#[derive(Debug)]
pub struct Connection {
    /// Its ports.
    pub key: Key,
    /// Whose it is.
    pub origin: Origin,
    /// It waits in the multiplexer's queue for a receive buffer.
    pub queued: bool,
    /// The guest has forgotten it; only the backlog is left to be written.
    pub detached: bool,
    /// It did not end in order.
    pub reset: bool,
    established: bool,
    /// The opening packet to send: a request or a response.
    opening: Option<u16>,
    credit: Credit,
    /// The guest has asked for our credit.
    credit_due: bool,
    /// We have asked for the guest's credit and got none yet.
    credit_asked: bool,
    header: Vec<u8>,
    header_sent: usize,
    input: Option<Endpoint>,
    output: Option<Endpoint>,
    backlog: VecDeque<u8>,
    /// Shutdown flags: what has ended on our side, what of it the guest knows, and the guest's.
    local: u32,
    told: u32,
    peer: u32,
}

impl Connection {
    /// A connection that the host opens.
    pub fn outgoing(
        key: Key,
        stream: u64,
        header: Vec<u8>,
        input: Option<Endpoint>,
        output: Option<Endpoint>,
        window: Window,
    ) -> Self {
        Self {
            key,
            origin: Origin::Stream(stream),
            queued: false,
            detached: false,
            reset: false,
            established: false,
            opening: Some(op::REQUEST),
            credit: Credit::new(window),
            credit_due: false,
            credit_asked: false,
            header,
            header_sent: 0,
            input,
            output,
            backlog: VecDeque::new(),
            local: 0,
            told: 0,
            peer: 0,
        }
    }

    /// The connection that the guest has opened with `request`.
    pub fn agent(
        key: Key,
        request: &Header,
        input: Endpoint,
        output: Endpoint,
        window: Window,
    ) -> Self {
        let mut connection = Self::outgoing(key, 0, Vec::new(), Some(input), Some(output), window);
        connection.origin = Origin::Agent;
        connection.established = true;
        connection.opening = Some(op::RESPONSE);
        connection.credit.update(request.buf_alloc, request.fwd_cnt);
        connection
    }

    /// `buf_alloc` and `fwd_cnt` for the next packet, which makes them known to the guest.
    pub fn credit(&mut self) -> (u32, u32) {
        self.credit_due = false;
        (self.credit.window(), self.credit.tell())
    }

    fn sending(&self) -> bool {
        self.local & shutdown::SEND == 0 && self.peer & shutdown::RECEIVE == 0
    }

    /// Whether a receive buffer would be of use.
    pub fn wants_buffer(&self) -> bool {
        if self.detached {
            return false;
        }
        if self.opening.is_some() {
            return true;
        }
        if !self.established {
            return false;
        }
        if self.credit_due || self.update_due() || self.local & !self.told != 0 {
            return true;
        }
        if !self.sending() {
            return false;
        }
        let data = self.header_sent < self.header.len()
            || self.input.as_ref().is_some_and(|input| input.ready);
        match (data, &self.input) {
            (true, _) => self.credit.available() > 0 || !self.credit_asked,
            (false, None) => true,
            (false, Some(_)) => false,
        }
    }

    fn update_due(&self) -> bool {
        self.peer & shutdown::SEND == 0 && self.credit.needs_update()
    }

    /// The next packet to the guest. Payload is put into `payload`, the guest's buffer behind the
    /// header.
    pub fn next_packet(
        &mut self,
        payload: &mut Buffers<'_>,
        sources: &mut Sources<'_>,
    ) -> Option<Packet> {
        if self.detached {
            return None;
        }
        if let Some(op) = self.opening.take() {
            return Some(Packet::control(op));
        }
        if !self.established {
            return None;
        }
        if self.sending()
            && let Some(packet) = self.next_data(payload, sources)
        {
            return Some(packet);
        }
        if self.local & !self.told != 0 {
            if self.receiving_ended() {
                self.local |= shutdown::RECEIVE;
            }
            self.told = self.local;
            return Some(Packet {
                op: op::SHUTDOWN,
                flags: self.local,
                length: 0,
            });
        }
        (self.credit_due || self.update_due()).then(|| Packet::control(op::CREDIT_UPDATE))
    }

    fn next_data(
        &mut self,
        payload: &mut Buffers<'_>,
        sources: &mut Sources<'_>,
    ) -> Option<Packet> {
        let head = &self.header[self.header_sent..];
        let input_ready = self.input.as_ref().is_some_and(|input| input.ready);
        if head.is_empty() && !input_ready {
            if self.input.is_none() {
                self.local |= shutdown::SEND;
            }
            return None;
        }
        let credit = self.credit.available().min(MAX_PAYLOAD);
        if credit == 0 {
            let ask = !std::mem::replace(&mut self.credit_asked, true);
            return ask.then(|| Packet::control(op::CREDIT_REQUEST));
        }
        let room = payload.len().min(credit as usize);
        let count = if head.is_empty() {
            let input = self.input.as_mut()?;
            match input.attempt(|fd| payload.read_from(fd, room)) {
                Outcome::Moved(count) => count,
                Outcome::Blocked => return None,
                Outcome::Ended => {
                    self.end_input(sources);
                    return None;
                }
            }
        } else {
            let count = payload.copy_from(&head[..head.len().min(room)]);
            self.header_sent += count;
            count
        };
        // `room` is at most MAX_PAYLOAD.
        let length = u32::try_from(count).unwrap_or(MAX_PAYLOAD);
        self.credit.send(length);
        Some(Packet {
            op: op::RW,
            flags: 0,
            length,
        })
    }

    fn end_input(&mut self, sources: &mut Sources<'_>) {
        self.local |= shutdown::SEND;
        self.header = Vec::new();
        self.header_sent = 0;
        if let Some(input) = self.input.take() {
            input.finish(Direction::Input, sources);
        }
    }

    /// Takes a packet of the guest, a reset excepted ([`Self::reset_by_guest`]).
    ///
    /// # Errors
    /// If it is out of turn or over the guest's credit.
    pub fn receive(
        &mut self,
        header: &Header,
        payload: Buffers<'_>,
        sources: &mut Sources<'_>,
    ) -> Result<(), Violation> {
        self.credit.update(header.buf_alloc, header.fwd_cnt);
        if self.credit.available() > 0 {
            self.credit_asked = false;
        }
        match header.op {
            op::RESPONSE if !self.established => self.established = true,
            _ if !self.established => return Err(Violation),
            op::RW if self.peer & shutdown::SEND == 0 => {
                return self.receive_data(header.length, payload, sources);
            }
            op::SHUTDOWN => {
                self.peer |= header.flags & shutdown::BOTH;
                if self.peer & shutdown::RECEIVE != 0 {
                    self.end_input(sources);
                }
                self.end_output_if_flushed(sources);
            }
            op::CREDIT_UPDATE => {}
            op::CREDIT_REQUEST => self.credit_due = true,
            _ => return Err(Violation),
        }
        Ok(())
    }

    fn receive_data(
        &mut self,
        length: u32,
        mut payload: Buffers<'_>,
        sources: &mut Sources<'_>,
    ) -> Result<(), Violation> {
        if !self.credit.receive(length) {
            return Err(Violation);
        }
        let Some(output) = self.output.as_mut() else {
            self.credit.forward(length);
            return Ok(());
        };
        if self.backlog.is_empty() {
            while output.ready && !payload.is_empty() {
                let left = payload.len();
                match output.attempt(|fd| payload.write_to(fd, left)) {
                    Outcome::Moved(count) => {
                        self.credit
                            .forward(u32::try_from(count).unwrap_or(u32::MAX));
                    }
                    Outcome::Blocked => {}
                    Outcome::Ended => {
                        self.lose_reader(sources);
                        return Ok(());
                    }
                }
            }
        }
        if !payload.is_empty() {
            let held = self.backlog.len();
            // Growing by doubling would hold more than the window.
            self.backlog.reserve_exact(payload.len());
            self.backlog.resize(held + payload.len(), 0);
            let (front, back) = self.backlog.as_mut_slices();
            let mut start = held;
            for part in [front, back] {
                if start < part.len() {
                    payload.copy_to(&mut part[start..]);
                    start = 0;
                } else {
                    start -= part.len();
                }
            }
        }
        Ok(())
    }

    /// The output takes no more: what comes is discarded and the guest is told, as from a pipe
    /// whose reader has gone.
    fn lose_reader(&mut self, sources: &mut Sources<'_>) {
        self.credit.forward(u32::MAX);
        self.backlog = VecDeque::new();
        self.local |= shutdown::RECEIVE;
        if let Some(output) = self.output.take() {
            output.finish(Direction::Output, sources);
        }
    }

    fn end_output_if_flushed(&mut self, sources: &mut Sources<'_>) {
        if self.peer & shutdown::SEND != 0
            && self.backlog.is_empty()
            && let Some(output) = self.output.take()
        {
            output.finish(Direction::Output, sources);
        }
    }

    /// An event of one of its descriptors.
    pub fn endpoint_ready(&mut self, direction: Direction, sources: &mut Sources<'_>) {
        match direction {
            Direction::Input => {
                if let Some(input) = self.input.as_mut() {
                    input.ready = true;
                }
            }
            Direction::Output => {
                if let Some(output) = self.output.as_mut() {
                    output.ready = true;
                }
                self.flush(sources);
            }
        }
    }

    fn flush(&mut self, sources: &mut Sources<'_>) {
        while !self.backlog.is_empty()
            && let Some(output) = self.output.as_mut()
            && output.ready
        {
            let (front, back) = self.backlog.as_slices();
            match output.attempt(|fd| write_vectored(fd, front, back)) {
                Outcome::Moved(count) => {
                    self.backlog.drain(..count);
                    self.credit
                        .forward(u32::try_from(count).unwrap_or(u32::MAX));
                }
                Outcome::Blocked => return,
                Outcome::Ended => {
                    self.lose_reader(sources);
                    return;
                }
            }
        }
        if self.backlog.is_empty() {
            self.backlog = VecDeque::new();
        }
        self.end_output_if_flushed(sources);
    }

    /// The guest has reset it: what was received before is still written out.
    pub fn reset_by_guest(&mut self, sources: &mut Sources<'_>) {
        let whole = self.peer & shutdown::SEND != 0 || self.local & shutdown::RECEIVE != 0;
        self.reset = !(whole && self.sending_ended());
        self.detached = true;
        self.peer = shutdown::BOTH;
        self.end_input(sources);
        self.end_output_if_flushed(sources);
    }

    fn sending_ended(&self) -> bool {
        self.told & shutdown::SEND != 0 || self.peer & shutdown::RECEIVE != 0
    }

    fn receiving_ended(&self) -> bool {
        self.local & shutdown::RECEIVE != 0
            || (self.peer & shutdown::SEND != 0 && self.backlog.is_empty())
    }

    /// Whether nothing is left to do.
    pub fn ended(&self) -> bool {
        self.receiving_ended() && self.sending_ended()
    }

    /// Whether the guest has ended both directions and waits for a reset.
    pub fn closed_by_guest(&self) -> bool {
        self.peer == shutdown::BOTH && !self.detached
    }

    /// Whether the guest knows that both directions have ended on our side.
    pub fn farewell_said(&self) -> bool {
        self.detached || self.told == shutdown::BOTH
    }

    /// Closes the descriptors, whatever is left, and gives its window up.
    pub fn release(self, sources: &mut Sources<'_>) -> Window {
        if let Some(input) = self.input {
            input.finish(Direction::Input, sources);
        }
        if let Some(output) = self.output {
            output.finish(Direction::Output, sources);
        }
        self.credit.into_window()
    }
}

fn write_vectored(fd: BorrowedFd<'_>, front: &[u8], back: &[u8]) -> io::Result<usize> {
    let slices = [IoSlice::new(front), IoSlice::new(back)];
    let count = if back.is_empty() { 1 } else { 2 };
    Ok(nix::sys::uio::writev(fd, &slices[..count])?)
}
