//! Links, addresses, routes and neighbours of the sandbox, as the host's network plug-in set them
//! up for the pod. The network namespace is the guest's own: the VM is the boundary.
mod addresses;
mod links;
mod routes;
mod routing;
mod text;

use std::time::Duration;

use brig_agent_protocol::agent::{Interface, Neighbour, StartSandboxRequest};
use tokio::time::{Instant, sleep};

use links::{LOOPBACK, index_of, refused};
use routing::{Request, Routing, family};
use text::{parse_address, parse_mac, show_mac};

use crate::{
    error::{Error, Result},
    inherited,
    netfilter::{self, Loaded},
    netlink::{CREATE, REPLACE},
    pci,
};

/// How long a hot-plugged interface may take to appear after the bus was scanned.
const APPEAR_TIME: Duration = Duration::from_secs(5);

/// Sets the network up: names, kernel parameters and the packet filter first, and only then are the interfaces up.
/// With `rescan` a missing interface is looked for on the PCI bus. Returns what came of the packet filter;
/// if the kernel had to take it all and did not, the interfaces stay down.
///
/// # Errors
/// `InvalidArgument` for what does not parse, `Internal` for what the kernel refuses, naming it.
pub async fn apply(
    request: &StartSandboxRequest,
    rescan: bool,
    logger: &slog::Logger,
) -> Result<Loaded> {
    let outcome = apply_all(request, rescan, logger).await;
    if let Err(error) = &outcome {
        slog::error!(logger, "network not set up"; "error" => %error);
    }
    outcome
}

async fn apply_all(
    request: &StartSandboxRequest,
    rescan: bool,
    logger: &slog::Logger,
) -> Result<Loaded> {
    let mut routing = open()?;
    let mut indexes = Vec::new();
    for interface in &request.interfaces {
        indexes.push(name_interface(&mut routing, interface, rescan).await?);
    }
    inherited::apply(&request.inherited, logger)?;
    for interface in &request.interfaces {
        inherited::apply(&interface.sysctls, logger)?;
    }
    let loaded = match request.netfilter.as_ref() {
        Some(filter) => {
            if rescan {
                inherited::grow_connection_table(logger);
            }
            netfilter::load(filter)?
        }
        None => Loaded::default(),
    };
    if !loaded.refused.is_empty() && !request.netfilter.best_effort {
        return Ok(loaded);
    }
    for (interface, index) in request.interfaces.iter().zip(indexes) {
        add_interface(&mut routing, interface, index, logger)?;
    }
    for neighbour in &request.neighbours {
        add_neighbour(&mut routing, neighbour)?;
    }
    routes::add(&mut routing, &request.routes, logger)?;
    Ok(loaded)
}

fn open() -> Result<Routing> {
    Routing::open().map_err(|e| Error::io("netlink", e))
}

/// Brings the loopback interface up.
///
/// # Errors
/// `Internal`.
pub fn loopback_up() -> Result<()> {
    let index = index_of(LOOPBACK)?;
    links::bring_up(&mut open()?, index, 0, false).map_err(|e| refused("interface lo", e))
}

/// Gives an interface its name, and returns its number.
async fn name_interface(routing: &mut Routing, interface: &Interface, rescan: bool) -> Result<u32> {
    let name = &interface.name;
    if name == LOOPBACK && interface.mac.is_empty() {
        return index_of(name);
    }
    let mac = parse_mac(&interface.mac)?;
    let (index, current) = find_by_mac(routing, &mac, rescan).await?;
    if !name.is_empty() && *name != current {
        // Another may have this name by its place on the bus; its own turn comes.
        if let Ok(other) = index_of(name) {
            links::rename(routing, other, &format!("brig-{other}"))?;
        }
        // A name changes only while the interface is down, as a new one is.
        links::rename(routing, index, name)?;
    }
    Ok(index)
}

fn add_interface(
    routing: &mut Routing,
    interface: &Interface,
    index: u32,
    logger: &slog::Logger,
) -> Result<()> {
    let Interface {
        name, mtu, noarp, ..
    } = interface;
    links::bring_up(routing, index, *mtu, *noarp)
        .map_err(|e| refused(format_args!("interface {name}"), e))?;
    addresses::add(routing, interface, index, logger)
}

async fn find_by_mac(routing: &mut Routing, mac: &[u8; 6], rescan: bool) -> Result<(u32, String)> {
    let deadline = Instant::now() + APPEAR_TIME;
    let mut scanned = false;
    loop {
        if let Some(found) = links::with_mac(routing, mac)? {
            return Ok(found);
        }
        if !rescan || Instant::now() >= deadline {
            return Err(Error::InvalidArgument(format!(
                "the guest has no interface with address {}",
                show_mac(mac)
            )));
        }
        if !scanned {
            scanned = true;
            pci::rescan().await?;
        } else {
            // The driver's probe is not awaited by the scan, and a link has no file to watch before
            // it exists.
            sleep(Duration::from_millis(10)).await;
        }
    }
}

fn add_neighbour(routing: &mut Routing, neighbour: &Neighbour) -> Result<()> {
    let address = parse_address(&neighbour.address)?;
    let mac = parse_mac(&neighbour.mac)?;
    let index = index_of(&neighbour.interface)?;
    // `struct ndmsg`, and `NDA_DST` and `NDA_LLADDR`.
    let mut general = vec![family(address), 0, 0, 0];
    general.extend(index.to_ne_bytes());
    general.extend(libc::NUD_PERMANENT.to_ne_bytes());
    general.extend([0, 0]);
    Request::new(libc::RTM_NEWNEIGH, CREATE | REPLACE, &general)
        .with_address(1, address)
        .and_then(|request| request.with(2, &mac))
        .and_then(|request| routing.change(&request))
        .map_err(|e| refused(format_args!("neighbour {address}"), e))
}

/// Reads everything in a request that is text.
#[cfg(any(test, feature = "fuzzing"))]
#[allow(clippy::unwrap_used, reason = "a broken assumption is a finding")]
pub fn read_all(request: &StartSandboxRequest) {
    for interface in &request.interfaces {
        if let Ok(mac) = parse_mac(&interface.mac) {
            assert_eq!(parse_mac(&show_mac(&mac)).unwrap(), mac);
        }
        for address in &interface.addresses {
            if let Ok((address, length)) = text::parse_prefix(&address.prefix) {
                assert!(length <= if address.is_ipv4() { 32 } else { 128 });
            }
        }
    }
    for route in &request.routes {
        let _ = routes::message(route, 1);
    }
    for neighbour in &request.neighbours {
        let _ = (parse_address(&neighbour.address), parse_mac(&neighbour.mac));
    }
}
