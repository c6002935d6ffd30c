//! The queues and who serves them. Reads of what the node has in memory are done at once by the thread that serves the
//! queue; everything else may take as long as the disk takes, and is handed to helpers, so that a slow request holds
//! nobody up.
//!
//! One thread alone takes requests from a queue (the device's worker, or one that [`super::queue_thread`] has started), and
//! goes on to the next when it has handed one over; helpers return theirs. A request is read once more by who does it:
//! what was seen of it before decides nothing then.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

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

/// A disk and its queues.
pub struct Service {
    backend: Backend,
    readonly: bool,
    sectors: AtomicU64,
    /// By index; none where the driver has enabled none.
    queues: Vec<Mutex<Option<Active>>>,
    /// Descriptors of all queues that are active.
    descriptors: AtomicUsize,
    /// The driver has given up what is being done.
    given_up: AtomicBool,
    /// What somebody met who is not the worker; the worker tells.
    failure: Mutex<Option<DeviceError>>,
}

/// A queue and what belongs to it.
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
    queue: u16,
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
    /// A disk with so many queues, none of which is active.
    pub fn new(backend: Backend, limits: Limits, queues: u16) -> Self {
        Self {
            backend,
            readonly: limits.readonly,
            sectors: AtomicU64::new(limits.sectors),
            queues: (0..queues).map(|_| Mutex::default()).collect(),
            descriptors: AtomicUsize::new(0),
            given_up: AtomicBool::new(false),
            failure: Mutex::default(),
        }
    }

    /// Has whoever does something that takes long leave the rest of it, until the queues are given up.
    pub fn give_up(&self) {
        self.given_up.store(true, Ordering::Release);
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

    /// How many queues a driver may enable.
    pub fn queues(&self) -> u16 {
        // A device has no more than a few.
        u16::try_from(self.queues.len()).unwrap_or(u16::MAX)
    }

    fn queue(&self, index: u16) -> Option<MutexGuard<'_, Option<Active>>> {
        self.queues.get(usize::from(index)).map(lock)
    }

    /// The disk has another size, in sectors; tells the driver.
    pub fn resize(&self, sectors: u64) -> Result<(), DeviceError> {
        self.sectors.store(sectors, Ordering::SeqCst);
        match self.queue(0).as_deref() {
            Some(Some(active)) => active
                .interrupt
                .config()
                .map_err(|source| DeviceError::Host {
                    device: NAME,
                    source,
                }),
            _ => Ok(()),
        }
    }

    /// Takes a queue. No one but the worker is at work.
    pub fn activate(&self, index: u16, active: Active) {
        if let Some(mut queue) = self.queue(index) {
            let size = usize::from(active.ring.size());
            self.descriptors.fetch_add(size, Ordering::Relaxed);
            *queue = Some(active);
        }
    }

    /// Gives all queues up. No one but the worker is at work.
    pub fn deactivate(&self, sources: &mut Sources<'_>) {
        for queue in &self.queues {
            if let Some(active) = lock(queue).take() {
                active.ring.release(sources);
            }
        }
        self.descriptors.store(0, Ordering::Relaxed);
        self.given_up.store(false, Ordering::Release);
        *lock(&self.failure) = None;
    }

    /// What somebody else met, for the worker.
    ///
    /// # Errors
    /// That.
    pub fn failed(&self) -> Result<(), DeviceError> {
        lock(&self.failure).take().map_or(Ok(()), Err)
    }

    /// Has the worker hear of it.
    pub fn fail(&self, failure: DeviceError) {
        *lock(&self.failure) = Some(failure);
        self.call_worker();
    }

    /// The worker looks after the queues.
    pub fn call_worker(&self) {
        if let Some(Some(active)) = self.queue(0).as_deref() {
            // If that fails, the guest's next kick does it.
            let _ = active.ring.call_again();
        }
    }

    /// Does something with a queue's ring, if it is active.
    pub fn with_ring<T>(&self, index: u16, what: impl FnOnce(&Ring) -> T) -> Option<T> {
        let queue = self.queue(index)?;
        queue.as_ref().map(|active| what(&active.ring))
    }

    /// Whether the driver has put something into a queue that nobody has taken.
    pub fn waits(&self, index: u16) -> bool {
        match self.queue(index).as_deref() {
            // A ring that breaks the rules is told by who serves it.
            Some(Some(active)) => {
                let pending = active.ring.pending(&active.memory.memory());
                pending.is_ok_and(|count| count > 0)
            }
            _ => false,
        }
    }

    /// Serves a kick, on the one thread that serves the queue. It does everything if there are no helpers.
    ///
    /// # Errors
    /// What the guest or the host did wrong.
    pub fn serve(&self, index: u16, helpers: Option<&Helpers<Job>>) -> Result<(), DeviceError> {
        let Some(mut guard) = self.queue(index) else {
            return Ok(());
        };
        let Some(active) = guard.as_mut() else {
            return Ok(());
        };
        let memory = active.memory.memory().into_inner();
        active.ring.acknowledge();
        for _ in 0..BUDGET {
            match active.ring.pop_descriptors(&memory)? {
                Some(descriptors) => {
                    let job = Job {
                        queue: index,
                        memory: Arc::clone(&memory),
                        descriptors,
                    };
                    let done = self.do_or_hand_over(job, helpers, &active.ring)?;
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
        job: Job,
        helpers: Option<&Helpers<Job>>,
        ring: &Ring,
    ) -> Result<Option<(u16, u32)>, DeviceError> {
        let Some(helpers) = helpers else {
            return self.complete(&job.memory, job.descriptors).map(Some);
        };
        if let Tried::Done(head, written) = self.attempt(&job.memory, job.descriptors.clone())? {
            return Ok(Some((head, written)));
        }
        // No driver has more requests than descriptors.
        if helpers.waiting() >= self.descriptors.load(Ordering::Relaxed) {
            return Err(ring.guest("more requests at once than the queues have descriptors"));
        }
        match helpers.submit(u32::from(job.queue), job) {
            Ok(()) => Ok(None),
            // The node gives no thread.
            Err(job) => self.complete(&job.memory, job.descriptors).map(Some),
        }
    }

    /// A helper's work.
    pub fn help(&self, job: Job) {
        let outcome = self.complete(&job.memory, job.descriptors);
        let returned = {
            let Some(mut queue) = self.queue(job.queue) else {
                return;
            };
            let Some(active) = queue.as_mut() else {
                return;
            };
            outcome.and_then(|(head, written)| {
                active.ring.push(&job.memory, head, written)?;
                active.ring.notify(&job.memory, &*active.interrupt)
            })
        };
        if let Err(failure) = returned {
            self.fail(failure);
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
            Ok(operation) => self
                .backend
                .run(&operation, readable, writable, &self.given_up),
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
