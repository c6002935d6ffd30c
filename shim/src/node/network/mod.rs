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
mod multicast;
mod namespace;
mod netfilter;
mod netlink;
mod redirect;
mod scan;
mod sysctls;
mod tap;
#[cfg(test)]
pub(crate) mod tests;
mod vhost;

use std::os::fd::OwnedFd;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use brig_agent_protocol::agent;
use brig_hypervisor::control::NetConfig;
use slog::{Logger, warn};

use crate::asked::config::{Config, Netfilter};
use error::failed;
pub use error::{MAX_INTERFACES, NetworkError};
pub use interface::{Address, Prefix};
pub use netfilter::{Ruleset, UNTOUCHED as UNTOUCHED_FILTER, heard as heard_of_filter};
pub use sysctls::{Inherited, of_node as limits_of_node};
pub use tap::is_our_name as is_our_tap;
pub use vhost::open as open_vhosts;

use interface::{Link, mac_text};
pub(crate) use namespace::Namespace;
use netlink::Netlink;
use scan::Layout;

/// The most queue pairs of all interfaces together: a tap descriptor each, of those that one control message carries, with
/// vhost-net another, and two interrupt vectors.
const MAX_PAIRS: usize = 32;
/// The most queue pairs of one interface, as the VMM takes them.
const MAX_PAIRS_EACH: usize = 16;

/// The name of the interface that every namespace has, and its number.
const LOOPBACK: &str = "lo";
const LOOPBACK_INDEX: u32 = 1;
/// How long a VM that is there may take to end: one that was killed just now.
const ENDING: Duration = Duration::from_secs(3);

/// One interface of the pod, behind a tap.
#[derive(Debug)]
pub struct TapInterface {
    /// Its number in the pod's namespace.
    pub index: u32,
    /// Its name in the pod.
    pub name: String,
    /// Its Ethernet address, which is the guest's too.
    pub mac: [u8; 6],
    /// Maximum transmission unit in bytes.
    pub mtu: u16,
    /// One descriptor for each queue pair. The tap exists as long as one of them is open.
    pub taps: Vec<OwnedFd>,
    /// One descriptor of vhost-net for each of them, if it is to move the frames.
    pub vhosts: Vec<OwnedFd>,
    /// Nobody answers for addresses there (`IFF_NOARP`).
    pub noarp: bool,
    /// IPv4 and IPv6 addresses, the first one of a family being the preferred one.
    pub addresses: Vec<Address>,
}

/// What stays with the shim of interfaces that a VM has.
#[derive(Debug, Default)]
pub struct Kept {
    /// Their numbers in the namespace, and their names in the guest.
    pub interfaces: Vec<(u32, String)>,
    /// Has those that filter receive every multicast group, as long as it is open.
    pub multicast: Option<OwnedFd>,
}

impl TapInterface {
    /// The VMM's network device. The tap descriptors are appended to `fds`, which travel with the message.
    pub fn device(self, fds: &mut Vec<OwnedFd>) -> NetConfig {
        let mut add = |descriptors| {
            let first = fds.len();
            fds.extend(descriptors);
            (first..fds.len()).collect()
        };
        NetConfig {
            taps: add(self.taps),
            vhosts: add(self.vhosts),
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
    /// Addresses that somebody has added to the loopback interface.
    pub loopback: Vec<Address>,
    /// To be kept as long as the VM lives, see [`Self::keep`].
    pub multicast: Option<OwnedFd>,
    /// The main routing table; routes that others depend on come first.
    pub routes: Vec<agent::Route>,
    /// Permanent neighbours.
    pub neighbours: Vec<agent::Neighbour>,
    /// Its packet filter.
    pub filter: Ruleset,
    /// One sentence for each thing in the namespace that the guest does not get.
    pub left_out: Vec<String>,
    /// Why vhost-net does not move the frames, if it should.
    pub without_vhost: Option<String>,
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
    /// Packet filter.
    pub filter: Ruleset,
    /// Kernel parameters that are not an interface's; see [`Self::inherit`].
    pub sysctls: Vec<agent::Sysctl>,
    /// One sentence for each thing that it does not get, for the log.
    pub left_out: Vec<String>,
    /// As [`PodNetwork::without_vhost`], for the log.
    pub without_vhost: Option<String>,
}

impl GuestNetwork {
    /// Takes over what [`inherited`] has found.
    pub fn inherit(&mut self, mut inherited: Inherited) {
        self.sysctls = inherited.general;
        for interface in &mut self.interfaces {
            let own = inherited.interfaces.remove(&interface.name);
            interface.sysctls = own.unwrap_or_default();
        }
    }

    /// Says in the log what it is not.
    pub fn log(&self, logger: &Logger) {
        for what in &self.left_out {
            warn!(logger, "the guest's network is not all of the pod's"; "left_out" => what);
        }
        if let Some(reason) = &self.without_vhost {
            warn!(logger, "the interfaces are served without vhost-net"; "reason" => reason);
        }
    }

    /// The names of its interfaces, but for the one that every guest has.
    #[must_use]
    pub fn interface_names(&self) -> Vec<String> {
        let names = self.interfaces.iter().map(|interface| &interface.name);
        names.filter(|name| *name != LOOPBACK).cloned().collect()
    }
}

impl PodNetwork {
    /// What the agent is to set up.
    #[must_use]
    pub fn guest(&self) -> GuestNetwork {
        let interfaces = self.interfaces.iter().map(|interface| agent::Interface {
            name: interface.name.clone(),
            mac: mac_text(&interface.mac),
            mtu: interface.mtu.into(),
            noarp: interface.noarp,
            addresses: interface.addresses.iter().map(Address::message).collect(),
            ..agent::Interface::default()
        });
        let loopback = (!self.loopback.is_empty()).then(|| agent::Interface {
            name: LOOPBACK.to_owned(),
            addresses: self.loopback.iter().map(Address::message).collect(),
            ..agent::Interface::default()
        });
        GuestNetwork {
            interfaces: interfaces.chain(loopback).collect(),
            routes: self.routes.clone(),
            neighbours: self.neighbours.clone(),
            filter: self.filter.clone(),
            sysctls: Vec::new(),
            left_out: self.left_out.clone(),
            without_vhost: self.without_vhost.clone(),
        }
    }

    /// What the shim keeps of it.
    pub fn keep(&mut self) -> Kept {
        let interfaces = self.interfaces.iter();
        Kept {
            interfaces: interfaces
                .map(|interface| (interface.index, interface.name.clone()))
                .collect(),
            multicast: self.multicast.take(),
        }
    }

    /// The VMM's network devices. The tap descriptors are appended to `fds`, which travel with the message.
    pub fn devices(self, fds: &mut Vec<OwnedFd>) -> Vec<NetConfig> {
        let devices = self.interfaces.into_iter();
        devices.map(|interface| interface.device(fds)).collect()
    }
}

/// What is wanted of a pod's network.
#[derive(Debug, Clone, Copy)]
pub struct Wanted {
    /// Queue pairs of each interface, normally the guest's number of CPUs.
    pub queues: usize,
    /// What becomes of its packet filter.
    pub netfilter: Netfilter,
    /// vhost-net moves the frames, where the node has it.
    pub vhost: bool,
}

impl Wanted {
    /// As a handler is configured.
    #[must_use]
    pub fn of(config: &Config) -> Self {
        Self {
            queues: config.vcpus.into(),
            netfilter: config.netfilter,
            vhost: config.vhost_net,
        }
    }
}

/// Takes over the interfaces of the namespace at `path`. What an earlier run left behind there is replaced.
///
/// # Errors
/// [`NetworkError`]; nothing is touched when the namespace is the host's or another VM's, or holds what a VM cannot have,
/// and what was done is undone when it fails later.
pub fn set_up(path: &Path, wanted: Wanted) -> Result<PodNetwork, NetworkError> {
    find_new(path, wanted, &Known::default())
}

/// What a guest has already.
#[derive(Debug, Clone, Default)]
pub struct Known {
    /// The Ethernet addresses of its interfaces.
    pub interfaces: Vec<[u8; 6]>,
    /// The state of the packet filter that it was given, if it is not to be given another.
    pub filter: Option<u32>,
}

/// As [`set_up`], for the interfaces whose Ethernet addresses are not among those `known`, with their routes and
/// neighbours.
///
/// # Errors
/// As of [`set_up`]; the known interfaces stay as they are.
pub fn find_new(path: &Path, wanted: Wanted, known: &Known) -> Result<PodNetwork, NetworkError> {
    let namespace = Namespace::open(path)?;
    namespace.run(|| {
        let mut netlink =
            Netlink::open().map_err(|error| failed("open a netlink socket", error))?;
        let mut layout = Layout::read(&mut netlink)?;
        let mut left_out = std::mem::take(&mut layout.left_out);
        let filter = filter(&layout.links, wanted.netfilter, known.filter, &mut left_out)?;
        layout.leave_out_known(&known.interfaces);
        claim(&mut netlink, &layout.links, path)?;
        let queues = queue_pairs(wanted.queues, layout.links.len());
        let result = take_over(&mut netlink, &layout.links, queues);
        let mut interfaces = result.inspect_err(|_| {
            for link in &layout.links {
                let _ = redirect::remove(&mut netlink, link.index);
            }
        })?;
        let without_vhost = match wanted.vhost {
            true => give_vhosts(&mut interfaces).err(),
            false => None,
        };
        let multicast = multicast::receive_all(&layout.links).unwrap_or_else(|error| {
            left_out.push(format!(
                "multicast groups that its containers join: the node's kernel does not let a device receive all of them: {error}"
            ));
            None
        });
        Ok(PodNetwork {
            interfaces,
            loopback: layout.loopback,
            multicast,
            without_vhost,
            routes: layout.routes,
            neighbours: layout.neighbours,
            filter,
            left_out,
        })
    })
}

/// The namespace's packet filter, or none when the guest is to keep its own.
fn filter(
    links: &[Link],
    policy: Netfilter,
    given: Option<u32>,
    left_out: &mut Vec<String>,
) -> Result<Ruleset, NetworkError> {
    if policy == Netfilter::Ignore {
        return Ok(Ruleset::default());
    }
    if let Some(generation) = given {
        // What has changed since comes by itself, see `changed_filter`.
        return Ok(Ruleset {
            generation,
            ..Ruleset::default()
        });
    }
    let interfaces = links.iter().map(|link| (link.index, link.name.as_str()));
    whole_filter(interfaces.collect(), policy, left_out)
}

/// The packet filter for a guest with these interfaces, by their numbers.
fn whole_filter(
    mut interfaces: Vec<(u32, &str)>,
    policy: Netfilter,
    left_out: &mut Vec<String>,
) -> Result<Ruleset, NetworkError> {
    interfaces.push((LOOPBACK_INDEX, LOOPBACK));
    let mut filter = netfilter::read(&interfaces)?;
    filter.decide(policy)?;
    left_out.append(&mut filter.refused);
    Ok(filter)
}

/// A socket that tells of changes of the packet filter of the namespace at `path`, to be asked by [`heard_of_filter`], and
/// whether it is in another state now than a guest has been `given`; none where the node's kernel has no packet filter.
///
/// # Errors
/// [`NetworkError`].
pub fn watch_filter(
    path: &Path,
    given: Option<u32>,
) -> Result<Option<(OwnedFd, bool)>, NetworkError> {
    Namespace::open(path)?.run(|| {
        let socket =
            netfilter::watch().map_err(|error| failed("watch the packet filter", error))?;
        Ok(socket.map(|socket| (socket, !netfilter::is_as(given))))
    })
}

/// The packet filter of the namespace at `path` for a guest with these `interfaces`, with one sentence for each thing of it
/// that is left out, unless it is in the state that a guest has been `given`. Whatever else has come into the namespace
/// since is not looked at.
///
/// # Errors
/// [`NetworkError`]; what cannot be taken, where the policy wants it.
pub fn changed_filter(
    path: &Path,
    interfaces: &[(u32, String)],
    policy: Netfilter,
    given: Option<u32>,
) -> Result<Option<(Ruleset, Vec<String>)>, NetworkError> {
    Namespace::open(path)?.run(|| {
        if netfilter::is_as(given) {
            return Ok(None);
        }
        let interfaces = interfaces
            .iter()
            .map(|(index, name)| (*index, name.as_str()));
        let mut left_out = Vec::new();
        let filter = whole_filter(interfaces.collect(), policy, &mut left_out)?;
        Ok(Some((filter, left_out)))
    })
}

/// The kernel parameters of the namespace at `path`, for a guest with these interfaces.
///
/// # Errors
/// [`NetworkError`].
pub fn inherited(path: &Path, interfaces: &[String]) -> Result<Inherited, NetworkError> {
    let names: Vec<_> = interfaces.iter().map(String::as_str).collect();
    Namespace::open(path)?.run(|| Ok(sysctls::of_namespace(&names)))
}

/// Takes the redirection of a VM that has ended off the interfaces of the namespace at `path`, so that it is as CNI made it.
/// One that leads to a tap is that of a VM which lives, because a tap ends with its VM, and stays. Nothing to undo, and a
/// namespace that is gone, are no errors.
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
            let result = redirect::remove_dead(&mut netlink, index).map(drop);
            if first.is_ok() {
                first = result;
            }
        }
        first
    })
}

/// Makes sure that no other VM has these interfaces.
fn claim(netlink: &mut Netlink, links: &[Link], path: &Path) -> Result<(), NetworkError> {
    let deadline = Instant::now() + ENDING;
    for link in links {
        while let Some(tap) = redirect::remove_dead(netlink, link.index)? {
            if Instant::now() >= deadline {
                return Err(NetworkError::InUse {
                    path: path.to_owned(),
                    interface: link.name.clone(),
                    tap: scan::name_of_index(netlink, tap)?,
                });
            }
            // Nobody announces a tap's end.
            sleep(Duration::from_millis(20));
        }
    }
    Ok(())
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
        redirect::join(netlink, link.index, index)?;
        interfaces.push(TapInterface {
            index: link.index,
            name: link.name.clone(),
            mac: link.mac,
            mtu: link.mtu,
            taps: tap.queues,
            vhosts: Vec::new(),
            noarp: link.noarp,
            addresses: link.addresses.clone(),
        });
    }
    Ok(interfaces)
}

/// All interfaces, or none.
fn give_vhosts(interfaces: &mut [TapInterface]) -> Result<(), String> {
    let pairs = interfaces.iter().map(|interface| interface.taps.len());
    let mut all = vhost::open(pairs.sum())?;
    for interface in interfaces {
        let rest = all.split_off(interface.taps.len());
        interface.vhosts = std::mem::replace(&mut all, rest);
    }
    Ok(())
}

/// Queue pairs of each interface, so that all together stay within the budget.
fn queue_pairs(wanted: usize, interfaces: usize) -> usize {
    wanted
        .clamp(1, MAX_PAIRS_EACH)
        .min(MAX_PAIRS / interfaces.max(1))
        .max(1)
}
