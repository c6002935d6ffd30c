//! Threads for queue pairs that keep each other waiting.
//!
//! The device's worker serves the pairs of all interfaces, which costs no thread as long as one thread is enough: a driver
//! with a pair for each CPU seldom uses two at once. A pair that was found waiting, or that keeps others waiting, is lent to
//! a thread together with its tap, so that nobody else can touch either meanwhile. Once there has been nothing for a while
//! the thread ends, and the worker has both again. The threads are started by the worker, whose filter they inherit.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread::JoinHandle;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::EventFd;

use super::device::NAME;
use super::pair::{Pair, Rules, Stop};
use super::tap::Tap;
use crate::event::borrow_event;
use crate::virtio::{DeviceError, GuestMemory, Interrupt};

/// As it is seen among the threads of the VMM; the list of the jail's audit has it.
const THREAD: &str = "net-pair";

/// How long a thread without work stays.
pub const REST: Duration = Duration::from_secs(10);

/// A pair and its tap, and what it takes to move frames between the two.
pub struct Lent {
    pub tap: Tap,
    pub pair: Pair,
    pub rules: Rules,
    pub memory: GuestMemory,
    pub interrupt: Arc<dyn Interrupt>,
}

/// A thread that has a pair. Dropping it ends it.
pub struct PairThread {
    /// By it the worker has the thread end, and hears that it is at its end.
    call: Arc<EventFd>,
    thread: Option<JoinHandle<Option<Ended>>>,
}

/// What comes back, and whether the guest or the host did something wrong.
type Ended = (Lent, Result<(), DeviceError>);

/// What a thread waits on.
struct Waiting {
    call: Arc<EventFd>,
    receive: EventFd,
    transmit: EventFd,
    rest: PollTimeout,
}

/// What has come.
enum Came {
    /// Something for these directions.
    Frames { receive: bool, transmit: bool },
    /// The end: it was called, nothing has come for long, or the tap is gone, for a word of which the worker can wait.
    End,
}

impl PairThread {
    /// Lends a pair, for which nobody waits any more, to a thread of its own, which ends after so long a rest.
    ///
    /// # Errors
    /// What was to be lent, if the node gives no thread or descriptor.
    pub fn start(lent: Lent, rest: Duration) -> Result<Self, Box<Lent>> {
        let Ok((call, waiting)) = Waiting::new(&lent.pair, rest) else {
            return Err(Box::new(lent));
        };
        // By a channel, because what a thread that cannot be started was to own is lost with it.
        let (give, take) = channel::<Lent>();
        let started = std::thread::Builder::new()
            .name(THREAD.to_owned())
            .spawn(move || take.recv().ok().map(|lent| waiting.live(lent)));
        let Ok(thread) = started else {
            return Err(Box::new(lent));
        };
        match give.send(lent) {
            Ok(()) => Ok(Self {
                call,
                thread: Some(thread),
            }),
            Err(refused) => Err(Box::new(refused.0)),
        }
    }

    /// What is readable when it is at its end.
    pub fn call(&self) -> BorrowedFd<'_> {
        borrow_event(&self.call)
    }

    /// Whether it has called.
    pub fn has_called(&self) -> bool {
        self.call.read().is_ok()
    }

    /// Has it end, without waiting for it.
    pub fn stop(&self) {
        // A full counter is already readable.
        let _ = self.call.write(1);
    }

    /// Has it end and waits for that; what it was lent. None if it broke.
    pub fn end(mut self) -> Option<Ended> {
        self.stop();
        self.thread.take()?.join().ok()?
    }
}

impl Drop for PairThread {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.stop();
            let _ = thread.join();
        }
    }
}

impl Waiting {
    fn new(pair: &Pair, rest: Duration) -> io::Result<(Arc<EventFd>, Self)> {
        let call = Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?);
        let waiting = Self {
            call: Arc::clone(&call),
            receive: pair.receive.copy_of_kick()?,
            transmit: pair.transmit.copy_of_kick()?,
            rest: PollTimeout::try_from(rest).unwrap_or(PollTimeout::MAX),
        };
        Ok((call, waiting))
    }

    /// A thread's life.
    fn live(self, mut lent: Lent) -> Ended {
        let outcome = self.serve(&mut lent);
        let _ = self.call.write(1);
        (lent, outcome)
    }

    fn serve(&self, lent: &mut Lent) -> Result<(), DeviceError> {
        // As if both had stopped in the middle: what came before is looked at first.
        let (mut receive, mut transmit) = (Stop::Budget, Stop::Budget);
        loop {
            if receive == Stop::Budget {
                let memory = lent.memory.memory();
                let pair = &mut lent.pair;
                receive = pair.receive(&lent.tap, lent.rules, &memory, &*lent.interrupt)?;
            }
            if transmit == Stop::Budget {
                let memory = lent.memory.memory();
                let pair = &mut lent.pair;
                transmit = pair.transmit(&lent.tap, lent.rules, &memory, &*lent.interrupt)?;
            }
            match self.wait(lent, &receive, &transmit)? {
                Came::End => return Ok(()),
                Came::Frames {
                    receive: some_in,
                    transmit: some_out,
                } => {
                    if some_in {
                        receive = Stop::Budget;
                    }
                    if some_out {
                        transmit = Stop::Budget;
                    }
                }
            }
        }
    }

    /// Waits for what the two directions have stopped at; not at all if one of them has met its bound of work.
    fn wait(&self, lent: &Lent, receive: &Stop, transmit: &Stop) -> Result<Came, DeviceError> {
        let busy = [receive, transmit].contains(&&Stop::Budget);
        let patience = if busy { PollTimeout::ZERO } else { self.rest };
        let when = |stop: &Stop, at: Stop, flag| match *stop == at {
            true => flag,
            false => PollFlags::empty(),
        };
        let tap = when(receive, Stop::Tap, PollFlags::POLLIN)
            | when(transmit, Stop::Tap, PollFlags::POLLOUT);
        let kick = |stop| when(stop, Stop::Queue, PollFlags::POLLIN);
        let mut events = [
            PollFd::new(borrow_event(&self.call), PollFlags::POLLIN),
            PollFd::new(borrow_event(&self.receive), kick(receive)),
            PollFd::new(borrow_event(&self.transmit), kick(transmit)),
            PollFd::new(lent.tap.as_fd(), tap),
        ];
        match poll(&mut events, patience) {
            Ok(0) if !busy => return Ok(Came::End),
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(error) => {
                return Err(DeviceError::Host {
                    device: NAME,
                    source: error.into(),
                });
            }
        }
        // After an error nothing has come: an interrupted poll writes none.
        let came = events.map(|event| event.revents().unwrap_or(PollFlags::empty()));
        let [call, kicked_in, kicked_out, tap] = came;
        // A tap that is gone would be so at each look.
        let gone = PollFlags::POLLERR | PollFlags::POLLHUP | PollFlags::POLLNVAL;
        if !call.is_empty() || tap.intersects(gone) {
            return Ok(Came::End);
        }
        if !kicked_in.is_empty() {
            lent.pair.receive.acknowledge();
        }
        if !kicked_out.is_empty() {
            lent.pair.transmit.acknowledge();
        }
        Ok(Came::Frames {
            receive: !kicked_in.is_empty() || tap.contains(PollFlags::POLLIN),
            transmit: !kicked_out.is_empty() || tap.contains(PollFlags::POLLOUT),
        })
    }
}
