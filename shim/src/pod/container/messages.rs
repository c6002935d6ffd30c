//! What containerd may ask of a container, and the answers.

use brig_agent_protocol::agent::StatsResponse;
use tokio::sync::oneshot;

use crate::error::Result;
use crate::pod::process::{Exit, Io, Phase};

/// Where an answer goes.
pub type Reply<T> = oneshot::Sender<Result<T>>;

/// A process as State tells of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessState {
    /// The bundle.
    pub bundle: String,
    /// The VMM's pid.
    pub pid: u32,
    /// Where the process is.
    pub phase: Phase,
    /// Its container is paused.
    pub paused: bool,
    /// Its stdio.
    pub io: Io,
}

/// The answer to Delete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deleted {
    /// The VMM's pid.
    pub pid: u32,
    /// How it ended.
    pub exit: Exit,
}

/// Requests of containerd to one container. `exec_id` is empty for the init process.
#[derive(Debug)]
#[allow(missing_docs)]
pub enum Request {
    State {
        exec_id: String,
        reply: Reply<ProcessState>,
    },
    Start {
        exec_id: String,
        reply: Reply<u32>,
    },
    Delete {
        exec_id: String,
        reply: Reply<Deleted>,
    },
    Kill {
        exec_id: String,
        signal: u32,
        all: bool,
        reply: Reply<()>,
    },
    Exec {
        exec_id: String,
        io: Io,
        process: Vec<u8>,
        reply: Reply<()>,
    },
    ResizePty {
        exec_id: String,
        rows: u32,
        columns: u32,
        reply: Reply<()>,
    },
    CloseStdin {
        exec_id: String,
        reply: Reply<()>,
    },
    Pause {
        reply: Reply<()>,
    },
    Resume {
        reply: Reply<()>,
    },
    Update {
        resources: Vec<u8>,
        reply: Reply<()>,
    },
    Stats {
        reply: Reply<StatsResponse>,
    },
    Pids {
        reply: Reply<Vec<Listed>>,
    },
    Wait {
        exec_id: String,
        reply: Reply<oneshot::Receiver<Exit>>,
    },
}

/// One process in a container; an exec's own process has its id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// The container's on the node: a guest's numbers would name strangers there.
    pub pid: u32,
    /// The exec it is the process of.
    pub exec_id: Option<String>,
}
