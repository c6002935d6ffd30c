use proptest::prelude::*;

use super::super::config::{ConfigSpace, Identity};
use super::super::root_port::RootPort;
use super::*;

type Moves = Vec<(Option<u64>, Option<u64>)>;

struct Fake {
    config: Mutex<ConfigSpace>,
    moves: Mutex<Moves>,
}

impl Fake {
    fn new(base: u64) -> Arc<Self> {
        let mut config = ConfigSpace::new(&Identity {
            vendor: 1,
            device: 2,
            revision: 0,
            class: [0; 3],
            subsystem: (0, 0),
        });
        config.add_bar64(0, 0x1000, base).unwrap();
        Arc::new(Self {
            config: Mutex::new(config),
            moves: Mutex::default(),
        })
    }
}

impl Function for Fake {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        lock(&self.config).read(offset, data);
    }
    fn config_write(&self, offset: u16, data: &[u8]) {
        lock(&self.config).write(offset, data);
    }
    fn config_image(&self) -> [u8; SIZE] {
        lock(&self.config).get(0)
    }
    fn reads_have_effects(&self) -> bool {
        lock(&self.config).get::<1>(0x3c) == [0x77]
    }
    fn decoded(&self) -> Vec<BarRange> {
        lock(&self.config).decoded()
    }
    fn bar_read(&self, _: u8, offset: u64, data: &mut [u8]) {
        data.fill(u8::try_from(offset & 0xff).unwrap());
    }
    fn bar_write(&self, _: u8, _: u64, _: &[u8]) {}
    fn reads_when_gone(&self) -> u8 {
        0x5a
    }
    fn bar_moved(&self, _: u8, old: Option<u64>, new: Option<u64>) {
        lock(&self.moves).push((old, new));
    }
}

const WINDOW: Range<u64> = 0xc000_0000..0xc010_0000;

fn bus() -> Bus {
    Bus::new(vec![WINDOW])
}

#[test]
fn functions_are_packed_and_absent_ones_read_as_all_ones() {
    let bus = bus();
    assert_eq!(bus.add(Fake::new(0)).unwrap(), 0);
    assert_eq!(bus.add(Fake::new(0)).unwrap(), 1);
    let mut id = [0u8; 4];
    bus.ecam_read(1 << 12, &mut id);
    assert_eq!(id, [1, 0, 2, 0]);
    bus.ecam_read(2 << 12, &mut id);
    assert_eq!(id, [0xff; 4]);
    bus.ecam_read(0x100, &mut id);
    assert_eq!(id, [0xff; 4]);
}

#[test]
fn a_bar_is_answered_where_it_was_moved_and_no_longer_where_it_was() {
    let bus = bus();
    let fake = Fake::new(0xc000_0000);
    bus.add(Arc::<Fake>::clone(&fake)).unwrap();
    let mut byte = [0u8];
    assert!(!bus.memory_read(0xc000_0010, &mut byte));
    bus.ecam_write(4, &[2, 0]);
    assert!(bus.memory_read(0xc000_0010, &mut byte));
    assert_eq!(byte, [0x10]);
    bus.ecam_write(0x10, &0xc000_5000u32.to_le_bytes());
    assert!(!bus.memory_read(0xc000_0010, &mut byte));
    assert!(bus.memory_read(0xc000_5020, &mut byte));
    // To 0 while sizing: outside every window, so nothing answers.
    bus.ecam_write(0x10, &0u32.to_le_bytes());
    assert!(!bus.memory_read(0x20, &mut byte));
    assert_eq!(
        *lock(&fake.moves),
        [
            (None, Some(0xc000_0000)),
            (Some(0xc000_0000), Some(0xc000_5000)),
            (Some(0xc000_5000), None),
        ]
    );
}

#[test]
fn an_access_that_crosses_the_end_of_a_bar_is_not_answered() {
    let bus = bus();
    bus.add(Fake::new(0xc000_0000)).unwrap();
    bus.ecam_write(4, &[2, 0]);
    assert!(!bus.memory_read(0xc000_0ffe, &mut [0; 4]));
    assert!(bus.memory_read(0xc000_0ffc, &mut [0; 4]));
}

#[derive(Default)]
struct Image(Arc<Mutex<(Vec<[u8; SIZE]>, bool)>>);

impl Mirror for Image {
    fn store(&self, devfn: u8, image: &[u8; SIZE]) {
        let images = &mut lock(&self.0).0;
        let index = usize::from(devfn);
        images.resize(images.len().max(index + 1), [0xff; SIZE]);
        images[index] = *image;
    }
    fn disable(&self) {
        lock(&self.0).1 = true;
    }
}

#[test]
fn the_mirror_follows_writes_and_ends_when_reads_have_effects() {
    let bus = bus();
    bus.add(Fake::new(0xc000_0000)).unwrap();
    bus.add(Fake::new(0xc000_1000)).unwrap();
    let image = Image::default();
    let seen = Arc::clone(&image.0);
    bus.set_mirror(Box::new(image));
    bus.ecam_write(0x1004, &[2, 0]);
    bus.ecam_write(0x1010, &[0xff; 4]);
    for devfn in 0..2u16 {
        let mut registers = [0u8; SIZE];
        for (offset, byte) in (u64::from(devfn) << 12..).zip(&mut registers) {
            bus.ecam_read(offset, std::slice::from_mut(byte));
        }
        assert_eq!(lock(&seen).0[usize::from(devfn)], registers);
    }
    assert!(!lock(&seen).1);
    bus.ecam_write(0x103c, &[0x77]);
    assert!(lock(&seen).1);
}

#[test]
fn a_function_that_is_plugged_later_is_in_the_mirror_too() {
    let bus = bus();
    bus.add(Fake::new(0xc000_0000)).unwrap();
    let image = Image::default();
    let seen = Arc::clone(&image.0);
    bus.set_mirror(Box::new(image));
    assert_eq!(bus.add(Fake::new(0xc000_1000)).unwrap(), 1);
    assert_eq!(lock(&seen).0[1][..4], [1, 0, 2, 0]);
    bus.ecam_write(0x1004, &[2, 0]);
    assert!(bus.memory_read(0xc000_1010, &mut [0]));
}

#[test]
fn a_removed_function_is_nowhere_and_its_number_is_free_once_it_is_released() {
    let bus = bus();
    let fakes = [Fake::new(0xc000_0000), Fake::new(0xc000_1000)];
    for fake in &fakes {
        bus.add(Arc::<Fake>::clone(fake)).unwrap();
    }
    let image = Image::default();
    let seen = Arc::clone(&image.0);
    bus.set_mirror(Box::new(image));
    bus.ecam_write(0x1004, &[2, 0]);
    assert!(bus.remove(1).is_some());
    assert!(bus.remove(1).is_none());
    // Where it was it reads as it says, until another one is there.
    let mut byte = [7];
    assert!(bus.memory_read(0xc000_1010, &mut byte));
    assert_eq!(byte, [0x5a]);
    bus.ecam_write(4, &[2, 0]);
    bus.ecam_write(0x10, &0xc000_1000u32.to_le_bytes());
    assert!(bus.memory_read(0xc000_1010, &mut byte));
    assert_eq!(byte, [0x10]);
    bus.ecam_write(0x10, &0xc000_0000u32.to_le_bytes());
    assert!(!bus.memory_read(0xc000_1010, &mut byte));
    let mut id = [0u8; 4];
    bus.ecam_read(1 << 12, &mut id);
    assert_eq!((id, lock(&seen).0[1]), ([0xff; 4], [0xff; SIZE]));
    // Its address was given back, and no write reaches it any more.
    bus.ecam_write(0x1004, &[0, 0]);
    let moves = [(None, Some(0xc000_1000)), (Some(0xc000_1000), None)];
    assert_eq!(*lock(&fakes[1].moves), moves);
    assert_eq!(bus.next().unwrap(), 2);
    bus.release(1);
    assert_eq!(bus.add(Fake::new(0xc000_2000)).unwrap(), 1);
    // What was not removed is not released.
    bus.release(0);
    assert_eq!(bus.next().unwrap(), 2);
}

#[test]
fn nothing_comes_into_a_slot_whose_function_0_is_not_there() {
    let bus = bus();
    for _ in 0..10 {
        bus.add(Fake::new(0)).unwrap();
    }
    // The slot's function 0 is leaving: a guest that scans the bus sees nothing of its others.
    assert!(bus.remove(8).is_some());
    assert_eq!(bus.next().unwrap(), 16);
    assert_eq!(bus.add(Fake::new(0)).unwrap(), 16);
    assert_eq!(bus.add(Fake::new(0)).unwrap(), 17);
    // It has gone: its place is the next, and the slot has a head again.
    bus.release(8);
    assert_eq!(bus.add(Fake::new(0)).unwrap(), 8);
    assert_eq!(bus.add(Fake::new(0)).unwrap(), 10);
    // As it does where another function of the slot leaves.
    assert!(bus.remove(9).is_some());
    assert_eq!(bus.add(Fake::new(0)).unwrap(), 11);
}

#[test]
fn a_function_alone_in_its_slot_has_nothing_beside_it_until_it_is_released() {
    let bus = bus();
    assert_eq!(bus.reserve().unwrap(), 31 << 3);
    assert_eq!(bus.reserve().unwrap(), 30 << 3);
    bus.fill(30 << 3, Fake::new(0xc000_0000));
    let mut id = [0u8; 4];
    bus.ecam_read(30 << 15, &mut id);
    assert_eq!(id, [1, 0, 2, 0]);
    for _ in 0..30 * 8 {
        bus.add(Fake::new(0)).unwrap();
    }
    assert!(bus.add(Fake::new(0)).is_err());
    let full = bus.reserve().unwrap_err().to_string();
    assert!(full.contains("of the 24 for them none is free"), "{full}");
    // The one that never came.
    bus.release(31 << 3);
    assert_eq!(bus.add(Fake::new(0)).unwrap(), 31 << 3);
    assert!(bus.remove(30 << 3).is_some());
    bus.release(30 << 3);
    assert_eq!(bus.reserve().unwrap(), 30 << 3);
}

#[test]
fn a_function_behind_a_port_is_on_the_bus_that_the_guest_gives_the_port() {
    let bus = bus();
    let slot = bus.reserve().unwrap();
    let fake = Fake::new(0xc000_0000);
    let behind: Arc<dyn Function> = Arc::<Fake>::clone(&fake);
    bus.fill(slot, Arc::new(RootPort::above(behind, slot >> 3)));
    let port = u64::from(slot) << 12;
    let read = |at: u64| {
        let mut value = [0; 4];
        bus.ecam_read(at, &mut value);
        u32::from_le_bytes(value)
    };
    let on = |number: u64, devfn: u64| number << 20 | devfn << 12;
    assert_eq!(read(port), 0x000c_1b36);
    assert_eq!(read(port + 0x18), 0x001f_1f00);
    assert_eq!(read(on(31, 0)), 0x0002_0001);
    // It is alone there, and nothing is on other buses.
    for absent in [on(31, 1), on(31, 8), on(30, 0), on(1, 0), on(255, 0)] {
        assert_eq!(read(absent), u32::MAX, "{absent:#x}");
    }
    // The guest's bus number; its command is no command of the function behind.
    bus.ecam_write(on(31, 0) + 4, &[2, 0]);
    assert!(bus.memory_read(0xc000_0000, &mut [0]));
    bus.ecam_write(port + 0x18, &[0, 5, 5]);
    bus.ecam_write(port + 4, &[0, 0]);
    assert_eq!((read(on(31, 0)), read(on(5, 0))), (u32::MAX, 0x0002_0001));
    assert!(bus.memory_read(0xc000_0000, &mut [0]));
    bus.ecam_write(on(5, 0) + 0x10, &0xc000_1000u32.to_le_bytes());
    assert!(bus.memory_read(0xc000_1000, &mut [0]));
    // Bus 0 is not behind it, whatever the guest says.
    bus.ecam_write(port + 0x18, &[0, 0, 0]);
    assert_eq!(read(0), u32::MAX);
    bus.ecam_write(port + 0x18, &[0, 5, 5]);
    // They go together.
    assert!(bus.remove(slot).is_some());
    assert_eq!(lock(&fake.moves).last(), Some(&(Some(0xc000_1000), None)));
    assert_eq!((read(port), read(on(5, 0))), (u32::MAX, u32::MAX));
    bus.release(slot);
    assert_eq!(bus.reserve().unwrap(), slot);
}

#[test]
fn a_guest_changes_what_a_port_keeps_for_it_and_no_more() {
    let bus = bus();
    let slot = bus.reserve().unwrap();
    bus.fill(slot, Arc::new(RootPort::above(Fake::new(0xc000_0000), 7)));
    let port = u64::from(slot) << 12;
    let mut before = [0; 256];
    for (at, byte) in (0..).zip(&mut before) {
        bus.ecam_read(port + at, std::slice::from_mut(byte));
        bus.ecam_write(port + at, &[0xff]);
    }
    let mut after = [0; 256];
    for (at, byte) in (0..).zip(&mut after) {
        bus.ecam_read(port + at, std::slice::from_mut(byte));
    }
    // Identity, class, the kind of header and the capability are as they were.
    for range in [0..4, 8..16, 0x34..0x3c, 0x40..0x48, 0x4c..0x50] {
        assert_eq!(before[range.clone()], after[range]);
    }
    // Windows that can be at any place, of 64 bits where memory is prefetchable; no I/O.
    assert_eq!(after[0x1c..0x1e], [0, 0]);
    assert_eq!(
        after[0x20..0x30],
        [
            0xf0, 0xff, 0xf0, 0xff, 0xf1, 0xff, 0xf1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
            0xff, 0xff
        ]
    );
}

#[test]
fn a_full_bus_refuses_with_the_number_and_serves_again_after_a_removal() {
    let bus = bus();
    for _ in 0..FUNCTIONS {
        bus.add(Fake::new(0)).unwrap();
    }
    let full = bus.add(Fake::new(0)).unwrap_err().to_string();
    assert!(full.contains("256"), "{full}");
    assert!(bus.remove(77).is_some());
    assert!(bus.add(Fake::new(0)).is_err());
    bus.release(77);
    assert_eq!(bus.add(Fake::new(0)).unwrap(), 77);
}

/// All sequences of four writes to two functions that share a window: command, both halves of a BAR, to
/// the place of the other, out of the window, to 0 and as sizing does it.
#[test]
fn after_every_short_sequence_of_moves_a_bar_is_answered_exactly_where_it_is() {
    let mut alphabet = Vec::new();
    for devfn in 0..2u64 {
        let at = devfn << 12;
        alphabet.extend([(at + 4, 0u32), (at + 4, 2), (at + 0x14, 0), (at + 0x14, 1)]);
        alphabet
            .extend([0, u32::MAX, 0xc000_0000, 0xc000_1000, 0xc00f_f000].map(|to| (at + 0x10, to)));
    }
    let total = crate::fuzzing::sequences(&alphabet, 4, |writes| {
        let bus = bus();
        let fakes = [Fake::new(0xc000_0000), Fake::new(0xc000_1000)];
        for fake in &fakes {
            bus.add(Arc::<Fake>::clone(fake)).unwrap();
        }
        for (register, value) in writes {
            bus.ecam_write(*register, &value.to_le_bytes());
        }
        let places = fakes.each_ref().map(|fake| {
            let ranges = fake.decoded();
            let inside = ranges.iter().find(|range| bus.inside_a_window(range));
            let place = inside.map(|range| range.base);
            // What was announced is where it is, and each announcement begins where the last ended.
            let moves = lock(&fake.moves);
            assert_eq!(moves.last().and_then(|moved| moved.1), place);
            let mut before = None;
            for (old, new) in &*moves {
                assert_eq!(*old, before);
                before = *new;
            }
            place
        });
        for address in [0, 0xc000_0000, 0xc000_1000, 0xc00f_f000, 0xffff_f000] {
            let answered = bus.memory_read(address, &mut [0]);
            assert_eq!(answered, places.contains(&Some(address)), "{address:#x}");
        }
    });
    assert_eq!(total, 18usize.pow(4));
}

proptest! {
    #[test]
    fn any_accesses_leave_the_bus_consistent(
        accesses in prop::collection::vec((0u64..0x10_0000, 1usize..9, any::<u64>()), 0..80)
    ) {
        let bus = bus();
        let fakes = [Fake::new(0xc000_0000), Fake::new(0xc000_1000)];
        for fake in &fakes {
            bus.add(Arc::<Fake>::clone(fake)).unwrap();
        }
        for (offset, length, value) in accesses {
            let offset = offset % 0x3000;
            bus.ecam_write(offset, &value.to_le_bytes()[..length]);
            bus.ecam_read(offset, &mut [0; 8][..length]);
            bus.memory_read(value, &mut [0; 8][..length]);
        }
        // What each function believes it decodes is exactly what was announced last.
        for fake in &fakes {
            let announced = lock(&fake.moves).last().and_then(|moved| moved.1);
            let inside = fake
                .decoded()
                .iter()
                .find(|range| bus.inside_a_window(range))
                .map(|range| range.base);
            prop_assert_eq!(announced, inside);
        }
    }
}
