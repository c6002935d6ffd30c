//! The thread that has a device's descriptors. It alone may make VFIO's calls; others ask it and wait.
//!
//! What is asked is short: a register, an interrupt's event. The long part, pinning the guest's memory, comes before
//! anybody can ask.

use std::io;
use std::sync::mpsc::{Receiver, Sender, channel, sync_channel};

use super::device::Device;

type Job = Box<dyn FnOnce(&dyn Device) + Send>;

enum Order {
    Run(Job),
    Retire(Box<dyn FnOnce() + Send>),
}

/// Asks the thread.
#[derive(Clone)]
pub struct Owner(Sender<Order>);

/// The thread's end.
pub struct Orders(Receiver<Order>);

/// An owner, and what its thread is to serve.
#[must_use]
pub fn pair() -> (Owner, Orders) {
    let (sender, receiver) = channel();
    (Owner(sender), Orders(receiver))
}

impl Owner {
    /// Runs `job` on the thread; none if the device has gone.
    pub fn ask<T: Send + 'static>(
        &self,
        job: impl FnOnce(&dyn Device) -> T + Send + 'static,
    ) -> Option<T> {
        let (answer, answered) = sync_channel(1);
        let job = Box::new(move |device: &dyn Device| {
            let _ = answer.send(job(device));
        });
        self.0.send(Order::Run(job)).ok()?;
        answered.recv().ok()
    }

    /// Has `job` run on the thread after all that it was asked before, without waiting for it.
    pub fn tell(&self, job: impl FnOnce(&dyn Device) + Send + 'static) {
        // A device that has gone needs nothing any more.
        let _ = self.0.send(Order::Run(Box::new(job)));
    }

    /// As [`Self::ask`] for what may fail; a device that has gone is an error too.
    ///
    /// # Errors
    /// What `job` returns.
    pub fn try_ask<T: Send + 'static>(
        &self,
        job: impl FnOnce(&dyn Device) -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        self.ask(job)
            .unwrap_or_else(|| Err(io::Error::other("the device has gone")))
    }

    /// Lets go of the device, after a reset, and ends the thread; `gone` is called when the thread holds nothing of it
    /// any more.
    pub fn retire(&self, gone: Box<dyn FnOnce() + Send>) {
        // A thread that has ended holds nothing.
        if let Err(error) = self.0.send(Order::Retire(gone))
            && let Order::Retire(gone) = error.0
        {
            gone();
        }
    }
}

impl Orders {
    /// Serves the device until it retires or nobody is left to ask. `held` goes with the device.
    pub fn serve<T>(self, device: Box<dyn Device>, held: T) {
        while let Ok(order) = self.0.recv() {
            match order {
                Order::Run(job) => job(&*device),
                Order::Retire(gone) => {
                    // Many have no reset of their own; the kernel tries more when the descriptor is closed.
                    let _ = device.reset();
                    drop(device);
                    drop(held);
                    gone();
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::testing::{Mock, Record};
    use super::*;

    #[test]
    fn a_device_is_asked_on_its_thread_and_is_reset_and_dropped_when_it_retires() {
        let record = Arc::new(Record::default());
        let mock = Mock::nvme(Arc::clone(&record));
        let (owner, orders) = pair();
        let held = Arc::new(());
        let holds = Arc::clone(&held);
        let thread = std::thread::spawn(move || orders.serve(Box::new(mock), holds));
        let size = owner.try_ask(|device| Ok(device.region(0)?.size)).unwrap();
        assert_eq!(size, 0x4000);
        let (told, gone) = channel();
        owner.retire(Box::new(move || told.send(()).unwrap()));
        gone.recv().unwrap();
        thread.join().unwrap();
        assert_eq!(Arc::strong_count(&held), 1);
        assert_eq!(record.all(), ["reset", "closed"]);
        // What comes later finds nobody, and nobody waits.
        assert!(owner.ask(|_| ()).is_none());
        let (told, gone) = channel();
        owner.retire(Box::new(move || told.send(()).unwrap()));
        gone.recv().unwrap();
    }
}
