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

/// Tells the host of events. What a guest can cause is bounded: one exit for each process the host started,
/// and one OOM event until the subscriber has taken the one before.
#[derive(Clone)]
pub struct Sender(UnboundedSender<Event>);

impl Sender {
    /// A process has ended.
    pub fn exited(&self, id: &str, exec_id: &str, pid: u32, exit: Exit) {
        let exit = event::Exit {
            id: id.into(),
            exec_id: exec_id.into(),
            exit: Some(exit_message(pid, exit)).into(),
            ..Default::default()
        };
        self.send(event::Kind::Exit(exit));
    }

    /// The kernel killed a process of the container for memory.
    pub fn oom(&self, id: &str) {
        self.send(event::Kind::Oom(event::Oom {
            id: id.into(),
            ..Default::default()
        }));
    }

    fn send(&self, kind: event::Kind) {
        // The receiver goes only with the connection, and then the guest powers off.
        let _ = self.0.send(Event {
            kind: Some(kind),
            ..Default::default()
        });
    }
}

/// The queue. It ends when it was told to and nobody has a sender any more.
pub struct Events {
    /// None once there are no more.
    sender: Mutex<Option<Sender>>,
    rx: Mutex<Option<UnboundedReceiver<Event>>>,
}

impl Default for Events {
    fn default() -> Self {
        let (tx, rx) = unbounded_channel();
        Self {
            sender: Mutex::new(Some(Sender(tx))),
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

    /// For who has something to tell, now or later; none once there are no more events.
    pub fn sender(&self) -> Option<Sender> {
        lock(&self.sender).clone()
    }

    /// There are no more but those of who has a sender: after the last of them the subscriber gets the end.
    pub fn end(&self) {
        lock(&self.sender).take();
    }
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
