//! What a guest sees and reaches of a device's configuration space.

use proptest::prelude::*;

use super::super::testing::{nvme, nvme_regions};
use super::*;

fn config() -> FilteredConfig {
    FilteredConfig::new(&nvme(), &nvme_regions()).unwrap()
}

fn read(config: &FilteredConfig, offset: u16, length: usize) -> Vec<u8> {
    let mut data = vec![0; length];
    config.read(offset, &mut data, |data| data.fill(0xdd));
    data
}

#[test]
fn bars_answer_their_size_keep_their_kind_and_decode_where_they_are_put() {
    let mut config = config();
    let bar = Bar {
        index: 0,
        size: 0x4000,
        wide: true,
    };
    assert_eq!(config.bars, [bar]);
    config.write(0x10, &[0xff; 8], |_, _| panic!("BARs are ours"));
    assert_eq!(
        read(&config, 0x10, 8),
        [0x04, 0xc0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]
    );
    config.place(bar, 0x40_0000_4000);
    assert!(config.decoded().is_empty());
    config.write(4, &[2, 0], |_, _| ());
    assert_eq!(config.decoded()[0].base, 0x40_0000_4000);
    // An I/O BAR, the ROM and INTx are not there.
    assert_eq!(read(&config, 0x18, 4), [0; 4]);
    assert_eq!(read(&config, 0x30, 4), [0; 4]);
    assert_eq!(read(&config, 0x3d, 1), [0]);
}

#[test]
fn the_list_has_the_known_capabilities_in_the_devices_order_and_no_other() {
    let config = config();
    let mut ids = Vec::new();
    let mut at = read(&config, 0x34, 1)[0];
    while at != 0 {
        let entry = read(&config, at.into(), 2);
        ids.push(entry[0]);
        at = entry[1];
    }
    // Of MSI-X, vital product data, power, MSI and express.
    assert_eq!(ids, [ID_MSIX, ID_POWER, ID_MSI, ID_EXPRESS]);
    let msix = config.msix.unwrap();
    assert_eq!(
        (msix.count, msix.table, msix.pending),
        (65, (0, 0x2000), (0, 0x3000))
    );
    // Its registers are the device's.
    assert_eq!(read(&config, 0x84, 4), [0xdd; 4]);
}

#[test]
fn displays_and_accelerators_of_pci_express_want_a_port() {
    let of = |class: u8, express: u8| {
        let mut device = nvme();
        device[0x0b] = class;
        device[0x82] = express;
        wants_port(&device)
    };
    assert!(of(0x03, 0x02) && of(0x12, 0x12));
    // A part of the root complex; a disk; one that is none of PCI Express.
    assert!(!of(0x03, 0x92) && !of(0x01, 0x02));
    let mut plain = nvme();
    (plain[0x0b], plain[0x80]) = (0x03, 0x09);
    assert!(!wants_port(&plain));
    plain[0x81] = 0x40;
    assert!(!wants_port(&plain));
}

#[test]
fn a_list_that_leads_back_to_itself_ends() {
    let mut device = nvme();
    device[0x81] = 0x40;
    FilteredConfig::new(&device, &nvme_regions()).unwrap();
    device[0x34] = 0xff;
    FilteredConfig::new(&device, &nvme_regions()).unwrap();
}

#[test]
fn the_device_decodes_memory_whatever_the_guest_writes_and_masters_the_bus_when_it_says_so() {
    let mut config = config();
    let written = config.write(4, &[0x06, 0], |_, _| panic!("the command is ours"));
    assert_eq!(written.command, Some(0x0406));
    assert_eq!(config.write(4, &[0x04, 0], |_, _| ()).command, None);
    assert_eq!(config.write(4, &[0x00, 0], |_, _| ()).command, Some(0x0402));
    // Asleep, it says; it is not.
    config.write(0x64, &[3], |_, _| panic!("the power state is ours"));
    assert_eq!(read(&config, 0x64, 1), [3]);
}

#[test]
fn messages_are_read_as_the_guest_wrote_them() {
    let mut config = config();
    assert_eq!(config.msi_messages(), None);
    config.write(0x74, &0xfee0_1000u32.to_le_bytes(), |_, _| ());
    config.write(0x7c, &[0x41, 0x00], |_, _| ());
    assert!(config.write(0x72, &[0x21, 0], |_, _| ()).msi);
    assert_eq!(config.msi_messages(), Some((4, 0xfee0_1000, 0x41)));
    assert!(config.write(0x43, &[0x80], |_, _| ()).msix);
    assert_eq!(config.msix_control(), (true, false));
}

#[test]
fn a_bridge_and_a_bar_that_cannot_be_are_refused() {
    let mut device = nvme();
    device[HEADER_TYPE] = 1;
    assert!(FilteredConfig::new(&device, &nvme_regions()).is_err());
    let mut regions = nvme_regions();
    regions[0].size = 0x3000;
    assert!(FilteredConfig::new(&nvme(), &regions).is_err());
}

proptest! {
    #[test]
    fn no_writes_reach_the_device_where_registers_are_ours_or_change_what_is_fixed(
        writes in prop::collection::vec((0u16..256, prop::collection::vec(any::<u8>(), 1..5)), 0..80)
    ) {
        let fresh = config();
        let mut config = config();
        for (offset, data) in &writes {
            config.write(*offset, data, |at, bytes| {
                for place in usize::from(at)..usize::from(at) + bytes.len() {
                    assert!(!fresh.ours[place], "{place:#x}");
                }
            });
        }
        for at in (0..SIZE).filter(|at| fresh.ours[*at]) {
            let fixed = !fresh.writable[at];
            prop_assert_eq!(config.registers[at] & fixed, fresh.registers[at] & fixed);
        }
        prop_assert_eq!(config.device_command() & (MEMORY | INTX_DISABLE), MEMORY | INTX_DISABLE);
        for range in config.decoded() {
            prop_assert!(range.base.is_multiple_of(range.size));
        }
    }

    #[test]
    fn any_device_is_filtered_or_refused(
        bytes in prop::collection::vec(any::<u8>(), SIZE), size in 0u32..64
    ) {
        let device: [u8; SIZE] = bytes.try_into().unwrap();
        let region = Region { size: 1u64.checked_shl(size).unwrap_or(0), mappable: Vec::new() };
        let regions = std::array::from_fn(|_| region.clone());
        if let Ok(mut config) = FilteredConfig::new(&device, &regions) {
            config.write(0, &[0xff; SIZE], |_, _| ());
            let _ = config.decoded();
            let _ = config.msi_messages();
        }
    }
}
