//! virtio's common configuration: between DRIVER_OK and the end of a reset nothing of a queue changes,
//! and a device never gets a queue outside guest memory (CVE-2026-5747).

use virtio_queue::QueueT;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::input::Input;
use crate::virtio::pci::VERSION_1;
use crate::virtio::pci::common::{Action, CommonConfig};

const STEPS: usize = 200;
const OFFERED: u64 = VERSION_1 | 1 << 29 | 0b101;
const SIZES: [u16; 2] = [256, 64];
const STATUS: u64 = 0x14;
const DRIVER_OK: u8 = 4;

/// A write of a register, or the device's answer to a reset.
#[derive(Clone, Copy, Debug)]
enum Step {
    Write(u64, usize, u64),
    Returned,
}

/// What no write may change while a device has its queues.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Frozen(Vec<u64>);

impl Frozen {
    fn of(config: &CommonConfig) -> Self {
        let mut config = config.clone();
        let mut all = vec![config.accepted(), u64::from(config.config_vector())];
        for queue in 0..2u16 {
            // Free to choose at any time: it selects what is shown.
            config.write(0x16, &queue.to_le_bytes());
            for (offset, length) in [
                (0x18, 2),
                (0x1a, 2),
                (0x1c, 2),
                (0x20, 8),
                (0x28, 8),
                (0x30, 8),
            ] {
                let mut bytes = [0; 8];
                config.read(offset, &mut bytes[..length], false);
                all.push(u64::from_le_bytes(bytes));
            }
        }
        Self(all)
    }
}

/// The registers, and what is known of them.
#[derive(Clone)]
struct Checked {
    config: CommonConfig,
    frozen: Option<Frozen>,
    resetting: bool,
}

impl Checked {
    fn new() -> Self {
        Self {
            config: CommonConfig::new(OFFERED, &SIZES, 3).unwrap(),
            frozen: None,
            resetting: false,
        }
    }

    fn status(&self) -> u8 {
        let mut status = [0];
        self.config.read(STATUS, &mut status, false);
        status[0]
    }

    fn step(&mut self, step: Step, memory: &GuestMemoryMmap) {
        match step {
            Step::Returned if self.resetting => {
                self.config.was_reset();
                (self.resetting, self.frozen) = (false, None);
                assert_eq!(self.status(), 0);
            }
            Step::Returned => {}
            Step::Write(offset, length, value) => {
                match self.config.write(offset, &value.to_le_bytes()[..length]) {
                    Action::Activate => self.activated(memory),
                    Action::Reset => {
                        assert!(!self.resetting, "reset twice");
                        self.resetting = true;
                    }
                    Action::None => {}
                }
            }
        }
        if self.resetting {
            assert_ne!(self.status(), 0, "a reset that the device has not answered");
        }
        assert_eq!(
            self.status() & DRIVER_OK != 0,
            self.frozen.is_some(),
            "{step:?}"
        );
        if let Some(frozen) = &self.frozen {
            assert_eq!(&Frozen::of(&self.config), frozen, "{step:?} while active");
        }
    }

    fn activated(&mut self, memory: &GuestMemoryMmap) {
        assert!(self.frozen.is_none() && !self.resetting, "activated twice");
        self.frozen = Some(Frozen::of(&self.config));
        assert_eq!(self.config.accepted() & !OFFERED, 0);
        assert_ne!(self.config.accepted() & VERSION_1, 0);
        if let Ok(queues) = self.config.queues(memory) {
            for (index, queue) in queues {
                assert!(queue.is_valid(memory));
                assert!(queue.size() <= SIZES[usize::from(index)]);
            }
        }
    }
}

fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap()
}

pub fn virtio_common_config(data: &[u8]) {
    const REGISTERS: [u64; 15] = [
        0x00, 0x08, 0x0c, 0x10, 0x14, 0x16, 0x18, 0x1a, 0x1c, 0x20, 0x24, 0x28, 0x2c, 0x30, 0x34,
    ];
    let mut input = Input::new(data);
    let memory = memory();
    let mut checked = Checked::new();
    for _ in 0..STEPS {
        if input.is_empty() {
            break;
        }
        let offset = match input.below(4) {
            0 => u64::from(input.byte()),
            1 => STATUS,
            _ => input.pick(&REGISTERS),
        };
        let length = match (input.below(5), offset) {
            (0, _) => usize::from(input.byte()) % 9,
            (_, STATUS) => 1,
            (_, 0x10 | 0x16 | 0x18 | 0x1a | 0x1c) => 2,
            _ => 4,
        };
        let value = match input.below(4) {
            0 => input.long(),
            1 => u64::from(input.byte()) << 12,
            2 => input.pick(&[0, 1, 3, 11, 15, 64, 256]),
            _ => u64::from(input.byte()),
        };
        checked.step(Step::Write(offset, length, value), &memory);
        if input.byte() > 200 {
            checked.step(Step::Returned, &memory);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const READY: [Step; 7] = [
        Step::Write(STATUS, 1, 3),
        Step::Write(0x08, 4, 1),
        Step::Write(0x0c, 4, 1),
        Step::Write(STATUS, 1, 11),
        Step::Write(0x20, 8, 0x1000),
        Step::Write(0x28, 8, 0x2000),
        Step::Write(0x30, 8, 0x3000),
    ];

    fn alphabet() -> Vec<Step> {
        let mut alphabet = vec![Step::Returned];
        alphabet.extend([0, 1, 11, 15, 0x80].map(|value| Step::Write(STATUS, 1, value)));
        // Selectors, features, vectors, size, enable and each half of the addresses.
        alphabet.extend([
            Step::Write(0x16, 2, 1),
            Step::Write(0x08, 4, 0),
            Step::Write(0x0c, 4, 0),
            Step::Write(0x10, 2, 1),
            Step::Write(0x1a, 2, 2),
            Step::Write(0x18, 2, 16),
            Step::Write(0x1c, 2, 1),
            Step::Write(0x20, 8, 0x8_0000),
            Step::Write(0x2c, 4, 1),
            Step::Write(0x30, 4, 0x4000),
        ]);
        alphabet
    }

    /// All sequences of four writes, from a device that is new, negotiated, active or in a reset.
    #[test]
    fn no_short_sequence_of_writes_changes_an_active_queue() {
        let memory = memory();
        let mut start = Checked::new();
        let mut total = 0;
        let mut from = |start: &Checked| {
            total += super::super::sequences(&alphabet(), 4, |steps| {
                let mut checked = start.clone();
                steps.iter().for_each(|step| checked.step(*step, &memory));
            });
        };
        from(&start);
        READY.iter().for_each(|step| start.step(*step, &memory));
        from(&start);
        start.step(Step::Write(0x1c, 2, 1), &memory);
        start.step(Step::Write(STATUS, 1, 15), &memory);
        assert!(start.frozen.is_some());
        from(&start);
        start.step(Step::Write(STATUS, 1, 0), &memory);
        assert!(start.resetting);
        from(&start);
        assert_eq!(total, 4 * 16usize.pow(4));
    }
}
