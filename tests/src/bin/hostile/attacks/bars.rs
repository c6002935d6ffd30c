//! Against the PCI bus: BARs that move, decoding that stops, configuration space.

use anyhow::Result;

use super::Guest;
use crate::pci::Function;

/// RAM, nothing, the local APIC, other functions, the end of the address space.
pub fn moved(guest: &Guest) -> Result<()> {
    let homes: Vec<u64> = guest.functions.iter().map(Function::bar_address).collect();
    let targets = [
        0,
        0x1000,
        0x10_0000,
        0x100_0000,
        0x400_0000,
        0xfec0_0000,
        0xfee0_0000,
        0xe000_0000,
        0xffff_f000,
        0x1_0000_0000,
        0x7fff_ffff_f000,
        u64::MAX,
    ];
    for (index, function) in guest.functions.iter().enumerate() {
        // Live, so that ioeventfds and handlers have to follow.
        let rings = function.start()?;
        for target in targets.iter().chain(&homes) {
            function.move_bar(*target);
            // Memory is still what it was: a write to RAM must not reach the device and back.
            for ring in &rings {
                ring.descriptor(0, ring.page.address, 16, 0, 0);
            }
            let _: u32 = function.bar.read(0);
        }
        function.move_bar(homes[index]);
        guest.done(function)?;
    }
    // All of them at the same place.
    for function in guest.functions.iter() {
        function.move_bar(homes[0]);
    }
    for (function, home) in guest.functions.iter().zip(&homes) {
        function.move_bar(*home);
    }
    for function in guest.functions.iter() {
        guest.done(function)?;
    }
    Ok(())
}

/// Memory decoding and bus mastering go while a queue is live.
pub fn decode_off(guest: &Guest) -> Result<()> {
    guest.each(|function| {
        let rings = function.start()?;
        for command in [0x0000u16, 0x0002, 0x0004, 0xffff, 0x0406] {
            function.config_write(4, &command.to_le_bytes());
            for ring in &rings {
                function.kick(ring.index);
            }
            let _: u32 = function.bar.read(0);
        }
        function.enable();
        Ok(())
    })
}

/// Every register, with everything and nothing, one, two and four bytes wide; then put back.
pub fn config_fuzz(guest: &Guest) -> Result<()> {
    for function in guest.functions.iter() {
        let saved: Vec<u32> = (0..64)
            .map(|index| function.config_read(index * 4))
            .collect();
        for offset in 0..256u64 {
            function.config_write(offset, &[0xff]);
            function.config_write(offset, &[0xff; 2]);
            function.config_write(offset, &[0xff; 4]);
            function.config_write(offset, &[0; 4]);
            let _ = function.config_read(offset);
        }
        for offset in (256..4096u64).step_by(64) {
            function.config_write(offset, &[0xff; 4]);
            let _ = function.config_read(offset);
        }
        for (index, value) in (0u64..).zip(&saved) {
            function.config_write(index * 4, &value.to_le_bytes());
        }
        guest.done(function)?;
    }
    Ok(())
}
