//! The MSI-X table against a model: each interrupt arrives once, when it may, by the message that the
//! table holds at that moment.

use std::sync::Arc;

use super::input::Input;
use crate::pci::msix::fake::FakeRoutes;
use crate::pci::msix::{ENTRY_SIZE, Message, Msix};
use crate::sync::lock;

const VECTORS: usize = 4;
const STEPS: usize = 200;

/// What a guest or the device does.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// The message control register: enabled, function masked.
    Control(bool, bool),
    Trigger(u16),
    /// Offset, length and bytes.
    Write(u64, usize, [u8; 8]),
}

/// An entry as the specification has it.
#[derive(Clone, Copy, Default)]
struct Entry {
    bytes: [u8; 16],
    pending: bool,
}

impl Entry {
    fn masked(&self) -> bool {
        self.bytes[12] & 1 != 0
    }

    fn message(&self) -> Message {
        let (address, rest) = self.bytes.split_at(8);
        Message {
            address: u64::from_le_bytes(address.try_into().unwrap()),
            data: u32::from_le_bytes(rest[..4].try_into().unwrap()),
        }
    }
}

/// The code and its model side by side.
struct Checked {
    msix: Msix,
    routes: Arc<FakeRoutes>,
    entries: [Entry; VECTORS],
    enabled: bool,
    masked: bool,
}

impl Checked {
    fn new() -> Self {
        let routes = Arc::new(FakeRoutes::default());
        let mut entries = [Entry::default(); VECTORS];
        entries.iter_mut().for_each(|entry| entry.bytes[12] = 1);
        Self {
            msix: Msix::new(4, Arc::<FakeRoutes>::clone(&routes)),
            routes,
            entries,
            enabled: false,
            masked: false,
        }
    }

    fn step(&mut self, step: Step) {
        let mut expected = Vec::new();
        match step {
            Step::Control(enabled, masked) => {
                (self.enabled, self.masked) = (enabled, masked);
                self.msix.control(enabled, masked).unwrap();
            }
            Step::Trigger(vector) => {
                if let Some(entry) = self.entries.get_mut(usize::from(vector))
                    && self.enabled
                {
                    if self.masked || entry.masked() {
                        entry.pending = true;
                    } else {
                        expected.push(entry.message());
                    }
                }
                self.msix.trigger(vector).unwrap();
            }
            Step::Write(offset, length, bytes) => {
                let index = usize::try_from(offset / ENTRY_SIZE).unwrap();
                let within = usize::try_from(offset % ENTRY_SIZE).unwrap();
                if let Some(entry) = self.entries.get_mut(index)
                    && within + length <= 16
                {
                    entry.bytes[within..within + length].copy_from_slice(&bytes[..length]);
                    entry.bytes[12] &= 1;
                    entry.bytes[13..].fill(0);
                }
                self.msix.table_write(offset, &bytes[..length]).unwrap();
            }
        }
        if self.enabled && !self.masked {
            for entry in &mut self.entries {
                if entry.pending && !entry.masked() {
                    entry.pending = false;
                    expected.push(entry.message());
                }
            }
        }
        self.compare(step, expected);
    }

    fn compare(&self, step: Step, mut expected: Vec<Message>) {
        let mut arrived = Vec::new();
        let updates = lock(&self.routes.updates);
        let triggers = lock(&self.routes.triggers);
        assert!(triggers.len() <= VECTORS, "more sources than vectors");
        for (gsi, trigger) in (24..).zip(&*triggers) {
            let by = updates.iter().flatten().rev().find(|(of, _)| *of == gsi);
            for _ in 0..trigger.read().unwrap_or(0) {
                arrived.push(by.expect("an interrupt without a route").1);
            }
        }
        let order = |message: &Message| (message.address, message.data);
        expected.sort_by_key(order);
        arrived.sort_by_key(order);
        assert_eq!(arrived, expected, "interrupts after {step:?}");
        let mut pending = [0; 8];
        self.msix.pending_read(0, &mut pending);
        let bits = (0..).zip(&self.entries);
        let bits = bits.fold(0, |bits, (at, entry)| bits | u8::from(entry.pending) << at);
        assert_eq!(
            pending,
            [bits, 0, 0, 0, 0, 0, 0, 0],
            "pending after {step:?}"
        );
        for (index, entry) in (0..).zip(&self.entries) {
            let mut bytes = [0; 16];
            self.msix.table_read(index * ENTRY_SIZE, &mut bytes);
            assert_eq!(bytes, entry.bytes, "entry {index} after {step:?}");
        }
    }
}

pub fn msix_table(data: &[u8]) {
    let mut input = Input::new(data);
    let mut checked = Checked::new();
    for _ in 0..STEPS {
        if input.is_empty() {
            break;
        }
        let step = match input.below(3) {
            0 => Step::Control(input.flag(), input.flag()),
            1 => Step::Trigger(u16::from(input.byte()) % 6),
            _ => Step::Write(
                u64::from(input.byte()) % (ENTRY_SIZE * 5),
                input.pick(&[4, 8, 1, 2]),
                input.long().to_le_bytes(),
            ),
        };
        checked.step(step);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All sequences of five steps over two vectors, two messages and every mask.
    #[test]
    fn every_short_sequence_of_masks_messages_and_interrupts_is_as_the_specification_has_it() {
        let word = |at: u64, value: u8| Step::Write(at, 4, [value, 0, 0, 0, 0, 0, 0, 0]);
        let alphabet = [
            Step::Control(false, false),
            Step::Control(true, false),
            Step::Control(true, true),
            Step::Trigger(0),
            Step::Trigger(1),
            word(12, 0),
            word(12, 1),
            word(8, 0x31),
            word(8, 0x32),
            word(28, 0),
        ];
        let depth = 5;
        let sequences = super::super::sequences(&alphabet, depth, |steps| {
            let mut checked = Checked::new();
            // Where a driver has set it up; a sequence may take that back.
            checked.step(Step::Control(true, false));
            steps.iter().for_each(|step| checked.step(*step));
        });
        assert_eq!(sequences, 10usize.pow(5));
    }
}
