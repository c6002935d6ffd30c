//! The guest's network interfaces with their addresses, and its routes.
use std::{
    fmt::Write as _,
    fs,
    net::{Ipv4Addr, Ipv6Addr},
};

use nix::{ifaddrs::getifaddrs, sys::socket::SockaddrStorage};

use crate::error::{Error, Result};

/// The most interfaces that are told of, and the most routes.
const MAX_INTERFACES: usize = 256;
const MAX_ROUTES: usize = 1024;

/// Text: an interface a line with its addresses below it, then the routes.
///
/// # Errors
/// What the kernel says.
pub(super) fn list() -> Result<String> {
    let addresses = getifaddrs().map_err(|error| Error::io("getifaddrs", error))?;
    let addresses: Vec<(String, String)> = addresses
        .filter_map(|entry| Some((entry.interface_name, prefix(entry.address?, entry.netmask)?)))
        .collect();
    let entries = fs::read_dir("/sys/class/net").map_err(|e| Error::io("/sys/class/net", e))?;
    let mut names: Vec<String> = entries
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort_unstable();
    let mut text = String::new();
    for name in names.iter().take(MAX_INTERFACES) {
        let read = |file: &str| {
            let value = fs::read_to_string(format!("/sys/class/net/{name}/{file}"));
            value.map_or_else(|_| "?".to_owned(), |value| value.trim().to_owned())
        };
        let (state, mtu, mac) = (read("operstate"), read("mtu"), read("address"));
        let _ = writeln!(text, "{name} {state} mtu {mtu} mac {mac}");
        for (_, address) in addresses.iter().filter(|(of, _)| of == name) {
            let _ = writeln!(text, "  {address}");
        }
    }
    let v4 = fs::read_to_string("/proc/net/route").unwrap_or_default();
    let v6 = fs::read_to_string("/proc/net/ipv6_route").unwrap_or_default();
    let routes = v4.lines().skip(1).filter_map(route_v4);
    for route in routes
        .chain(v6.lines().filter_map(route_v6))
        .take(MAX_ROUTES)
    {
        let _ = writeln!(text, "route {route}");
    }
    Ok(text)
}

fn prefix(address: SockaddrStorage, mask: Option<SockaddrStorage>) -> Option<String> {
    if let Some(v4) = address.as_sockaddr_in() {
        let mask = mask.and_then(|mask| Some(u32::from(mask.as_sockaddr_in()?.ip())));
        return Some(format!(
            "{}/{}",
            v4.ip(),
            mask.unwrap_or(u32::MAX).count_ones()
        ));
    }
    let v6 = address.as_sockaddr_in6()?;
    let mask = mask.and_then(|mask| Some(u128::from(mask.as_sockaddr_in6()?.ip())));
    Some(format!(
        "{}/{}",
        v6.ip(),
        mask.unwrap_or(u128::MAX).count_ones()
    ))
}

/// A line of /proc/net/route: numbers in hexadecimal, addresses as they lie in memory.
fn route_v4(line: &str) -> Option<String> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let number = |at: usize| u32::from_str_radix(fields.get(at)?, 16).ok();
    let address = |at: usize| Some(Ipv4Addr::from(number(at)?.to_ne_bytes()));
    let length = number(7)?.count_ones();
    let to = show(&format!("{}/{length}", address(1)?), length);
    let gateway = address(2)?;
    let via = if gateway.is_unspecified() {
        String::new()
    } else {
        format!(" via {gateway}")
    };
    Some(format!(
        "{to}{via} dev {} metric {}",
        fields[0],
        fields.get(6)?
    ))
}

/// A line of /proc/net/ipv6_route: addresses in hexadecimal, of which those of this machine itself (RTF_LOCAL,
/// RTF_REJECT) are left out.
fn route_v6(line: &str) -> Option<String> {
    const REJECT: u32 = 0x0200;
    const LOCAL: u32 = 0x8000_0000;
    let fields: Vec<&str> = line.split_whitespace().collect();
    let address = |at: usize| {
        let bits = u128::from_str_radix(fields.get(at)?, 16).ok()?;
        Some(Ipv6Addr::from(bits))
    };
    let flags = u32::from_str_radix(fields.get(8)?, 16).ok()?;
    if flags & (LOCAL | REJECT) != 0 {
        return None;
    }
    let length = u32::from_str_radix(fields.get(1)?, 16).ok()?;
    let to = show(&format!("{}/{length}", address(0)?), length);
    let gateway = address(4)?;
    let via = if gateway.is_unspecified() {
        String::new()
    } else {
        format!(" via {gateway}")
    };
    let metric = u32::from_str_radix(fields.get(5)?, 16).ok()?;
    Some(format!("{to}{via} dev {} metric {metric}", fields.get(9)?))
}

fn show(to: &str, length: u32) -> String {
    if length == 0 {
        "default".to_owned()
    } else {
        to.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routes_are_read_from_the_kernels_tables() {
        let line = "eth0\t00000000\t0102A8C0\t0003\t0\t0\t100\t00000000\t0\t0\t0";
        assert_eq!(
            route_v4(line).unwrap(),
            "default via 192.168.2.1 dev eth0 metric 100"
        );
        let line = "eth0\t0002A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0";
        assert_eq!(route_v4(line).unwrap(), "192.168.2.0/24 dev eth0 metric 0");
        let line = "00000000000000000000000000000000 00 00000000000000000000000000000000 00 \
                    fd000000000000000000000000000001 00000400 00000001 00000000 00000003     eth0";
        assert_eq!(
            route_v6(line).unwrap(),
            "default via fd00::1 dev eth0 metric 1024"
        );
        let line = "fe800000000000000000000000000000 40 00000000000000000000000000000000 00 \
                    00000000000000000000000000000000 00000100 00000001 00000000 00000001     eth0";
        assert_eq!(route_v6(line).unwrap(), "fe80::/64 dev eth0 metric 256");
        for nothing in ["", "x", "eth0 0 0"] {
            assert_eq!((route_v4(nothing), route_v6(nothing)), (None, None));
        }
    }

    #[test]
    fn the_loopback_of_this_machine_is_there() {
        let text = list().unwrap();
        assert!(text.contains("\nlo ") || text.starts_with("lo "), "{text}");
    }
}
