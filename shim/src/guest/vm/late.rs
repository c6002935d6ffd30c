//! What of its network namespace a VM has, and what has come since.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use crate::error::{Error, Result};
use crate::node::network::{self, GuestNetwork, Known, NetworkError, PodNetwork, Wanted};

/// Where a network may appear, and what of it the guest has.
#[derive(Debug)]
pub(super) struct Late {
    netns: PathBuf,
    /// How it is to be taken.
    pub(super) wanted: Wanted,
    known: Mutex<Known>,
}

impl Late {
    /// The VM has this from its launch.
    pub(super) fn new(netns: PathBuf, wanted: Wanted, known: Known) -> Self {
        Self {
            netns,
            wanted,
            known: Mutex::new(known),
        }
    }

    /// The guest has the interface of this address now.
    pub(super) fn plugged(&self, mac: [u8; 6]) {
        self.known().interfaces.push(mac);
    }

    /// The guest has this state of the packet filter now.
    pub(super) fn filtered(&self, generation: u32) {
        self.known().filter = Some(generation);
    }

    fn known(&self) -> std::sync::MutexGuard<'_, Known> {
        // What is known is whole whatever its holder did.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is there that the guest does not have yet.
    ///
    /// # Errors
    /// As of [`network::find_new`].
    pub(super) async fn find(&self) -> Result<(PodNetwork, GuestNetwork)> {
        let (netns, wanted) = (self.netns.clone(), self.wanted);
        let known = self.known().clone();
        let found = tokio::task::spawn_blocking(move || {
            let found = network::find_new(&netns, wanted, &known)?;
            let mut guest = found.guest();
            if !found.interfaces.is_empty() {
                guest.inherit(network::inherited(&netns, &guest.interface_names())?);
            }
            Ok::<_, NetworkError>((found, guest))
        });
        let worker = |error| Error::internal(format!("the network worker ended: {error}"));
        Ok(found.await.map_err(worker)??)
    }
}
