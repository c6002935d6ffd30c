//! Interfaces: by their names and hardware addresses, and what is changed of them.

use std::io;

use super::routing::{Request, Routing};
use crate::{
    error::{Error, Result},
    netlink::attributes,
};

/// The interface that every network has.
pub(super) const LOOPBACK: &str = "lo";

/// Bytes of `struct ifinfomsg`.
const GENERAL: usize = 16;
/// `IFLA_ADDRESS`, `IFLA_IFNAME` and `IFLA_MTU`.
const ADDRESS: u16 = 1;
const NAME: u16 = 3;
const MTU: u16 = 4;
/// `IFF_UP` and `IFF_NOARP`.
const UP: u32 = 1;
const NOARP: u32 = 0x80;

/// A request that the kernel, or the writing of it, refused.
pub(super) fn refused(what: impl std::fmt::Display, error: io::Error) -> Error {
    Error::io(what, error)
}

/// An interface's number.
pub(super) fn index_of(name: &str) -> Result<u32> {
    nix::net::if_::if_nametoindex(name)
        .map_err(|_| Error::InvalidArgument(format!("the guest has no interface {name:?}")))
}

/// A request that concerns interface `index`, with which those of `flags` are set and no others touched.
fn set(index: u32, flags: u32) -> Request {
    let mut general = [0; GENERAL];
    general[4..8].copy_from_slice(&index.to_ne_bytes());
    general[8..12].copy_from_slice(&flags.to_ne_bytes());
    general[12..].copy_from_slice(&flags.to_ne_bytes());
    Request::new(libc::RTM_SETLINK, 0, &general)
}

/// Gives an interface that is down another name.
pub(super) fn rename(routing: &mut Routing, index: u32, name: &str) -> Result<()> {
    let renamed = set(index, 0).with(NAME, &[name.as_bytes(), &[0]].concat());
    renamed
        .and_then(|request| routing.change(&request))
        .map_err(|e| refused(format_args!("interface {name}"), e))
}

/// Brings an interface up, with an MTU in bytes unless that is 0, and without ARP if `noarp`.
pub(super) fn bring_up(routing: &mut Routing, index: u32, mtu: u32, noarp: bool) -> io::Result<()> {
    let mut request = set(index, if noarp { UP | NOARP } else { UP });
    if mtu != 0 {
        request = request.with_number(MTU, mtu)?;
    }
    routing.change(&request)
}

/// The number and name of the interface with this hardware address, if there is one.
pub(super) fn with_mac(routing: &mut Routing, mac: &[u8; 6]) -> Result<Option<(u32, String)>> {
    let all = Request::new(libc::RTM_GETLINK, 0, &[0; GENERAL]);
    let links = routing.list(&all).map_err(|e| refused("interfaces", e))?;
    Ok(links.iter().find_map(|link| named(link, mac)))
}

fn named(link: &[u8], mac: &[u8; 6]) -> Option<(u32, String)> {
    let index = u32::from_ne_bytes(link.get(4..8)?.try_into().ok()?);
    let value = |wanted: u16| {
        attributes(link.get(GENERAL..).unwrap_or_default())
            .find(|(kind, _)| *kind == wanted)
            .map(|(_, value)| value)
    };
    if value(ADDRESS)? != mac {
        return None;
    }
    let name = value(NAME).unwrap_or_default();
    let name = name.strip_suffix(&[0]).unwrap_or(name);
    Some((index, String::from_utf8_lossy(name).into_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::attribute;

    #[test]
    fn an_interface_is_found_by_its_hardware_address_alone() {
        let mut link = vec![0; GENERAL];
        link[4] = 7;
        attribute(&mut link, NAME, b"eth0\0").unwrap();
        attribute(&mut link, ADDRESS, &[2, 0, 0, 0, 0, 1]).unwrap();
        let found = named(&link, &[2, 0, 0, 0, 0, 1]);
        assert_eq!(found, Some((7, "eth0".to_owned())));
        assert_eq!(named(&link, &[2, 0, 0, 0, 0, 2]), None);
        assert_eq!(named(&link[..6], &[2, 0, 0, 0, 0, 1]), None);
    }

    #[test]
    fn only_the_flags_that_are_meant_are_touched() {
        let request = set(3, UP | NOARP);
        let words: Vec<u32> = request
            .general()
            .chunks(4)
            .map(|word| u32::from_ne_bytes(word.try_into().unwrap()))
            .collect();
        assert_eq!(words, [0, 3, 0x81, 0x81]);
    }
}
