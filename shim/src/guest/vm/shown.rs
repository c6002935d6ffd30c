//! What is changed across calls of the VMM and the agent, one change after another, and is looked at without waiting for the
//! one that is under way: what is seen then is how it was before.

use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, PoisonError};

use tokio::sync::MutexGuard;

/// What of it is to be seen.
pub(super) trait Show: Default {
    /// A copy that no change touches.
    type Seen: Clone + Default;

    /// As it is now.
    fn show(&self) -> Self::Seen;
}

/// The state of something, and what of it is to be seen.
#[derive(Debug, Default)]
pub(super) struct Shown<T: Show> {
    state: tokio::sync::Mutex<T>,
    seen: Mutex<T::Seen>,
}

impl<T: Show> Shown<T> {
    /// Waits for the change under way; the next one lasts as long as this is held, and is seen afterwards.
    pub(super) async fn lock(&self) -> Change<'_, T> {
        let state = self.state.lock().await;
        Change { state, of: self }
    }

    /// As it was after the last change.
    pub(super) fn seen(&self) -> T::Seen {
        // It is whole whatever its holder did.
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.clone()
    }
}

/// A change under way.
pub(super) struct Change<'a, T: Show> {
    state: MutexGuard<'a, T>,
    of: &'a Shown<T>,
}

impl<T: Show> Deref for Change<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.state
    }
}

impl<T: Show> DerefMut for Change<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.state
    }
}

impl<T: Show> Drop for Change<'_, T> {
    fn drop(&mut self) {
        // Before the next change can begin.
        let shown = self.state.show();
        *self.of.seen.lock().unwrap_or_else(PoisonError::into_inner) = shown;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Show for Vec<u8> {
        type Seen = Vec<u8>;

        fn show(&self) -> Vec<u8> {
            self.clone()
        }
    }

    #[tokio::test]
    async fn what_was_before_a_change_is_seen_while_it_lasts() {
        let shown = Shown::<Vec<u8>>::default();
        let mut change = shown.lock().await;
        change.push(1);
        assert!(shown.seen().is_empty());
        drop(change);
        assert_eq!(shown.seen(), [1]);
    }
}
