//! The pod's network on the host side: takes over the interfaces that CNI made in the pod's network
//! namespace and hands them to the VMM as taps (DESIGN section 8).
//!
//! The interfaces keep their addresses, because containerd and the kubelet read the pod's figures there.
//! Every frame they receive is redirected to a tap, and every frame of the tap back, by the kernel's traffic
//! control at ingress: before the namespace's own protocol stack sees it, so that the guest alone answers.
//! The taps are not persistent and die with the last descriptor; only the redirection remains until
//! [`undo`] or the end of the namespace.
//!
//! Trusted: the namespace's path and what the node's CNI plug-ins put there. Blocking code, no program is run.

mod error;
mod interface;
mod namespace;
mod netlink;
mod redirect;
mod scan;
mod tap;
#[cfg(test)]
pub(crate) mod tests;

use std::os::fd::OwnedFd;
use std::path::Path;

use brig_agent_protocol::agent;
use brig_hypervisor::control::NetConfig;

use error::failed;
pub use error::{MAX_INTERFACES, NetworkError};
pub use interface::Prefix;

use interface::{Link, mac_text};
pub(crate) use namespace::Namespace;
use netlink::Netlink;
use scan::Layout;

/// The most queue pairs of all interfaces together: a tap descriptor each, of the 64 that one control message
/// carries, and two interrupt vectors each.
const MAX_PAIRS: usize = 32;
/// The most queue pairs of one interface, as the VMM takes them.
const MAX_PAIRS_EACH: usize = 16;

/// One interface of the pod, behind a tap.
#[derive(Debug)]
pub struct TapInterface {
    /// Its name in the pod.
    pub name: String,
    /// Its Ethernet address, which is the guest's too.
    pub mac: [u8; 6],
    /// Maximum transmission unit in bytes.
    pub mtu: u16,
    /// One descriptor for each queue pair. The tap exists as long as one of them is open.
    pub taps: Vec<OwnedFd>,
    /// IPv4 and IPv6 addresses, the first one of a family being the preferred one.
    pub addresses: Vec<Prefix>,
}

impl TapInterface {
    /// The VMM's network device. The tap descriptors are appended to `fds`, which travel with the message.
    pub fn device(self, fds: &mut Vec<OwnedFd>) -> NetConfig {
        let first = fds.len();
        fds.extend(self.taps);
        NetConfig {
            taps: (first..fds.len()).collect(),
            mac: self.mac,
            mtu: self.mtu,
        }
    }
}

/// A pod's network, ready for a VM.
#[derive(Debug, Default)]
pub struct PodNetwork {
    /// In the order in which the guest shall number them.
    pub interfaces: Vec<TapInterface>,
    /// The main routing table; routes that others depend on come first.
    pub routes: Vec<agent::Route>,
    /// Permanent neighbours.
    pub neighbours: Vec<agent::Neighbour>,
    /// One sentence for each thing in the namespace that the guest does not get.
    pub left_out: Vec<String>,
}

/// What the guest is told about its network.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GuestNetwork {
    /// Interfaces.
    pub interfaces: Vec<agent::Interface>,
    /// Routes.
    pub routes: Vec<agent::Route>,
    /// Neighbours.
    pub neighbours: Vec<agent::Neighbour>,
    /// One sentence for each thing that it does not get, for the log.
    pub left_out: Vec<String>,
}

impl PodNetwork {
    /// What the agent is to set up.
    #[must_use]
    pub fn guest(&self) -> GuestNetwork {
        let interfaces = self.interfaces.iter().map(|interface| agent::Interface {
            name: interface.name.clone(),
            mac: mac_text(&interface.mac),
            mtu: interface.mtu.into(),
            addresses: interface.addresses.iter().map(Prefix::to_string).collect(),
            ..agent::Interface::default()
        });
        GuestNetwork {
            interfaces: interfaces.collect(),
            routes: self.routes.clone(),
            neighbours: self.neighbours.clone(),
            left_out: self.left_out.clone(),
        }
    }

    /// The VMM's network devices. The tap descriptors are appended to `fds`, which travel with the message.
    pub fn devices(self, fds: &mut Vec<OwnedFd>) -> Vec<NetConfig> {
        let devices = self.interfaces.into_iter();
        devices.map(|interface| interface.device(fds)).collect()
    }
}

/// Takes over the interfaces of the namespace at `path` with up to `queues` queue pairs each, normally the
/// guest's number of CPUs. What an earlier run left behind there is replaced.
///
/// # Errors
/// [`NetworkError`]; nothing is touched when the namespace is the host's or holds what a VM cannot have, and
/// what was done is undone when it fails later.
pub fn set_up(path: &Path, queues: usize) -> Result<PodNetwork, NetworkError> {
    find_new(path, queues, &[])
}

/// As [`set_up`], for the interfaces whose Ethernet addresses are not among those `known`, with their routes and
/// neighbours.
///
/// # Errors
/// As of [`set_up`]; the known interfaces stay as they are.
pub fn find_new(path: &Path, queues: usize, known: &[[u8; 6]]) -> Result<PodNetwork, NetworkError> {
    let namespace = Namespace::open(path)?;
    namespace.run(|| {
        let mut netlink =
            Netlink::open().map_err(|error| failed("open a netlink socket", error))?;
        let mut layout = Layout::read(&mut netlink)?;
        layout.leave_out_known(known);
        let queues = queue_pairs(queues, layout.links.len());
        let result = take_over(&mut netlink, &layout.links, queues);
        let interfaces = result.inspect_err(|_| {
            for link in &layout.links {
                let _ = redirect::remove(&mut netlink, link.index);
            }
        })?;
        Ok(PodNetwork {
            interfaces,
            routes: layout.routes,
            neighbours: layout.neighbours,
            left_out: layout.left_out,
        })
    })
}

/// Takes the redirection off every interface of the namespace at `path`, so that it is as CNI made it. Nothing
/// to undo, and a namespace that is gone, are no errors.
///
/// # Errors
/// [`NetworkError`].
pub fn undo(path: &Path) -> Result<(), NetworkError> {
    let namespace = match Namespace::open(path) {
        Ok(namespace) => namespace,
        Err(NetworkError::Missing { .. } | NetworkError::NotANamespace { .. }) => return Ok(()),
        Err(error) => return Err(error),
    };
    namespace.run(|| {
        let mut netlink =
            Netlink::open().map_err(|error| failed("open a netlink socket", error))?;
        let mut first = Ok(());
        for index in scan::indexes(&mut netlink)? {
            let result = redirect::remove(&mut netlink, index);
            if first.is_ok() {
                first = result;
            }
        }
        first
    })
}

fn take_over(
    netlink: &mut Netlink,
    links: &[Link],
    queues: usize,
) -> Result<Vec<TapInterface>, NetworkError> {
    let mut interfaces = Vec::new();
    for link in links {
        let tap = tap::create(queues)?;
        let index = scan::index_of(netlink, &tap.name)?;
        tap::configure(netlink, index, link.mtu)?;
        redirect::replace(netlink, link.index, index)?;
        redirect::replace(netlink, index, link.index)?;
        interfaces.push(TapInterface {
            name: link.name.clone(),
            mac: link.mac,
            mtu: link.mtu,
            taps: tap.queues,
            addresses: link.addresses.clone(),
        });
    }
    Ok(interfaces)
}

/// Queue pairs of each interface, so that all together stay within the budget.
fn queue_pairs(wanted: usize, interfaces: usize) -> usize {
    wanted
        .clamp(1, MAX_PAIRS_EACH)
        .min(MAX_PAIRS / interfaces.max(1))
        .max(1)
}
