//! Whether free pages of the guest may go back to the host: not while a device reaches guest memory by itself, for it
//! would go on writing to the page that was, and the guest would see another one.

pub mod discard;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};

use self::discard::Discarded;
use crate::sync::{lock, read, write};

/// Shared by the balloon, by memory that comes and goes, and by what pins memory.
#[derive(Debug, Default)]
pub struct Reclaim {
    /// How many pin it.
    pins: RwLock<usize>,
    /// What has left, whoever gave it up.
    discarded: Mutex<Discarded>,
    /// Bytes that have left.
    given_up: AtomicU64,
}

/// Memory is pinned while this is there.
#[derive(Debug)]
pub struct Pinned(Arc<Reclaim>);

impl Reclaim {
    /// No page leaves from when this returns: one that is on its way has left by then.
    #[must_use]
    pub fn pin(self: &Arc<Self>) -> Pinned {
        *write(&self.pins) += 1;
        Pinned(Arc::clone(self))
    }

    /// Gives pages up, if that is allowed; none if it is not.
    pub fn give_up<T>(&self, work: impl FnOnce(&mut Discarded) -> T) -> Option<T> {
        // Held over the work, so that pinning waits for it.
        let pins = read(&self.pins);
        (*pins == 0).then(|| {
            let mut discarded = lock(&self.discarded);
            let done = work(&mut discarded);
            self.given_up.store(discarded.bytes(), Ordering::Relaxed);
            done
        })
    }

    /// Bytes that have left so far; one that has come back may leave again.
    #[must_use]
    pub fn given_up(&self) -> u64 {
        self.given_up.load(Ordering::Relaxed)
    }

    /// Whether pages may leave now.
    #[must_use]
    pub fn is_allowed(&self) -> bool {
        *read(&self.pins) == 0
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        *write(&self.0.pins) -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_stay_while_anything_pins_them() {
        let reclaim = Arc::new(Reclaim::default());
        let gone = |reclaim: &Reclaim| {
            let mut gone = false;
            let done = reclaim.give_up(|_| gone = true);
            assert_eq!(done.is_some(), gone);
            gone
        };
        assert!(gone(&reclaim));
        let (first, second) = (reclaim.pin(), reclaim.pin());
        drop(first);
        assert!(!gone(&reclaim));
        drop(second);
        assert!(gone(&reclaim));
    }
}
