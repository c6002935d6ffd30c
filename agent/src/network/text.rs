//! Addresses as text. Hostile: a shim's, but fuzzed as if it were.

use std::net::IpAddr;

use crate::error::{Error, Result};

/// An address and its prefix length.
pub(super) type Prefix = (IpAddr, u8);

pub(super) fn parse_address(text: &str) -> Result<IpAddr> {
    text.parse()
        .map_err(|_| Error::InvalidArgument(format!("{text:?} is not an IP address")))
}

pub(super) fn parse_optional(text: &str) -> Result<Option<IpAddr>> {
    if text.is_empty() {
        Ok(None)
    } else {
        parse_address(text).map(Some)
    }
}

/// CIDR notation; a bare address is a host's.
pub(super) fn parse_prefix(text: &str) -> Result<Prefix> {
    let bad = || Error::InvalidArgument(format!("{text:?} is not an address in CIDR notation"));
    let (address, length) = match text.split_once('/') {
        Some((address, length)) => (address, Some(length)),
        None => (text, None),
    };
    let address: IpAddr = address.parse().map_err(|_| bad())?;
    let widest = if address.is_ipv4() { 32 } else { 128 };
    let length: u8 = length.map_or(Ok(widest), str::parse).map_err(|_| bad())?;
    if length > widest {
        Err(bad())
    } else {
        Ok((address, length))
    }
}

pub(super) fn parse_mac(text: &str) -> Result<[u8; 6]> {
    let bad = || Error::InvalidArgument(format!("{text:?} is not a MAC address"));
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|p| p.len() == 2).ok_or_else(bad)?;
        *byte = u8::from_str_radix(part, 16).map_err(|_| bad())?;
    }
    if parts.next().is_some() {
        Err(bad())
    } else {
        Ok(mac)
    }
}

pub(super) fn show_mac(mac: &[u8; 6]) -> String {
    mac.map(|b| format!("{b:02x}")).join(":")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn cidr_and_mac_are_checked() {
        assert_eq!(
            parse_prefix("10.0.0.2/24").unwrap(),
            ("10.0.0.2".parse().unwrap(), 24)
        );
        assert_eq!(parse_prefix("fd00::2").unwrap().1, 128);
        for bad in ["10.0.0.2/33", "x/3", "10.0.0.2/", "/8", "fd00::/129"] {
            assert!(parse_prefix(bad).is_err(), "{bad}");
        }
        assert_eq!(
            parse_mac("02:00:0a:FF:00:01").unwrap(),
            [2, 0, 10, 255, 0, 1]
        );
        for bad in [
            "",
            "02:00:0a:ff:00",
            "02:00:0a:ff:00:01:02",
            "2:0:0:0:0:1",
            "0x:00:00:00:00:00",
        ] {
            assert!(parse_mac(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn any_text_parses_or_fails(text in "[0-9a-f:./]{0,24}") {
            let _ = parse_mac(&text);
            if let Ok((address, length)) = parse_prefix(&text) {
                let widest = if address.is_ipv4() { 32 } else { 128 };
                prop_assert!(length <= widest);
            }
        }
    }
}
