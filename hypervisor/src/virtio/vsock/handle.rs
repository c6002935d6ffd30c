//! The device as other threads see it: open and close streams, hear of their end.
//!
//! Commands go through a bounded channel and an event that the device's worker waits for; the set
//! of live streams is shared, so that a limit or a number used twice is refused at once.

use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

pub use brig_agent_protocol::MAX_STREAMS;
/// The longest header of a stream in bytes.
pub const MAX_STREAM_HEADER: usize = 4096;
/// Commands that may wait for the worker. An open and a close for each stream fit.
const MAX_COMMANDS: usize = 2 * MAX_STREAMS + 64;

/// A stream to open.
#[derive(Debug)]
pub struct StreamParams {
    /// Its number, unique for the life of the VM.
    pub stream: u64,
    /// Guest port.
    pub port: u32,
    /// Bytes sent before any input, at most [`MAX_STREAM_HEADER`].
    pub header: Vec<u8>,
    /// Read until end of file and sent to the guest. None: sending ends after the header.
    pub input: Option<OwnedFd>,
    /// Receives what the guest sends. None: it is discarded.
    pub output: Option<OwnedFd>,
}

/// What the device reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VsockEvent {
    /// The agent's stream is open.
    AgentConnected,
    /// A stream has ended in both directions; its output is complete and closed.
    StreamClosed {
        /// Its number.
        stream: u64,
        /// It did not end in order: refused, reset by the guest, or closed by us.
        reset: bool,
    },
}

/// Why a stream was not opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum VsockError {
    /// The number is that of a live stream.
    #[error("stream {0} is open already")]
    InUse(u64),
    /// [`MAX_STREAMS`] are open.
    #[error("{MAX_STREAMS} streams are open, which is the limit of one VM")]
    Limit,
    /// The header is too long.
    #[error("a stream header of {0} bytes is over the limit of {MAX_STREAM_HEADER}")]
    Header(usize),
    /// The worker does not keep up, or the device is gone.
    #[error("the vsock device takes no commands")]
    Gone,
}

/// A command to the device.
#[derive(Debug)]
pub(super) enum Command {
    /// Open a stream.
    Open(StreamParams),
    /// Reset a stream.
    Close(u64),
}

/// The numbers of the live streams.
#[derive(Debug, Clone, Default)]
pub(super) struct Live(Arc<Mutex<HashSet<u64>>>);

impl Live {
    fn lock(&self) -> MutexGuard<'_, HashSet<u64>> {
        // A set of numbers is whole whatever its holder did.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, stream: u64) -> Result<(), VsockError> {
        let mut live = self.lock();
        if live.contains(&stream) {
            return Err(VsockError::InUse(stream));
        }
        if live.len() >= MAX_STREAMS {
            return Err(VsockError::Limit);
        }
        live.insert(stream);
        Ok(())
    }

    /// The stream has ended.
    pub fn remove(&self, stream: u64) {
        self.lock().remove(&stream);
    }
}

/// Opens and closes streams from any thread.
#[derive(Debug, Clone)]
pub struct VsockHandle {
    commands: SyncSender<Command>,
    wake: Option<Arc<EventFd>>,
    live: Live,
}

impl VsockHandle {
    pub(super) fn new(wake: Option<Arc<EventFd>>) -> (Self, Receiver<Command>, Live) {
        let (commands, receiver) = sync_channel(MAX_COMMANDS);
        let live = Live::default();
        let handle = Self {
            commands,
            wake,
            live: live.clone(),
        };
        (handle, receiver, live)
    }

    /// Opens a stream to a guest port; before the guest's driver is up it waits for it. Exactly one
    /// [`VsockEvent::StreamClosed`] follows a success.
    ///
    /// # Errors
    /// If the number is in use, a limit is met or the device is gone; then no event follows.
    pub fn open(&self, params: StreamParams) -> Result<(), VsockError> {
        if params.header.len() > MAX_STREAM_HEADER {
            return Err(VsockError::Header(params.header.len()));
        }
        let stream = params.stream;
        self.live.add(stream)?;
        self.send(Command::Open(params))
            .inspect_err(|_| self.live.remove(stream))
    }

    /// Resets a stream and drops what it holds. One that has ended already is left alone.
    pub fn close(&self, stream: u64) {
        // A stream of a device that is gone is closed.
        let _ = self.send(Command::Close(stream));
    }

    fn send(&self, command: Command) -> Result<(), VsockError> {
        let wake = self.wake.as_ref().ok_or(VsockError::Gone)?;
        match self.commands.try_send(command) {
            Ok(()) => {
                // It fails only when the counter is full, and then the worker is woken anyway.
                let _ = wake.write(1);
                Ok(())
            }
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => Err(VsockError::Gone),
        }
    }
}
