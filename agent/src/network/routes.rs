//! The main routing table, as the host's kernel lists it.

use std::net::IpAddr;

use brig_agent_protocol::agent::Route;
use futures::StreamExt as _;
use rtnetlink::{
    Handle, RouteMessageBuilder,
    packet_core::{
        NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
        NlaBuffer, NlasIterator, Parseable as _,
    },
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        route::{RouteAttribute, RouteMessage, RouteMetric, RouteProtocol, RouteScope},
    },
};

use super::links::{index_of, refused};
use super::text::{parse_optional, parse_prefix};
use crate::error::{Error, Result};

/// Adds routes beside those that are there.
pub(super) async fn add(handle: &Handle, routes: &[Route], logger: &slog::Logger) -> Result<()> {
    // Routes to a gateway need the route that reaches the gateway.
    let (via, direct): (Vec<&Route>, Vec<&Route>) =
        routes.iter().partition(|route| !route.gateway.is_empty());
    for route in direct.into_iter().chain(via) {
        add_one(handle, route, logger).await?;
    }
    Ok(())
}

async fn add_one(handle: &Handle, route: &Route, logger: &slog::Logger) -> Result<()> {
    let index = index_of(handle, &route.interface).await?;
    let mut wanted = message(route, index)?;
    let what = format!("route {:?} via {:?}", route.destination, route.gateway);
    let Err(error) = append(handle, wanted.clone()).await else {
        return Ok(());
    };
    // A metric that this kernel does not know or have costs the pod less than the route would.
    if !leave_out_metrics(&mut wanted) {
        return Err(refused(what, &error));
    }
    let plain = append(handle, wanted).await;
    plain.map_err(|_| refused(&what, &error))?;
    slog::warn!(logger, "a route is without its metrics"; "route" => what, "reason" => %error);
    Ok(())
}

/// Adds a route after those to the same destination, as the kernel's own are added: two interfaces in one network have a
/// route each. One that is there already stays.
async fn append(
    handle: &Handle,
    message: RouteMessage,
) -> std::result::Result<(), rtnetlink::Error> {
    // IPv6 knows no order of its own there, and takes APPEND for a further hop of the route before.
    let order = match message.header.address_family {
        AddressFamily::Inet => NLM_F_APPEND,
        _ => 0,
    };
    let mut request = NetlinkMessage::from(RouteNetlinkMessage::NewRoute(message));
    request.header.flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | order;
    let mut answers = handle.clone().request(request)?;
    while let Some(answer) = answers.next().await {
        if let NetlinkPayload::Error(error) = answer.payload
            && error.code.is_some()
            && error.raw_code() != -libc::EEXIST
        {
            return Err(rtnetlink::Error::NetlinkError(error));
        }
    }
    Ok(())
}

/// Takes away what a kernel may not take of a route's metrics, which is all but the MTU; whether there was any.
fn leave_out_metrics(message: &mut RouteMessage) -> bool {
    let mut any = false;
    for attribute in &mut message.attributes {
        if let RouteAttribute::Metrics(metrics) = attribute {
            let before = metrics.len();
            metrics.retain(|one| matches!(one, RouteMetric::Mtu(_) | RouteMetric::Lock(_)));
            any |= metrics.len() != before;
        }
    }
    any
}

pub(super) fn message(route: &Route, index: u32) -> Result<RouteMessage> {
    fn bad(error: impl std::fmt::Display) -> Error {
        Error::InvalidArgument(format!("route: {error}"))
    }
    let gateway = parse_optional(&route.gateway)?;
    let source = parse_optional(&route.source)?;
    let destination = match route.destination.as_str() {
        "" => match (gateway.or(source), route.family) {
            (Some(IpAddr::V6(_)), _) | (None, 6) => (IpAddr::from([0_u16; 8]), 0),
            _ => (IpAddr::from([0_u8; 4]), 0),
        },
        text => parse_prefix(text)?,
    };
    let byte = |what: &str, value: u32| {
        u8::try_from(value).map_err(|_| bad(format_args!("{what} {value} is out of range")))
    };
    let scope = RouteScope::from(byte("scope", route.scope)?);
    let mut builder = RouteMessageBuilder::<IpAddr>::new()
        .output_interface(index)
        .scope(scope)
        .destination_prefix(destination.0, destination.1)
        .map_err(bad)?;
    if let Some(gateway) = gateway {
        if gateway.is_ipv4() == destination.0.is_ipv4() {
            builder = builder.gateway(gateway).map_err(bad)?;
        } else {
            // An IPv4 route by way of an IPv6 router.
            let via = RouteAttribute::Via(gateway.into());
            builder.get_mut().attributes.push(via);
        }
    }
    if let Some(source) = source {
        builder = builder.pref_source(source).map_err(bad)?;
    }
    if route.metric != 0 {
        builder = builder.priority(route.metric);
    }
    if route.onlink {
        builder = builder.onlink();
    }
    let mut message = builder.build();
    if route.protocol != 0 {
        message.header.protocol = RouteProtocol::from(byte("protocol", route.protocol)?);
    }
    if !route.metrics.is_empty() {
        let metrics = metrics(&route.metrics).map_err(bad)?;
        message.attributes.push(RouteAttribute::Metrics(metrics));
    }
    Ok(message)
}

fn metrics(
    bytes: &[u8],
) -> std::result::Result<Vec<RouteMetric>, rtnetlink::packet_core::DecodeError> {
    let attributes = NlasIterator::new(bytes);
    attributes
        .map(|attribute: std::result::Result<NlaBuffer<&[u8]>, _>| RouteMetric::parse(&attribute?))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_default_route_takes_its_family_from_the_gateway_or_the_field() {
        let family = |route: Route| message(&route, 2).unwrap().header.address_family;
        assert_eq!(
            family(Route {
                gateway: "fd00::1".into(),
                ..Default::default()
            }),
            AddressFamily::Inet6
        );
        assert_eq!(
            family(Route {
                gateway: "10.0.0.1".into(),
                ..Default::default()
            }),
            AddressFamily::Inet
        );
        assert_eq!(
            family(Route {
                family: 6,
                ..Default::default()
            }),
            AddressFamily::Inet6
        );
        let link = Route {
            destination: "169.254.1.1/32".into(),
            scope: 253,
            metric: 7,
            ..Default::default()
        };
        let message = message(&link, 2).unwrap();
        assert_eq!(message.header.scope, RouteScope::Link);
        assert!(message.attributes.contains(&RouteAttribute::Priority(7)));
    }

    #[test]
    fn metrics_and_protocol_are_the_hosts_and_only_the_mtu_is_kept_at_need() {
        // An MTU of 1300 that is locked, and an advertised MSS of 1200.
        let number = |kind: u8, value: u32| {
            let mut bytes = vec![8, 0, kind, 0];
            bytes.extend(value.to_ne_bytes());
            bytes
        };
        let route = Route {
            destination: "10.9.0.0/16".into(),
            metrics: [number(1, 4), number(2, 1300), number(8, 1200)].concat(),
            protocol: 2,
            ..Default::default()
        };
        let mut message = message(&route, 2).unwrap();
        assert_eq!(message.header.protocol, RouteProtocol::Kernel);
        let metrics = |message: &RouteMessage| {
            let found = message.attributes.iter().find_map(|a| match a {
                RouteAttribute::Metrics(metrics) => Some(metrics.clone()),
                _ => None,
            });
            found.unwrap()
        };
        let kept = [RouteMetric::Lock(4), RouteMetric::Mtu(1300)];
        assert_eq!(metrics(&message)[..2], kept);
        assert_eq!(metrics(&message)[2], RouteMetric::Advmss(1200));
        assert!(leave_out_metrics(&mut message));
        assert_eq!(metrics(&message), kept);
        assert!(!leave_out_metrics(&mut message));
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
        ] {
            assert!(message(&route, 2).is_err(), "{route:?}");
        }
    }
}
