//! Which containers of a pod run, and which of them were sent SIGKILL and have not ended.
//!
//! A process that waits for a volume that does not answer cannot be killed before it does, and that is no reason to take its
//! neighbours away: as on a node, that container stays. When nobody of the pod is to live on, its VM is ended, whatever the guest
//! says.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Those of one pod. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Doomed(Arc<Mutex<BTreeMap<String, bool>>>);

impl Doomed {
    fn all(&self) -> MutexGuard<'_, BTreeMap<String, bool>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A container runs.
    pub fn lives(&self, id: &str) {
        self.all().entry(id.to_owned()).or_default();
    }

    /// It was sent SIGKILL.
    pub fn was_killed(&self, id: &str) {
        if let Some(killed) = self.all().get_mut(id) {
            *killed = true;
        }
    }

    /// It has ended, or has gone.
    pub fn ended(&self, id: &str) {
        self.all().remove(id);
    }

    /// Whether nobody runs that was not killed.
    #[must_use]
    pub fn is_all(&self) -> bool {
        self.all().values().all(|killed| *killed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_is_doomed_when_all_that_runs_in_it_is() {
        let pod = Doomed::default();
        assert!(pod.is_all());
        pod.was_killed("unknown");
        pod.lives("a");
        pod.lives("b");
        pod.was_killed("a");
        // Told twice, as a start that is answered late.
        pod.lives("a");
        assert!(!pod.is_all());
        pod.ended("b");
        assert!(pod.is_all());
        pod.lives("c");
        assert!(!pod.is_all());
        pod.was_killed("c");
        assert!(pod.is_all());
    }
}
