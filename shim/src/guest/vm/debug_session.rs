//! Until when a debugger has the VM's CPUs: as long as it is asked for.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::time::Instant;

/// Until when the session lasts, if there is one.
#[derive(Debug, Default)]
pub(super) struct Session(Mutex<Option<Instant>>);

impl Session {
    fn lock(&self) -> MutexGuard<'_, Option<Instant>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lasts until then; true if it begins with that.
    pub(super) fn renew(&self, until: Instant) -> bool {
        self.lock().replace(until).is_none()
    }

    /// When it is to end; over if that is now.
    pub(super) fn end(&self, now: Instant) -> Option<Instant> {
        let mut until = self.lock();
        *until = until.filter(|until| *until > now);
        *until
    }

    /// Whether there is one.
    pub(super) fn lasts(&self) -> bool {
        self.lock().is_some()
    }
}
