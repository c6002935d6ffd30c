//! What containers' limits say of the node itself, where their VMM works for them: of its block devices, on which their files
//! lie, and of the CPUs and the memory that the VM runs on. It holds for the pod's cgroup, which the VMM is in.
//!
//! A VMM does nothing in the name of one container, so the pod has what its containers together amount to.

mod container;
mod cpuset;
mod io;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use slog::{Logger, warn};
use tokio::task::AbortHandle;

use crate::asked::spec::{OnNode, Throttles};
use crate::error::{Error, Result};
use crate::node::cgroup::{Cgroup, Taken};
use crate::node::disk::Numbers;
use container::{Container, Wanted};
use cpuset::Lists;

/// The limits of one pod. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct NodeLimits(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    cgroup: OnceLock<Cgroup>,
    containers: Mutex<BTreeMap<String, Container>>,
    /// What the cgroup has. Held while it is changed, which may block.
    applied: Mutex<Applied>,
    /// Something was written there.
    touched: AtomicBool,
    /// Writes it again when the cgroup has lost it. Only where there is something to lose.
    following: OnceLock<AbortHandle>,
}

/// What was written to a pod's cgroup.
#[derive(Debug, Default)]
struct Applied {
    throttles: Throttles,
    lists: Lists,
}

impl Drop for Inner {
    fn drop(&mut self) {
        if let Some(following) = self.following.get() {
            following.abort();
        }
    }
}

impl NodeLimits {
    fn containers(&self) -> MutexGuard<'_, BTreeMap<String, Container>> {
        let containers = &self.0.containers;
        containers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn applied(&self) -> MutexGuard<'_, Applied> {
        let applied = &self.0.applied;
        applied.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The pod's cgroup, once it is known.
    pub fn is_in(&self, cgroup: Cgroup) {
        let _ = self.0.cgroup.set(cgroup);
    }

    /// A container is about to be made, which was given these disks: from now on its limits hold. They are taken back by
    /// [`gone`](Self::gone), also when this fails.
    ///
    /// # Errors
    /// `InvalidArgument` for what the node does not have, `FailedPrecondition` where it cannot limit any of it.
    pub async fn admit(
        &self,
        id: &str,
        asked: OnNode,
        disks: BTreeSet<Numbers>,
        cgroup: Option<Cgroup>,
        logger: &Logger,
    ) -> Result<()> {
        if let Some(cgroup) = cgroup {
            self.is_in(cgroup);
        }
        let container = Container { disks, asked };
        self.containers().insert(id.to_owned(), container);
        self.apply(logger).await
    }

    /// Changes the limits of a container: `resources` is OCI's `LinuxResources` as JSON, in which what is not named stays.
    /// What else the change is of may still be refused: then it is to be [undone](Changed::undo).
    ///
    /// # Errors
    /// As of [`admit`](Self::admit); the limits are the old ones then.
    pub async fn update(&self, id: &str, resources: &[u8], logger: &Logger) -> Result<Changed> {
        let changed = OnNode::changed(resources)?;
        if changed.is_empty() {
            return Ok(Changed(None));
        }
        let old = {
            let mut containers = self.containers();
            let container = containers.entry(id.to_owned()).or_default();
            let old = container.clone();
            container.asked.take(changed);
            old
        };
        let undo = Changed(Some((self.clone(), id.to_owned(), old, logger.clone())));
        match self.apply(logger).await {
            Ok(()) => Ok(undo),
            Err(error) => {
                undo.undo().await;
                Err(error)
            }
        }
    }

    /// The container has gone, or was not made.
    pub fn gone(&self, id: &str, logger: &Logger) {
        if self.containers().remove(id).is_none() {
            return;
        }
        let (limits, logger) = (self.clone(), logger.clone());
        tokio::spawn(async move {
            if let Err(error) = limits.apply(&logger).await {
                warn!(logger, "limits of the node's devices and CPUs are left"; "error" => %error);
            }
        });
    }

    /// Has the cgroup be as all containers want it. One whose containers want nothing is not touched.
    async fn apply(&self, logger: &Logger) -> Result<()> {
        if self.wanted().is_nothing() && !self.0.touched.load(Ordering::Acquire) {
            return Ok(());
        }
        let limits = self.clone();
        tokio::task::spawn_blocking(move || limits.write()).await??;
        self.follow(logger);
        Ok(())
    }

    fn wanted(&self) -> Wanted {
        Wanted::by(self.containers().values())
    }

    /// Blocking.
    fn write(&self) -> Result<()> {
        let mut applied = self.applied();
        let wanted = self.wanted();
        let cgroup = self.0.cgroup.get().ok_or_else(|| {
            Error::state(
                "linux.resources limits devices or CPUs of the node, and the pod has no cgroup there: it needs a cgroupsPath",
            )
        })?;
        self.0.touched.store(true, Ordering::Release);
        let Applied { throttles, lists } = &mut *applied;
        io::apply(cgroup, throttles, &wanted.throttles)?;
        lists.apply(cgroup, &wanted)
    }

    /// Writes what the cgroup should have, as it may have lost it. Blocking.
    fn write_again(&self) -> Result<()> {
        let applied = self.applied();
        let Some(cgroup) = self.0.cgroup.get() else {
            return Ok(());
        };
        io::apply(cgroup, &mut Throttles::new(), &applied.throttles)?;
        applied.lists.write(cgroup)
    }

    /// From now on who takes a controller from the cgroup (systemd does, whenever the limits of the pod's slice change, as it
    /// knows nobody in there) does not take the limits for good.
    fn follow(&self, logger: &Logger) {
        if self.0.following.get().is_some() {
            return;
        }
        let Some(cgroup) = self.0.cgroup.get() else {
            return;
        };
        let taken = match Taken::watch(cgroup) {
            Ok(taken) => taken,
            Err(error) => {
                warn!(logger, "limits of the node's devices and CPUs may be lost when the node's cgroups change"; "reason" => %error);
                return;
            }
        };
        let task = tokio::spawn(follow(Arc::downgrade(&self.0), taken, logger.clone()));
        if let Err(second) = self.0.following.set(task.abort_handle()) {
            second.abort();
        }
    }
}

async fn follow(limits: Weak<Inner>, taken: Taken, logger: Logger) {
    while taken.changed().await.is_ok() {
        let Some(limits) = limits.upgrade().map(NodeLimits) else {
            return;
        };
        let written = tokio::task::spawn_blocking(move || limits.write_again()).await;
        if let Ok(Err(error)) = written {
            warn!(logger, "limits of the node's devices and CPUs do not hold"; "error" => %error);
        }
    }
}

/// A change that was made.
#[derive(Debug)]
#[must_use = "the rest of the change may fail"]
pub struct Changed(Option<(NodeLimits, String, Container, Logger)>);

impl Changed {
    /// What was possible before is so again. A container that has gone meanwhile stays away.
    pub async fn undo(self) {
        let Some((limits, id, old, logger)) = self.0 else {
            return;
        };
        if let Some(container) = limits.containers().get_mut(&id) {
            *container = old;
        }
        let _ = limits.apply(&logger).await;
    }
}
