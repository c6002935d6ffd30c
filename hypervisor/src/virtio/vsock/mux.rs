//! All connections of one guest: who owns a packet, whose turn it is to send, and which packets
//! belong to none.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::OwnedFd;

use brig_agent_protocol::{AGENT_PORT, HOST_CID};

use super::connection::{Connection, Key, Origin};
use super::credit::Pool;
use super::endpoint::{Direction, Endpoint};
use super::handle::{Live, MAX_STREAMS, StreamParams, VsockEvent};
use super::packet::{HEADER, Header, TYPE_STREAM, op, shutdown};
use crate::virtio::Sources;
use crate::virtio::chain::Buffers;

/// Resets owed to the guest for packets that belong to no connection; more are dropped, so that a
/// guest which offers no receive buffers costs nothing.
const MAX_STRAY: usize = 256;
/// Last packets of connections that have ended; more are dropped.
const MAX_FAREWELL: usize = MAX_STRAY + 2 * MAX_STREAMS;
/// Bits of a token that name a slot, and the count at which generations begin again.
const SLOT_BITS: u32 = 11;
const GENERATIONS: u32 = 1 << 18;
const _: () = assert!(MAX_STREAMS < 1 << SLOT_BITS);
/// Where host ports begin; each stream gets a fresh one.
const FIRST_HOST_PORT: u32 = 1 << 30;

/// All connections of one guest.
pub struct Mux {
    guest_cid: u64,
    agent: Option<OwnedFd>,
    slots: Vec<Option<Box<Connection>>>,
    vacant: Vec<usize>,
    /// How often each slot was vacated, a part of its tokens.
    generations: Vec<u32>,
    by_key: HashMap<Key, usize>,
    by_stream: HashMap<u64, usize>,
    /// Packets of no connection.
    control: VecDeque<Header>,
    /// Connections that have something to send.
    turns: VecDeque<usize>,
    next_port: u32,
    /// What may wait for the readers of all connections.
    pool: Pool,
    first_token: u32,
    live: Live,
    events: Box<dyn Fn(VsockEvent) + Send>,
}

impl Mux {
    /// `agent` is the host's end of the agent's connection; tokens from `first_token` on are ours.
    pub fn new(
        guest_cid: u32,
        agent: OwnedFd,
        first_token: u32,
        live: Live,
        events: Box<dyn Fn(VsockEvent) + Send>,
    ) -> Self {
        Self {
            guest_cid: u64::from(guest_cid),
            agent: Some(agent),
            slots: Vec::new(),
            vacant: Vec::new(),
            generations: Vec::new(),
            by_key: HashMap::new(),
            by_stream: HashMap::new(),
            control: VecDeque::new(),
            turns: VecDeque::new(),
            next_port: FIRST_HOST_PORT,
            pool: Pool::new(),
            first_token,
            live,
            events,
        }
    }

    /// Whether a receive buffer would be of use.
    pub fn wants_buffer(&self) -> bool {
        !self.control.is_empty() || !self.turns.is_empty()
    }

    /// Opens a stream. That it failed is reported like any other end of it.
    pub fn open(&mut self, params: StreamParams, sources: &mut Sources<'_>) {
        let stream = params.stream;
        if self.try_open(params, sources).is_err() {
            self.report_closed(Origin::Stream(stream), true);
        }
    }

    fn try_open(&mut self, params: StreamParams, sources: &mut Sources<'_>) -> io::Result<()> {
        let slot = self.vacant_slot()?;
        let (input, output) = match self.endpoints(slot, params.input, params.output, sources) {
            Ok(endpoints) => endpoints,
            Err(error) => {
                self.vacant.push(slot);
                return Err(error);
            }
        };
        let key = self.fresh_key(params.port);
        self.by_stream.insert(params.stream, slot);
        self.by_key.insert(key, slot);
        let window = self.pool.take();
        let connection =
            Connection::outgoing(key, params.stream, params.header, input, output, window);
        self.settle(slot, Box::new(connection), sources);
        Ok(())
    }

    fn endpoints(
        &self,
        slot: usize,
        input: Option<OwnedFd>,
        output: Option<OwnedFd>,
        sources: &mut Sources<'_>,
    ) -> io::Result<(Option<Endpoint>, Option<Endpoint>)> {
        let token = self.token(slot)?;
        let input = input
            .map(|fd| Endpoint::new(fd, Direction::Input, token, sources))
            .transpose()?;
        match output
            .map(|fd| Endpoint::new(fd, Direction::Output, token + 1, sources))
            .transpose()
        {
            Ok(output) => Ok((input, output)),
            Err(error) => {
                if let Some(input) = input {
                    input.release(sources);
                }
                Err(error)
            }
        }
    }

    /// Tokens of a connection: its input's, and one more, its output's. They tell it from the
    /// connection that had the slot before, an event of which may be under way.
    fn token(&self, slot: usize) -> io::Result<u32> {
        let generation = self.generations.get(slot).copied().unwrap_or(0) % GENERATIONS;
        u32::try_from(slot)
            .ok()
            .filter(|slot| *slot < 1 << SLOT_BITS)
            .map(|slot| self.first_token + (((generation << SLOT_BITS) | slot) << 1))
            .ok_or_else(|| io::Error::other("no token left"))
    }

    fn vacant_slot(&mut self) -> io::Result<usize> {
        if let Some(slot) = self.vacant.pop() {
            return Ok(slot);
        }
        // One for the agent.
        if self.slots.len() > MAX_STREAMS {
            return Err(io::Error::other("too many streams"));
        }
        self.slots.push(None);
        self.generations.push(0);
        Ok(self.slots.len() - 1)
    }

    fn fresh_key(&mut self, guest_port: u32) -> Key {
        loop {
            let key = Key {
                host_port: self.next_port,
                guest_port,
            };
            self.next_port = self
                .next_port
                .checked_add(1)
                .filter(|port| *port != u32::MAX)
                .unwrap_or(FIRST_HOST_PORT);
            // Ends: there are far more ports than connections.
            if !self.by_key.contains_key(&key) {
                return key;
            }
        }
    }

    /// Resets a stream and drops what it holds.
    pub fn close(&mut self, stream: u64, sources: &mut Sources<'_>) {
        if let Some(slot) = self.by_stream.get(&stream).copied()
            && let Some(connection) = self.slots[slot].take()
        {
            self.abort(slot, *connection, sources);
        }
    }

    /// Takes a packet from the guest. `payload` is what follows the header in the chain.
    pub fn receive(
        &mut self,
        header: &Header,
        mut payload: Buffers<'_>,
        sources: &mut Sources<'_>,
    ) {
        // Any program in the guest can open a socket, but only our kernel fills these in.
        if header.src_cid != self.guest_cid || header.dst_cid != u64::from(HOST_CID) {
            return;
        }
        let key = Key {
            host_port: header.dst_port,
            guest_port: header.src_port,
        };
        let known = self.by_key.get(&key).copied();
        let Some((slot, mut connection)) =
            known.and_then(|slot| Some((slot, self.slots[slot].take()?)))
        else {
            return self.receive_unknown(key, header, sources);
        };
        if header.op == op::RST {
            self.by_key.remove(&key);
            connection.reset_by_guest(sources);
            return self.settle(slot, connection, sources);
        }
        let length = header.length as usize;
        let well_formed = header.kind == TYPE_STREAM
            && (header.op != op::RW
                || (header.length <= super::packet::MAX_PAYLOAD && length <= payload.len()));
        let payload = payload.split_to(length);
        if well_formed && connection.receive(header, payload, sources).is_ok() {
            self.settle(slot, connection, sources);
        } else {
            self.abort(slot, *connection, sources);
        }
    }

    fn receive_unknown(&mut self, key: Key, header: &Header, sources: &mut Sources<'_>) {
        let for_agent =
            header.op == op::REQUEST && header.kind == TYPE_STREAM && key.host_port == AGENT_PORT;
        if for_agent
            && let Some(agent) = self.agent.take()
            && self.accept_agent(key, header, agent, sources).is_ok()
        {
            (self.events)(VsockEvent::AgentConnected);
            return;
        }
        if header.op != op::RST && self.control.len() < MAX_STRAY {
            self.push_control(key, op::RST, 0, (0, 0));
        }
    }

    fn accept_agent(
        &mut self,
        key: Key,
        request: &Header,
        agent: OwnedFd,
        sources: &mut Sources<'_>,
    ) -> io::Result<()> {
        let copy = agent.try_clone()?;
        let slot = self.vacant_slot()?;
        let (input, output) = match self.endpoints(slot, Some(agent), Some(copy), sources) {
            Ok((Some(input), Some(output))) => (input, output),
            Ok(_) => return Err(io::Error::other("the agent's socket has gone")),
            Err(error) => {
                self.vacant.push(slot);
                return Err(error);
            }
        };
        self.by_key.insert(key, slot);
        let connection = Connection::agent(key, request, input, output, self.pool.take());
        self.settle(slot, Box::new(connection), sources);
        Ok(())
    }

    /// Fills one receive buffer of the guest, which is longer than a header; `None` if there is
    /// nothing to send. Returns the bytes written.
    pub fn transmit(&mut self, mut buffer: Buffers<'_>, sources: &mut Sources<'_>) -> Option<u32> {
        let mut place = buffer.split_to(HEADER);
        if let Some(header) = self.control.pop_front() {
            place.copy_from(&header.to_bytes());
            return Some(written(0));
        }
        while let Some(slot) = self.turns.pop_front() {
            let Some(mut connection) = self.slots[slot].take() else {
                continue;
            };
            connection.queued = false;
            let packet = connection.next_packet(&mut buffer, sources);
            let credit = packet.map(|_| connection.credit());
            let key = connection.key;
            self.settle(slot, connection, sources);
            if let (Some(packet), Some(credit)) = (packet, credit) {
                let mut header = self.header(key, packet.op, packet.flags, credit);
                header.length = packet.length;
                place.copy_from(&header.to_bytes());
                return Some(written(packet.length));
            }
        }
        None
    }

    /// An event of a connection's descriptor: `offset` is its token less the first one.
    pub fn endpoint_ready(&mut self, offset: u32, sources: &mut Sources<'_>) {
        let slot = ((offset >> 1) & ((1 << SLOT_BITS) - 1)) as usize;
        let generation = offset >> (SLOT_BITS + 1);
        let direction = if offset.is_multiple_of(2) {
            Direction::Input
        } else {
            Direction::Output
        };
        if self.generations.get(slot).map(|count| count % GENERATIONS) != Some(generation) {
            return;
        }
        if let Some(mut connection) = self.slots.get_mut(slot).and_then(Option::take) {
            connection.endpoint_ready(direction, sources);
            self.settle(slot, connection, sources);
        }
    }

    /// Resets everything without a word to the guest, whose driver has gone.
    pub fn reset(&mut self, sources: &mut Sources<'_>) {
        for slot in 0..self.slots.len() {
            if let Some(connection) = self.slots[slot].take() {
                self.forget(slot, *connection, true, sources);
            }
        }
        self.control.clear();
        self.turns.clear();
    }

    /// Reports a stream that never came to be, or has ended.
    pub fn report_closed(&self, origin: Origin, reset: bool) {
        if let Origin::Stream(stream) = origin {
            self.live.remove(stream);
            (self.events)(VsockEvent::StreamClosed { stream, reset });
        }
    }

    /// Puts a connection back after work on it, or ends it.
    fn settle(&mut self, slot: usize, mut connection: Box<Connection>, sources: &mut Sources<'_>) {
        if connection.closed_by_guest() {
            // The guest waits for this before it frees its side, however long our reader takes.
            self.by_key.remove(&connection.key);
            connection.detached = true;
            self.say_farewell(connection.key, op::RST, 0, connection.credit());
        }
        if connection.ended() {
            if !connection.farewell_said() {
                let credit = connection.credit();
                self.say_farewell(connection.key, op::SHUTDOWN, shutdown::BOTH, credit);
            }
            let reset = connection.reset;
            return self.forget(slot, *connection, reset, sources);
        }
        if !connection.queued && connection.wants_buffer() {
            connection.queued = true;
            self.turns.push_back(slot);
        }
        self.slots[slot] = Some(connection);
    }

    fn abort(&mut self, slot: usize, mut connection: Connection, sources: &mut Sources<'_>) {
        if !connection.detached {
            let credit = connection.credit();
            self.say_farewell(connection.key, op::RST, 0, credit);
        }
        self.forget(slot, connection, true, sources);
    }

    fn forget(
        &mut self,
        slot: usize,
        connection: Connection,
        reset: bool,
        sources: &mut Sources<'_>,
    ) {
        if connection.queued {
            self.turns.retain(|turn| *turn != slot);
        }
        if !connection.detached {
            self.by_key.remove(&connection.key);
        }
        let origin = connection.origin;
        if let Origin::Stream(stream) = origin {
            self.by_stream.remove(&stream);
        }
        self.pool.give_back(connection.release(sources));
        self.generations[slot] = self.generations[slot].wrapping_add(1);
        self.vacant.push(slot);
        self.report_closed(origin, reset);
    }

    fn say_farewell(&mut self, key: Key, op: u16, flags: u32, credit: (u32, u32)) {
        if self.control.len() < MAX_FAREWELL {
            self.push_control(key, op, flags, credit);
        }
    }

    fn push_control(&mut self, key: Key, op: u16, flags: u32, credit: (u32, u32)) {
        let header = self.header(key, op, flags, credit);
        self.control.push_back(header);
    }

    fn header(&self, key: Key, op: u16, flags: u32, credit: (u32, u32)) -> Header {
        Header {
            src_cid: u64::from(HOST_CID),
            dst_cid: self.guest_cid,
            src_port: key.host_port,
            dst_port: key.guest_port,
            length: 0,
            kind: TYPE_STREAM,
            op,
            flags,
            buf_alloc: credit.0,
            fwd_cnt: credit.1,
        }
    }

    /// Connections, and packets of no connection, for tests of the bounds.
    #[cfg(any(test, feature = "fuzzing"))]
    pub fn counts(&self) -> (usize, usize) {
        (self.slots.iter().flatten().count(), self.control.len())
    }
}

fn written(payload: u32) -> u32 {
    const HEADER_LENGTH: u32 = 44;
    const { assert!(HEADER_LENGTH as usize == HEADER) };
    payload.saturating_add(HEADER_LENGTH)
}
