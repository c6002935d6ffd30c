//! The PCI bus, and those behind its ports: dispatches ECAM and BAR accesses to functions, and follows BARs as they move.
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

/// The bus has no free function number, or no free slot.
#[derive(Debug, thiserror::Error)]
pub enum BusFull {
    /// Not one that a guest would find.
    #[error(
        "all {FUNCTIONS} functions of the VM's PCI bus are taken, or in slots whose function 0 is leaving"
    )]
    Functions,
    /// A function that needs a slot of its own finds none.
    #[error(
        "a device of the node has a slot of the VM's PCI bus to itself, and of the {} for them none is free",
        FUNCTIONS / 8 - FIRST_ALONE
    )]
    Slots,
}

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
    /// an empty slot: so none comes into a slot whose function 0 is leaving. A guest that runs finds it when it scans the bus
    /// again.
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
        let (number, slot) = slots
            .rev()
            .find(|(_, slot)| free(slot))
            .ok_or(BusFull::Slots)?;
        slot.fill(Place::Beside);
        slot[0] = Place::Reserved;
        u8::try_from(number * 8).map_err(|_| BusFull::Slots)
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
        if let Some((_, behind)) = function.behind() {
            // What it has reset decodes nothing any more.
            self.follow(devfn, &behind);
            return;
        }
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

    /// The function an ECAM access is for, and its number, which is its port's if it is behind one; none if absent or
    /// beyond the conventional space.
    fn target(&self, offset: u64, length: usize) -> Option<(u8, Arc<dyn Function>, u16)> {
        let number = usize::try_from(offset >> 12).ok()?;
        let register = usize::try_from(offset & 0xfff).ok()?;
        if register + length > SIZE {
            return None;
        }
        let functions = read(&self.functions);
        let (devfn, function) = match functions.get(number) {
            Some(place) => (number, Arc::clone(place.function()?)),
            None => behind_a_port(&functions, number)?,
        };
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
        found.is_some_and(|found| {
            let is_it = |other: &Arc<dyn Function>| Arc::ptr_eq(other, function);
            is_it(found) || found.behind().is_some_and(|(_, behind)| is_it(&behind))
        })
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

/// The function at this number, counted over all buses, if the bus is behind a port: it is the only one there. And that of
/// its port. A guest that gives several ports one bus finds the first.
fn behind_a_port(functions: &[Place], number: usize) -> Option<(usize, Arc<dyn Function>)> {
    let (bus, devfn) = (number / FUNCTIONS, number % FUNCTIONS);
    let slots = functions.iter().enumerate().step_by(8).skip(FIRST_ALONE);
    let mut behind = slots.filter_map(|(port, place)| {
        let (secondary, function) = place.function()?.behind()?;
        (usize::from(secondary) == bus).then_some((port, function))
    });
    behind.next().filter(|_| devfn == 0)
}

/// The lowest number at which a guest finds what comes there: it looks at no other function of a slot whose function 0 is
/// not there, as while that one is leaving.
fn lowest_free(functions: &[Place]) -> Result<u8, BusFull> {
    let headed = |index: usize| {
        let first = functions.get(index & !7).and_then(Place::function);
        index.is_multiple_of(8) || first.is_some()
    };
    let mut places = functions.iter().enumerate();
    let (index, _) = places
        .find(|(index, place)| matches!(place, Place::Free) && headed(*index))
        .ok_or(BusFull::Functions)?;
    u8::try_from(index).map_err(|_| BusFull::Functions)
}

#[cfg(test)]
mod tests;
