//! `brig timeline --follow`: waits for the next pod that starts on this node.

use std::collections::BTreeSet;
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use brig_shim::error::{Error, Result};
use brig_shim::node::journal;
use brig_shim::pod::timeline::CONTAINER_STARTED;

use crate::cli;
use crate::terminal;
use crate::timelines;

/// Between two looks at the node.
const LOOK: Duration = Duration::from_millis(100);

/// containerd's namespace and the sandbox's id.
type Key = (String, String);

/// The pods that were seen, and the one that is waited for.
#[derive(Debug)]
struct Wait {
    namespace: Option<String>,
    known: BTreeSet<Key>,
    next: Option<Key>,
}

impl Wait {
    fn new(namespace: Option<String>, now: Vec<Key>) -> Self {
        Self {
            namespace,
            known: now.into_iter().collect(),
            next: None,
        }
    }

    /// The first pod that was not there before, given those that are.
    ///
    /// # Errors
    /// `FailedPrecondition` when it is gone again.
    fn look(&mut self, now: Vec<Key>) -> Result<Option<&Key>> {
        let now: BTreeSet<Key> = now.into_iter().collect();
        if let Some((_, id)) = self.next.as_ref().filter(|next| !now.contains(next)) {
            return Err(Error::state(format!(
                "pod {id} ended before a container of it ran: see 'brig dump {id}'"
            )));
        }
        if self.next.is_none() {
            // An id that was free meanwhile is a new pod's.
            self.known.retain(|pod| now.contains(pod));
            let wanted = self.namespace.as_ref();
            self.next = now
                .into_iter()
                .filter(|(namespace, _)| wanted.is_none_or(|wanted| wanted == namespace))
                .find(|pod| !self.known.contains(pod));
        }
        Ok(self.next.as_ref())
    }
}

/// The next pod that starts, in `namespace` or any, as soon as a container of it runs.
///
/// # Errors
/// `FailedPrecondition` when it ends before.
pub fn next(base: &Path, namespace: Option<String>) -> Result<cli::Pod> {
    let mut wait = Wait::new(namespace, journal::list(base));
    terminal::complain("waiting for the next pod that starts");
    loop {
        sleep(LOOK);
        if let Some((namespace, id)) = wait.look(journal::list(base))?
            && runs(base, namespace, id)
        {
            return Ok(cli::Pod {
                namespace: Some(namespace.clone()),
                id: id.clone(),
            });
        }
    }
}

fn runs(base: &Path, namespace: &str, id: &str) -> bool {
    timelines::read(base, namespace, id).is_ok_and(|timeline| {
        let mut marks = timeline.marks.iter();
        marks.any(|mark| mark.name == CONTAINER_STARTED)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use brig_shim::node::journal::StateDir;
    use brig_shim::pod::timeline::Timeline;

    fn pods(pods: &[(&str, &str)]) -> Vec<Key> {
        let pods = pods.iter();
        pods.map(|(namespace, id)| ((*namespace).to_owned(), (*id).to_owned()))
            .collect()
    }

    #[test]
    fn the_next_pod_is_none_of_those_that_were_there() {
        let mut wait = Wait::new(Some("k8s.io".to_owned()), pods(&[("k8s.io", "old")]));
        for now in [
            &[("k8s.io", "old")][..],
            &[("default", "elsewhere"), ("k8s.io", "old")],
            &[],
        ] {
            assert_eq!(wait.look(pods(now)).unwrap(), None);
        }
        let again = ("k8s.io".to_owned(), "old".to_owned());
        let now = pods(&[("k8s.io", "old")]);
        assert_eq!(wait.look(now).unwrap(), Some(&again), "a new pod of an id");
        let now = pods(&[("k8s.io", "a-later-one"), ("k8s.io", "old")]);
        assert_eq!(wait.look(now).unwrap(), Some(&again), "the first stays it");
        let error = wait.look(pods(&[("k8s.io", "a-later-one")])).unwrap_err();
        assert!(error.message.contains("brig dump old"), "{error}");
    }

    #[test]
    fn a_pod_runs_once_a_container_of_it_was_started() {
        let base = tempfile::tempdir().unwrap();
        crate::pods::fake(base.path(), "default", "web");
        assert!(!runs(base.path(), "default", "web"));
        let mut timeline = Timeline::new(std::time::SystemTime::now());
        for (name, expected) in [("container.created", false), (CONTAINER_STARTED, true)] {
            timeline.mark(name, std::time::SystemTime::now());
            let dir = StateDir::new(base.path(), "default", "web").unwrap();
            let bytes = serde_json::to_vec(&timeline).unwrap();
            dir.write_timeline(&bytes).unwrap();
            assert_eq!(runs(base.path(), "default", "web"), expected);
        }
    }
}
