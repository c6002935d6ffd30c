//! The guest's console: a write-only debug port where a 16550 UART would be.
//!
//! `earlyprintk=serial` polls the line status and writes one byte at a time; nothing else of a UART
//! exists. The guest may write anything at any time, so lines, total and rate are bounded, and what
//! is not printable is replaced.

use std::time::{Duration, Instant};

/// The most bytes of a line; the rest goes to the next.
pub const MAX_LINE: usize = 512;
/// The most bytes passed on in the life of a VM.
pub const MAX_TOTAL: usize = 64 * 1024;
/// Kept back from [`MAX_TOTAL`] for a panic.
const PANIC_RESERVE: usize = 16 * 1024;
/// The most lines in a second.
const MAX_RATE: u32 = 1000;

/// What Linux prints first when it panics.
const PANIC: &str = "Kernel panic - not syncing";

const DATA: u16 = 0;
const LINE_CONTROL: u16 = 3;
const LINE_STATUS: u16 = 5;
/// Divisor latch access: the data register is not data.
const DLAB: u8 = 0x80;
/// Transmitter empty.
const LINE_STATUS_READY: u8 = 0x60;

/// The port and the line it is collecting.
pub struct Console {
    line_control: u8,
    line: Vec<u8>,
    left: usize,
    panic: Option<String>,
    second: Instant,
    lines_in_second: u32,
}

impl Default for Console {
    fn default() -> Self {
        Self {
            line_control: 0,
            line: Vec::new(),
            left: MAX_TOTAL,
            panic: None,
            second: Instant::now(),
            lines_in_second: 0,
        }
    }
}

impl Console {
    /// Reads a register (offset from the first port).
    #[must_use]
    pub fn read(&self, register: u16) -> u8 {
        if register == LINE_STATUS {
            LINE_STATUS_READY
        } else {
            0
        }
    }

    /// Writes a register; returns a line when one is complete and may be passed on.
    pub fn write(&mut self, register: u16, value: u8) -> Option<String> {
        match register {
            DATA if self.line_control & DLAB == 0 => self.byte(value),
            LINE_CONTROL => {
                self.line_control = value;
                None
            }
            _ => None,
        }
    }

    /// The panic message, if the kernel has panicked.
    #[must_use]
    pub fn panic(&self) -> Option<&str> {
        self.panic.as_deref()
    }

    /// The unfinished line, at the end of the VM.
    pub fn flush(&mut self) -> Option<String> {
        if self.line.is_empty() {
            None
        } else {
            self.finish_line()
        }
    }

    fn byte(&mut self, byte: u8) -> Option<String> {
        match byte {
            b'\r' => return None,
            b'\n' => return self.finish_line(),
            b'\t' | b' '..=b'~' => self.line.push(byte),
            _ => self.line.push(b'?'),
        }
        if self.line.len() >= MAX_LINE {
            self.finish_line()
        } else {
            None
        }
    }

    fn finish_line(&mut self) -> Option<String> {
        let line: String = self.line.drain(..).map(char::from).collect();
        if self.panic.is_none()
            && let Some(at) = line.find(PANIC)
        {
            self.panic = Some(line[at..].to_owned());
        }
        let reserve = if self.panic.is_some() {
            0
        } else {
            PANIC_RESERVE
        };
        if self.left < line.len() + 1 + reserve || !self.within_rate() {
            return None;
        }
        self.left -= line.len() + 1;
        Some(line)
    }

    fn within_rate(&mut self) -> bool {
        if self.second.elapsed() >= Duration::from_secs(1) {
            self.second = Instant::now();
            self.lines_in_second = 0;
        }
        self.lines_in_second += 1;
        self.lines_in_second <= MAX_RATE
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn print(console: &mut Console, text: &str) -> Vec<String> {
        text.bytes()
            .filter_map(|byte| console.write(DATA, byte))
            .collect()
    }

    #[test]
    fn bytes_become_lines_and_the_status_is_always_ready() {
        let mut console = Console::default();
        assert_eq!(console.read(LINE_STATUS), 0x60);
        assert_eq!(print(&mut console, "one\r\ntwo\nthr"), ["one", "two"]);
        assert_eq!(console.flush().as_deref(), Some("thr"));
        assert_eq!(console.flush(), None);
    }

    #[test]
    fn divisor_writes_are_not_text() {
        let mut console = Console::default();
        console.write(LINE_CONTROL, DLAB);
        console.write(DATA, b'x');
        console.write(LINE_CONTROL, 3);
        assert_eq!(print(&mut console, "y\n"), ["y"]);
    }

    #[test]
    fn a_panic_is_recognised_and_still_passed_on_after_a_flood() {
        let mut console = Console::default();
        for _ in 0..MAX_TOTAL {
            console.write(DATA, b'x');
        }
        console.write(DATA, b'\n');
        assert!(console.panic().is_none());
        console.second = Instant::now().checked_sub(Duration::from_secs(2)).unwrap();
        let text = "[  1.0] Kernel panic - not syncing: test\n";
        assert_eq!(print(&mut console, text).len(), 1);
        assert_eq!(console.panic(), Some("Kernel panic - not syncing: test"));
    }

    proptest! {
        #[test]
        fn any_bytes_stay_within_the_bounds(
            bytes in prop::collection::vec((0u16..8, any::<u8>()), 0..4000)
        ) {
            let mut console = Console::default();
            let mut total = 0;
            for (register, value) in bytes {
                if let Some(line) = console.write(register, value) {
                    prop_assert!(line.len() <= MAX_LINE);
                    prop_assert!(line.bytes().all(|byte| byte == b'\t' || (b' '..=b'~').contains(&byte)));
                    total += line.len();
                }
                let _ = console.read(register);
            }
            prop_assert!(total <= MAX_TOTAL);
        }
    }
}
