//! The queues, which the device's thread takes requests from, and to which helpers return theirs too.

use std::sync::{Arc, Mutex};

use fuse_backend_rs::abi::fuse_abi::InHeader;
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};

use super::answer::{Answered, Serving};
use super::slow::Slow;
use super::{DeviceError, NAME, REQUEST_SIZE};
use crate::sync::lock;
use crate::virtio::helpers::Helpers;
use crate::virtio::ring::{Descriptors, Ring};
use crate::virtio::{GuestMemory, Interrupt, Sources};

/// Requests served before the worker looks at its other events again.
const BATCH: usize = 64;
/// FORGETs that are put off, at most.
pub(super) const MOST_PUT_OFF: u16 = 32;

/// The queues, while there are any.
#[derive(Default)]
pub(super) struct Queues(Mutex<State>);

#[derive(Default)]
struct State {
    active: Option<Active>,
    /// What a helper met; the device's thread tells.
    failure: Option<DeviceError>,
}

/// The queues and what belongs to them.
pub(super) struct Active {
    pub(super) memory: GuestMemory,
    pub(super) interrupt: Arc<dyn Interrupt>,
    pub(super) hiprio: Ring,
    pub(super) request: Ring,
    /// Requests came a moment ago, so FORGETs are put off.
    busy: bool,
}

/// A request for a helper.
pub(super) struct Job {
    serving: Arc<Serving>,
    memory: Arc<GuestMemoryMmap>,
    descriptors: Descriptors,
}

/// Who serves.
pub(super) struct Desk<'a> {
    pub(super) serving: &'a Arc<Serving>,
    pub(super) helpers: Option<&'a Helpers<Job>>,
    pub(super) slow: &'a mut Slow,
}

impl Active {
    pub(super) fn new(
        memory: GuestMemory,
        interrupt: Arc<dyn Interrupt>,
        [hiprio, request]: [Ring; 2],
    ) -> Self {
        Self {
            memory,
            interrupt,
            hiprio,
            request,
            busy: false,
        }
    }

    /// Returns a request that was served.
    fn returned(
        &mut self,
        memory: &GuestMemoryMmap,
        head: u16,
        done: Option<u32>,
    ) -> Result<(), DeviceError> {
        self.request.push(memory, head, done.unwrap_or(0))?;
        // Each request is its own wait in the guest, that of who closes a file too, and the next one may take long.
        self.request.notify(memory, self.interrupt.as_ref())
    }
}

impl Queues {
    pub(super) fn activate(&self, active: Active) {
        *lock(&self.0) = State {
            active: Some(active),
            failure: None,
        };
    }

    /// Gives the queues up. No helper is at work.
    pub(super) fn deactivate(&self, sources: &mut Sources<'_>) {
        if let Some(active) = lock(&self.0).active.take() {
            active.hiprio.release(sources);
            active.request.release(sources);
        }
    }

    /// Whether things are put off.
    pub(super) fn is_busy(&self) -> bool {
        let state = lock(&self.0);
        state.active.as_ref().is_some_and(|active| active.busy)
    }

    /// Does `act` with the queues, on the device's thread, which alone takes them away.
    fn with<T>(
        &self,
        act: impl FnOnce(&mut Active) -> Result<T, DeviceError>,
    ) -> Result<Option<T>, DeviceError> {
        lock(&self.0).active.as_mut().map(act).transpose()
    }

    /// Serves requests, until there are none or others have to be looked at.
    pub(super) fn requests(&self, desk: &mut Desk<'_>) -> Result<(), DeviceError> {
        if let Some(failure) = lock(&self.0).failure.take() {
            return Err(failure);
        }
        let begun = self.with(|active| {
            let memory = active.memory.memory().into_inner();
            if !std::mem::replace(&mut active.busy, true) {
                active.hiprio.disable_kick(&memory)?;
            }
            active.request.disable_kick(&memory)?;
            Ok(memory)
        })?;
        let Some(memory) = begun else {
            return Ok(());
        };
        let mut left = BATCH;
        loop {
            let next = self.with(|active| active.request.pop_descriptors(&memory))?;
            let Some(descriptors) = next.flatten() else {
                let more = self.with(|active| {
                    let more = active.request.enable_kick(&memory)?;
                    if more {
                        active.request.disable_kick(&memory)?;
                    }
                    Ok(more)
                })?;
                match more {
                    Some(true) => continue,
                    _ => break,
                }
            };
            let head = descriptors.head_index();
            if let Some(done) = desk.serve(&memory, descriptors)? {
                self.with(|active| active.returned(&memory, head, done))?;
            }
            left -= 1;
            if left == 0 {
                return self.with(|active| active.request.call_again()).map(drop);
            }
        }
        if self.with(|active| active.hiprio.pending(&memory))? >= Some(MOST_PUT_OFF) {
            self.some_forgets(desk.serving, &memory)?;
        }
        Ok(())
    }

    /// A helper's work.
    pub(super) fn help(&self, job: Job) {
        let head = job.descriptors.head_index();
        let answered = job.serving.answer(&job.memory, job.descriptors, None);
        let mut state = lock(&self.0);
        let Some(active) = state.active.as_mut() else {
            return;
        };
        let returned = answered.and_then(|answered| match answered {
            Answered::Done(done) => active.returned(&job.memory, head, done),
            // Nothing is put off for a helper.
            Answered::Later(_) => active.returned(&job.memory, head, None),
        });
        if let Err(failure) = returned {
            // The device's thread is called to hear of it. If that fails, the guest's next kick does it.
            let _ = active.request.call_again();
            state.failure = Some(failure);
        }
    }

    /// FORGETs that are there, so many that other events do not have to wait; true if more may be.
    fn some_forgets(
        &self,
        serving: &Serving,
        memory: &Arc<GuestMemoryMmap>,
    ) -> Result<bool, DeviceError> {
        let mut more = true;
        for _ in 0..BATCH {
            let next = self.with(|active| active.hiprio.pop_descriptors(memory))?;
            let Some(descriptors) = next.flatten() else {
                more = false;
                break;
            };
            let head = descriptors.head_index();
            let written = match serving.answer(memory, descriptors, None)? {
                Answered::Done(Some(written)) => written,
                _ => 0,
            };
            self.with(|active| active.hiprio.push(memory, head, written))?;
        }
        self.with(|active| active.hiprio.notify(memory, active.interrupt.as_ref()))?;
        Ok(more)
    }

    /// Serves what came in the other queue.
    pub(super) fn forgets(&self, serving: &Serving) -> Result<(), DeviceError> {
        let begun = self.with(|active| {
            // The last one that the guest was asked to tell of.
            if active.busy {
                return Ok(None);
            }
            let memory = active.memory.memory().into_inner();
            active.hiprio.disable_kick(&memory)?;
            Ok(Some(memory))
        })?;
        let Some(memory) = begun.flatten() else {
            return Ok(());
        };
        loop {
            if self.some_forgets(serving, &memory)? {
                return self.with(|active| active.hiprio.call_again()).map(drop);
            }
            let more = self.with(|active| {
                let more = active.hiprio.enable_kick(&memory)?;
                if more {
                    active.hiprio.disable_kick(&memory)?;
                }
                Ok(more)
            })?;
            if more != Some(true) {
                return Ok(());
            }
        }
    }

    /// Does what was put off.
    pub(super) fn catch_up(&self, serving: &Serving) -> Result<(), DeviceError> {
        self.with(|active| {
            active.busy = false;
            Ok(())
        })?;
        self.forgets(serving)
    }
}

impl Desk<'_> {
    /// Serves a request, or hands it over: then there is nothing to return yet.
    fn serve(
        &mut self,
        memory: &Arc<GuestMemoryMmap>,
        descriptors: Descriptors,
    ) -> Result<Option<Option<u32>>, DeviceError> {
        let Some(helpers) = self.helpers else {
            return self.at_last(memory, descriptors).map(Some);
        };
        let (served, slow) = (&self.serving.served, &mut *self.slow);
        let mut lanes = |header: &InHeader| slow.lane(header, served, helpers);
        let answered = self
            .serving
            .answer(memory, descriptors.clone(), Some(&mut lanes))?;
        let lane = match answered {
            Answered::Done(done) => return Ok(Some(done)),
            Answered::Later(lane) => lane,
        };
        // No driver has more requests than descriptors.
        if helpers.waiting() >= usize::from(REQUEST_SIZE) {
            return Err(DeviceError::Guest {
                device: NAME,
                reason: "more requests at once than the queue has descriptors".to_owned(),
            });
        }
        let job = Job {
            serving: Arc::clone(self.serving),
            memory: Arc::clone(memory),
            descriptors,
        };
        match helpers.submit(lane, job) {
            Ok(()) => Ok(None),
            // The node gives no thread.
            Err(job) => self.at_last(memory, job.descriptors).map(Some),
        }
    }

    /// Serves it, however long that takes.
    fn at_last(
        &self,
        memory: &GuestMemoryMmap,
        descriptors: Descriptors,
    ) -> Result<Option<u32>, DeviceError> {
        Ok(match self.serving.answer(memory, descriptors, None)? {
            Answered::Done(done) => done,
            Answered::Later(_) => None,
        })
    }
}
