//! The event queue: exits and OOM kills, in order, for the one subscriber.
use std::{
    sync::Mutex,
    time::{SystemTime, UNIX_EPOCH},
};

use brig_agent_protocol::agent::{Event, ProcessExited, event};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use crate::{
    error::{Error, Result},
    reaper::Exit,
    sync::lock,
};

/// Sends events. What a guest can cause is bounded: one exit for each process the host started,
/// and one OOM event until the subscriber has taken the one before.
pub struct Events {
    /// None once there are no more.
    tx: Mutex<Option<UnboundedSender<Event>>>,
    rx: Mutex<Option<UnboundedReceiver<Event>>>,
}

impl Default for Events {
    fn default() -> Self {
        let (tx, rx) = unbounded_channel();
        Self {
            tx: Mutex::new(Some(tx)),
            rx: Mutex::new(Some(rx)),
        }
    }
}

impl Events {
    /// The events from now on and those that nobody has taken.
    ///
    /// # Errors
    /// `FailedPrecondition` at the second call.
    pub fn subscribe(&self) -> Result<UnboundedReceiver<Event>> {
        let taken = lock(&self.rx).take();
        taken
            .ok_or_else(|| Error::FailedPrecondition("the events have a subscriber already".into()))
    }

    /// The word that a process's end will be told, unless there are no more events already.
    pub fn owe(&self) -> Owed {
        Owed(lock(&self.tx).clone())
    }

    /// The kernel killed a process of the container for memory.
    pub fn oom(&self, id: &str) {
        oom(lock(&self.tx).as_ref(), id);
    }

    /// There are no more but those that are owed: after the last of them the subscriber gets the end.
    pub fn end(&self) {
        lock(&self.tx).take();
    }
}

/// The end of a process that has not ended, or was not told yet.
pub struct Owed(Option<UnboundedSender<Event>>);

impl Owed {
    /// The kernel has killed a process of its container for memory.
    pub fn oom(&self, id: &str) {
        oom(self.0.as_ref(), id);
    }

    /// The process has ended.
    pub fn exited(self, id: &str, exec_id: &str, pid: u32, exit: Exit) {
        let exit = event::Exit {
            id: id.into(),
            exec_id: exec_id.into(),
            exit: Some(exit_message(pid, exit)).into(),
            ..Default::default()
        };
        send(self.0.as_ref(), event::Kind::Exit(exit));
    }
}

fn oom(tx: Option<&UnboundedSender<Event>>, id: &str) {
    let oom = event::Oom {
        id: id.into(),
        ..Default::default()
    };
    send(tx, event::Kind::Oom(oom));
}

fn send(tx: Option<&UnboundedSender<Event>>, kind: event::Kind) {
    let Some(tx) = tx else { return };
    // The receiver goes only with the connection, and then the guest powers off.
    let _ = tx.send(Event {
        kind: Some(kind),
        ..Default::default()
    });
}

/// The protocol's form of an exit.
pub fn exit_message(pid: u32, exit: Exit) -> ProcessExited {
    ProcessExited {
        pid,
        status: exit.status,
        exited_at_unix_ns: unix_ns(exit.at),
        ..Default::default()
    }
}

fn unix_ns(at: SystemTime) -> u64 {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}
