//! A shim that is ending its pod in order when `delete` comes: containerd waits three seconds for a Shutdown and then
//! hangs up, and a guest may need longer to power off.

use std::time::Duration;

use rustix::process::Signal;

use crate::error::Result;
use crate::node::journal::{Journal, StateDir};

/// How long such a shim is waited for; the rest of what `delete` has is for killing it.
const PATIENCE: Duration = Duration::from_secs(2);

/// Whether the shim of this journal was ending its pod and has ended it, with nothing left, in a time that `delete` has.
///
/// # Errors
/// When the journal cannot be read again.
pub(super) fn ended(dir: &StateDir, journal: &Journal) -> Result<bool> {
    if journal.ending.is_none() {
        return Ok(false);
    }
    // It may have been asked for the end of its pod alone, and wait for a Shutdown that nobody sends any more.
    // When its pod is gone, it may still be telling containerd of it.
    let _ = journal.shim.end_by(Signal::TERM, PATIENCE);
    let left = dir.read()?;
    Ok(left.is_none_or(|left| left.shim != journal.shim))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::identity::Identity;
    use crate::node::journal::Ending;
    use std::io::Read as _;
    use std::path::Path;
    use std::process::{Child, Command, Stdio};
    use std::time::Instant;

    /// A shim that does this when it is told to end, with its journal.
    fn shim(base: &Path, on_term: &str, ending: Option<Ending>) -> (StateDir, Child) {
        let dir = StateDir::new(base, "ns", "c1").unwrap();
        dir.create().unwrap();
        let script = format!("trap '{on_term}' TERM; echo; while :; do sleep 0.05; done");
        let mut child = Command::new("sh")
            .args(["-c", &script])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let journal = Journal {
            ending,
            ..Journal::new(Identity::of(child.id()).unwrap())
        };
        dir.write(&journal).unwrap();
        let mut ready = [0];
        let stdout = child.stdout.as_mut().unwrap();
        stdout.read_exact(&mut ready).unwrap();
        (dir, child)
    }

    fn ended_of(dir: &StateDir) -> bool {
        ended(dir, &dir.read().unwrap().unwrap()).unwrap()
    }

    #[test]
    fn a_shim_that_ends_its_pod_is_waited_for() {
        let base = tempfile::tempdir().unwrap();
        let journal = base.path().join("ns/c1/pod.json");
        let on_term = format!("sleep 0.3; rm {}; exit", journal.display());
        let (dir, mut child) = shim(base.path(), &on_term, Some(Ending::Emptied));
        assert!(ended_of(&dir));
        assert!(child.wait().unwrap().success());
    }

    #[test]
    fn one_that_leaves_something_or_does_not_end_is_to_be_undone() {
        for on_term in ["exit", ":"] {
            let base = tempfile::tempdir().unwrap();
            let (dir, mut child) = shim(base.path(), on_term, Some(Ending::Inhabited));
            let before = Instant::now();
            assert!(!ended_of(&dir), "{on_term}");
            assert!(before.elapsed() < 2 * PATIENCE);
            let _ = child.kill();
            child.wait().unwrap();
        }
    }

    #[test]
    fn one_that_was_not_ending_is_not_told_to() {
        let base = tempfile::tempdir().unwrap();
        let (dir, mut child) = shim(base.path(), "exit", None);
        assert!(!ended_of(&dir));
        assert!(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
