//! Threads for queues that keep each other waiting.
//!
//! The device's worker serves all queues, which costs no thread as long as one thread is enough: a driver with a queue for
//! each CPU seldom uses two at once. A queue that was found waiting for another gets a thread that waits for its kicks
//! instead of the worker. Once it has had none for a while the thread ends, and the worker has the queue again. The
//! threads are started by the worker, whose filter they inherit.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_sys_util::eventfd::EventFd;

use super::service::{self, Job, Service};
use crate::event::borrow_event;
use crate::virtio::helpers::Helpers;
use crate::virtio::ring::Ring;
use crate::virtio::{DeviceError, Sources};

/// As it is seen among the threads of the VMM.
const NAME: &str = "block-queue";

/// How long a thread without work stays.
const REST: Duration = Duration::from_secs(10);

/// The threads of one device's queues. Dropping them ends them.
pub struct QueueThreads {
    rest: Duration,
    running: BTreeMap<u16, QueueThread>,
}

struct QueueThread {
    shared: Arc<Shared>,
    thread: JoinHandle<()>,
}

/// What a thread and the worker tell each other.
struct Shared {
    /// The queue's.
    kick: EventFd,
    /// The thread is to end; the kick is written to then.
    stopping: AtomicBool,
    /// It has had nothing to do and is at its end.
    rested: AtomicBool,
}

impl Default for QueueThreads {
    fn default() -> Self {
        Self::resting(REST)
    }
}

impl QueueThreads {
    /// None yet; one without work stays for this long.
    pub fn resting(rest: Duration) -> Self {
        Self {
            rest,
            running: BTreeMap::new(),
        }
    }

    /// Whether a queue has one.
    pub fn has(&self, index: u16) -> bool {
        self.running.contains_key(&index)
    }

    /// Those that have one.
    #[cfg(test)]
    pub fn queues(&self) -> Vec<u16> {
        self.running.keys().copied().collect()
    }

    /// Gives a queue a thread, if the node does; else it stays with the worker.
    pub fn start(
        &mut self,
        index: u16,
        service: &Arc<Service>,
        helpers: &Arc<Helpers<Job>>,
        sources: &mut Sources<'_>,
    ) {
        let Some(Ok(kick)) = service.with_ring(index, Ring::copy_of_kick) else {
            return;
        };
        let shared = Arc::new(Shared {
            kick,
            stopping: AtomicBool::new(false),
            rested: AtomicBool::new(false),
        });
        let rest = PollTimeout::try_from(self.rest).unwrap_or(PollTimeout::MAX);
        let (own, service_of, helpers) = (
            Arc::clone(&shared),
            Arc::clone(service),
            Arc::clone(helpers),
        );
        let started = std::thread::Builder::new()
            .name(NAME.to_owned())
            .spawn(move || own.live(index, rest, &service_of, &helpers));
        if let Ok(thread) = started {
            // Until here both have waited for the kick: none is lost, and one that the worker hears of too is the thread's.
            let _ = service.with_ring(index, |ring| ring.leave_kicks(sources));
            self.running.insert(index, QueueThread { shared, thread });
        }
    }

    /// Gives the worker those queues again whose threads are at their end.
    ///
    /// # Errors
    /// If a queue's kicks cannot be waited for.
    pub fn take_back(
        &mut self,
        service: &Service,
        sources: &mut Sources<'_>,
    ) -> Result<(), DeviceError> {
        let rested = |thread: &QueueThread| thread.shared.rested.load(Ordering::Acquire);
        let ended: Vec<u16> = self
            .running
            .iter()
            .filter_map(|(index, thread)| rested(thread).then_some(*index))
            .collect();
        for index in ended {
            if let Some(thread) = self.running.remove(&index) {
                let _ = thread.thread.join();
            }
            let token = u32::from(index);
            service
                .with_ring(index, |ring| ring.take_kicks_back(token, sources))
                .transpose()?;
        }
        Ok(())
    }

    /// Ends all; when this returns none touches a queue.
    pub fn stop(&mut self) {
        let threads = std::mem::take(&mut self.running);
        for thread in threads.values() {
            thread.shared.stopping.store(true, Ordering::Release);
            // A full counter is already ready.
            let _ = thread.shared.kick.write(1);
        }
        for thread in threads.into_values() {
            let _ = thread.thread.join();
        }
    }
}

impl Drop for QueueThreads {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    /// A thread's life.
    fn live(&self, index: u16, rest: PollTimeout, service: &Service, helpers: &Helpers<Job>) {
        loop {
            let mut kick = [PollFd::new(borrow_event(&self.kick), PollFlags::POLLIN)];
            match poll(&mut kick, rest) {
                Ok(0) => {
                    self.rested.store(true, Ordering::Release);
                    return service.call_worker();
                }
                Ok(_) => {}
                Err(nix::Error::EINTR) => continue,
                Err(error) => {
                    return service.fail(DeviceError::Host {
                        device: service::NAME,
                        source: error.into(),
                    });
                }
            }
            if self.stopping.load(Ordering::Acquire) {
                return;
            }
            if let Err(failure) = service.serve(index, Some(helpers)) {
                return service.fail(failure);
            }
        }
    }
}
