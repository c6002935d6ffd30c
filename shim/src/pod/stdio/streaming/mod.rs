//! Stdio by containerd's streaming service, for handlers with `io_type = "streaming"`: containerd dials the
//! pod's socket once for each stream and says its id, before or after a Create or Exec names that id.
//!
//! Unlike those of FIFOs, these bytes pass through the shim: the VMM has one end of a pipe, a task here the
//! other (`output`, `input`). A stream belongs to its process, not to its client: one that goes away may come
//! back, as a restarted containerd does, and until then the pipe holds the data.
//!
//! containerd is trusted to mean well, not to be right: clients that nobody claims are bounded in number, and one
//! that comes back to a stream that has ended is told the end.

mod connection;
mod input;
mod output;
pub mod uri;
pub mod wire;

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use std::time::Duration;

use tokio::sync::oneshot::error::TryRecvError;
use tokio::sync::{mpsc, oneshot};
use ttrpc::Code;

use crate::error::{Error, Result};
pub use connection::Connection;
pub use input::Input;
pub use output::Output;

/// Clients that may wait for a process to name their stream: three for each container of a large pod.
const MAX_WAITING: usize = 192;
/// Streams that have ended and are remembered, for clients that come back.
const MAX_ENDED: usize = 256;
/// How long a client may take to close its side once it was told the end.
const CLOSING: Duration = Duration::from_secs(5);
/// Clients of one stream that have not been looked at yet.
const INBOX: usize = 2;

type Inbox = mpsc::Sender<Connection>;

/// What is known of a stream.
#[derive(Debug)]
enum Slot {
    /// A client is there; it is told who takes it.
    Waiting(oneshot::Sender<Inbox>),
    /// A process has the stream.
    Claimed(Inbox),
}

/// The pod's streams by their ids; cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Streams {
    table: Arc<Mutex<Table>>,
}

#[derive(Debug, Default)]
struct Table {
    slots: HashMap<String, Slot>,
    /// The oldest is first.
    ended: VecDeque<String>,
}

/// A stream that a process has, as long as this is there.
#[derive(Debug)]
pub struct Claim {
    streams: Streams,
    id: String,
    clients: mpsc::Receiver<Connection>,
}

impl Streams {
    /// Takes a new client in: it says its stream's id, is answered, and waits for its process.
    pub fn admit(&self, connection: Connection) {
        tokio::spawn(self.clone().settle(connection));
    }

    /// The stream of this id, for a process.
    ///
    /// # Errors
    /// `AlreadyExists` when another process has it.
    pub fn claim(&self, id: &str) -> Result<Claim> {
        let (inbox, clients) = mpsc::channel(INBOX);
        let mut table = self.table();
        if let Some(Slot::Claimed(_)) = table.slots.get(id) {
            return Err(Error::already_exists(format!(
                "the stream {id} belongs to another process already"
            )));
        }
        table.ended.retain(|ended| ended != id);
        let before = table
            .slots
            .insert(id.to_owned(), Slot::Claimed(inbox.clone()));
        drop(table);
        if let Some(Slot::Waiting(client)) = before {
            let _ = client.send(inbox);
        }
        Ok(Claim {
            streams: self.clone(),
            id: id.to_owned(),
            clients,
        })
    }

    async fn settle(self, mut client: Connection) {
        let Some(id) = client.init().await else {
            return client
                .refuse(
                    Code::INVALID_ARGUMENT,
                    "a stream begins with a StreamInit message",
                )
                .await;
        };
        if id.is_empty() || id.len() > uri::MAX_ID {
            let sentence = format!("a stream's id has 1 to {} bytes", uri::MAX_ID);
            return client.refuse(Code::INVALID_ARGUMENT, &sentence).await;
        }
        let Some(place) = self.place(&id) else {
            let sentence =
                format!("{MAX_WAITING} streams wait already for a container that names them");
            return client.refuse(Code::RESOURCE_EXHAUSTED, &sentence).await;
        };
        if client.acknowledge().await.is_err() {
            return self.leave(&id, place);
        }
        if let Place::Over = place {
            return client.end(CLOSING).await;
        }
        if let Some(inbox) = self.wait(&id, place, &mut client).await {
            // A stream that has ended meanwhile gives it back.
            if let Err(late) = inbox.send(client).await {
                late.0.end(CLOSING).await;
            }
        }
    }

    /// Where a client of this stream goes; `None` when too many wait. An older client that still waits for
    /// the same stream has been replaced.
    fn place(&self, id: &str) -> Option<Place> {
        let mut table = self.table();
        if table.ended.iter().any(|ended| ended == id) {
            return Some(Place::Over);
        }
        let waiting = |slot: &&Slot| matches!(slot, Slot::Waiting(_));
        let full = table.slots.values().filter(waiting).count() >= MAX_WAITING;
        let (sender, claimed) = oneshot::channel();
        match table.slots.entry(id.to_owned()) {
            Entry::Occupied(mut slot) => match slot.get_mut() {
                Slot::Claimed(inbox) => return Some(Place::Taken(inbox.clone())),
                slot @ Slot::Waiting(_) => *slot = Slot::Waiting(sender),
            },
            Entry::Vacant(_) if full => return None,
            Entry::Vacant(slot) => drop(slot.insert(Slot::Waiting(sender))),
        }
        Some(Place::Waiting(claimed))
    }

    /// Waits until a process claims the stream; `None` when the client goes or another replaces it.
    async fn wait(&self, id: &str, place: Place, client: &mut Connection) -> Option<Inbox> {
        let mut claimed = match place {
            Place::Taken(inbox) => return Some(inbox),
            Place::Waiting(claimed) => claimed,
            Place::Over => return None,
        };
        loop {
            tokio::select! {
                biased;
                inbox = &mut claimed => return inbox.ok(),
                received = client.receive() => {
                    // Window for output may come early; data may not, since no leave was given.
                    if received != connection::Received::Window {
                        self.leave(id, Place::Waiting(claimed));
                        return None;
                    }
                }
            }
        }
    }

    /// Forgets a client that waited.
    fn leave(&self, id: &str, place: Place) {
        let Place::Waiting(mut claimed) = place else {
            return;
        };
        let mut table = self.table();
        // Still open and empty: the slot is this client's.
        if matches!(claimed.try_recv(), Err(TryRecvError::Empty)) {
            table.slots.remove(id);
        }
    }

    /// Consistent whenever the lock is free.
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A client's place.
#[derive(Debug)]
enum Place {
    Waiting(oneshot::Receiver<Inbox>),
    Taken(Inbox),
    /// The stream has ended.
    Over,
}

impl Claim {
    /// The next client. May be dropped while it waits.
    async fn client(&mut self) -> Connection {
        match self.clients.recv().await {
            Some(client) => client,
            // Not before the slot is gone, which goes with the claim.
            None => std::future::pending().await,
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut table = self.streams.table();
        table.slots.remove(&self.id);
        if table.ended.len() >= MAX_ENDED {
            table.ended.pop_front();
        }
        table.ended.push_back(std::mem::take(&mut self.id));
    }
}

#[cfg(test)]
mod tests;
