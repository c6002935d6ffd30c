//! Whether free pages of the guest may go back to the host: not while a device reaches guest memory by itself, for it
//! would go on writing to the page that was, and the guest would see another one.

use std::sync::{Arc, RwLock};

use crate::sync::{read, write};

/// Shared by the balloon and by what pins memory.
#[derive(Debug, Default)]
pub struct Reclaim {
    /// How many pin it.
    pins: RwLock<usize>,
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

    /// Gives pages up, if that is allowed.
    pub fn give_up(&self, work: impl FnOnce()) {
        // Held over the work, so that pinning waits for it.
        let pins = read(&self.pins);
        if *pins == 0 {
            work();
        }
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
            reclaim.give_up(|| gone = true);
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
