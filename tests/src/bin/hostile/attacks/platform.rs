//! Against the machine around the devices: I/O ports.

use anyhow::Result;

use super::Guest;
use crate::port;

/// Where reset, power and the debug console are: left alone, they end the guest on purpose.
const SPARED: &[std::ops::Range<u16>] = &[0x3f8..0x400, 0x60..0x68, 0xcf9..0xcfa, 0x600..0x610];

/// Reads and writes all over the port space, with strings too.
pub fn ports(guest: &Guest) -> Result<()> {
    for port in (0..0xfffc_u16).step_by(13) {
        if SPARED
            .iter()
            .any(|range| (port..port.saturating_add(4)).any(|byte| range.contains(&byte)))
        {
            continue;
        }
        let _ = port::read32(port);
        if port != 0x80 {
            port::write32(port, 0);
            port::write8(port, 0xff);
        }
    }
    port::write_string(0x80, &[0xee; 512]);
    port::write_string(0x4242, &[0xff; 4096]);
    // The machine around is as it was: every device still works.
    guest
        .functions
        .iter()
        .try_for_each(|function| guest.done(function))
}
