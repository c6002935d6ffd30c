//! What of its network namespace a VM has, and what has come since.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use brig_hypervisor::control::NetConfig;

use crate::error::Result;
use crate::node::network::{
    self, GuestNetwork, Known, NetworkError, PodNetwork, Ruleset, UNTOUCHED_FILTER, Wanted,
};

/// An interface that the guest has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Interface {
    /// Its Ethernet address.
    pub mac: [u8; 6],
    /// The node's vhost-net moves its frames, and not the VMM.
    pub by_vhost: bool,
}

impl Interface {
    /// That of a device.
    pub(super) fn of(net: &NetConfig) -> Self {
        Self {
            mac: net.mac,
            by_vhost: net.by_vhost(),
        }
    }
}

/// What of its namespace the guest has.
#[derive(Debug)]
struct Had {
    interfaces: Vec<Interface>,
    /// Their numbers in the namespace, and their names in the guest.
    numbered: Vec<(u32, String)>,
    /// The state of the packet filter that it was given.
    filter: Option<u32>,
}

/// Where a network may appear, and what of it the guest has.
#[derive(Debug)]
pub(super) struct Late {
    netns: PathBuf,
    /// How it is to be taken.
    pub(super) wanted: Wanted,
    had: Mutex<Had>,
    /// The generation of the guest's own ruleset, as it was loaded last.
    guest_filter: AtomicU32,
    /// Later changes of the packet filter are followed.
    followed: AtomicBool,
}

impl Late {
    /// The VM has this from its launch.
    pub(super) fn new(
        netns: PathBuf,
        wanted: Wanted,
        (interfaces, numbered): (Vec<Interface>, Vec<(u32, String)>),
        filter: Option<u32>,
    ) -> Self {
        Self {
            netns,
            wanted,
            had: Mutex::new(Had {
                interfaces,
                numbered,
                filter,
            }),
            guest_filter: AtomicU32::new(UNTOUCHED_FILTER),
            followed: AtomicBool::new(false),
        }
    }

    /// The guest has this interface now.
    pub(super) fn plugged(&self, interface: Interface) {
        self.had().interfaces.push(interface);
    }

    /// These are the numbers in the namespace of interfaces that the guest has now.
    pub(super) fn numbered(&self, interfaces: Vec<(u32, String)>) {
        self.had().numbered.extend(interfaces);
    }

    /// The interfaces that the guest has.
    pub(super) fn interfaces(&self) -> Vec<Interface> {
        self.had().interfaces.clone()
    }

    /// The guest has this state of the packet filter now.
    pub(super) fn filtered(&self, generation: u32) {
        self.had().filter = Some(generation);
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
        let (netns, given) = (self.netns.clone(), self.had().filter);
        let watching = tokio::task::spawn_blocking(move || network::watch_filter(&netns, given));
        Ok(watching.await??)
    }

    /// The packet filter, if the guest has another.
    ///
    /// # Errors
    /// As of [`network::changed_filter`].
    pub(super) async fn changed_filter(&self) -> Result<Option<(Ruleset, Vec<String>)>> {
        let (netns, policy) = (self.netns.clone(), self.wanted.netfilter);
        let (given, interfaces) = {
            let had = self.had();
            (had.filter, had.numbered.clone())
        };
        let looking = tokio::task::spawn_blocking(move || {
            network::changed_filter(&netns, &interfaces, policy, given)
        });
        Ok(looking.await??)
    }

    fn had(&self) -> std::sync::MutexGuard<'_, Had> {
        // It is whole whatever its holder did.
        self.had.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is there that the guest does not have yet.
    ///
    /// # Errors
    /// As of [`network::find_new`].
    pub(super) async fn find(&self) -> Result<(PodNetwork, GuestNetwork)> {
        let (netns, wanted) = (self.netns.clone(), self.wanted);
        let known = {
            let had = self.had();
            Known {
                interfaces: had.interfaces.iter().map(|one| one.mac).collect(),
                filter: had.filter,
            }
        };
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
