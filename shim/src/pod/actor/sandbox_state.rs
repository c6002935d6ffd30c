//! A sandbox of the Sandbox API, as the pod's actor keeps it: its phase, and its end, of which the first counts.

use std::time::SystemTime;

use tokio::sync::watch;

use super::handle::SandboxState;
use crate::asked::sandbox_config::PodConfig;
use crate::guest::vm::boot::Boot;
use crate::pod::process::Exit;

/// A sandbox that containerd has created.
pub(super) struct Sandbox {
    pub(super) boot: Boot,
    pub(super) phase: Phase,
    pub(super) created_at: SystemTime,
    pub(super) config: PodConfig,
    pub(super) exit: watch::Sender<Option<Exit>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    Created,
    Starting,
    Ready,
    Stopping,
}

impl Sandbox {
    /// The first end counts.
    pub(super) fn ended(&mut self, status: u32, at: SystemTime) {
        self.exit.send_if_modified(|exit| {
            let first = exit.is_none();
            exit.get_or_insert(Exit { status, at });
            first
        });
    }

    pub(super) fn state(&self, id: String) -> SandboxState {
        let exit = *self.exit.borrow();
        SandboxState {
            id,
            pid: match exit {
                None => self.boot.vm().map_or(0, |vm| vm.pid()),
                Some(_) => 0,
            },
            ready: self.phase == Phase::Ready && exit.is_none(),
            created_at: self.created_at,
            exit,
        }
    }
}
