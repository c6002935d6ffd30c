//! Where a virtio function's registers are: the BAR's regions and the capabilities that name them
//! (virtio 1.3 §4.1.4).

use crate::pci::config::{ConfigError, ConfigSpace};
use crate::pci::msix::ENTRY_SIZE;

/// Bytes of the BAR.
pub const BAR_SIZE: u64 = 0x8000;
/// Common configuration.
pub const COMMON: u64 = 0;
/// Interrupt status.
pub const ISR: u64 = 0x1000;
/// Device configuration.
pub const DEVICE: u64 = 0x2000;
/// Queue notifications.
pub const NOTIFY: u64 = 0x3000;
/// MSI-X table.
pub const TABLE: u64 = 0x4000;
/// MSI-X pending bits.
pub const PENDING: u64 = 0x5000;
/// Bytes between the notification addresses of two queues.
pub const NOTIFY_STRIDE: u64 = 4;

const REGION: u64 = 0x1000;
const COMMON_LENGTH: u64 = 0x38;

const VENDOR_CAPABILITY: u8 = 9;
const MSIX_CAPABILITY: u8 = 0x11;

/// Offsets of the capabilities that the transport itself interprets.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// The MSI-X capability.
    pub msix: u16,
    /// The PCI configuration access capability.
    pub window: u16,
}

/// Which region an offset of the BAR lies in, and where in it.
#[must_use]
pub fn region(offset: u64) -> (u64, u64) {
    (offset / REGION * REGION, offset % REGION)
}

/// Adds the BAR and all capabilities, in the order in which Linux looks for them: each step past
/// one costs two exits.
///
/// # Errors
/// If they do not fit, which is our own mistake.
pub fn add(config: &mut ConfigSpace, vectors: u16, base: u64) -> Result<Layout, ConfigError> {
    config.add_bar64(0, BAR_SIZE, base)?;
    add_region(config, 1, COMMON, COMMON_LENGTH, &[])?;
    add_region(config, 3, ISR, 1, &[])?;
    let stride = u32::try_from(NOTIFY_STRIDE).unwrap_or(0);
    add_region(config, 2, NOTIFY, REGION, &stride.to_le_bytes())?;
    add_region(config, 4, DEVICE, REGION, &[])?;
    let msix = add_msix(config, vectors)?;
    let window = add_window(config)?;
    Ok(Layout { msix, window })
}

/// `virtio_pci_cap` without its first two bytes.
fn body(kind: u8, offset: u64, length: u64, extra: &[u8]) -> Vec<u8> {
    let total = u8::try_from(16 + extra.len()).unwrap_or(u8::MAX);
    let word = |value: u64| u32::try_from(value).unwrap_or(0).to_le_bytes();
    let mut body = vec![total, kind, 0, 0, 0, 0];
    body.extend(word(offset));
    body.extend(word(length));
    body.extend(extra);
    body
}

fn add_region(
    config: &mut ConfigSpace,
    kind: u8,
    offset: u64,
    length: u64,
    extra: &[u8],
) -> Result<u16, ConfigError> {
    config.add_capability(VENDOR_CAPABILITY, &body(kind, offset, length, extra), &[])
}

fn add_msix(config: &mut ConfigSpace, vectors: u16) -> Result<u16, ConfigError> {
    debug_assert!(u64::from(vectors) * ENTRY_SIZE <= REGION);
    let mut body = Vec::with_capacity(10);
    body.extend(vectors.saturating_sub(1).to_le_bytes());
    for offset in [TABLE, PENDING] {
        // The low three bits name BAR 0.
        body.extend(u32::try_from(offset).unwrap_or(0).to_le_bytes());
    }
    // A guest may change enable and function mask.
    config.add_capability(MSIX_CAPABILITY, &body, &[0, 0xc0])
}

fn add_window(config: &mut ConfigSpace) -> Result<u16, ConfigError> {
    let body = body(5, 0, 0, &[0; 4]);
    // BAR, offset, length and data are the driver's.
    let mut writable = [0xff; 18];
    writable[..2].fill(0);
    writable[3..6].fill(0);
    config.add_capability(VENDOR_CAPABILITY, &body, &writable)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::config::Identity;

    #[test]
    fn a_driver_finds_every_region_by_walking_the_list() {
        let mut config = ConfigSpace::new(&Identity {
            vendor: 1,
            device: 2,
            revision: 1,
            class: [0; 3],
            subsystem: (0, 0),
        });
        let layout = add(&mut config, 5, 0x8000).unwrap();
        let mut found = Vec::new();
        let [mut at] = config.get::<1>(0x34);
        while at != 0 {
            let [id, next, _, kind] = config.get::<4>(u16::from(at));
            if id == VENDOR_CAPABILITY {
                let offset = u32::from_le_bytes(config.get(u16::from(at) + 8));
                found.push((kind, u64::from(offset)));
            }
            at = next;
        }
        assert_eq!(
            found,
            [(1, COMMON), (3, ISR), (2, NOTIFY), (4, DEVICE), (5, 0)]
        );
        assert_eq!(
            u16::from_le_bytes(config.get(layout.msix + 2)),
            4,
            "table size minus one"
        );
        assert_eq!(
            u32::from_le_bytes(config.get(layout.msix + 4)),
            u32::try_from(TABLE).unwrap()
        );
    }

    #[test]
    fn only_bar_offset_length_and_data_of_the_window_are_writable() {
        let mut config = ConfigSpace::new(&Identity {
            vendor: 1,
            device: 2,
            revision: 1,
            class: [0; 3],
            subsystem: (0, 0),
        });
        let layout = add(&mut config, 5, 0).unwrap();
        let before: [u8; 20] = config.get(layout.window);
        config.write(layout.window, &[0xff; 20]);
        let after: [u8; 20] = config.get(layout.window);
        assert_eq!(before[..4], after[..4]);
        assert_eq!(before[5..8], after[5..8]);
        assert_eq!(after[4], 0xff);
        assert_eq!(after[8..20], [0xff; 12]);
    }
}
