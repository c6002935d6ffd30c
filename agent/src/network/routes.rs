//! The main routing table, as the host's kernel lists it.

use std::{io, net::IpAddr};

use brig_agent_protocol::agent::Route;

use super::links::{index_of, refused};
use super::routing::{Request, Routing, family, octets};
use super::text::{parse_optional, parse_prefix};
use crate::{
    error::{Error, Result},
    netlink::{APPEND, CREATE, attribute, attributes},
};

/// `RTA_DST`, `RTA_OIF`, `RTA_GATEWAY`, `RTA_PRIORITY`, `RTA_PREFSRC`, `RTA_METRICS` and `RTA_VIA`.
const DESTINATION: u16 = 1;
const INTERFACE: u16 = 4;
const GATEWAY: u16 = 5;
const PRIORITY: u16 = 6;
const PREFERRED_SOURCE: u16 = 7;
const METRICS: u16 = 8;
const VIA: u16 = 18;
/// `RTAX_LOCK` and `RTAX_MTU`, of the metrics.
const LOCK: u16 = 1;
const MTU: u16 = 2;
/// `RTNH_F_ONLINK`: the gateway is on the link, whatever the addresses say.
const ON_LINK: u32 = 4;

/// Adds routes beside those that are there.
pub(super) fn add(routing: &mut Routing, routes: &[Route], logger: &slog::Logger) -> Result<()> {
    // Routes to a gateway need the route that reaches the gateway.
    let (via, direct): (Vec<&Route>, Vec<&Route>) =
        routes.iter().partition(|route| !route.gateway.is_empty());
    for route in direct.into_iter().chain(via) {
        add_one(routing, route, logger)?;
    }
    Ok(())
}

fn add_one(routing: &mut Routing, route: &Route, logger: &slog::Logger) -> Result<()> {
    let index = index_of(&route.interface)?;
    let wanted = message(route, index)?;
    let what = format!("route {:?} via {:?}", route.destination, route.gateway);
    let Err(error) = append(routing, &wanted) else {
        return Ok(());
    };
    // A metric that this kernel does not know or have costs the pod less than the route would.
    let mut plain = route.clone();
    if !leave_out_metrics(&mut plain.metrics).map_err(|e| refused(&what, e))? {
        return Err(refused(what, error));
    }
    let Ok(()) = append(routing, &message(&plain, index)?) else {
        return Err(refused(what, error));
    };
    slog::warn!(logger, "a route is without its metrics"; "route" => what, "reason" => %error);
    Ok(())
}

/// Adds a route after those to the same destination, as the kernel's own are added: two interfaces in one network have a
/// route each. One that is there already stays.
fn append(routing: &mut Routing, request: &Request) -> io::Result<()> {
    match routing.change(request) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        outcome => outcome,
    }
}

/// Takes away what a kernel may not take of a route's metrics, which is all but the MTU; whether there was any.
fn leave_out_metrics(metrics: &mut Vec<u8>) -> io::Result<bool> {
    let mut kept = Vec::new();
    for (kind, value) in attributes(metrics) {
        if matches!(kind, LOCK | MTU) {
            attribute(&mut kept, kind, value)?;
        }
    }
    let any = kept.len() != metrics.len();
    *metrics = kept;
    Ok(any)
}

/// The request that adds a route by way of interface number `index`.
pub(super) fn message(route: &Route, index: u32) -> Result<Request> {
    fn bad(error: impl std::fmt::Display) -> Error {
        Error::InvalidArgument(format!("route: {error}"))
    }
    let gateway = parse_optional(&route.gateway)?;
    let source = parse_optional(&route.source)?;
    let (destination, length) = match route.destination.as_str() {
        "" => match (gateway.or(source), route.family) {
            (Some(IpAddr::V6(_)), _) | (None, 6) => (IpAddr::from([0_u16; 8]), 0),
            _ => (IpAddr::from([0_u8; 4]), 0),
        },
        text => parse_prefix(text)?,
    };
    let byte = |what: &str, value: u32| {
        u8::try_from(value).map_err(|_| bad(format_args!("{what} {value} is out of range")))
    };
    let scope = byte("scope", route.scope)?;
    let protocol = match byte("protocol", route.protocol)? {
        0 => libc::RTPROT_STATIC,
        protocol => protocol,
    };
    if source.is_some_and(|source| source.is_ipv4() != destination.is_ipv4()) {
        return Err(bad("the source is of another family than the destination"));
    }
    if attributes(&route.metrics)
        .map(|(_, value)| 4 + value.len().next_multiple_of(4))
        .sum::<usize>()
        != route.metrics.len()
    {
        return Err(bad("metrics that are cut short"));
    }
    // `struct rtmsg`.
    let mut general = vec![family(destination), length, 0, 0];
    general.extend([libc::RT_TABLE_MAIN, protocol, scope, libc::RTN_UNICAST]);
    general.extend(if route.onlink { ON_LINK } else { 0 }.to_ne_bytes());
    // IPv6 knows no order of its own there, and takes APPEND for a further hop of the route before.
    let order = if destination.is_ipv4() { APPEND } else { 0 };
    let request = Request::new(libc::RTM_NEWROUTE, CREATE | order, &general);
    let hop = Hop {
        index,
        gateway,
        source,
    };
    complete(request, route, (destination, length), &hop).map_err(bad)
}

/// Where a route leads.
struct Hop {
    index: u32,
    gateway: Option<IpAddr>,
    source: Option<IpAddr>,
}

fn complete(
    mut request: Request,
    route: &Route,
    (destination, length): (IpAddr, u8),
    hop: &Hop,
) -> io::Result<Request> {
    request = request.with_number(INTERFACE, hop.index)?;
    if length > 0 {
        request = request.with_address(DESTINATION, destination)?;
    }
    if let Some(gateway) = hop.gateway {
        request = if gateway.is_ipv4() == destination.is_ipv4() {
            request.with_address(GATEWAY, gateway)?
        } else {
            // An IPv4 route by way of an IPv6 router: `struct rtvia`.
            let family = u16::from(family(gateway)).to_ne_bytes();
            request.with(VIA, &[&family[..], &octets(gateway)].concat())?
        };
    }
    if let Some(source) = hop.source {
        request = request.with_address(PREFERRED_SOURCE, source)?;
    }
    if route.metric != 0 {
        request = request.with_number(PRIORITY, route.metric)?;
    }
    if !route.metrics.is_empty() {
        request = request.with(METRICS, &route.metrics)?;
    }
    Ok(request)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_default_route_takes_its_family_from_the_gateway_or_the_field() {
        let family = |route: Route| message(&route, 2).unwrap().general()[0];
        assert_eq!(
            family(Route {
                gateway: "fd00::1".into(),
                ..Default::default()
            }),
            10
        );
        assert_eq!(
            family(Route {
                gateway: "10.0.0.1".into(),
                ..Default::default()
            }),
            2
        );
        assert_eq!(
            family(Route {
                family: 6,
                ..Default::default()
            }),
            10
        );
        let link = Route {
            destination: "169.254.1.1/32".into(),
            scope: 253,
            metric: 7,
            onlink: true,
            ..Default::default()
        };
        let message = message(&link, 2).unwrap();
        assert_eq!(message.general(), [2, 32, 0, 0, 254, 4, 253, 1, 4, 0, 0, 0]);
        assert_eq!(message.value(DESTINATION), Some(&[169, 254, 1, 1][..]));
        assert_eq!(message.value(PRIORITY).unwrap(), 7_u32.to_ne_bytes());
        assert_eq!(message.value(INTERFACE).unwrap(), 2_u32.to_ne_bytes());
        assert_eq!(message.value(GATEWAY), None);
    }

    #[test]
    fn an_ipv4_route_may_go_by_way_of_an_ipv6_router() {
        let route = Route {
            destination: "10.0.0.0/8".into(),
            gateway: "fe80::1".into(),
            ..Default::default()
        };
        let message = message(&route, 2).unwrap();
        assert_eq!(message.value(GATEWAY), None);
        let via = message.value(VIA).unwrap();
        assert_eq!((&via[..4], via.len()), (&[10, 0, 0xfe, 0x80][..], 18));
    }

    #[test]
    fn metrics_and_protocol_are_the_hosts_and_only_the_mtu_is_kept_at_need() {
        // An MTU of 1300 that is locked, and an advertised MSS of 1200.
        let number = |kind: u8, value: u32| {
            let mut bytes = vec![8, 0, kind, 0];
            bytes.extend(value.to_ne_bytes());
            bytes
        };
        let kept = [number(1, 4), number(2, 1300)].concat();
        let mut route = Route {
            destination: "10.9.0.0/16".into(),
            metrics: [&kept[..], &number(8, 1200)].concat(),
            protocol: 2,
            ..Default::default()
        };
        let whole = message(&route, 2).unwrap();
        assert_eq!(whole.general()[5], libc::RTPROT_KERNEL);
        assert_eq!(whole.value(METRICS), Some(&route.metrics[..]));
        assert!(leave_out_metrics(&mut route.metrics).unwrap());
        assert_eq!(route.metrics, kept);
        assert!(!leave_out_metrics(&mut route.metrics).unwrap());
        route.metrics.pop();
        assert!(message(&route, 2).is_err());
    }

    #[test]
    fn what_is_no_route_is_refused() {
        for route in [
            Route {
                scope: 256,
                ..Default::default()
            },
            Route {
                protocol: 256,
                ..Default::default()
            },
            Route {
                metrics: vec![9, 0, 2, 0, 1],
                ..Default::default()
            },
            Route {
                gateway: "10.0.0.1".into(),
                source: "fd00::1".into(),
                ..Default::default()
            },
        ] {
            assert!(message(&route, 2).is_err(), "{route:?}");
        }
    }
}
