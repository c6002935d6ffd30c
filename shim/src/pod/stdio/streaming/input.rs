//! Standard input: from the stream's client to the pipe that the VMM empties. The client has leave to send
//! one window, and gets more as the pipe takes it; so a guest that does not read blocks the client.
//!
//! The end of a client is not the end of input, which is CloseIO's: a restarted containerd goes on writing.
//! After CloseIO the end comes when the client has closed its side too, as with a FIFO's two writers.

use std::io;
use std::os::fd::OwnedFd;

use rustix::pipe::{PipeFlags, pipe_with};
use tokio::net::unix::pipe::Sender;
use tokio::sync::watch;

use super::Claim;
use super::connection::{Connection, Received};

/// Bytes that a client may send ahead: as many as containerd lets us send ahead of output.
pub(super) const WINDOW: u32 = 64 << 10;

/// What is to become of the input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Open,
    /// CloseIO came.
    Closing,
}

/// Standard input's pump, as long as this is there.
#[derive(Debug)]
pub struct Input {
    fate: watch::Sender<Fate>,
}

impl Input {
    /// Starts it: the pipe's other end for the VMM.
    ///
    /// # Errors
    /// When the host has no pipe.
    pub fn start(claim: Claim) -> io::Result<(Self, OwnedFd)> {
        let (given, sink) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        let (fate, told) = watch::channel(Fate::Open);
        let mut stopped = told.clone();
        let mut pump = Pump {
            sink: Some(Sender::from_owned_fd(sink)?),
            claim,
            told,
            client: None,
            leave: 0,
            taken: 0,
            pending: Vec::new(),
        };
        tokio::spawn(async move {
            let dropped = async { while stopped.changed().await.is_ok() {} };
            tokio::select! {
                biased;
                () = pump.run() => {}
                () = dropped => {}
            }
            if let Some(client) = pump.client.take() {
                client.end_now();
            }
        });
        Ok((Self { fate }, given))
    }

    /// CloseIO: end of file comes once the client has closed its side.
    pub fn close(&self) {
        self.fate.send_replace(Fate::Closing);
    }
}

struct Pump {
    /// None once the guest takes no more.
    sink: Option<Sender>,
    claim: Claim,
    told: watch::Receiver<Fate>,
    client: Option<Connection>,
    /// Bytes that the client may send.
    leave: u32,
    /// Bytes that the pipe took and the client has had no new leave for.
    taken: u32,
    /// From the client and not in the pipe yet.
    pending: Vec<u8>,
}

enum Step {
    Client(Connection),
    Received(Received),
    Writable,
    Fate,
}

impl Pump {
    /// Returns at the end of input.
    async fn run(&mut self) {
        loop {
            let closing = *self.told.borrow() == Fate::Closing;
            if closing && self.client.is_none() && self.pending.is_empty() {
                return;
            }
            match self.step().await {
                Step::Client(client) => {
                    self.client = Some(client);
                    (self.leave, self.taken) = (0, WINDOW);
                    self.grant().await;
                }
                Step::Received(Received::Data(bytes)) => self.received(bytes).await,
                Step::Received(Received::Window) | Step::Fate => {}
                Step::Received(Received::End) => self.client = None,
                Step::Writable => self.write().await,
            }
        }
    }

    async fn step(&mut self) -> Step {
        if let (false, Some(sink)) = (self.pending.is_empty(), &self.sink) {
            let _ = sink.writable().await;
            return Step::Writable;
        }
        let changed = async {
            if self.told.changed().await.is_err() {
                // The pump is being stopped.
                std::future::pending::<()>().await;
            }
        };
        let Some(client) = &mut self.client else {
            return tokio::select! {
                biased;
                client = self.claim.client() => Step::Client(client),
                () = changed => Step::Fate,
            };
        };
        // The older client first: what it sent before it went comes before what its successor sends.
        tokio::select! {
            biased;
            received = client.receive() => Step::Received(received),
            client = self.claim.client() => Step::Client(client),
            () = changed => Step::Fate,
        }
    }

    async fn received(&mut self, bytes: Vec<u8>) {
        let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        let Some(leave) = self.leave.checked_sub(length) else {
            // More than it may: it does not keep to the protocol.
            self.client = None;
            return;
        };
        self.leave = leave;
        if self.sink.is_some() {
            self.pending = bytes;
        } else {
            self.count(length).await;
        }
    }

    async fn write(&mut self) {
        let Some(sink) = &self.sink else { return };
        match sink.try_write(&self.pending) {
            Ok(written) => {
                self.pending.drain(..written);
                self.count(u32::try_from(written).unwrap_or(u32::MAX)).await;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => {
                // The process has closed its standard input: what comes is thrown away.
                let length = u32::try_from(self.pending.len()).unwrap_or(u32::MAX);
                (self.sink, self.pending) = (None, Vec::new());
                self.count(length).await;
            }
        }
    }

    /// So many bytes have gone.
    async fn count(&mut self, length: u32) {
        self.taken = self.taken.saturating_add(length);
        // Not for each key that somebody types.
        if self.taken >= WINDOW / 2 {
            self.grant().await;
        }
    }

    async fn grant(&mut self) {
        let more = std::mem::take(&mut self.taken);
        // One that has gone is met again where it is read, behind the last of what it sent.
        if let Some(client) = &mut self.client
            && client.grant(more).await.is_ok()
        {
            self.leave = self.leave.saturating_add(more);
        }
    }
}
