//! A device of the node as a handler's configuration names it: where it is, or what it is.

use std::fmt;
use std::str::FromStr;

/// One entry of [`super::Config::devices`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wish {
    /// The PCI function at this address, `0000:3b:00.0`.
    At(String),
    /// Any free one of this vendor and device, `10de:2330`.
    Kind {
        /// Vendor.
        vendor: u16,
        /// Device.
        device: u16,
    },
}

impl fmt::Display for Wish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::At(address) => f.write_str(address),
            Self::Kind { vendor, device } => write!(f, "{vendor:04x}:{device:04x}"),
        }
    }
}

impl FromStr for Wish {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        parse(text).ok_or_else(|| {
            format!(
                "{text:?} names no PCI device: it is an address such as \"0000:3b:00.0\", or vendor and device such as \
                 \"10de:2330\""
            )
        })
    }
}

fn parse(text: &str) -> Option<Wish> {
    // No sign, no other length: what `lspci` prints.
    let hex = |text: &str, digits: usize| {
        let exact = text.len() == digits && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        exact.then(|| u16::from_str_radix(text, 16).ok()).flatten()
    };
    let parts: Vec<&str> = text.split(':').collect();
    let (domain, bus, rest) = match parts[..] {
        [vendor, device] if !device.contains('.') => {
            let (vendor, device) = (hex(vendor, 4)?, hex(device, 4)?);
            return Some(Wish::Kind { vendor, device });
        }
        [bus, rest] => ("0000", bus, rest),
        [domain, bus, rest] => (domain, bus, rest),
        _ => return None,
    };
    let (slot, function) = rest.split_once('.')?;
    let (domain, bus, slot) = (hex(domain, 4)?, hex(bus, 2)?, hex(slot, 2)?);
    let function = hex(function, 1).filter(|function| *function < 8)?;
    (slot < 32).then(|| Wish::At(format!("{domain:04x}:{bus:02x}:{slot:02x}.{function}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_named_as_lspci_prints_it() {
        let shown = |text: &str| text.parse::<Wish>().map(|wish| wish.to_string());
        assert_eq!(shown("0000:3B:00.0").unwrap(), "0000:3b:00.0");
        assert_eq!(shown("3b:1f.7").unwrap(), "0000:3b:1f.7");
        assert_eq!(shown("10DE:2330").unwrap(), "10de:2330");
        for wrong in [
            "",
            "gpu",
            "10de",
            "10de:233",
            "10de:+330",
            "0000:3b:20.0",
            "0000:3b:00.8",
            "3b:00",
            "0000:3b:00.0.0",
            "0:0:0:0",
            "10de:2330:1",
        ] {
            let error = shown(wrong).unwrap_err();
            assert!(error.contains("0000:3b:00.0"), "{wrong}: {error}");
        }
    }
}
