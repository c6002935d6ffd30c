//! The PCI bus: dispatches ECAM and BAR accesses to functions, and follows BARs as they move.
//!
//! A guest may put a BAR anywhere, also at 0 or over another one while it sizes it. An address is
//! answered only inside the bus's windows, and by the function that took it first; RAM is never
//! shadowed because KVM does not exit for it.

use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock, RwLock};

use super::config::{BARS, BARS_END, COMMAND, SIZE};
use super::mirror::Mirror;
use super::{BarRange, Function};
use crate::sync::{lock, read, write};

/// Device and function numbers of bus 0: 32 slots of 8 functions.
pub const FUNCTIONS: usize = 256;

/// The lowest slot that a function may have alone: far above those of a VM's own devices.
const FIRST_ALONE: usize = 8;

/// The bus has no free function number.
#[derive(Debug, thiserror::Error)]
#[error("all {FUNCTIONS} functions of the VM's PCI bus are taken")]
pub struct BusFull;

/// A function number.
#[derive(Clone, Default)]
enum Place {
    #[default]
    Free,
    Taken(Arc<dyn Function>),
    /// The guest cannot reach it: it is about to come, or what it used is not free yet.
    Reserved,
    /// Of a slot whose function 0 has it alone.
    Beside,
}

impl Place {
    fn function(&self) -> Option<&Arc<dyn Function>> {
        match self {
            Self::Taken(function) => Some(function),
            Self::Free | Self::Reserved | Self::Beside => None,
        }
    }
}

struct Decoded {
    devfn: u8,
    range: BarRange,
    answer: Answer,
}

/// What answers in a BAR's range.
enum Answer {
    Function(Arc<dyn Function>),
    /// One that was removed reads as this there, until something else is.
    Gone(u8),
}

impl Decoded {
    fn overlaps(&self, other: &BarRange) -> bool {
        self.range.base < other.base + other.size && other.base < self.range.base + self.range.size
    }
}

/// Bus 0.
pub struct Bus {
    functions: RwLock<Vec<Place>>,
    decoded: RwLock<Vec<Decoded>>,
    /// Serialises configuration writes: they may move a BAR and change the image.
    moving: Mutex<()>,
    windows: Vec<Range<u64>>,
    mirror: OnceLock<Box<dyn Mirror>>,
}

impl Bus {
    /// An empty bus that answers BARs inside `windows`.
    #[must_use]
    pub fn new(windows: Vec<Range<u64>>) -> Self {
        Self {
            functions: RwLock::new(vec![Place::Free; FUNCTIONS]),
            decoded: RwLock::new(Vec::new()),
            moving: Mutex::new(()),
            windows,
            mirror: OnceLock::new(),
        }
    }

    /// Answers configuration reads from `mirror` from now on. Only the first call counts.
    pub fn set_mirror(&self, mirror: Box<dyn Mirror>) {
        let mirror = self.mirror.get_or_init(|| mirror);
        let _moving = lock(&self.moving);
        for (devfn, place) in (0..=u8::MAX).zip(read(&self.functions).iter()) {
            if let Some(function) = place.function() {
                mirror.store(devfn, &function.config_image());
            }
        }
    }

    /// Adds a function at the lowest free number and returns that: functions are packed, because
    /// Linux probes all eight of a slot whose function 0 is multi-function, and only function 0 of
    /// an empty slot. A guest that runs finds it when it scans the bus again.
    ///
    /// # Errors
    /// [`BusFull`].
    pub fn add(&self, function: Arc<dyn Function>) -> Result<u8, BusFull> {
        let _moving = lock(&self.moving);
        let mut functions = write(&self.functions);
        let devfn = lowest_free(&functions)?;
        let image = function.config_image();
        functions[usize::from(devfn)] = Place::Taken(function);
        if let Some(mirror) = self.mirror.get() {
            mirror.store(devfn, &image);
        }
        Ok(devfn)
    }

    /// The number that [`Self::add`] gives next. Only what adds functions may rely on it.
    ///
    /// # Errors
    /// [`BusFull`].
    pub fn next(&self) -> Result<u8, BusFull> {
        lowest_free(&read(&self.functions))
    }

    /// Takes a function out of the guest's sight: its registers read as all ones, and its BARs as it says
    /// ([`Function::reads_when_gone`]). The number stays taken until [`Self::release`]. None if there is no function.
    #[must_use]
    pub fn remove(&self, devfn: u8) -> Option<Arc<dyn Function>> {
        let _moving = lock(&self.moving);
        let function = {
            let mut functions = write(&self.functions);
            let place = functions.get_mut(usize::from(devfn))?;
            let function = Arc::clone(place.function()?);
            *place = Place::Reserved;
            function
        };
        let ranges = self.ranges_of(devfn);
        self.announce(devfn, &function, Vec::new());
        let value = function.reads_when_gone();
        write(&self.decoded).extend(ranges.into_iter().map(|range| Decoded {
            devfn,
            range,
            answer: Answer::Gone(value),
        }));
        if let Some(mirror) = self.mirror.get() {
            mirror.store(devfn, &[0xff; SIZE]);
        }
        Some(function)
    }

    /// Frees the number of a function that was removed, or that was reserved and did not come.
    pub fn release(&self, devfn: u8) {
        let mut functions = write(&self.functions);
        let first = usize::from(devfn);
        if let Some(place @ Place::Reserved) = functions.get_mut(first) {
            *place = Place::Free;
            for place in functions.iter_mut().skip(first + 1).take(7) {
                if !matches!(place, Place::Beside) {
                    break;
                }
                *place = Place::Free;
            }
        }
    }

    /// Sets a whole slot aside for a function that has it alone; the function's number. Slots are taken from the
    /// end: configuration space there is not mirrored, and such a function has registers that change by themselves.
    ///
    /// # Errors
    /// [`BusFull`].
    pub fn reserve(&self) -> Result<u8, BusFull> {
        let mut functions = write(&self.functions);
        let slots = functions.chunks_exact_mut(8).enumerate().skip(FIRST_ALONE);
        let free = |slot: &[Place]| slot.iter().all(|place| matches!(place, Place::Free));
        let (number, slot) = slots.rev().find(|(_, slot)| free(slot)).ok_or(BusFull)?;
        slot.fill(Place::Beside);
        slot[0] = Place::Reserved;
        u8::try_from(number * 8).map_err(|_| BusFull)
    }

    /// Puts a function where a place was reserved.
    pub fn fill(&self, devfn: u8, function: Arc<dyn Function>) {
        let _moving = lock(&self.moving);
        if let Some(place @ Place::Reserved) = write(&self.functions).get_mut(usize::from(devfn)) {
            *place = Place::Taken(function);
        }
    }

    /// An access to ECAM at `offset` from its start (PCIe 5.0 §7.2.2).
    pub fn ecam_read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((_, function, register)) = self.target(offset, data.len()) {
            function.config_read(register, data);
        }
    }

    /// A write to ECAM.
    pub fn ecam_write(&self, offset: u64, data: &[u8]) {
        let Some((devfn, function, register)) = self.target(offset, data.len()) else {
            return;
        };
        let end = usize::from(register) + data.len();
        let touches = |range: Range<u16>| usize::from(range.start) < end && register < range.end;
        // Held over the write and what follows it, so that the last write is the last to be mirrored.
        let _moving = lock(&self.moving);
        if !self.has(devfn, &function) {
            return;
        }
        function.config_write(register, data);
        if touches(COMMAND..COMMAND + 2) || touches(BARS..BARS_END) {
            self.follow(devfn, &function);
        }
        if let Some(mirror) = self.mirror.get() {
            if function.reads_have_effects() {
                mirror.disable();
            } else {
                mirror.store(devfn, &function.config_image());
            }
        }
    }

    /// The function an ECAM access is for; none if absent or beyond the conventional space.
    fn target(&self, offset: u64, length: usize) -> Option<(u8, Arc<dyn Function>, u16)> {
        let devfn = usize::try_from(offset >> 12).ok()?;
        let register = usize::try_from(offset & 0xfff).ok()?;
        if register + length > SIZE {
            return None;
        }
        let function = Arc::clone(read(&self.functions).get(devfn)?.function()?);
        Some((
            u8::try_from(devfn).ok()?,
            function,
            u16::try_from(register).ok()?,
        ))
    }

    /// Whether the function is still there, and not another one of its number.
    fn has(&self, devfn: u8, function: &Arc<dyn Function>) -> bool {
        let functions = read(&self.functions);
        let found = functions.get(usize::from(devfn)).and_then(Place::function);
        found.is_some_and(|found| Arc::ptr_eq(found, function))
    }

    /// Brings `decoded` up to date with one function and tells it what moved.
    fn follow(&self, devfn: u8, function: &Arc<dyn Function>) {
        let new: Vec<BarRange> = function
            .decoded()
            .into_iter()
            .filter(|range| self.inside_a_window(range))
            .collect();
        self.announce(devfn, function, new);
    }

    /// The function's BARs are at `new` from now on.
    fn announce(&self, devfn: u8, function: &Arc<dyn Function>, new: Vec<BarRange>) {
        let old = self.ranges_of(devfn);
        if old == new {
            return;
        }
        let mut decoded = write(&self.decoded);
        let gone = |entry: &Decoded| matches!(entry.answer, Answer::Gone(_));
        decoded.retain(|entry| {
            entry.devfn != devfn && !(gone(entry) && new.iter().any(|range| entry.overlaps(range)))
        });
        decoded.extend(new.iter().map(|range| Decoded {
            devfn,
            range: *range,
            answer: Answer::Function(Arc::clone(function)),
        }));
        drop(decoded);
        let base = |ranges: &[BarRange], bar| {
            ranges
                .iter()
                .find(|range| range.bar == bar)
                .map(|range| range.base)
        };
        for bar in 0..6 {
            let (old, new) = (base(&old, bar), base(&new, bar));
            if old != new {
                function.bar_moved(bar, old, new);
            }
        }
    }

    /// Where a function's BARs are.
    fn ranges_of(&self, devfn: u8) -> Vec<BarRange> {
        read(&self.decoded)
            .iter()
            .filter(|entry| entry.devfn == devfn && matches!(entry.answer, Answer::Function(_)))
            .map(|entry| entry.range)
            .collect()
    }

    fn inside_a_window(&self, range: &BarRange) -> bool {
        range.base.checked_add(range.size).is_some_and(|end| {
            self.windows
                .iter()
                .any(|window| window.start <= range.base && end <= window.end)
        })
    }

    /// A read in an MMIO window. Returns false if nothing answers.
    pub fn memory_read(&self, address: u64, data: &mut [u8]) -> bool {
        match self.find(address, data.len()) {
            Some(Found::Function(function, bar, offset)) => {
                function.bar_read(bar, offset, data);
                true
            }
            Some(Found::Gone(value)) => {
                data.fill(value);
                true
            }
            None => {
                data.fill(0xff);
                false
            }
        }
    }

    /// A write in an MMIO window. Returns false if nothing answers.
    pub fn memory_write(&self, address: u64, data: &[u8]) -> bool {
        match self.find(address, data.len()) {
            Some(Found::Function(function, bar, offset)) => {
                function.bar_write(bar, offset, data);
                true
            }
            Some(Found::Gone(_)) => true,
            None => false,
        }
    }

    fn find(&self, address: u64, length: usize) -> Option<Found> {
        let length = u64::try_from(length).ok()?;
        read(&self.decoded).iter().find_map(|entry| {
            let offset = address.checked_sub(entry.range.base)?;
            let end = offset.checked_add(length)?;
            (end <= entry.range.size).then(|| match &entry.answer {
                Answer::Function(function) => {
                    Found::Function(Arc::clone(function), entry.range.bar, offset)
                }
                Answer::Gone(value) => Found::Gone(*value),
            })
        })
    }
}

/// What is at an address: a function's BAR and where in it, or what is left of one.
enum Found {
    Function(Arc<dyn Function>, u8, u64),
    Gone(u8),
}

fn lowest_free(functions: &[Place]) -> Result<u8, BusFull> {
    let free = |place: &Place| matches!(place, Place::Free);
    let index = functions.iter().position(free).ok_or(BusFull)?;
    u8::try_from(index).map_err(|_| BusFull)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::config::{ConfigSpace, Identity};
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
        assert!(bus.add(Fake::new(0)).is_err() && bus.reserve().is_err());
        // The one that never came.
        bus.release(31 << 3);
        assert_eq!(bus.add(Fake::new(0)).unwrap(), 31 << 3);
        assert!(bus.remove(30 << 3).is_some());
        bus.release(30 << 3);
        assert_eq!(bus.reserve().unwrap(), 30 << 3);
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
            alphabet.extend(
                [0, u32::MAX, 0xc000_0000, 0xc000_1000, 0xc00f_f000].map(|to| (at + 0x10, to)),
            );
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
}
