//! What happens to a pod's tasks, in containerd's terms, and where it is told. The pod does not know who
//! listens.

use std::fmt;
use std::sync::Arc;

use containerd_shim_protos::api::Mount;

use crate::pod::process::{Exit, Io};

/// What happened to a task; each becomes one containerd event.
#[derive(Debug, Clone, PartialEq)]
pub enum TaskEvent {
    /// A container was created.
    Create {
        /// Container id.
        id: String,
        /// Its bundle.
        bundle: String,
        /// Its root file system, as containerd gave it.
        rootfs: Vec<Mount>,
        /// Its stdio, as containerd gave it.
        io: Io,
        /// The VMM's pid.
        pid: u32,
    },
    /// Its init process runs.
    Start {
        /// Container id.
        id: String,
        /// The VMM's pid.
        pid: u32,
    },
    /// An exec was added.
    ExecAdded {
        /// Container id.
        id: String,
        /// Exec id.
        exec_id: String,
    },
    /// An exec runs.
    ExecStarted {
        /// Container id.
        id: String,
        /// Exec id.
        exec_id: String,
        /// The VMM's pid.
        pid: u32,
    },
    /// A process ended; for init the exec id is the container's.
    Exit {
        /// Container id.
        id: String,
        /// Exec id, or the container id.
        process: String,
        /// The VMM's pid.
        pid: u32,
        /// How it ended.
        exit: Exit,
    },
    /// A container was deleted.
    Delete {
        /// Container id.
        id: String,
        /// The VMM's pid.
        pid: u32,
        /// How its init process ended.
        exit: Exit,
    },
    /// The guest's kernel killed a process of the container for memory.
    Oom {
        /// Container id.
        id: String,
    },
    /// A container was paused.
    Paused {
        /// Container id.
        id: String,
    },
    /// A container was resumed.
    Resumed {
        /// Container id.
        id: String,
    },
}

/// Where a pod tells its events; cheap to clone.
#[derive(Clone)]
pub struct Events(Arc<dyn Fn(TaskEvent) + Send + Sync>);

impl Events {
    /// Each event is given to `listener`, in order. It must not block.
    pub fn to(listener: impl Fn(TaskEvent) + Send + Sync + 'static) -> Self {
        Self(Arc::new(listener))
    }

    /// Tells an event.
    pub fn publish(&self, event: TaskEvent) {
        (self.0)(event);
    }
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Events").finish_non_exhaustive()
    }
}
