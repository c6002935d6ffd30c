//! How willingly the node's kernel kills a pod's VMM for memory.
//!
//! Under runc each container's process carries its own score adjustment and the pause process a very
//! low one. Here they die together, so the VMM has the adjustment of the container that is to be spared
//! longest. The sandbox's own would shield a best-effort pod from a node that runs out of memory.

use std::collections::HashMap;
use std::fs;

use slog::{Logger, warn};

use crate::error::ignore_missing;

/// The adjustments of a pod's containers, by id.
#[derive(Debug, Default)]
pub(super) struct OomScores(HashMap<String, i32>);

impl OomScores {
    /// Notes a container's.
    pub(super) fn add(&mut self, id: &str, adjustment: i32) {
        self.0.insert(id.to_owned(), adjustment);
    }

    /// Forgets a container's.
    pub(super) fn remove(&mut self, id: &str) {
        self.0.remove(id);
    }

    /// The VMM's; none while nothing but the sandbox exists, which keeps what it has.
    pub(super) fn of_vmm(&self) -> Option<i32> {
        self.0.values().copied().min()
    }

    /// Gives it to the process `pid`, in the background.
    pub(super) fn apply(&self, pid: u32, logger: &Logger) {
        let Some(adjustment) = self.of_vmm() else {
            return;
        };
        let logger = logger.clone();
        tokio::task::spawn_blocking(move || {
            let path = format!("/proc/{pid}/oom_score_adj");
            // A VMM that has ended needs none.
            let written = ignore_missing(fs::write(path, adjustment.to_string()));
            if let Err(error) = written {
                warn!(logger, "the VMM keeps its OOM score adjustment"; "error" => %error);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_vmm_is_spared_as_long_as_its_most_precious_container() {
        let mut scores = OomScores::default();
        assert_eq!(scores.of_vmm(), None);
        scores.add("batch", 1000);
        assert_eq!(scores.of_vmm(), Some(1000));
        scores.add("guaranteed", -997);
        assert_eq!(scores.of_vmm(), Some(-997));
        scores.remove("guaranteed");
        assert_eq!(scores.of_vmm(), Some(1000));
    }
}
