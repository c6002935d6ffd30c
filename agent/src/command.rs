//! What a container's task is asked, by requests and by the tasks that work for it.
use std::os::fd::OwnedFd;

use brig_agent_protocol::agent::{self, StatsResponse};
use tokio::sync::mpsc;

use crate::{
    error::Result,
    process::{Process, Reply},
    reaper::Exit,
    spec::{self, Resources},
};

/// What the container's task is asked.
pub enum Command {
    /// Prepare another process.
    CreateExec {
        exec_id: String,
        process: Box<spec::Process>,
        stdio: agent::Stdio,
        reply: Reply<()>,
    },
    /// Let a prepared process run. An empty `exec_id` is the init process, here and below.
    Start { exec_id: String, reply: Reply<u32> },
    /// Send a signal to one process or to all.
    Signal {
        exec_id: String,
        signal: i32,
        all: bool,
        reply: Reply<()>,
    },
    /// Set a terminal's size in characters.
    Resize {
        exec_id: String,
        rows: u32,
        columns: u32,
        reply: Reply<()>,
    },
    /// Close a process's stdin.
    CloseStdin { exec_id: String, reply: Reply<()> },
    /// Forget an ended process, or remove the container.
    Delete {
        exec_id: String,
        reply: Reply<agent::ProcessExited>,
    },
    /// The pids of all processes.
    List { reply: Reply<Vec<u32>> },
    /// Freeze or thaw.
    Freeze { frozen: bool, reply: Reply<()> },
    /// Change limits.
    Update {
        resources: Box<Resources>,
        reply: Reply<()>,
    },
    /// Its init process, whose pid namespace can be joined while it runs.
    PidNamespace { reply: Reply<OwnedFd> },
    /// Read statistics.
    Stats { reply: Reply<StatsResponse> },
    /// From the task that prepared an exec.
    Prepared {
        exec_id: String,
        result: Result<Process>,
        reply: Reply<()>,
    },
    /// From the task that started a process.
    Started { exec_id: String, result: Result<()> },
    /// From the reaper.
    Exited {
        exec_id: String,
        serial: u64,
        exit: Exit,
    },
    /// From the task that removed the container.
    Removed {
        exit: Exit,
        result: Result<()>,
        reply: Reply<agent::ProcessExited>,
    },
    /// The end of init has waited long enough for those of the container's other processes.
    LastExit,
    /// memory.events changed.
    MemoryEvent,
    /// A device has gone, and its numbers may be another one's soon: kind and numbers of its nodes.
    Revoke { nodes: Vec<(String, (i64, i64))> },
}

/// Sends commands to a container's task.
pub type Mailbox = mpsc::UnboundedSender<Command>;
