//! What CPU and device threads tell the main thread, and the clock of boot marks.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Instant;

use vmm_sys_util::eventfd::EventFd;

use crate::template::cpu::CpuState;
use crate::virtio::vsock::VsockEvent;

/// The clock that boot marks are read from: microseconds since brig-vmm was executed.
#[derive(Clone, Copy, Debug)]
pub struct Clock(Instant);

impl Clock {
    /// Starts now. To be called first in `main`.
    #[must_use]
    pub fn start() -> Self {
        Self(Instant::now())
    }

    /// Microseconds.
    #[must_use]
    pub fn micros(&self) -> u64 {
        u64::try_from(self.0.elapsed().as_micros()).unwrap_or(u64::MAX)
    }
}

/// Something the main thread must act on.
#[derive(Debug)]
pub enum Notice {
    /// The guest wrote a boot mark.
    Mark {
        /// The byte.
        mark: u8,
        /// When.
        micros: u64,
    },
    /// A line of the guest's console.
    Console(String),
    /// The file server's descriptors run short.
    SharePressure,
    /// The device for a function has been made ready, or cannot be.
    Prepared(u8),
    /// The device of a function that was unplugged has let go of all that it had.
    Removed(u8),
    /// The guest is where it is to be captured, and waits for its devices to be taken away.
    Still,
    /// And this is its CPU.
    Captured(Box<CpuState>),
    /// This CPU has met a breakpoint, or made its step.
    Met(u8),
    /// The VM is at its end.
    Ended(Ended),
    /// From the vsock device, and when.
    Vsock(VsockEvent, u64),
}

/// Why the VM ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// One of [`crate::control::exit`].
    pub code: i32,
    /// One sentence for the log.
    pub reason: String,
}

/// Sends notices and wakes the main thread.
#[derive(Clone)]
pub struct Notifier {
    sender: Sender<Notice>,
    wake: Arc<EventFd>,
    clock: Clock,
}

impl Notifier {
    /// A notifier, what it sends to, and the event that says there is something.
    ///
    /// # Errors
    /// If the host gives no eventfd.
    pub fn new(clock: Clock) -> io::Result<(Self, Receiver<Notice>, Arc<EventFd>)> {
        let (sender, receiver) = channel();
        let wake = Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?);
        let notifier = Self {
            sender,
            wake: Arc::clone(&wake),
            clock,
        };
        Ok((notifier, receiver, wake))
    }

    /// Sends a notice. When the main thread is gone the process is ending.
    pub fn send(&self, notice: Notice) {
        if self.sender.send(notice).is_ok() {
            // A full counter has woken the main thread already.
            let _ = self.wake.write(1);
        }
    }

    /// Ends the VM.
    pub fn end(&self, code: i32, reason: impl Into<String>) {
        self.send(Notice::Ended(Ended {
            code,
            reason: reason.into(),
        }));
    }

    /// Microseconds since brig-vmm was executed.
    #[must_use]
    pub fn micros(&self) -> u64 {
        self.clock.micros()
    }
}

/// Makes the descriptor table large at once, while the process has one thread: growing it later
/// waits for an RCU grace period (30 to 70 ms, research/vmm.md trap b).
pub fn presize_descriptor_table() {
    const ENTRIES: libc::c_int = 1023;
    // SAFETY: F_DUPFD makes a new descriptor, which is closed at once; failure is harmless.
    unsafe {
        let fd = libc::fcntl(0, libc::F_DUPFD_CLOEXEC, ENTRIES);
        if fd >= 0 {
            libc::close(fd);
        }
    }
}
