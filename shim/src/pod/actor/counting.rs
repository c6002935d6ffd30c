//! Counts the pod's start among those of the node, once and beside everything else.

use slog::{Logger, warn};
use tokio::task::{JoinHandle, spawn_blocking};

use crate::node::remains::Remains;
use crate::pod::starts;
use crate::pod::timeline::Timeline;

/// Whether the start is counted.
#[derive(Debug, Default)]
pub(super) struct Counting {
    begun: bool,
    writing: Option<JoinHandle<()>>,
}

impl Counting {
    /// To be called when a container runs, whose start is answered by then, and at the end, for a pod that never had one.
    /// One that has not started is not counted.
    pub(super) fn once(&mut self, timeline: &Timeline, remains: Remains, logger: &Logger) {
        let Some(took) = starts::took(timeline).filter(|_| !self.begun) else {
            return;
        };
        self.begun = true;
        let logger = logger.clone();
        self.writing = Some(spawn_blocking(move || {
            if let Err(error) = starts::count(&remains, &took) {
                warn!(logger, "this start is not in brig_start_stage_seconds"; "error" => %error);
            }
        }));
    }

    /// What is still to be waited for before the shim ends.
    pub(super) fn last(&mut self) -> Option<JoinHandle<()>> {
        self.writing.take()
    }
}
