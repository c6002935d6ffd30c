//! The agent's connection as ttrpc's client may see it: every frame is checked before the client reads its
//! first byte.
//!
//! The client allocates whatever length a frame's header names, decodes whatever fields it has, and queues the
//! frames of a stream without a bound. An agent is hostile input, so here its frames are bounded in size and
//! kind, answers are let through for calls that were made and once each, and nothing more is read while the pod
//! has not taken the events that came before. An agent that breaks these rules is cut off, and with it its VM.
//!
//! Trusted: what the client writes, whose headers say which calls were made.

use std::collections::HashMap;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};

use brig_agent_protocol::{MAX_EVENT, MAX_REPLY};
use futures::task::AtomicWaker;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::oneshot;
use ttrpc::proto::{
    FLAG_NO_DATA, FLAG_REMOTE_CLOSED, MESSAGE_HEADER_LENGTH, MESSAGE_TYPE_DATA,
    MESSAGE_TYPE_REQUEST, MESSAGE_TYPE_RESPONSE, MessageHeader,
};

/// Events that may wait for the pod; beyond, nothing more is read of the agent.
pub(crate) const MAX_AHEAD: usize = 64;
/// Calls that an agent may leave unanswered. containerd asks a few at a time, and gives each up in its time.
pub(crate) const MAX_UNANSWERED: usize = 1024;

/// How a connection to an agent ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// The agent closed it, or its VM is gone.
    Closed,
    /// The agent broke a rule, which is told as the end of a sentence about it.
    Broken(String),
}

/// How many events have been let through that the pod has not taken.
#[derive(Debug, Default)]
pub(crate) struct Ahead {
    count: AtomicUsize,
    reader: AtomicWaker,
}

impl Ahead {
    /// The pod has taken an event.
    pub(crate) fn taken(&self) {
        // Atomic, so that no count is lost between the tasks.
        let _ = self
            .count
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |count| {
                count.checked_sub(1)
            });
        self.reader.wake();
    }

    fn is_full(&self) -> bool {
        self.count.load(Ordering::Relaxed) >= MAX_AHEAD
    }
}

/// What a number on the wire stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Call {
    /// One answer.
    Unary,
    /// Events, then one answer.
    Events,
}

/// A header that arrives or leaves in pieces, and the payload after it.
#[derive(Debug, Default)]
struct Frame {
    header: [u8; MESSAGE_HEADER_LENGTH],
    /// Bytes of the header that are there.
    filled: usize,
    /// Bytes of the payload that are still to come.
    rest: usize,
}

impl Frame {
    /// Takes in bytes of a header; how many, and the header when it is whole.
    fn fill(&mut self, bytes: &[u8]) -> (usize, Option<MessageHeader>) {
        let room = &mut self.header[self.filled..];
        let length = room.len().min(bytes.len());
        room[..length].copy_from_slice(&bytes[..length]);
        self.filled += length;
        let whole = self.filled == MESSAGE_HEADER_LENGTH;
        (length, whole.then(|| MessageHeader::from(&self.header)))
    }
}

fn length(header: &MessageHeader) -> usize {
    usize::try_from(header.length).unwrap_or(usize::MAX)
}

/// The connection; ttrpc's client is put on top of it.
#[derive(Debug)]
pub(crate) struct Guarded<S> {
    stream: S,
    incoming: Frame,
    /// Bytes of the incoming header that the client has.
    given: usize,
    outgoing: Frame,
    calls: HashMap<u32, Call>,
    ahead: Arc<Ahead>,
    ending: Option<oneshot::Sender<Ending>>,
}

impl<S> Guarded<S> {
    /// Guards a connection. The receiver resolves at its end; with an error, when nobody noticed that.
    pub(crate) fn new(stream: S) -> (Self, Arc<Ahead>, oneshot::Receiver<Ending>) {
        let (ending, ended) = oneshot::channel();
        let ahead = Arc::new(Ahead::default());
        let guarded = Self {
            stream,
            incoming: Frame::default(),
            given: 0,
            outgoing: Frame::default(),
            calls: HashMap::new(),
            ahead: Arc::clone(&ahead),
            ending: Some(ending),
        };
        (guarded, ahead, ended)
    }

    /// What it guards.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn stream_mut(&mut self) -> &mut S {
        &mut self.stream
    }

    fn end(&mut self, ending: Ending) {
        if let Some(told) = self.ending.take() {
            let _ = told.send(ending);
        }
    }

    fn broken(&mut self, rule: String) -> io::Error {
        let error = io::Error::other(format!("the guest's agent {rule}"));
        self.end(Ending::Broken(rule));
        error
    }

    /// Decides on a frame of the agent by its header.
    fn check(&mut self, header: &MessageHeader) -> Result<(), String> {
        let number = header.stream_id;
        let call = self.calls.get(&number).copied();
        let most = match (header.type_, call) {
            (MESSAGE_TYPE_RESPONSE, Some(_)) => {
                self.calls.remove(&number);
                MAX_REPLY
            }
            (MESSAGE_TYPE_RESPONSE, None) => {
                return Err(format!("answered call {number}, which waits for no answer"));
            }
            (MESSAGE_TYPE_DATA, Some(Call::Events)) => {
                let end = header.flags & FLAG_REMOTE_CLOSED != 0;
                if end != (header.flags & FLAG_NO_DATA != 0) || end != (header.length == 0) {
                    return Err("sent an event without content".to_owned());
                }
                if end {
                    self.calls.insert(number, Call::Unary);
                } else {
                    self.ahead.count.fetch_add(1, Ordering::Relaxed);
                }
                MAX_EVENT
            }
            (MESSAGE_TYPE_DATA, _) => {
                return Err(format!("sent events in call {number}, which asks for none"));
            }
            (other, _) => return Err(format!("sent a frame of the unknown type {other}")),
        };
        if length(header) > most {
            return Err(format!(
                "sent a frame of {} bytes where {most} are the most",
                header.length
            ));
        }
        Ok(())
    }

    /// Notes what the client has written.
    fn written(&mut self, mut bytes: &[u8]) -> Result<(), String> {
        while !bytes.is_empty() {
            if self.outgoing.rest > 0 {
                let length = self.outgoing.rest.min(bytes.len());
                self.outgoing.rest -= length;
                bytes = &bytes[length..];
                continue;
            }
            let (taken, whole) = self.outgoing.fill(bytes);
            bytes = &bytes[taken..];
            let Some(header) = whole else { continue };
            self.outgoing.filled = 0;
            self.outgoing.rest = length(&header);
            if header.type_ == MESSAGE_TYPE_REQUEST {
                // So the client marks what it wants events of.
                let call = match header.flags & FLAG_REMOTE_CLOSED {
                    0 => Call::Unary,
                    _ => Call::Events,
                };
                self.calls.insert(header.stream_id, call);
            }
        }
        if self.calls.len() > MAX_UNANSWERED {
            return Err(format!("left {MAX_UNANSWERED} calls without an answer"));
        }
        Ok(())
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Guarded<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        loop {
            if this.incoming.filled == MESSAGE_HEADER_LENGTH {
                if this.given < MESSAGE_HEADER_LENGTH {
                    let header = &this.incoming.header[this.given..];
                    let length = header.len().min(buffer.remaining());
                    buffer.put_slice(&header[..length]);
                    this.given += length;
                    return Poll::Ready(Ok(()));
                }
                if this.incoming.rest > 0 {
                    let room = this.incoming.rest.min(buffer.remaining());
                    let mut part = ReadBuf::new(buffer.initialize_unfilled_to(room));
                    ready!(Pin::new(&mut this.stream).poll_read(context, &mut part))?;
                    let read = part.filled().len();
                    buffer.advance(read);
                    this.incoming.rest -= read;
                    if read == 0 && room > 0 {
                        this.end(Ending::Closed);
                    }
                    return Poll::Ready(Ok(()));
                }
                (this.incoming.filled, this.given) = (0, 0);
            }
            if this.incoming.filled == 0 && this.ahead.is_full() {
                this.ahead.reader.register(context.waker());
                // What was taken before the waker was there has woken nobody.
                if this.ahead.is_full() {
                    return Poll::Pending;
                }
            }
            let mut bytes = [0; MESSAGE_HEADER_LENGTH];
            let wanted = MESSAGE_HEADER_LENGTH - this.incoming.filled;
            let mut part = ReadBuf::new(&mut bytes[..wanted]);
            let read = ready!(Pin::new(&mut this.stream).poll_read(context, &mut part));
            if read.is_err() || part.filled().is_empty() {
                this.end(Ending::Closed);
                return Poll::Ready(read);
            }
            if let (_, Some(header)) = this.incoming.fill(part.filled()) {
                if let Err(rule) = this.check(&header) {
                    return Poll::Ready(Err(this.broken(rule)));
                }
                this.incoming.rest = length(&header);
            }
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Guarded<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        let written = ready!(Pin::new(&mut this.stream).poll_write(context, bytes))?;
        if let Err(rule) = this.written(bytes.get(..written).unwrap_or_default()) {
            return Poll::Ready(Err(this.broken(rule)));
        }
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};

    fn frame(number: u32, kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let header = MessageHeader {
            length: u32::try_from(payload.len()).unwrap(),
            stream_id: number,
            type_: kind,
            flags,
        };
        [Vec::from(header), payload.to_vec()].concat()
    }

    fn answer(number: u32, payload: &[u8]) -> Vec<u8> {
        frame(number, MESSAGE_TYPE_RESPONSE, 0, payload)
    }

    fn event(number: u32, payload: &[u8]) -> Vec<u8> {
        frame(number, MESSAGE_TYPE_DATA, 0, payload)
    }

    struct Pair {
        client: Guarded<DuplexStream>,
        agent: DuplexStream,
        ahead: Arc<Ahead>,
        ended: oneshot::Receiver<Ending>,
    }

    /// A connection over which call 1 was made, and call 3 for events.
    async fn connected() -> Pair {
        let (client, mut agent) = duplex(1 << 20);
        let (mut client, ahead, ended) = Guarded::new(client);
        let calls = [
            frame(1, MESSAGE_TYPE_REQUEST, 0, b"once"),
            frame(3, MESSAGE_TYPE_REQUEST, FLAG_REMOTE_CLOSED, b"events"),
        ]
        .concat();
        // In two pieces, the second of which begins inside a header.
        client.write_all(&calls[..20]).await.unwrap();
        client.write_all(&calls[20..]).await.unwrap();
        let mut seen = vec![0; calls.len()];
        agent.read_exact(&mut seen).await.unwrap();
        assert_eq!(seen, calls);
        Pair {
            client,
            agent,
            ahead,
            ended,
        }
    }

    /// What the client reads of `bytes`, and how the connection ends when the agent hangs up after them.
    async fn read(bytes: &[u8]) -> (Vec<u8>, Ending) {
        let mut pair = connected().await;
        pair.agent.write_all(bytes).await.unwrap();
        drop(pair.agent);
        let mut seen = Vec::new();
        let _ = pair.client.read_to_end(&mut seen).await;
        (seen, pair.ended.await.unwrap())
    }

    #[tokio::test]
    async fn what_was_asked_for_passes_unchanged() {
        let bytes = [
            event(3, b"one"),
            answer(1, &[7; MAX_REPLY]),
            event(3, &[8; MAX_EVENT]),
            frame(3, MESSAGE_TYPE_DATA, FLAG_REMOTE_CLOSED | FLAG_NO_DATA, b""),
            answer(3, b"over"),
        ]
        .concat();
        assert_eq!(read(&bytes).await, (bytes, Ending::Closed));
    }

    #[tokio::test]
    async fn a_frame_that_breaks_a_rule_is_not_seen_and_ends_the_connection() {
        let header = |length, number, type_| {
            Vec::from(MessageHeader {
                length,
                stream_id: number,
                type_,
                flags: 0,
            })
        };
        let big = |most: usize| u32::try_from(most + 1).unwrap();
        for (bytes, rule) in [
            (header(big(MAX_REPLY), 1, 2), "where 32768 are the most"),
            (header(u32::MAX, 1, 2), "where 32768 are the most"),
            (header(big(MAX_EVENT), 3, 3), "where 1024 are the most"),
            (header(4 << 20, 3, 2), "where 32768 are the most"),
            (answer(5, b"x"), "waits for no answer"),
            (event(1, b"x"), "asks for none"),
            (event(5, b"x"), "asks for none"),
            (event(3, b""), "without content"),
            (
                frame(3, MESSAGE_TYPE_DATA, FLAG_REMOTE_CLOSED, b"x"),
                "without content",
            ),
            (
                frame(3, MESSAGE_TYPE_DATA, FLAG_NO_DATA, b""),
                "without content",
            ),
            (frame(1, MESSAGE_TYPE_REQUEST, 0, b"x"), "unknown type 1"),
            (frame(1, 0, 0, b""), "unknown type 0"),
        ] {
            let (seen, ending) = read(&bytes).await;
            assert_eq!(seen, b"", "{rule}");
            assert!(
                matches!(&ending, Ending::Broken(told) if told.contains(rule)),
                "{rule}: {ending:?}"
            );
        }
        let twice = [answer(1, b"x"), answer(1, b"x")].concat();
        let (seen, ending) = read(&twice).await;
        assert_eq!(seen, answer(1, b"x"));
        assert!(matches!(ending, Ending::Broken(_)), "{ending:?}");
    }

    #[tokio::test]
    async fn nothing_is_read_while_the_pod_is_behind() {
        let mut pair = connected().await;
        let all = 3 * MAX_AHEAD;
        let one = event(3, b"x");
        pair.agent.write_all(&one.repeat(all)).await.unwrap();
        let mut seen = vec![0; one.len() * MAX_AHEAD];
        pair.client.read_exact(&mut seen).await.unwrap();
        let mut next = vec![0; one.len()];
        for _ in MAX_AHEAD..all {
            let behind = tokio::select! {
                biased;
                _ = pair.client.read_exact(&mut next) => false,
                () = tokio::task::yield_now() => true,
            };
            assert!(behind, "an event too many was read");
            let (ahead, client) = (Arc::clone(&pair.ahead), &mut pair.client);
            // The reader waits first, so the event that is taken has to wake it.
            let (read, ()) = tokio::join!(client.read_exact(&mut next), async {
                tokio::task::yield_now().await;
                ahead.taken();
            });
            read.unwrap();
        }
    }

    #[tokio::test]
    async fn an_agent_that_answers_nothing_is_cut_off_in_the_end() {
        let (client, mut agent) = duplex(1 << 20);
        let (mut client, _ahead, ended) = Guarded::new(client);
        let limit = u32::try_from(MAX_UNANSWERED).unwrap();
        for number in 0..limit {
            let call = frame(number, MESSAGE_TYPE_REQUEST, 0, b"");
            client.write_all(&call).await.unwrap();
        }
        // One that is answered makes room.
        agent.write_all(&answer(0, b"")).await.unwrap();
        client.read_exact(&mut [0; 10]).await.unwrap();
        let call = |number| frame(number, MESSAGE_TYPE_REQUEST, 0, b"");
        client.write_all(&call(limit)).await.unwrap();
        assert!(client.write_all(&call(limit + 1)).await.is_err());
        assert!(matches!(ended.await, Ok(Ending::Broken(_))));
    }

    proptest! {
        /// However the bytes are cut, the client sees whole frames of known calls only, and as many bytes
        /// as it would at once.
        #[test]
        fn no_bytes_of_an_agent_pass_unchecked(
            bytes in proptest::collection::vec(prop_oneof![
                Just(0_u8), Just(1), Just(2), Just(3), any::<u8>()
            ], 0..200),
            cut in 0..200_usize,
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            runtime.block_on(async {
                let (whole, ending) = read(&bytes).await;
                let mut pair = connected().await;
                let cut = cut.min(bytes.len());
                let (first, second) = bytes.split_at(cut);
                let (first, second) = (first.to_vec(), second.to_vec());
                let mut agent = pair.agent;
                let writer = tokio::spawn(async move {
                    let _ = agent.write_all(&first).await;
                    tokio::task::yield_now().await;
                    let _ = agent.write_all(&second).await;
                });
                let mut seen = Vec::new();
                let _ = pair.client.read_to_end(&mut seen).await;
                writer.await.unwrap();
                assert_eq!(seen, whole);
                assert!(bytes.starts_with(&seen));
                assert_eq!(pair.ended.await.unwrap(), ending);
            });
        }
    }
}
