//! Links, addresses, routes and neighbours of the sandbox, as the host's network plug-in set them
//! up for the pod. The network namespace is the guest's own: the VM is the boundary.
mod addresses;
mod links;
mod routes;
mod text;

use std::time::Duration;

use brig_agent_protocol::agent::{Interface, Neighbour, StartSandboxRequest};
use futures::TryStreamExt as _;
use rtnetlink::{Handle, LinkUnspec, packet_route::link::LinkAttribute};
use tokio::time::{Instant, sleep};

use links::{LOOPBACK, index_of, refused};
use text::{parse_address, parse_mac, show_mac};

use crate::{
    error::{Error, Result},
    inherited,
    netfilter::{self, Loaded},
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
    let (connection, handle, _) =
        rtnetlink::new_connection().map_err(|e| Error::io("netlink", e))?;
    let connection = tokio::spawn(connection);
    let outcome = apply_all(&handle, request, rescan, logger).await;
    connection.abort();
    if let Err(error) = &outcome {
        slog::error!(logger, "network not set up"; "error" => %error);
    }
    outcome
}

async fn apply_all(
    handle: &Handle,
    request: &StartSandboxRequest,
    rescan: bool,
    logger: &slog::Logger,
) -> Result<Loaded> {
    let mut indexes = Vec::new();
    for interface in &request.interfaces {
        indexes.push(name_interface(handle, interface, rescan).await?);
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
        add_interface(handle, interface, index, logger).await?;
    }
    for neighbour in &request.neighbours {
        add_neighbour(handle, neighbour).await?;
    }
    routes::add(handle, &request.routes, logger).await?;
    Ok(loaded)
}

/// Brings the loopback interface up.
///
/// # Errors
/// `Internal`.
pub async fn loopback_up() -> Result<()> {
    let (connection, handle, _) =
        rtnetlink::new_connection().map_err(|e| Error::io("netlink", e))?;
    let connection = tokio::spawn(connection);
    let outcome = match index_of(&handle, LOOPBACK).await {
        Ok(index) => {
            let up = handle
                .link()
                .set(LinkUnspec::new_with_index(index).up().build())
                .execute()
                .await;
            up.map_err(|e| refused("interface lo", &e))
        }
        Err(error) => Err(error),
    };
    connection.abort();
    outcome
}

/// Gives an interface its name, and returns its number.
async fn name_interface(handle: &Handle, interface: &Interface, rescan: bool) -> Result<u32> {
    let name = &interface.name;
    if name == LOOPBACK && interface.mac.is_empty() {
        return index_of(handle, name).await;
    }
    let mac = parse_mac(&interface.mac)?;
    let (index, current) = find_by_mac(handle, &mac, rescan).await?;
    if !name.is_empty() && *name != current {
        make_way(handle, name).await?;
        // A name changes only while the interface is down, as a new one is.
        let message = LinkUnspec::new_with_index(index).name(name.clone()).build();
        handle
            .link()
            .set(message)
            .execute()
            .await
            .map_err(|e| refused(format_args!("interface {name}"), &e))?;
    }
    Ok(index)
}

async fn add_interface(
    handle: &Handle,
    interface: &Interface,
    index: u32,
    logger: &slog::Logger,
) -> Result<()> {
    let name = &interface.name;
    let mut up = LinkUnspec::new_with_index(index).up();
    if interface.mtu != 0 {
        up = up.mtu(interface.mtu);
    }
    if interface.noarp {
        up = up.arp(false);
    }
    handle
        .link()
        .set(up.build())
        .execute()
        .await
        .map_err(|e| refused(format_args!("interface {name}"), &e))?;
    addresses::add(handle, interface, index, logger).await
}

/// Gives another name to an interface that has this one by its place on the bus; its own turn comes.
async fn make_way(handle: &Handle, name: &str) -> Result<()> {
    let Ok(index) = index_of(handle, name).await else {
        return Ok(());
    };
    let other = LinkUnspec::new_with_index(index)
        .name(format!("brig-{index}"))
        .build();
    handle
        .link()
        .set(other)
        .execute()
        .await
        .map_err(|e| refused(format_args!("interface {name}"), &e))
}

async fn find_by_mac(handle: &Handle, mac: &[u8; 6], rescan: bool) -> Result<(u32, String)> {
    let deadline = Instant::now() + APPEAR_TIME;
    let mut scanned = false;
    loop {
        let mut links = handle.link().get().execute();
        while let Some(link) = links
            .try_next()
            .await
            .map_err(|e| refused("interfaces", &e))?
        {
            let has_mac = link
                .attributes
                .iter()
                .any(|a| matches!(a, LinkAttribute::Address(m) if m == mac));
            if has_mac {
                let name = link.attributes.iter().find_map(|a| match a {
                    LinkAttribute::IfName(name) => Some(name.clone()),
                    _ => None,
                });
                return Ok((link.header.index, name.unwrap_or_default()));
            }
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

async fn add_neighbour(handle: &Handle, neighbour: &Neighbour) -> Result<()> {
    let address = parse_address(&neighbour.address)?;
    let mac = parse_mac(&neighbour.mac)?;
    let index = index_of(handle, &neighbour.interface).await?;
    let request = handle
        .neighbours()
        .add(index, address)
        .link_layer_address(&mac)
        .replace();
    request
        .execute()
        .await
        .map_err(|e| refused(format_args!("neighbour {address}"), &e))
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
