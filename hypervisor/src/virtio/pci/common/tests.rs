//! Register sequences, sensible and hostile.

use proptest::prelude::*;

use super::*;

const RAM: usize = 1 << 20;

fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM)]).unwrap()
}

fn config() -> CommonConfig {
    CommonConfig::new(VERSION_1 | EVENT_IDX | 0b101, &[256, 64], 3).unwrap()
}

fn get(config: &CommonConfig, offset: u64, length: usize) -> u64 {
    let mut bytes = [0u8; 8];
    config.read(offset, &mut bytes[..length], false);
    u64::from_le_bytes(bytes)
}

fn put(config: &mut CommonConfig, offset: u64, length: usize, value: u64) -> Action {
    config.write(offset, &value.to_le_bytes()[..length])
}

/// What Linux does up to DRIVER_OK.
fn negotiate(config: &mut CommonConfig, features: u64) -> Action {
    put(config, 0x14, 1, 1);
    put(config, 0x14, 1, 3);
    for half in 0..2 {
        put(config, 0x08, 4, half);
        put(config, 0x0c, 4, features >> (32 * half) & 0xffff_ffff);
    }
    put(config, 0x14, 1, 11);
    put(config, 0x10, 2, 0);
    for queue in 0..2 {
        put(config, 0x16, 2, queue);
        put(config, 0x18, 2, 32);
        put(config, 0x20, 8, 0x1000 + queue * 0x4000);
        put(config, 0x28, 4, 0x2000 + queue * 0x4000);
        put(config, 0x30, 8, 0x3000 + queue * 0x4000);
        put(config, 0x1a, 2, 1 + queue);
        put(config, 0x1c, 2, 1);
    }
    put(config, 0x14, 1, 15)
}

#[test]
fn a_driver_that_follows_the_rules_gets_its_queues() {
    let mut config = config();
    assert_eq!(
        negotiate(&mut config, VERSION_1 | EVENT_IDX),
        Action::Activate
    );
    assert_eq!(config.accepted(), VERSION_1 | EVENT_IDX);
    let queues = config.queues(&memory()).unwrap();
    assert_eq!(queues.len(), 2);
    assert_eq!(queues[1].0, 1);
    assert_eq!(queues[1].1.size(), 32);
    assert_eq!(queues[1].1.desc_table(), 0x5000);
    assert!(queues[0].1.event_idx_enabled());
    assert_eq!(config.vectors(), [1, 2]);
}

#[test]
fn features_that_were_not_offered_or_lack_version_1_are_refused() {
    for features in [VERSION_1 | 1 << 40, EVENT_IDX, VERSION_1 | 0b10] {
        let mut config = config();
        assert_eq!(negotiate(&mut config, features), Action::None);
        assert_eq!(
            get(&config, 0x14, 1) & u64::from(FEATURES_OK | DRIVER_OK),
            0
        );
    }
}

#[test]
fn nothing_changes_an_active_queue_after_driver_ok() {
    let mut config = config();
    negotiate(&mut config, VERSION_1);
    let before = config.clone();
    for queue in 0..2 {
        put(&mut config, 0x16, 2, queue);
        for (offset, length) in [
            (0x18, 2),
            (0x1a, 2),
            (0x1c, 2),
            (0x20, 8),
            (0x28, 4),
            (0x34, 4),
        ] {
            put(&mut config, offset, length, 0x10);
        }
    }
    put(&mut config, 0x0c, 4, 0);
    put(&mut config, 0x10, 2, 2);
    assert_eq!(config.queues, before.queues);
    assert_eq!(config.accepted, before.accepted);
    assert_eq!(config.config_vector, before.config_vector);
}

#[test]
fn a_reset_is_visible_only_when_the_device_has_given_its_queues_back() {
    let mut config = config();
    negotiate(&mut config, VERSION_1);
    assert_eq!(put(&mut config, 0x14, 1, 0), Action::Reset);
    assert_ne!(get(&config, 0x14, 1), 0);
    put(&mut config, 0x18, 2, 16);
    assert_eq!(get(&config, 0x18, 2), 32);
    assert_eq!(put(&mut config, 0x14, 1, 1), Action::None);
    config.was_reset();
    assert_eq!(get(&config, 0x14, 1), 0);
    assert_eq!(get(&config, 0x18, 2), 256);
    assert_eq!(negotiate(&mut config, VERSION_1), Action::Activate);
}

#[test]
fn a_second_driver_ok_does_not_activate_again() {
    let mut config = config();
    negotiate(&mut config, VERSION_1);
    assert_eq!(put(&mut config, 0x14, 1, 15), Action::None);
}

#[test]
fn rings_outside_memory_or_unaligned_are_refused() {
    let end = RAM as u64;
    for (register, address) in [(0x20, end - 16), (0x28, 1), (0x30, u64::MAX - 3), (0x20, 8)] {
        let mut config = config();
        put(&mut config, 0x16, 2, 0);
        put(&mut config, 0x20, 8, 0x1000);
        put(&mut config, 0x28, 8, 0x2000);
        put(&mut config, 0x30, 8, 0x3000);
        put(&mut config, register, 8, address);
        put(&mut config, 0x1c, 2, 1);
        assert!(
            config.queues(&memory()).is_err(),
            "{register:#x} {address:#x}"
        );
    }
}

#[test]
fn rings_in_memory_that_is_files_are_refused() {
    const FILES: u64 = 1 << 32;
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 16).unwrap();
    let (region, _files) =
        crate::virtio::pmem::files::map(FILES, vec![(file.into(), 1 << 16)]).unwrap();
    let memory = memory().insert_region(std::sync::Arc::new(region)).unwrap();
    for register in [0x20, 0x28, 0x30] {
        let mut config = config();
        put(&mut config, 0x16, 2, 0);
        for (at, address) in [(0x20, 0x1000), (0x28, 0x2000), (0x30, 0x3000)] {
            let address = if at == register {
                FILES + 0x1000
            } else {
                address
            };
            put(&mut config, at, 8, address);
        }
        put(&mut config, 0x1c, 2, 1);
        assert!(config.queues(&memory).is_err(), "{register:#x}");
    }
}

#[test]
fn sizes_vectors_and_selectors_out_of_range_are_harmless() {
    let mut config = config();
    for size in [0, 3, 512] {
        put(&mut config, 0x18, 2, size);
        assert_eq!(get(&config, 0x18, 2), 256);
    }
    put(&mut config, 0x1a, 2, 3);
    assert_eq!(get(&config, 0x1a, 2), u64::from(NO_VECTOR));
    put(&mut config, 0x16, 2, 9);
    assert_eq!(get(&config, 0x18, 2), 0);
    put(&mut config, 0x1c, 2, 1);
    assert!(config.queues(&memory()).unwrap().is_empty());
}

#[test]
fn needs_reset_is_shown_in_the_status() {
    let config = config();
    let mut status = [0u8];
    config.read(0x14, &mut status, true);
    assert_eq!(status, [NEEDS_RESET]);
}

proptest! {
    #[test]
    fn random_register_writes_never_panic_and_never_change_an_active_queue(
        writes in prop::collection::vec((0u64..0x48, 1usize..9, any::<u64>(), any::<bool>()), 0..300)
    ) {
        let memory = memory();
        let mut config = config();
        let mut active: Option<Vec<QueueSetup>> = None;
        for (offset, length, value, small) in writes {
            let value = if small { value & 0xf } else { value };
            match put(&mut config, offset, length, value) {
                Action::Activate => {
                    prop_assert!(active.is_none());
                    prop_assert!(config.accepted & !config.offered == 0);
                    active = Some(config.queues.clone());
                }
                Action::Reset => {
                    if let Some(active) = active.take() {
                        prop_assert_eq!(&config.queues, &active);
                    }
                    config.was_reset();
                }
                Action::None => {}
            }
            if let Some(active) = &active {
                prop_assert_eq!(&config.queues, active);
            }
            for queue in &config.queues {
                prop_assert!(queue.size.is_power_of_two() && queue.size <= queue.max);
            }
            if let Ok(queues) = config.queues(&memory) {
                for (_, queue) in queues {
                    prop_assert!(queue.is_valid(&memory));
                }
            }
            get(&config, offset, length);
        }
    }

    #[test]
    fn after_negotiation_random_writes_without_a_reset_leave_every_queue_alone(
        writes in prop::collection::vec((0u64..0x48, 1usize..9, any::<u64>()), 0..100)
    ) {
        let mut config = config();
        prop_assert_eq!(negotiate(&mut config, VERSION_1), Action::Activate);
        let active = config.queues.clone();
        for (offset, length, value) in writes {
            // Any value but the reset.
            let value = if offset == 0x14 { value | 1 } else { value };
            prop_assert_eq!(put(&mut config, offset, length, value), Action::None);
            prop_assert_eq!(&config.queues, &active);
        }
    }
}
