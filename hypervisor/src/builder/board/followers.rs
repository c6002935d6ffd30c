//! Devices that must hear of a change of the guest's memory before the guest does: the node's kernel has a table of it for
//! them.

use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use crate::virtio::worker::DeviceHandle;

/// What they have together to hear of one.
const PATIENCE: Duration = Duration::from_secs(1);

/// Some have not heard of the last change yet.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Slow;

/// They, by function.
pub(super) struct Followers {
    handles: BTreeMap<u8, DeviceHandle>,
    /// Those that were told and have not said that they have heard.
    told: Vec<(u8, Receiver<()>)>,
    patience: Duration,
}

impl Default for Followers {
    fn default() -> Self {
        Self::with_patience(PATIENCE)
    }
}

impl Followers {
    fn with_patience(patience: Duration) -> Self {
        Self {
            handles: BTreeMap::new(),
            told: Vec::new(),
            patience,
        }
    }

    /// Whether there is none.
    pub(super) fn is_empty(&self) -> bool {
        self.handles.is_empty()
    }

    /// One more, which knows the memory that there is.
    pub(super) fn insert(&mut self, function: u8, handle: DeviceHandle) {
        self.handles.insert(function, handle);
    }

    /// It is leaving.
    pub(super) fn remove(&mut self, function: u8) {
        self.handles.remove(&function);
        self.told.retain(|(told, _)| *told != function);
    }

    /// Tells all of a change, and waits until they have heard of it.
    ///
    /// # Errors
    /// [`Slow`]: they will hear of it, and [`Self::wait`] says when.
    pub(super) fn tell(&mut self) -> Result<(), Slow> {
        let handles = self.handles.iter();
        self.told
            .extend(handles.map(|(function, handle)| (*function, handle.refreshed())));
        self.wait()
    }

    /// Waits until they have heard of all that they were told.
    ///
    /// # Errors
    /// [`Slow`].
    pub(super) fn wait(&mut self) -> Result<(), Slow> {
        let deadline = Instant::now() + self.patience;
        // A worker that is gone has said so; the VM is ending.
        self.told.retain(|(_, done)| {
            let left = deadline.saturating_duration_since(Instant::now());
            done.recv_timeout(left) == Err(RecvTimeoutError::Timeout)
        });
        if self.told.is_empty() {
            Ok(())
        } else {
            Err(Slow)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::mpsc::channel;

    use slog::{Discard, Logger, o};
    use vmm_sys_util::epoll::EventSet;

    use super::*;
    use crate::virtio::worker::{self, Slot};
    use crate::virtio::{Activation, ConfigSpace, DeviceError, Sources, VirtioDevice};

    /// Hears of a change when it is let.
    struct Fake(Receiver<()>);

    impl VirtioDevice for Fake {
        fn name(&self) -> &'static str {
            "fake"
        }
        fn device_type(&self) -> u16 {
            1
        }
        fn features(&self) -> u64 {
            0
        }
        fn queue_sizes(&self) -> Vec<u16> {
            Vec::new()
        }
        fn config(&self) -> Arc<dyn ConfigSpace> {
            Arc::new(Vec::new())
        }
        fn activate(&mut self, _: Activation, _: &mut Sources<'_>) -> Result<(), DeviceError> {
            Ok(())
        }
        fn process(&mut self, _: u32, _: EventSet, _: &mut Sources<'_>) -> Result<(), DeviceError> {
            Ok(())
        }
        fn refresh(&mut self) -> Result<(), DeviceError> {
            let _ = self.0.recv();
            Ok(())
        }
        fn deactivate(&mut self, _: &mut Sources<'_>) {}
    }

    #[test]
    fn one_that_was_slow_is_waited_for_again_and_only_until_it_leaves() {
        let (lets, let_by) = channel();
        let slot = Slot {
            device: Box::new(Fake(let_by)),
            on_failure: Box::new(|| ()),
            counts: Arc::default(),
        };
        let (_worker, mut handles) = worker::spawn(
            "test",
            vec![slot],
            Box::new(|| Ok(())),
            Box::new(|_| ()),
            Logger::root(Discard, o!()),
        )
        .unwrap();
        // Goes before the worker, which ends when nothing is to be waited for.
        let lets = lets;
        let mut followers = Followers::with_patience(Duration::from_millis(20));
        assert_eq!(followers.tell(), Ok(()));
        followers.insert(7, handles.remove(0));
        assert_eq!(followers.tell(), Err(Slow));
        // It has still not heard of it: whoever comes back is not told that all is well.
        assert_eq!(followers.wait(), Err(Slow));
        followers.patience = Duration::from_secs(20);
        lets.send(()).unwrap();
        assert_eq!(followers.wait(), Ok(()));
        followers.patience = Duration::from_millis(20);
        assert_eq!(followers.tell(), Err(Slow));
        followers.remove(7);
        assert_eq!(followers.wait(), Ok(()));
        assert!(followers.is_empty());
        drop(lets);
    }
}
