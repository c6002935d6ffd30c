//! Addresses of an interface, in the order in which the host's kernel lists them: of several that would do, the first one is
//! where connections come from.

use std::net::IpAddr;

use brig_agent_protocol::agent::{Address, Interface};
use futures::TryStreamExt as _;
use rtnetlink::{
    Handle,
    packet_route::address::{
        AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope, CacheInfo,
    },
};

use super::links::{LOOPBACK, refused};
use super::text::parse_prefix;
use crate::error::{Error, Result};

/// An address as it is set.
struct Wanted {
    address: IpAddr,
    length: u8,
    scope: AddressScope,
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
            scope: scope.into(),
            deprecated: address.deprecated,
        })
    }
}

/// Gives interface number `index` the addresses of `interface`.
pub(super) async fn add(
    handle: &Handle,
    interface: &Interface,
    index: u32,
    logger: &slog::Logger,
) -> Result<()> {
    let name = &interface.name;
    let wanted = interface.addresses.iter().map(Wanted::parse);
    let wanted = wanted.collect::<Result<Vec<_>>>()?;
    for address in in_order_of_setting(&wanted) {
        let Wanted {
            address: ip,
            length,
            ..
        } = address;
        let mut request = handle.address().add(index, *ip, *length);
        complete(request.message_mut(), address, name == LOOPBACK);
        let added = request.replace().execute().await;
        added.map_err(|e| refused(format_args!("address {ip}/{length} of {name}"), &e))?;
    }
    let v6: Vec<IpAddr> = of_version_6(wanted.iter().map(|one| one.address)).collect();
    if v6.len() > 1 {
        let listed = listed(handle, index).await?;
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

fn complete(message: &mut AddressMessage, address: &Wanted, of_loopback: bool) {
    message.header.scope = address.scope;
    let mut flags = AddressFlags::empty();
    if !of_loopback {
        // The routes of its network are among the requested ones, as far as the pod has them.
        flags |= AddressFlags::Noprefixroute;
    }
    if address.address.is_ipv6() {
        // The host's side holds the same address: detection would find a duplicate.
        message.header.flags |= AddressHeaderFlags::Nodad;
        flags |= AddressFlags::Nodad;
    }
    message.attributes.push(AddressAttribute::Flags(flags));
    if address.deprecated {
        let mut lifetime = CacheInfo::default();
        lifetime.ifa_valid = u32::MAX;
        message
            .attributes
            .push(AddressAttribute::CacheInfo(lifetime));
    }
}

/// The IPv6 addresses of an interface, as the kernel lists them.
async fn listed(handle: &Handle, index: u32) -> Result<Vec<IpAddr>> {
    let request = handle.address().get().set_link_index_filter(index);
    let messages: Vec<AddressMessage> = request
        .execute()
        .try_collect()
        .await
        .map_err(|e| refused("addresses", &e))?;
    let addresses = messages.iter().filter_map(|message| {
        message
            .attributes
            .iter()
            .find_map(|attribute| match attribute {
                AddressAttribute::Address(ip) => Some(*ip),
                _ => None,
            })
    });
    Ok(of_version_6(addresses).collect())
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
        let mut message = AddressMessage::default();
        complete(&mut message, &vip, true);
        let lifetime = message.attributes.iter().find_map(|a| match a {
            AddressAttribute::CacheInfo(lifetime) => Some(*lifetime),
            _ => None,
        });
        let lifetime = lifetime.unwrap();
        assert_eq!((lifetime.ifa_preferred, lifetime.ifa_valid), (0, u32::MAX));
        assert!(
            message
                .attributes
                .contains(&AddressAttribute::Flags(AddressFlags::Nodad))
        );
        let bad = Address {
            prefix: "10.0.0.1/8".into(),
            scope: 256,
            ..Default::default()
        };
        assert!(Wanted::parse(&bad).is_err());
    }
}
