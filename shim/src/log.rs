//! The shim's log: logfmt or JSON lines to containerd's `log` FIFO in the bundle, never blocking; and to the node's
//! journal, if the operator wants that.
//!
//! containerd copies what it reads there to its own log. The FIFO is opened for reading and writing,
//! so that it outlives a restart of containerd; when it is full, lines are dropped. Text from the
//! guest is escaped and goes through a [`Gate`], because the guest may write as much as it likes.

mod control;
mod entry;
mod journald;

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

pub use control::{Control, Line};
use entry::Entry;
pub use entry::{CONSOLE, rfc3339};
pub use journald::{Journald, SOCKET as JOURNAL};
use rustix::fs::{Mode, OFlags};
use slog::{Drain, Logger, Never, OwnedKVList, Record};

/// A slog drain that writes one line a record.
struct FifoDrain {
    fd: Option<OwnedFd>,
    control: Arc<Control>,
}

impl Drain for FifoDrain {
    type Ok = ();
    type Err = Never;

    fn log(&self, record: &Record<'_>, values: &OwnedKVList) -> Result<(), Never> {
        if record.level().is_at_least(self.control.level()) {
            let entry = Entry::of(SystemTime::now(), record, values);
            let mut line = if self.control.json() {
                entry.json()
            } else {
                entry.text()
            };
            self.control.keep(entry.is_console(), &line);
            if let Some(journal) = self.control.journal() {
                journal.send(&entry);
            }
            line.push('\n');
            if let Some(fd) = &self.fd {
                // Full, or nobody there: the log must never hold up a pod.
                let _ = rustix::io::write(fd, line.as_bytes());
            }
        }
        Ok(())
    }
}

/// Opens the bundle's `log` FIFO; standard error where there is none.
pub fn open(path: &Path, debug: bool) -> (Logger, Arc<Control>) {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let fd = match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(fd) => Some(fd),
        Err(_) => rustix::io::dup(rustix::stdio::stderr()).ok(),
    };
    let control = Arc::new(Control::new(debug));
    let drain = FifoDrain {
        fd,
        control: Arc::clone(&control),
    };
    let logger = Logger::root(drain, slog::o!("runtime" => "brig"));
    (logger, control)
}

/// Bounds what the guest can make the shim log: a burst, then a steady rate.
#[derive(Debug)]
pub struct Gate {
    tokens: u32,
    last: Instant,
    suppressed: u64,
}

/// What a [`Gate`] decided for one line.
#[derive(Debug, PartialEq, Eq)]
pub enum Passed {
    /// Log it; so many lines before it were suppressed.
    Yes {
        /// Lines dropped since the last one that passed.
        suppressed: u64,
    },
    /// Drop it.
    No,
}

impl Gate {
    const BURST: u32 = 400;
    const PER_SECOND: u32 = 20;

    /// A full gate.
    #[must_use]
    pub fn new() -> Self {
        Self {
            tokens: Self::BURST,
            last: Instant::now(),
            suppressed: 0,
        }
    }

    /// Whether a line may pass at this moment.
    pub fn pass(&mut self, now: Instant) -> Passed {
        let elapsed = now.saturating_duration_since(self.last).as_millis();
        let earned = elapsed * u128::from(Self::PER_SECOND) / 1000;
        if earned > 0 {
            let earned = u32::try_from(earned).unwrap_or(Self::BURST);
            self.tokens = self.tokens.saturating_add(earned).min(Self::BURST);
            self.last = now;
        }
        if self.tokens == 0 {
            self.suppressed += 1;
            return Passed::No;
        }
        self.tokens -= 1;
        Passed::Yes {
            suppressed: std::mem::take(&mut self.suppressed),
        }
    }
}

impl Default for Gate {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_flood_is_cut_and_the_loss_is_told() {
        let mut gate = Gate::new();
        let start = gate.last;
        for _ in 0..Gate::BURST {
            assert_eq!(gate.pass(start), Passed::Yes { suppressed: 0 });
        }
        assert_eq!(gate.pass(start), Passed::No);
        assert_eq!(gate.pass(start), Passed::No);
        let later = start + Duration::from_millis(50);
        assert_eq!(gate.pass(later), Passed::Yes { suppressed: 2 });
        assert_eq!(gate.pass(later), Passed::No);
    }
}
