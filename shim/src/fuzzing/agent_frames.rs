//! An agent's connection as [`Guarded`] lets it through, beside a model of the rules that decides frame by frame.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use brig_agent_protocol::{MAX_EVENT, MAX_REPLY};
use futures::task::noop_waker_ref;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::oneshot;

use crate::guest::vm::frames::{Ahead, Ending, Guarded, MAX_AHEAD, MAX_UNANSWERED};

/// ttrpc's header: length, number, type, flags.
const HEADER: usize = 10;
const REQUEST: u8 = 1;
const RESPONSE: u8 = 2;
const DATA: u8 = 3;
/// The flags of a stream's end; the first, of a call, asks for events.
const REMOTE_CLOSED: u8 = 1;
const NO_DATA: u8 = 4;

fn header(length: u32, number: u32, kind: u8, flags: u8) -> Vec<u8> {
    let words = [length.to_be_bytes(), number.to_be_bytes()].concat();
    [words, vec![kind, flags]].concat()
}

/// Both directions of a connection, in pieces of a size that the input chooses.
#[derive(Default)]
struct Wire {
    from_agent: VecDeque<u8>,
    hung_up: bool,
    piece: usize,
}

impl AsyncRead for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let length = self.piece.min(buffer.remaining());
        let length = length.min(self.from_agent.len());
        if length == 0 && !self.hung_up {
            return Poll::Pending;
        }
        let bytes: Vec<u8> = self.from_agent.drain(..length).collect();
        buffer.put_slice(&bytes);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Wire {
    fn poll_write(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Poll::Ready(Ok(bytes.len().min(self.piece)))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// What the rules say of the bytes so far.
#[derive(Default)]
struct Model {
    /// Calls that wait for an answer; whether events may come before it.
    calls: HashMap<u32, bool>,
    ahead: usize,
    sent: Vec<u8>,
    /// Bytes that the client may have seen.
    allowed: usize,
    /// Bytes of the next header that have been read.
    read: usize,
    /// Bytes that the present frame still has.
    rest: usize,
    broken: bool,
}

impl Model {
    /// The client reads all that there is.
    fn drain(&mut self) {
        loop {
            let here = self.rest.min(self.sent.len() - self.allowed);
            (self.allowed, self.rest) = (self.allowed + here, self.rest - here);
            let next = &self.sent[self.allowed..];
            if self.broken || self.rest > 0 || (self.read == 0 && self.ahead >= MAX_AHEAD) {
                return;
            }
            self.read = next.len().min(HEADER);
            let Some(header) = next.first_chunk::<HEADER>() else {
                return;
            };
            let word = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().unwrap());
            let (length, number) = (word(0), word(4));
            if !self.is_allowed(length, number, header[8], header[9]) {
                self.broken = true;
                return;
            }
            self.read = 0;
            self.allowed += HEADER;
            self.rest = usize::try_from(length).unwrap();
        }
    }

    fn is_allowed(&mut self, length: u32, number: u32, kind: u8, flags: u8) -> bool {
        let length = usize::try_from(length).unwrap();
        let end = flags & (REMOTE_CLOSED | NO_DATA);
        match (kind, self.calls.get(&number)) {
            (RESPONSE, Some(_)) => {
                self.calls.remove(&number);
                length <= MAX_REPLY
            }
            (DATA, Some(true)) if end == 0 && (1..=MAX_EVENT).contains(&length) => {
                self.ahead += 1;
                true
            }
            (DATA, Some(true)) if end == REMOTE_CLOSED | NO_DATA && length == 0 => {
                self.calls.insert(number, false);
                true
            }
            _ => false,
        }
    }
}

/// The guard and the model side by side.
struct Both {
    guarded: Guarded<Wire>,
    pod: Arc<Ahead>,
    ended: oneshot::Receiver<Ending>,
    model: Model,
    seen: Vec<u8>,
    next_call: u32,
}

impl Both {
    /// Makes `count` calls; `false` when the agent is cut off for leaving too many unanswered.
    fn call(&mut self, count: usize, flags: u8) -> bool {
        let mut context = Context::from_waker(noop_waker_ref());
        for _ in 0..count {
            let payload = b"request";
            let length = u32::try_from(payload.len()).unwrap();
            let frame = [
                header(length, self.next_call, REQUEST, flags),
                payload.to_vec(),
            ]
            .concat();
            self.model.calls.insert(self.next_call, flags != 0);
            self.next_call += 2;
            let mut left = frame.as_slice();
            while !left.is_empty() {
                match Pin::new(&mut self.guarded).poll_write(&mut context, left) {
                    Poll::Ready(Ok(written)) => left = &left[written..],
                    Poll::Ready(Err(_)) => {
                        self.model.broken = true;
                        assert!(self.model.calls.len() > MAX_UNANSWERED);
                        return false;
                    }
                    Poll::Pending => unreachable!("this wire always takes something"),
                }
            }
            assert!(self.model.calls.len() <= MAX_UNANSWERED);
        }
        true
    }

    /// The client reads until nothing comes; the bytes are those of the model. Whether the connection goes on.
    fn drain(&mut self) -> bool {
        let mut context = Context::from_waker(noop_waker_ref());
        let mut bytes = [0; 777];
        let over = loop {
            let mut buffer = ReadBuf::new(&mut bytes);
            match Pin::new(&mut self.guarded).poll_read(&mut context, &mut buffer) {
                Poll::Pending => break false,
                Poll::Ready(Err(_)) => break true,
                Poll::Ready(Ok(())) if buffer.filled().is_empty() => break true,
                Poll::Ready(Ok(())) => self.seen.extend_from_slice(buffer.filled()),
            }
        };
        self.model.drain();
        assert_eq!(self.seen, self.model.sent[..self.model.allowed]);
        assert!(
            over || !self.model.broken,
            "a rule is broken, and the connection goes on"
        );
        !over
    }
}

/// A conversation: calls of the shim, frames and bytes of the agent, events taken by the pod.
pub fn agent_frames(data: &[u8]) {
    let mut data = data.iter().copied();
    let piece = usize::from(data.next().unwrap_or(1)).max(1);
    let wire = Wire {
        piece,
        ..Wire::default()
    };
    let (guarded, pod, ended) = Guarded::new(wire);
    let mut both = Both {
        guarded,
        pod,
        ended,
        model: Model::default(),
        seen: Vec::new(),
        next_call: 1,
    };
    let mut goes_on = true;
    while let (true, Some(step)) = (goes_on, data.next()) {
        let mut byte = || data.next().unwrap_or_default();
        match step % 8 {
            0 => goes_on = both.call(usize::from(byte()), 0),
            1 => goes_on = both.call(1, REMOTE_CLOSED),
            2 => {
                for _ in 0..byte() {
                    both.pod.taken();
                    both.model.ahead = both.model.ahead.saturating_sub(1);
                }
            }
            3 => goes_on = both.drain(),
            // Frames of the agent: what is in order, then anything.
            4 => {
                let (number, length) = (byte(), u16::from_be_bytes([byte(), byte()]));
                both.sends(u32::from(number), u32::from(length), RESPONSE, 0);
            }
            5 => {
                let (number, flags, count) = (byte(), byte(), byte());
                let length = if flags & NO_DATA == 0 {
                    u32::from(count) * 5
                } else {
                    0
                };
                for _ in 0..count {
                    both.sends(u32::from(number), length, DATA, flags);
                }
            }
            6 => {
                let length = u32::from_be_bytes([byte(), byte(), byte(), byte()]);
                let (number, kind, flags) = (byte(), byte(), byte());
                both.send(header(length, u32::from(number), kind, flags));
            }
            _ => {
                let length = byte();
                let bytes = (0..length).map(|_| byte()).collect();
                both.send(bytes);
            }
        }
    }
    both.finish(goes_on);
}

impl Both {
    fn send(&mut self, bytes: Vec<u8>) {
        self.model.sent.extend_from_slice(&bytes);
        self.guarded.stream_mut().from_agent.extend(bytes);
    }

    /// A frame with a payload of the length it names.
    fn sends(&mut self, number: u32, length: u32, kind: u8, flags: u8) {
        self.send(header(length, number, kind, flags));
        self.send(vec![0x5a; usize::try_from(length).unwrap()]);
    }

    /// The agent hangs up; the pod takes what there is.
    fn finish(mut self, mut goes_on: bool) {
        self.guarded.stream_mut().hung_up = true;
        while goes_on {
            goes_on = self.drain();
            self.pod.taken();
            self.model.ahead = self.model.ahead.saturating_sub(1);
        }
        match self.ended.try_recv() {
            Ok(Ending::Broken(rule)) => {
                assert!(self.model.broken, "{rule}");
                assert!(!rule.is_empty() && rule.len() < 100, "{rule}");
            }
            Ok(Ending::Closed) => {
                assert!(!self.model.broken);
                // What it had begun to say of another frame is nothing.
                assert_eq!(self.model.allowed + self.model.read, self.model.sent.len());
            }
            Err(_) => panic!("nobody is told of the end"),
        }
    }
}
