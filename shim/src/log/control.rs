//! What of a pod's log can be changed while it is written: level and form; and its last lines, for `brig logs` and for
//! what is kept of a pod that failed. Bounded, because a guest may say as much as it likes.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use serde::{Deserialize, Serialize};
use slog::Level;

use super::journald::Journald;

/// The most of the last lines that are kept, and the most bytes of them. A pod that has started and idles has about a dozen.
const MAX_LINES: usize = 400;
const MAX_BYTES: usize = 48 << 10;
/// The same of the first lines, which stay: what a pod was started with, whatever it says later.
const FIRST_LINES: usize = 100;
const FIRST_BYTES: usize = 16 << 10;

/// A line of the log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Line {
    /// Numbers go up by one a line, so what was dropped in between can be told.
    pub number: u64,
    /// Of the guest's console.
    pub console: bool,
    /// Without its end.
    pub text: String,
}

/// Level, form and last lines.
#[derive(Debug)]
pub struct Control {
    /// containerd itself logs for debugging, and so do its shims.
    debug: bool,
    level: AtomicUsize,
    json: AtomicBool,
    journal: OnceLock<Journald>,
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    next: u64,
    first: Lines,
    last: Lines,
}

/// Lines and their bytes.
#[derive(Debug, Default)]
struct Lines {
    lines: VecDeque<Line>,
    bytes: usize,
}

impl Lines {
    fn push(&mut self, line: Line) {
        self.bytes += line.text.len();
        self.lines.push_back(line);
    }
}

impl Control {
    /// Text from `info` on; from `debug` on if containerd wants it so.
    #[must_use]
    pub fn new(debug: bool) -> Self {
        let level = if debug { Level::Debug } else { Level::Info };
        Self {
            debug,
            level: AtomicUsize::new(level.as_usize()),
            json: AtomicBool::new(false),
            journal: OnceLock::new(),
            kept: Mutex::default(),
        }
    }

    /// What the handler's configuration wants.
    pub fn configure(&self, level: Level, json: bool) {
        self.set_level(if self.debug { Level::Debug } else { level });
        self.json.store(json, Ordering::Relaxed);
    }

    /// Entries of the node's journal from now on, besides.
    pub fn enter_into(&self, journal: Journald) {
        // One is as good as another.
        let _ = self.journal.set(journal);
    }

    pub(super) fn journal(&self) -> Option<&Journald> {
        self.journal.get()
    }

    /// What the operator wants of a pod that lives.
    pub fn set_level(&self, level: Level) {
        self.level.store(level.as_usize(), Ordering::Relaxed);
    }

    /// Records less serious than this are left out.
    #[must_use]
    pub fn level(&self) -> Level {
        Level::from_usize(self.level.load(Ordering::Relaxed)).unwrap_or(Level::Info)
    }

    /// JSON objects instead of text.
    #[must_use]
    pub fn json(&self) -> bool {
        self.json.load(Ordering::Relaxed)
    }

    /// The lines kept from `number` on.
    #[must_use]
    pub fn from(&self, number: u64) -> Vec<Line> {
        let kept = self.kept();
        let lines = kept.first.lines.iter().chain(&kept.last.lines);
        lines
            .filter(|line| line.number >= number)
            .cloned()
            .collect()
    }

    pub(super) fn keep(&self, console: bool, text: &str) {
        let mut kept = self.kept();
        let line = Line {
            number: kept.next,
            console,
            text: text.to_owned(),
        };
        kept.next += 1;
        let first = &kept.first;
        let fits = first.lines.len() < FIRST_LINES && first.bytes + text.len() <= FIRST_BYTES;
        if fits && kept.last.lines.is_empty() {
            return kept.first.push(line);
        }
        let last = &mut kept.last;
        last.push(line);
        while last.lines.len() > MAX_LINES || last.bytes > MAX_BYTES {
            let dropped = last.lines.pop_front().map_or(0, |line| line.text.len());
            last.bytes -= dropped;
        }
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_are_kept_within_bounds_and_their_numbers_tell_of_the_others() {
        let control = Control::new(false);
        for number in 0..FIRST_LINES + 2 * MAX_LINES {
            control.keep(number % 2 == 0, "x");
        }
        let lines = control.from(0);
        let (first, lines) = lines.split_at(FIRST_LINES);
        assert!(
            first
                .iter()
                .map(|line| line.number)
                .eq(0..first.len() as u64)
        );
        assert_eq!(lines.len(), MAX_LINES);
        assert_eq!(
            lines[0].number,
            u64::try_from(FIRST_LINES + MAX_LINES).unwrap()
        );
        assert!(lines[0].console && !lines[1].console);
        let last = lines[MAX_LINES - 1].number;
        assert_eq!(control.from(last).len(), 1);
        assert!(control.from(last + 1).is_empty());
        for _ in 0..100 {
            control.keep(false, &"y".repeat(4000));
        }
        let bytes: usize = control.from(last).iter().map(|line| line.text.len()).sum();
        assert!(bytes <= MAX_BYTES, "{bytes}");
        assert!(bytes > MAX_BYTES - 4001, "{bytes}");
        let few = Control::new(false);
        for _ in 0..100 {
            few.keep(false, &"y".repeat(4000));
        }
        let bytes: usize = few.from(0).iter().map(|line| line.text.len()).sum();
        assert!(bytes <= FIRST_BYTES + MAX_BYTES, "{bytes}");
        assert_eq!(few.from(0)[0].number, 0);
    }

    #[test]
    fn containerds_wish_for_debugging_stands_until_the_operator_says_otherwise() {
        let control = Control::new(true);
        control.configure(Level::Error, true);
        assert_eq!((control.level(), control.json()), (Level::Debug, true));
        control.set_level(Level::Error);
        assert_eq!(control.level(), Level::Error);
        let control = Control::new(false);
        control.configure(Level::Warning, false);
        assert_eq!((control.level(), control.json()), (Level::Warning, false));
    }
}
