//! Output: from the pipe that the VMM fills to whoever is the stream's client, as far as its window allows.
//! One chunk is read ahead and no more, so a container without a client blocks on a full pipe, as on a FIFO
//! that nobody reads.

use std::io;
use std::os::fd::OwnedFd;

use rustix::pipe::{PipeFlags, pipe_with};
use tokio::net::unix::pipe::Receiver;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::connection::{Connection, Received};
use super::{CLOSING, Claim};

/// The most that is sent at once, in bytes: containerd reads with a buffer of this size, and of a larger message
/// it would count only that much, until it gave no window any more.
const CHUNK: usize = 32 << 10;
/// An output's pump, as long as this is there.
#[derive(Debug)]
pub struct Output {
    _stop: oneshot::Sender<()>,
}

impl Output {
    /// Starts it: the pipe's other end for the VMM, and what ends when everything has been delivered.
    ///
    /// # Errors
    /// When the host has no pipe.
    pub fn start(claim: Claim) -> io::Result<(Self, OwnedFd, JoinHandle<()>)> {
        let (source, given) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        let mut pump = Pump {
            source: Receiver::from_owned_fd(source)?,
            claim,
            client: None,
            unsent: Vec::new(),
        };
        let (stop, mut stopped) = oneshot::channel();
        let done = tokio::spawn(async move {
            tokio::select! {
                biased;
                () = pump.run() => {}
                _ = &mut stopped => {
                    if let Some(client) = pump.client.take() {
                        client.end_now();
                    }
                }
            }
        });
        Ok((Self { _stop: stop }, given, done))
    }
}

struct Pump {
    source: Receiver,
    claim: Claim,
    client: Option<Connection>,
    /// Read from the pipe and with no client yet.
    unsent: Vec<u8>,
}

enum Step {
    Client(Connection),
    Received(Received),
    Readable,
}

impl Pump {
    async fn run(&mut self) {
        loop {
            if !self.unsent.is_empty() && self.window() > 0 {
                self.send().await;
                continue;
            }
            match self.step().await {
                Step::Client(client) => self.client = Some(client),
                Step::Received(Received::Window) => {}
                // A client of an output has nothing to say but its window.
                Step::Received(Received::Data(_) | Received::End) => self.client = None,
                Step::Readable => {
                    if self.read() {
                        break;
                    }
                }
            }
        }
        // All is delivered, and a client that comes later is told the end alone.
        if let Some(client) = self.client.take() {
            client.end(CLOSING).await;
        }
    }

    fn window(&self) -> usize {
        let window = self.client.as_ref().map_or(0, Connection::window);
        usize::try_from(window).unwrap_or(usize::MAX)
    }

    async fn step(&mut self) -> Step {
        let reading = self.unsent.is_empty();
        let Some(client) = &mut self.client else {
            return tokio::select! {
                biased;
                client = self.claim.client() => Step::Client(client),
                _ = self.source.readable(), if reading => Step::Readable,
            };
        };
        tokio::select! {
            biased;
            received = client.receive() => Step::Received(received),
            client = self.claim.client() => Step::Client(client),
            _ = self.source.readable(), if reading => Step::Readable,
        }
    }

    /// Reads the next chunk; true at the end.
    fn read(&mut self) -> bool {
        let mut chunk = vec![0; CHUNK];
        match self.source.try_read(&mut chunk) {
            Ok(0) => return true,
            Ok(read) => {
                chunk.truncate(read);
                self.unsent = chunk;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => return true,
        }
        false
    }

    async fn send(&mut self) {
        let length = self.window().min(self.unsent.len());
        let (Some(client), Some(now)) = (&mut self.client, self.unsent.get(..length)) else {
            return;
        };
        if client.send(now).await.is_ok() {
            self.unsent.drain(..length);
            if self.unsent.is_empty() {
                // Idle streams cost nothing.
                self.unsent = Vec::new();
            }
        } else {
            self.client = None;
        }
    }
}
