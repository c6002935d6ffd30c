//! What of its network namespace a VM has, and what has come since.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::error::Result;
use crate::node::network::{
    self, GuestNetwork, Known, NetworkError, PodNetwork, Ruleset, UNTOUCHED_FILTER, Wanted,
};

/// Where a network may appear, and what of it the guest has.
#[derive(Debug)]
pub(super) struct Late {
    netns: PathBuf,
    /// How it is to be taken.
    pub(super) wanted: Wanted,
    known: Mutex<Known>,
    /// The generation of the guest's own ruleset, as it was loaded last.
    guest_filter: AtomicU32,
    /// Later changes of the packet filter are followed.
    followed: AtomicBool,
}

impl Late {
    /// The VM has this from its launch.
    pub(super) fn new(netns: PathBuf, wanted: Wanted, known: Known) -> Self {
        Self {
            netns,
            wanted,
            known: Mutex::new(known),
            guest_filter: AtomicU32::new(UNTOUCHED_FILTER),
            followed: AtomicBool::new(false),
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

    /// The guest says that its ruleset has this generation after it loaded one; 0: it had none to load.
    pub(super) fn loaded(&self, generation: u32) {
        if generation != 0 {
            self.guest_filter.store(generation, Ordering::Relaxed);
        }
    }

    /// What was said last by [`Self::loaded`].
    pub(super) fn guest_filter(&self) -> u32 {
        self.guest_filter.load(Ordering::Relaxed)
    }

    /// Says whether changes of the packet filter are followed from now on; returns what was said before.
    pub(super) fn follow(&self, followed: bool) -> bool {
        self.followed.swap(followed, Ordering::Relaxed)
    }

    /// A socket that tells of changes of the packet filter, and whether it has changed already.
    ///
    /// # Errors
    /// As of [`network::watch_filter`].
    pub(super) async fn watch_filter(&self) -> Result<Option<(OwnedFd, bool)>> {
        let (netns, given) = (self.netns.clone(), self.known().filter);
        let watching = tokio::task::spawn_blocking(move || network::watch_filter(&netns, given));
        Ok(watching.await??)
    }

    /// The packet filter, if the guest has another.
    ///
    /// # Errors
    /// As of [`network::changed_filter`].
    pub(super) async fn changed_filter(&self) -> Result<Option<(Ruleset, Vec<String>)>> {
        let (netns, policy) = (self.netns.clone(), self.wanted.netfilter);
        let given = self.known().filter;
        let looking =
            tokio::task::spawn_blocking(move || network::changed_filter(&netns, policy, given));
        Ok(looking.await??)
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
        Ok(found.await??)
    }
}
