//! Against the virtio-PCI transport: common configuration, status, notifications, MSI-X.

use std::time::Duration;

use anyhow::Result;

use super::Guest;
use crate::dma::Page;
use crate::virtio::{Ring, SIZE, WRITE};

/// Addresses that are not RAM, or only partly.
pub const OUTSIDE: &[u64] = &[
    0,
    0xa_0000,
    0xf_f000,
    0xfee0_0000,
    0xe000_0000,
    0xffff_f000,
    0x1_0000_0000_0000,
    u64::MAX - 0xfff,
    u64::MAX - 15,
];

/// CVE-2026-5747: nothing in common configuration changes an active queue.
pub fn change_active_queue(guest: &Guest) -> Result<()> {
    guest.each(|function| {
        let rings = function.start()?;
        let decoy = Page::new()?;
        for ring in &rings {
            for (size, address) in [
                (1, decoy.address),
                (0, decoy.address),
                (0x8000, decoy.address + 1),
                (0xffff, u64::MAX - 0xfff),
                (SIZE, 0),
            ] {
                function.set_queue(ring.index, size, address, address, address);
                ring.descriptor(0, decoy.address, 64, WRITE, 0);
                ring.offer(0);
                function.kick(ring.index);
            }
            function.common16(0x16, ring.index);
            function.common16(0x1c, 0);
            function.kick(ring.index);
        }
        // A second DRIVER_OK and a status that loses bits without a reset.
        function.set_status(0xf);
        function.set_status(1);
        function.set_status(0xf);
        Ok(())
    })
}

/// queue_select beyond num_queues.
pub fn absent_queues(guest: &Guest) -> Result<()> {
    guest.each(|function| {
        function.negotiate()?;
        let ring = Ring::new(0)?;
        for index in [function.queues(), 64, 255, 0x7fff, 0xffff] {
            function.set_queue(
                index,
                SIZE,
                ring.page.address,
                ring.page.address + 1024,
                ring.page.address + 2048,
            );
            function.common16(0x1a, 0xfffe);
        }
        function.set_status(0xf);
        for index in [function.queues(), 64, 0xffff] {
            function.kick(index);
        }
        Ok(())
    })
}

/// queue_size of every bad kind.
pub fn bad_sizes(guest: &Guest) -> Result<()> {
    guest.each(|function| {
        for size in [0u16, 1, 3, 17, 257, 0x8000, 0xffff] {
            function.negotiate()?;
            let ring = Ring::new(0)?;
            let base = ring.page.address;
            for index in 0..function.queues().min(4) {
                function.set_queue(index, size, base, base + 1024, base + 2048);
            }
            function.set_status(0xf);
            ring.descriptor(0, base, 16, WRITE, 0);
            ring.offer(0);
            ring.set_position(0xffff);
            function.kick(0);
        }
        Ok(())
    })
}

/// Rings where there is no RAM, or that end beyond it, or that are not aligned.
pub fn addresses_outside(guest: &Guest) -> Result<()> {
    guest.each(|function| {
        let good = Ring::new(0)?;
        for address in OUTSIDE {
            for (desc, avail, used) in [
                (*address, good.page.address + 1024, good.page.address + 2048),
                (good.page.address, *address, good.page.address + 2048),
                (good.page.address, good.page.address + 1024, *address),
                (*address, *address, *address),
                (
                    good.page.address + 1,
                    good.page.address + 1025,
                    good.page.address + 2049,
                ),
            ] {
                function.negotiate()?;
                function.set_queue(0, SIZE, desc, avail, used);
                function.set_status(0xf);
                function.kick(0);
            }
        }
        Ok(())
    })
}

/// Feature bits that do not exist, and DRIVER_OK without FEATURES_OK.
pub fn bad_features(guest: &Guest) -> Result<()> {
    guest.each(|function| {
        function.reset()?;
        function.set_status(3);
        for select in [0u32, 1, 2, 3, 0xffff_ffff] {
            function.common32(0x00, select);
            function.common32(0x08, select);
            function.common32(0x0c, 0xffff_ffff);
        }
        function.set_status(0xb);
        let ring = Ring::new(0)?;
        ring.attach(function);
        function.set_status(0xf);
        function.kick(0);
        // No features at all: not a modern driver.
        function.reset()?;
        function.set_status(0xf);
        ring.attach(function);
        function.kick(0);
        Ok(())
    })
}

/// Every status value after every other.
pub fn status_storm(guest: &Guest) -> Result<()> {
    guest.each(|function| {
        let rings = function.start()?;
        for value in (0..=255u8).rev() {
            function.set_status(value);
            function.set_status(value.wrapping_mul(37));
            for ring in &rings {
                function.kick(ring.index);
            }
        }
        Ok(())
    })
}

/// Reads and writes of 1, 2, 4 and 8 bytes at every offset of the BAR that has a meaning.
pub fn odd_accesses(guest: &Guest) -> Result<()> {
    guest.each(|function| {
        function.negotiate()?;
        let end = function
            .bar
            .length
            .min(function.device.offset + function.device.length.min(64) + 16);
        for region in [function.common, function.device, function.notify] {
            for offset in region.offset..(region.offset + region.length.min(96)).min(end) {
                let _: u8 = function.bar.read(offset);
                let _: u16 = function.bar.read(offset);
                let _: u32 = function.bar.read(offset);
                let _: u64 = function.bar.read(offset);
                function.bar.write(offset, 0xa5u8);
                function.bar.write(offset, 0xffffu16);
                function.bar.write(offset, 0xffff_ffffu32);
                function.bar.write(offset, u64::MAX);
            }
        }
        // The last bytes of the BAR.
        for back in 1..9 {
            let _: u8 = function.bar.read(function.bar.length - back);
            function.bar.write(function.bar.length - back, 0xffu8);
        }
        Ok(())
    })
}

/// Writes all over the notification area, before and after DRIVER_OK.
pub fn stray_kicks(guest: &Guest) -> Result<()> {
    guest.each(|function| {
        for ready in [false, true] {
            if ready {
                function.start()?;
            } else {
                function.negotiate()?;
            }
            for step in 0..256usize {
                let offset = function.notify.offset + (step * 7) % function.notify.length.max(1);
                function.bar.write(offset, 0xffffu16);
                function.bar.write(offset, 0xffff_ffffu32);
                function.bar.write(offset, 1u8);
            }
        }
        Ok(())
    })
}

/// Resets while buffers are being used.
pub fn resets_in_traffic(guest: &Guest) -> Result<()> {
    guest.each(|function| {
        let buffer = Page::new()?;
        for _ in 0..50 {
            let rings = function.start()?;
            for ring in &rings {
                for head in 0..SIZE {
                    ring.descriptor(head, buffer.address, 4096, WRITE, 0);
                    ring.offer(head);
                }
                function.kick(ring.index);
            }
            function.reset()?;
            // The memory is the driver's again: whatever the device still wrote would be seen here.
            let before: Vec<u16> = rings.iter().map(Ring::used).collect();
            std::thread::sleep(Duration::from_millis(1));
            let after: Vec<u16> = rings.iter().map(Ring::used).collect();
            anyhow::ensure!(before == after, "the device used a ring after its reset");
        }
        Ok(())
    })
}

/// Vectors that do not exist, and a table full of bad addresses, all unmasked.
pub fn msix(guest: &Guest) -> Result<()> {
    guest.each(|function| {
        function.negotiate()?;
        for vector in [0u16, 1, 63, 64, 255, 0x7ff, 0xfffe, 0xffff] {
            function.common16(0x10, vector);
            for index in 0..function.queues().min(4) {
                function.common16(0x16, index);
                function.common16(0x1a, vector);
            }
        }
        // Whatever lies outside the known regions of the BAR is the table and the pending bits.
        let known = [function.common, function.notify, function.device];
        for offset in (0..function.bar.length).step_by(4).take(4096) {
            let inside = known
                .iter()
                .any(|region| (region.offset..region.offset + region.length).contains(&offset));
            if !inside {
                let value = match offset % 16 {
                    0 => 0xfee0_0000u32.wrapping_add(u32::try_from(offset).unwrap_or(0) << 12),
                    4 => 0xffff_ffff,
                    8 => 0xffff,
                    _ => 0,
                };
                function.bar.write(offset, value);
            }
        }
        // Turns MSI-X on and masks and unmasks the function.
        for control in [0x8000u16, 0xc000, 0x0000, 0x8000, 0xffff, 0x0000] {
            let mut next = u64::from(function.config_read(0x34) & 0xff);
            for _ in 0..48 {
                if next == 0 {
                    break;
                }
                let header = function.config_read(next);
                if header & 0xff == 0x11 {
                    function.config_write(next + 2, &control.to_le_bytes());
                }
                next = u64::from((header >> 8) & 0xff);
            }
        }
        function.set_status(0xf);
        function.kick(0);
        Ok(())
    })
}
