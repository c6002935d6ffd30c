//! The queue and who serves it. Reads of what the node has in memory are done by the device's worker, at once; everything
//! else may take as long as the disk takes, and is handed to helpers, so that a slow request holds nobody up.
//!
//! The worker alone takes requests from the queue, and goes on to the next when it has handed one over; helpers return
//! theirs. A request is read once more by who does it: what the worker saw of it decides nothing then.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use vm_memory::{GuestAddressSpace, GuestMemoryMmap};

use super::backend::Backend;
use super::request::{Limits, Operation, Request, Status};
use crate::sync::lock;
use crate::virtio::chain::{Buffers, Chain};
use crate::virtio::helpers::Helpers;
use crate::virtio::ring::{Descriptors, Ring};
use crate::virtio::{DeviceError, GuestMemory, Interrupt, Sources};

/// Name in errors.
pub const NAME: &str = "block";
/// Requests per event.
const BUDGET: usize = 32;

/// A disk and its queue.
pub struct Service {
    backend: Backend,
    readonly: bool,
    sectors: AtomicU64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    active: Option<Active>,
    /// What a helper met; the worker tells.
    failure: Option<DeviceError>,
}

/// The queue and what belongs to it.
pub struct Active {
    /// Guest RAM.
    pub memory: GuestMemory,
    /// How to interrupt the driver.
    pub interrupt: Arc<dyn Interrupt>,
    /// The requests.
    pub ring: Ring,
}

/// A request for a helper.
pub struct Job {
    memory: Arc<GuestMemoryMmap>,
    descriptors: Descriptors,
}

/// What became of a request that may be done at once.
enum Tried {
    /// Done: its head and the bytes written.
    Done(u16, u32),
    /// It takes its time.
    Later,
}

impl Service {
    /// A disk without a queue.
    pub fn new(backend: Backend, limits: Limits) -> Self {
        Self {
            backend,
            readonly: limits.readonly,
            sectors: AtomicU64::new(limits.sectors),
            state: Mutex::default(),
        }
    }

    /// A flush waits at the gate.
    #[cfg(test)]
    pub fn set_gate(&mut self, gate: Arc<std::sync::Barrier>) {
        self.backend.gate = Some(gate);
    }

    /// What is behind the disk.
    pub fn backend(&self) -> &Backend {
        &self.backend
    }

    /// What the disk allows now.
    pub fn limits(&self) -> Limits {
        Limits {
            sectors: self.sectors.load(Ordering::SeqCst),
            readonly: self.readonly,
        }
    }

    /// The disk has another size, in sectors; tells the driver.
    pub fn resize(&self, sectors: u64) -> Result<(), DeviceError> {
        self.sectors.store(sectors, Ordering::SeqCst);
        match &lock(&self.state).active {
            Some(active) => active
                .interrupt
                .config()
                .map_err(|source| DeviceError::Host {
                    device: NAME,
                    source,
                }),
            None => Ok(()),
        }
    }

    /// Takes the queue.
    pub fn activate(&self, active: Active) {
        *lock(&self.state) = State {
            active: Some(active),
            failure: None,
        };
    }

    /// Gives the queue up. No helper is at work.
    pub fn deactivate(&self, sources: &mut Sources<'_>) {
        if let Some(active) = lock(&self.state).active.take() {
            active.ring.release(sources);
        }
    }

    /// Serves a kick. On the worker's thread, which does everything if there are no helpers.
    ///
    /// # Errors
    /// What the guest or the host did wrong, also towards a helper.
    pub fn serve(&self, helpers: Option<&Helpers<Job>>) -> Result<(), DeviceError> {
        let mut guard = lock(&self.state);
        if let Some(failure) = guard.failure.take() {
            return Err(failure);
        }
        let Some(active) = guard.active.as_mut() else {
            return Ok(());
        };
        let memory = active.memory.memory().into_inner();
        active.ring.acknowledge();
        for _ in 0..BUDGET {
            match active.ring.pop_descriptors(&memory)? {
                Some(descriptors) => {
                    let done = self.do_or_hand_over(&memory, descriptors, helpers, &active.ring)?;
                    if let Some((head, written)) = done {
                        active.ring.push(&memory, head, written)?;
                    }
                }
                None if active.ring.enable_kick(&memory)? => {}
                None => return active.ring.notify(&memory, &*active.interrupt),
            }
        }
        active.ring.call_again()?;
        active.ring.notify(&memory, &*active.interrupt)
    }

    /// The head of what is done and the bytes written; `None` if a helper does it.
    fn do_or_hand_over(
        &self,
        memory: &Arc<GuestMemoryMmap>,
        descriptors: Descriptors,
        helpers: Option<&Helpers<Job>>,
        ring: &Ring,
    ) -> Result<Option<(u16, u32)>, DeviceError> {
        let Some(helpers) = helpers else {
            return self.complete(memory, descriptors).map(Some);
        };
        if let Tried::Done(head, written) = self.attempt(memory, descriptors.clone())? {
            return Ok(Some((head, written)));
        }
        // No driver has more requests than descriptors.
        if helpers.waiting() >= usize::from(ring.size()) {
            return Err(ring.guest("more requests at once than the queue has descriptors"));
        }
        let job = Job {
            memory: Arc::clone(memory),
            descriptors,
        };
        match helpers.submit(0, job) {
            Ok(()) => Ok(None),
            // The node gives no thread.
            Err(job) => self.complete(memory, job.descriptors).map(Some),
        }
    }

    /// A helper's work.
    pub fn help(&self, job: Job) {
        let outcome = self.complete(&job.memory, job.descriptors);
        let mut state = lock(&self.state);
        let Some(active) = state.active.as_mut() else {
            return;
        };
        let returned = outcome.and_then(|(head, written)| {
            active.ring.push(&job.memory, head, written)?;
            active.ring.notify(&job.memory, &*active.interrupt)
        });
        if let Err(failure) = returned {
            // The worker is called to hear of it. If that fails, the guest's next kick does it.
            let _ = active.ring.call_again();
            state.failure = Some(failure);
        }
    }

    fn parse<'m>(
        &self,
        memory: &'m GuestMemoryMmap,
        descriptors: Descriptors,
    ) -> Result<Request<'m>, DeviceError> {
        let wrong = |reason: String| DeviceError::Guest {
            device: NAME,
            reason,
        };
        let chain = Chain::parse(descriptors, memory).map_err(|error| wrong(error.to_string()))?;
        Request::parse(chain, self.limits())
            .map_err(|_| wrong("a request has no status byte".to_owned()))
    }

    /// Does what needs no waiting.
    fn attempt(
        &self,
        memory: &GuestMemoryMmap,
        descriptors: Descriptors,
    ) -> Result<Tried, DeviceError> {
        let Request {
            head,
            operation,
            writable,
            status,
            ..
        } = self.parse(memory, descriptors)?;
        let done = match operation {
            Ok(Operation::Read(offset)) => {
                let length = writable.len();
                if !self.backend.read_at_once(offset, writable) {
                    return Ok(Tried::Later);
                }
                (Status::Ok, length)
            }
            Ok(_) => return Ok(Tried::Later),
            Err(status) => (status, 0),
        };
        let (head, written) = end(head, status, done);
        Ok(Tried::Done(head, written))
    }

    /// Runs a request to its end; the head of its chain and the bytes written.
    fn complete(
        &self,
        memory: &GuestMemoryMmap,
        descriptors: Descriptors,
    ) -> Result<(u16, u32), DeviceError> {
        let Request {
            head,
            operation,
            readable,
            writable,
            status,
        } = self.parse(memory, descriptors)?;
        let done = match operation {
            Ok(operation) => self.backend.run(&operation, readable, writable),
            Err(status) => (status, 0),
        };
        Ok(end(head, status, done))
    }
}

/// Writes a request's status.
fn end(head: u16, mut place: Buffers<'_>, (status, written): (Status, usize)) -> (u16, u32) {
    place.copy_from(&[match status {
        Status::Ok => 0,
        Status::IoError => 1,
        Status::Unsupported => 2,
    }]);
    // Bounded by the largest request.
    (head, u32::try_from(written + 1).unwrap_or(1))
}
