//! What an operator may know of the pod, and what is kept of one that failed. Neither has environments, arguments,
//! specifications or values of annotations in it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use serde_json::json;
use slog::{info, warn};

use super::handle::Inspection;
use super::{Pod, Stage};
use crate::asked::config::keys;
use crate::asked::pod_name::PodName;
use crate::error::Error;
use crate::log::rfc3339;
use crate::node::remains::Remains;

impl Pod {
    /// The pod is in another state from now on, which the log tells.
    pub(super) fn enter(&mut self, state: &'static str) {
        let now = SystemTime::now();
        let after = now.duration_since(self.since).unwrap_or_default();
        let pod = self.setup.journal.pod.as_ref().map(PodName::full);
        info!(self.setup.logger, "the sandbox is {}", state;
            "sandbox" => &self.setup.id, "namespace" => &self.setup.namespace, "pod" => pod,
            "was" => self.state, "for_ms" => u64::try_from(after.as_millis()).unwrap_or(u64::MAX));
        self.state = state;
        self.since = now;
    }

    pub(super) fn inspection(&self) -> Inspection {
        let mut containers: Vec<_> = self
            .containers
            .iter()
            .map(|(id, container)| (id.clone(), container.clone()))
            .collect();
        containers.sort_by(|(a, _), (b, _)| a.cmp(b));
        Inspection {
            namespace: self.setup.namespace.clone(),
            id: self.setup.id.clone(),
            pod: self.setup.journal.pod.clone(),
            state: self.state,
            since: self.since,
            config: self.in_force.clone(),
            netns: self.setup.journal.netns.clone(),
            cgroup: self.setup.journal.cgroup.clone(),
            failure: self.failed(),
            vm: match &self.stage {
                Stage::Up(boot) => boot.vm(),
                _ => None,
            },
            containers,
        }
    }

    /// Why the pod is no use, if it is none: its VM did not come up or has ended by itself, or it was refused.
    fn failed(&self) -> Option<Error> {
        let of_vm = match &self.stage {
            Stage::Up(boot) => boot.failure(),
            _ => None,
        };
        of_vm.or_else(|| self.failure.clone())
    }

    /// To be called before the pod is stopped: what is to be kept of it, if it failed. The returned function blocks.
    pub(super) fn last_account(&mut self) -> Option<impl FnOnce() + Send + 'static> {
        let failure = self.failed()?;
        self.failure = Some(failure.clone());
        let at = SystemTime::now();
        let mut account = json!({
            "namespace": self.setup.namespace,
            "id": self.setup.id,
            "pod": self.setup.journal.pod,
            "reason": failure.message,
            "code": failure.kind.name(),
            "at": rfc3339(at),
            "version": env!("CARGO_PKG_VERSION"),
            "shim": program(std::process::id()),
            "config": self.in_force.as_ref().map(keys::in_force),
            "timeline": self.timeline,
            "journal": self.setup.journal,
        });
        let remains = Remains::beside(self.setup.state.base());
        let (log, logger) = (Arc::clone(&self.setup.log), self.setup.logger.clone());
        Some(move || {
            // With what the end itself has left in it.
            account["log"] = log.from(0).into_iter().map(|line| line.text).collect();
            if let Err(error) = remains.keep(at, failure.kind.name(), &account) {
                warn!(logger, "nothing is kept of this failure"; "error" => %error);
            }
        })
    }
}

/// The binary that a process runs, which says what version of Brig it is.
fn program(pid: u32) -> Option<PathBuf> {
    std::fs::read_link(format!("/proc/{pid}/exe")).ok()
}
