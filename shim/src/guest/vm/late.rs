//! Which interfaces of its network namespace a VM has, and which have come since.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use crate::error::{Error, Result};
use crate::node::network::{self, PodNetwork};

/// Where interfaces may appear, and which the guest has.
#[derive(Debug)]
pub(super) struct Late {
    netns: PathBuf,
    /// Queue pairs of an interface.
    queues: usize,
    known: Mutex<Vec<[u8; 6]>>,
}

impl Late {
    /// The VM has the interfaces of these addresses from its launch.
    pub(super) fn new(netns: PathBuf, queues: usize, known: Vec<[u8; 6]>) -> Self {
        Self {
            netns,
            queues,
            known: Mutex::new(known),
        }
    }

    /// The guest has the interface of this address now.
    pub(super) fn plugged(&self, mac: [u8; 6]) {
        self.known().push(mac);
    }

    fn known(&self) -> std::sync::MutexGuard<'_, Vec<[u8; 6]>> {
        // A list of addresses is whole whatever its holder did.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is there that the guest does not have yet.
    ///
    /// # Errors
    /// As of [`network::find_new`].
    pub(super) async fn find(&self) -> Result<PodNetwork> {
        let (netns, queues) = (self.netns.clone(), self.queues);
        let known = self.known().clone();
        let found = tokio::task::spawn_blocking(move || network::find_new(&netns, queues, &known));
        let worker = |error| Error::internal(format!("the network worker ended: {error}"));
        Ok(found.await.map_err(worker)??)
    }
}
