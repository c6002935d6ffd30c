//! Addresses of an interface, in the order in which the host's kernel lists them: of several that would do, the first one is
//! where connections come from.

use std::{io, net::IpAddr};

use brig_agent_protocol::agent::{Address, Interface};

use super::links::{LOOPBACK, refused};
use super::routing::{Request, Routing, family};
use super::text::parse_prefix;
use crate::{
    error::{Error, Result},
    netlink::{CREATE, REPLACE, attributes},
};

/// Bytes of `struct ifaddrmsg`.
const GENERAL: usize = 8;
/// `IFA_ADDRESS`, `IFA_LOCAL`, `IFA_BROADCAST`, `IFA_CACHEINFO` and `IFA_FLAGS`.
const ADDRESS: u16 = 1;
const LOCAL: u16 = 2;
const BROADCAST: u16 = 4;
const CACHE_INFO: u16 = 6;
const FLAGS: u16 = 8;
/// `IFA_F_NODAD` and `IFA_F_NOPREFIXROUTE`.
const NO_DETECTION: u8 = 2;
const NO_PREFIX_ROUTE: u32 = 0x200;

/// An address as it is set.
struct Wanted {
    address: IpAddr,
    length: u8,
    scope: u8,
    deprecated: bool,
}

impl Wanted {
    fn parse(address: &Address) -> Result<Self> {
        let (ip, length) = parse_prefix(&address.prefix)?;
        let scope = u8::try_from(address.scope).map_err(|_| {
            Error::InvalidArgument(format!("address scope {} is out of range", address.scope))
        })?;
        Ok(Self {
            address: ip,
            length,
            scope,
            deprecated: address.deprecated,
        })
    }

    /// The request that gives it to interface number `index`.
    fn request(&self, index: u32, of_loopback: bool) -> io::Result<Request> {
        let mut flags = 0;
        if !of_loopback {
            // The routes of its network are among the requested ones, as far as the pod has them.
            flags |= NO_PREFIX_ROUTE;
        }
        let mut header_flags = 0;
        if self.address.is_ipv6() {
            // The host's side holds the same address: detection would find a duplicate.
            header_flags = NO_DETECTION;
            flags |= u32::from(NO_DETECTION);
        }
        let general = [family(self.address), self.length, header_flags, self.scope];
        let general = [general, index.to_ne_bytes()].concat();
        let mut request = Request::new(libc::RTM_NEWADDR, CREATE | REPLACE, &general)
            .with_address(ADDRESS, self.address)?
            .with_address(LOCAL, self.address)?
            .with_number(FLAGS, flags)?;
        if let IpAddr::V4(address) = self.address
            && self.length < 31
        {
            let host = u32::MAX >> self.length;
            let broadcast = (u32::from(address) | host).to_be_bytes();
            request = request.with(BROADCAST, &broadcast)?;
        }
        if self.deprecated {
            // `struct ifa_cacheinfo`: not preferred from now on, and valid for ever.
            let lifetime = [0, u32::MAX, 0, 0].map(u32::to_ne_bytes).concat();
            request = request.with(CACHE_INFO, &lifetime)?;
        }
        Ok(request)
    }
}

/// Gives interface number `index` the addresses of `interface`.
pub(super) fn add(
    routing: &mut Routing,
    interface: &Interface,
    index: u32,
    logger: &slog::Logger,
) -> Result<()> {
    let name = &interface.name;
    let wanted = interface.addresses.iter().map(Wanted::parse);
    let wanted = wanted.collect::<Result<Vec<_>>>()?;
    for one in in_order_of_setting(&wanted) {
        let added = one
            .request(index, name == LOOPBACK)
            .and_then(|request| routing.change(&request));
        added.map_err(|e| {
            let Wanted {
                address, length, ..
            } = one;
            refused(format_args!("address {address}/{length} of {name}"), e)
        })?;
    }
    let v6: Vec<IpAddr> = of_version_6(wanted.iter().map(|one| one.address)).collect();
    if v6.len() > 1 {
        let listed = listed(routing, index).map_err(|e| refused("addresses", e))?;
        let listed: Vec<IpAddr> = listed.into_iter().filter(|ip| v6.contains(ip)).collect();
        if listed != v6 {
            slog::warn!(logger, "the kernel prefers another of an interface's addresses than the host's does";
                "interface" => name, "wanted" => ?v6, "listed" => ?listed);
        }
    }
    Ok(())
}

/// The kernel lists a new IPv4 address after those of its scope, a new IPv6 address before them.
fn in_order_of_setting(wanted: &[Wanted]) -> impl Iterator<Item = &Wanted> {
    let v4 = wanted.iter().filter(|one| one.address.is_ipv4());
    v4.chain(wanted.iter().rev().filter(|one| one.address.is_ipv6()))
}

fn of_version_6(addresses: impl Iterator<Item = IpAddr>) -> impl Iterator<Item = IpAddr> {
    addresses.filter(IpAddr::is_ipv6)
}

/// The IPv6 addresses of an interface, as the kernel lists them.
fn listed(routing: &mut Routing, index: u32) -> io::Result<Vec<IpAddr>> {
    let all = Request::new(libc::RTM_GETADDR, 0, &[0; GENERAL]);
    let messages = routing.list(&all)?;
    let addresses = messages.iter().filter_map(|message| {
        let of = message.get(4..GENERAL)?;
        if of != index.to_ne_bytes() {
            return None;
        }
        let (_, value) = attributes(message.get(GENERAL..)?).find(|(kind, _)| *kind == ADDRESS)?;
        let octets: [u8; 16] = value.try_into().ok()?;
        Some(IpAddr::from(octets))
    });
    Ok(addresses.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(prefix: &str) -> Wanted {
        Wanted::parse(&Address {
            prefix: prefix.into(),
            ..Default::default()
        })
        .unwrap()
    }

    #[test]
    fn ipv6_addresses_are_set_last_to_first() {
        let all = [
            "10.0.0.2/24",
            "fd00::2/64",
            "10.0.0.3/24",
            "fd00::3/64",
            "fe80::1/64",
        ]
        .map(wanted);
        let order: Vec<_> = in_order_of_setting(&all)
            .map(|one| one.address.to_string())
            .collect();
        assert_eq!(
            order,
            ["10.0.0.2", "10.0.0.3", "fe80::1", "fd00::3", "fd00::2"]
        );
    }

    #[test]
    fn a_deprecated_address_is_valid_for_ever_and_one_of_the_loopback_interface_keeps_its_route() {
        let mut vip = wanted("fd00::9/128");
        vip.deprecated = true;
        let request = vip.request(5, true).unwrap();
        assert_eq!(request.general()[..4], [10, 128, NO_DETECTION, 0]);
        assert_eq!(request.value(FLAGS).unwrap(), 2_u32.to_ne_bytes());
        let lifetime = request.value(CACHE_INFO).unwrap();
        assert_eq!(lifetime[..8], [0, 0, 0, 0, 255, 255, 255, 255]);
        assert_eq!(request.value(BROADCAST), None);
        let bad = Address {
            prefix: "10.0.0.1/8".into(),
            scope: 256,
            ..Default::default()
        };
        assert!(Wanted::parse(&bad).is_err());
    }

    #[test]
    fn an_ipv4_network_has_a_broadcast_address_where_it_has_room_for_one() {
        let broadcast = |prefix: &str| {
            let request = wanted(prefix).request(5, false).unwrap();
            assert_eq!(request.value(FLAGS).unwrap(), NO_PREFIX_ROUTE.to_ne_bytes());
            assert_eq!(request.value(CACHE_INFO), None);
            request.value(BROADCAST).map(<[u8]>::to_vec)
        };
        assert_eq!(broadcast("10.1.2.3/20"), Some(vec![10, 1, 15, 255]));
        assert_eq!(broadcast("10.1.2.3/0"), Some(vec![255; 4]));
        assert_eq!(broadcast("10.1.2.2/31"), None);
        assert_eq!(broadcast("10.1.2.2/32"), None);
    }
}
