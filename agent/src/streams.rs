//! Streams between the host and the agent: the log, the stdio of processes, forwarded ports.
//!
//! The host opens each one (vsock port STREAM_PORT, or a Unix socket in component tests) and names
//! it by eight bytes. Only the host's context id is accepted: any container can open AF_VSOCK, and
//! none of them may speak here.
use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use brig_agent_protocol::{FIRST_PROCESS_STREAM, HOST_CID, LOG_STREAM, MAX_STREAMS, STREAM_PORT};
use tokio::{io::AsyncReadExt as _, net::UnixListener, sync::oneshot, time::timeout};
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener};

use crate::{
    error::{Error, Result},
    log::LogRing,
    stream::Stream,
    sync::lock,
};

/// How long a peer may take to send the header.
const HEADER_TIME: Duration = Duration::from_secs(10);
/// How long a process waits for its streams, and a stream for its process.
const MEET_TIME: Duration = Duration::from_secs(30);
/// Streams that may wait for their process: all that there can be. The host opens those of a process before it asks for it,
/// and asks for many processes at once.
const MAX_UNCLAIMED: usize = MAX_STREAMS;

enum Slot {
    Wanted(oneshot::Sender<Stream>),
    Arrived(Stream),
}

/// Where arriving streams meet the processes that wait for them. Cheap to clone.
#[derive(Clone, Default)]
pub struct Streams {
    slots: Arc<Mutex<HashMap<u64, Slot>>>,
}

impl Streams {
    fn slots(&self) -> MutexGuard<'_, HashMap<u64, Slot>> {
        lock(&self.slots)
    }

    /// Hands over the stream `number`, waiting for the host to open it.
    ///
    /// # Errors
    /// `InvalidArgument` for a number that is reserved or asked for twice, `DeadlineExceeded`
    /// when the host does not open it in time.
    pub async fn take(&self, number: u64) -> Result<Stream> {
        if number < FIRST_PROCESS_STREAM {
            return Err(Error::InvalidArgument(format!(
                "stream {number} is reserved; process streams start at {FIRST_PROCESS_STREAM}"
            )));
        }
        let arrival = {
            let mut slots = self.slots();
            match slots.remove(&number) {
                Some(Slot::Arrived(stream)) => return Ok(stream),
                Some(wanted @ Slot::Wanted(_)) => {
                    slots.insert(number, wanted);
                    return Err(Error::InvalidArgument(format!(
                        "stream {number} is already waited for"
                    )));
                }
                None => {
                    let (tx, rx) = oneshot::channel();
                    slots.insert(number, Slot::Wanted(tx));
                    rx
                }
            }
        };
        match timeout(MEET_TIME, arrival).await {
            Ok(Ok(stream)) => Ok(stream),
            _ => {
                self.slots().remove(&number);
                Err(Error::DeadlineExceeded(format!(
                    "the host did not open stream {number} within {} s",
                    MEET_TIME.as_secs()
                )))
            }
        }
    }

    /// Reads the header of a fresh connection and puts the stream where it is waited for.
    async fn place(&self, mut stream: Stream, log: &LogRing, logger: &slog::Logger) {
        let mut header = [0; 8];
        match timeout(HEADER_TIME, stream.read_exact(&mut header)).await {
            Ok(Ok(_)) => {}
            _ => {
                slog::warn!(logger, "stream dropped: no header");
                return;
            }
        }
        let number = u64::from_le_bytes(header);
        if number == LOG_STREAM {
            // A second log stream competes for lines with the first until that one fails.
            let _ = log.drain_to(stream).await;
            return;
        }
        {
            let mut slots = self.slots();
            match slots.remove(&number) {
                Some(Slot::Wanted(tx)) => {
                    let _ = tx.send(stream);
                    return;
                }
                Some(first @ Slot::Arrived(_)) => {
                    slots.insert(number, first);
                    slog::warn!(logger, "stream dropped: number in use"; "stream" => number);
                    return;
                }
                None if slots.len() >= MAX_UNCLAIMED => {
                    slog::warn!(logger, "stream dropped: too many wait"; "stream" => number);
                    return;
                }
                None => slots.insert(number, Slot::Arrived(stream)),
            };
        }
        tokio::time::sleep(MEET_TIME).await;
        let mut slots = self.slots();
        // A later waiter under the same number keeps its slot.
        if matches!(slots.get(&number), Some(Slot::Arrived(_))) {
            slots.remove(&number);
        }
    }

    fn spawn_place(&self, stream: Stream, log: &LogRing, logger: &slog::Logger) {
        let (this, log, logger) = (self.clone(), log.clone(), logger.clone());
        tokio::spawn(async move { this.place(stream, &log, &logger).await });
    }

    /// Accepts streams from the host over vsock for ever.
    pub async fn serve_vsock(self, listener: VsockListener, log: LogRing, logger: slog::Logger) {
        loop {
            match listener.accept().await {
                Ok((stream, peer)) if peer.cid() == HOST_CID => {
                    self.spawn_place(Stream::Vsock(stream), &log, &logger);
                }
                Ok((_, peer)) => slog::warn!(logger, "stream refused"; "cid" => peer.cid()),
                Err(error) => {
                    slog::error!(logger, "cannot accept a stream"; "error" => %error);
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    /// Accepts streams over a Unix socket for ever.
    pub async fn serve_unix(self, listener: UnixListener, log: LogRing, logger: slog::Logger) {
        while let Ok((stream, _)) = listener.accept().await {
            self.spawn_place(Stream::Unix(stream), &log, &logger);
        }
    }
}

/// The vsock listener for streams.
///
/// # Errors
/// When the guest has no vsock device.
pub fn listen_vsock() -> io::Result<VsockListener> {
    let listener = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, STREAM_PORT))?;
    // It has come with a backlog of 128, and the kernel resets what does not fit. Less than `net.core.somaxconn` at boot.
    let all = i32::try_from(MAX_STREAMS).unwrap_or(i32::MAX);
    rustix::net::listen(&listener, all)?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::{io::AsyncWriteExt as _, net::UnixStream};

    fn setup() -> (Streams, LogRing, slog::Logger) {
        let log = LogRing::new(false);
        let logger = log.logger();
        (Streams::default(), log, logger)
    }

    #[tokio::test]
    async fn a_stream_meets_its_taker_in_either_order() {
        let (streams, log, logger) = setup();
        for early in [true, false] {
            let (mut host, guest) = UnixStream::pair().unwrap();
            host.write_all(&20_u64.to_le_bytes()).await.unwrap();
            host.write_all(b"x").await.unwrap();
            let taker = {
                let streams = streams.clone();
                async move { streams.take(20).await.unwrap() }
            };
            let mut got = if early {
                streams.spawn_place(Stream::Unix(guest), &log, &logger);
                tokio::task::yield_now().await;
                taker.await
            } else {
                let task = tokio::spawn(taker);
                tokio::task::yield_now().await;
                streams.spawn_place(Stream::Unix(guest), &log, &logger);
                task.await.unwrap()
            };
            let mut byte = [0];
            got.read_exact(&mut byte).await.unwrap();
            assert_eq!(&byte, b"x");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_that_never_comes_is_a_deadline_and_reserved_numbers_are_refused() {
        let (streams, ..) = setup();
        assert!(matches!(
            streams.take(99).await,
            Err(Error::DeadlineExceeded(_))
        ));
        assert!(streams.slots().is_empty());
        assert!(matches!(
            streams.take(1).await,
            Err(Error::InvalidArgument(_))
        ));
    }

    #[tokio::test]
    async fn unclaimed_streams_are_bounded() {
        let (streams, log, logger) = setup();
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
        let most = rustix::process::Rlimit {
            current: limit.maximum,
            ..limit
        };
        // Both ends are here.
        rustix::process::setrlimit(rustix::process::Resource::Nofile, most).unwrap();
        let mut hosts = Vec::new();
        for n in 0..MAX_UNCLAIMED as u64 + 5 {
            let (mut host, guest) = UnixStream::pair().unwrap();
            host.write_all(&(FIRST_PROCESS_STREAM + n).to_le_bytes())
                .await
                .unwrap();
            streams.spawn_place(Stream::Unix(guest), &log, &logger);
            hosts.push(host);
        }
        let mut ends = tokio::task::JoinSet::new();
        for mut host in hosts {
            ends.spawn(async move { host.read(&mut [0]).await });
        }
        for _ in 0..5 {
            assert_eq!(ends.join_next().await.unwrap().unwrap().unwrap(), 0);
        }
        // The others wait to be claimed.
        assert_eq!(streams.slots().len(), MAX_UNCLAIMED);
        assert_eq!(ends.len(), MAX_UNCLAIMED);
    }
}
