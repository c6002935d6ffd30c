//! The connections of the shim's socket. What a connection begins with says whose it is: containerd's
//! streams, one a connection, go to [`Streams`]; all others to the ttrpc server.
//!
//! Who does not say in time what it is, is hung up on: containerd does at once.
//!
//! Counts the latter, because an answer and the end of its connection must not arrive together: containerd's
//! client may then see the end alone.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt as _, Stream, StreamExt as _};
use slog::{Logger, warn};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{oneshot, watch};
use tokio::time::{Sleep, sleep, timeout};

use crate::pod::stdio::streaming::wire::{self, Opening};
use crate::pod::stdio::streaming::{self, Streams};

/// Bytes read at once of a connection's beginning.
const READ: usize = 512;

/// How long a connection may take to say what it is. containerd may be stopped for a while after it has
/// dialled, and takes a pod whose connection breaks for dead.
const SILENCE: Duration = Duration::from_secs(300);
/// Connections that may be silent at once; beyond, the oldest is hung up on.
const MAX_SILENT: usize = 64;

/// How long nobody is accepted after that has failed: there may be a descriptor for it by then. The listener stays ready, so
/// that without a pause the thread would do nothing else.
const RECOVERY: Duration = Duration::from_millis(100);

/// Reads what a connection begins with; see [`begin`].
type Beginning = BoxFuture<'static, Option<(Vec<u8>, UnixStream)>>;

/// Accepted connections, each counted as long as it is open.
pub struct Connections {
    listener: UnixListener,
    open: watch::Sender<usize>,
    streams: Streams,
    /// Those that have not said what they are yet.
    beginning: FuturesUnordered<Beginning>,
    /// The end of one of these hangs up on its connection, unless that has begun. The oldest is first.
    silent: VecDeque<oneshot::Sender<()>>,
    /// Until it is over nobody is accepted.
    recovery: Option<Pin<Box<Sleep>>>,
    logger: Logger,
}

impl Connections {
    /// Counts the connections of this listener; the receiver has their number.
    pub fn of(
        listener: UnixListener,
        streams: Streams,
        logger: Logger,
    ) -> (Self, watch::Receiver<usize>) {
        let (open, count) = watch::channel(0);
        let connections = Self {
            listener,
            open,
            streams,
            beginning: FuturesUnordered::new(),
            silent: VecDeque::new(),
            recovery: None,
            logger,
        };
        (connections, count)
    }

    /// The next connection; after a failure only when the pause is over.
    fn poll_accept(&mut self, context: &mut Context<'_>) -> Poll<UnixStream> {
        loop {
            if let Some(recovery) = &mut self.recovery {
                ready!(recovery.poll_unpin(context));
                self.recovery = None;
            }
            match ready!(self.listener.poll_accept(context)) {
                Ok((stream, _)) => return Poll::Ready(stream),
                Err(error) => {
                    warn!(self.logger, "cannot accept a connection"; "error" => %error);
                    self.recovery = Some(Box::pin(sleep(RECOVERY)));
                }
            }
        }
    }
}

/// Reads what a connection begins with; a stream goes its way, any other connection comes back with what was
/// read of it.
async fn begin(mut stream: UnixStream, streams: Streams) -> Option<(Vec<u8>, UnixStream)> {
    let mut read = Vec::new();
    loop {
        match wire::opening(&read) {
            Opening::Unclear => {}
            Opening::Other => return Some((read, stream)),
            Opening::Stream(number, length, first) => {
                let mut rest = read.split_off(length);
                if !first.is_empty() {
                    rest = [wire::message_frame(number, &first), rest].concat();
                }
                streams.admit(streaming::Connection::new(stream, number, rest));
                return None;
            }
        }
        read.reserve(READ);
        match stream.read_buf(&mut read).await {
            Ok(1..) => {}
            Ok(0) | Err(_) => return None,
        }
    }
}

/// As [`begin`], within its time, and until `hung_up` ends.
async fn begin_in_time(
    stream: UnixStream,
    streams: Streams,
    hung_up: oneshot::Receiver<()>,
) -> Option<(Vec<u8>, UnixStream)> {
    tokio::select! {
        biased;
        begun = timeout(SILENCE, begin(stream, streams)) => begun.ok().flatten(),
        _ = hung_up => None,
    }
}

impl Stream for Connections {
    type Item = io::Result<Connection>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        while let Poll::Ready(stream) = self.poll_accept(context) {
            let (silent, hung_up) = oneshot::channel();
            self.silent.retain(|silent| !silent.is_closed());
            self.silent.push_back(silent);
            if self.silent.len() > MAX_SILENT {
                self.silent.pop_front();
            }
            let beginning = begin_in_time(stream, self.streams.clone(), hung_up);
            self.beginning.push(Box::pin(beginning));
        }
        loop {
            match ready!(self.beginning.poll_next_unpin(context)) {
                Some(Some((read, stream))) => {
                    self.open.send_modify(|count| *count += 1);
                    return Poll::Ready(Some(Ok(Connection {
                        stream,
                        read,
                        open: self.open.clone(),
                    })));
                }
                Some(None) => {}
                // The listener wakes us, or the end of the pause.
                None => return Poll::Pending,
            }
        }
    }
}

/// One connection.
pub struct Connection {
    stream: UnixStream,
    /// Its beginning, until that has been read again.
    read: Vec<u8>,
    open: watch::Sender<usize>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.open.send_modify(|count| *count -= 1);
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if !self.read.is_empty() {
            let length = self.read.len().min(buffer.remaining());
            let rest = self.read.split_off(length);
            buffer.put_slice(&std::mem::replace(&mut self.read, rest));
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
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
    use tokio::io::AsyncWriteExt as _;

    fn of(listener: UnixListener) -> (Connections, watch::Receiver<usize>) {
        let logger = Logger::root(slog::Discard, slog::o!());
        Connections::of(listener, Streams::default(), logger)
    }

    #[tokio::test]
    async fn a_connection_counts_from_its_first_frame_until_it_is_closed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let (mut connections, mut count) = of(listener);
        let mut clients = [
            UnixStream::connect(&path).await.unwrap(),
            UnixStream::connect(&path).await.unwrap(),
        ];
        // A frame that is no request, twice: whatever was read ahead is read again.
        for client in &mut clients {
            client.write_all(&[7; 25]).await.unwrap();
        }
        let mut first = connections.next().await.unwrap().unwrap();
        let mut again = [0; 25];
        first.read_exact(&mut again).await.unwrap();
        assert_eq!(again, [7; 25]);
        let second = connections.next().await.unwrap().unwrap();
        assert_eq!(*count.borrow(), 2);
        drop((first, second));
        count.wait_for(|count| *count == 0).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn after_a_failure_to_accept_there_is_a_pause() {
        // A socket that does not listen: always ready, and accept always fails.
        let socket = rustix::net::socket(
            rustix::net::AddressFamily::UNIX,
            rustix::net::SocketType::STREAM,
            None,
        );
        let listener = std::os::unix::net::UnixListener::from(socket.unwrap());
        listener.set_nonblocking(true).unwrap();
        let listener = UnixListener::from_std(listener).unwrap();
        let (mut connections, _count) = of(listener);
        let mut polls = 0;
        let accepted = std::future::poll_fn(|context| {
            polls += 1;
            connections.poll_next_unpin(context)
        });
        assert!(timeout(10 * RECOVERY, accepted).await.is_err());
        assert!((2..=22).contains(&polls), "{polls} polls");
    }

    async fn is_hung_up(client: &mut UnixStream) -> bool {
        matches!(client.read(&mut [0; 1]).await, Ok(0) | Err(_))
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_says_nothing_is_hung_up_on_in_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let (mut connections, _count) = of(listener);
        let serving = tokio::spawn(async move { connections.next().await.is_some() });
        let mut silent = UnixStream::connect(&path).await.unwrap();
        let mut slow = UnixStream::connect(&path).await.unwrap();
        // The beginning of a ttrpc header, and no more.
        slow.write_all(&[0; 4]).await.unwrap();
        let before = tokio::time::Instant::now();
        assert!(is_hung_up(&mut silent).await && is_hung_up(&mut slow).await);
        assert!(before.elapsed() >= SILENCE);
        let mut talks = UnixStream::connect(&path).await.unwrap();
        talks.write_all(&[7; 25]).await.unwrap();
        assert!(serving.await.unwrap());
    }

    #[tokio::test]
    async fn the_oldest_of_too_many_silent_connections_is_hung_up_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let (mut connections, _count) = of(listener);
        let serving = tokio::spawn(async move { connections.next().await.is_some() });
        let mut oldest = UnixStream::connect(&path).await.unwrap();
        let mut others = Vec::new();
        for _ in 0..MAX_SILENT {
            others.push(UnixStream::connect(&path).await.unwrap());
            tokio::task::yield_now().await;
        }
        assert!(is_hung_up(&mut oldest).await);
        others[0].write_all(&[7; 25]).await.unwrap();
        assert!(serving.await.unwrap(), "the second oldest is served");
    }
}
