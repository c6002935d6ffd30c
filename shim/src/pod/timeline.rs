//! The boot timeline of a pod: named moments since `start` was called, kept for every pod and shown by
//! `brig timeline`.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

/// The moment from which a container of the pod runs.
pub const CONTAINER_STARTED: &str = "container.started";
/// More marks than a boot has: the guest may write boot marks for ever.
const MAX_MARKS: usize = 64;
/// Width of the drawn bars in characters.
const WIDTH: u64 = 50;

/// One moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// What happened.
    pub name: String,
    /// Microseconds since the timeline's zero.
    pub micros: u64,
}

/// The moments of one pod, in the order in which they were reported.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timeline {
    /// Wall clock of the zero, nanoseconds since the epoch.
    pub zero_unix_ns: u64,
    /// The moments.
    pub marks: Vec<Mark>,
    /// VM exits by reason up to the agent's call.
    #[serde(default)]
    pub exits: BTreeMap<String, u64>,
}

impl Timeline {
    /// An empty timeline that began at `zero`.
    #[must_use]
    pub fn new(zero: SystemTime) -> Self {
        let since = zero
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        Self {
            zero_unix_ns: u64::try_from(since.as_nanos()).unwrap_or(0),
            marks: Vec::new(),
            exits: BTreeMap::new(),
        }
    }

    /// Adds a moment.
    pub fn mark(&mut self, name: &str, at: SystemTime) {
        let zero = SystemTime::UNIX_EPOCH + Duration::from_nanos(self.zero_unix_ns);
        let since = at.duration_since(zero).unwrap_or_default();
        if self.marks.len() < MAX_MARKS {
            self.marks.push(Mark {
                name: name.to_owned(),
                micros: u64::try_from(since.as_micros()).unwrap_or(u64::MAX),
            });
        }
    }

    /// The timeline as a waterfall: each bar is the time since the moment before.
    #[must_use]
    pub fn draw(&self) -> String {
        let mut marks = self.marks.clone();
        marks.sort_by_key(|mark| mark.micros);
        let total = marks.last().map_or(1, |mark| mark.micros).max(1);
        let column = |micros: u64| {
            let scaled = u128::from(micros) * u128::from(WIDTH) / u128::from(total);
            usize::try_from(scaled).unwrap_or(0)
        };
        let name_width = marks.iter().map(|mark| mark.name.len()).max().unwrap_or(0);
        let mut drawn = String::new();
        let mut before = 0;
        for mark in &marks {
            let (from, to) = (column(before), column(mark.micros));
            let bar = "█".repeat((to - from).max(1));
            let _ = writeln!(
                drawn,
                "{:<name_width$} {:>9.1} ms {:>+9.1}  {}{bar}",
                mark.name,
                millis(mark.micros),
                millis(mark.micros - before),
                " ".repeat(from),
            );
            before = mark.micros;
        }
        drawn
    }
}

fn millis(micros: u64) -> f64 {
    Duration::from_micros(micros).as_secs_f64() * 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_count_from_the_zero_and_are_bounded() {
        let zero = SystemTime::UNIX_EPOCH + Duration::from_secs(100);
        let mut timeline = Timeline::new(zero);
        timeline.mark("create", zero + Duration::from_millis(5));
        timeline.mark("early", zero - Duration::from_secs(1));
        assert_eq!(timeline.marks[0].micros, 5000);
        assert_eq!(timeline.marks[1].micros, 0);
        for _ in 0..2 * MAX_MARKS {
            timeline.mark("x", zero);
        }
        assert_eq!(timeline.marks.len(), MAX_MARKS);
    }

    #[test]
    fn a_waterfall_has_one_line_a_moment_in_order_of_time() {
        let zero = SystemTime::UNIX_EPOCH;
        let mut timeline = Timeline::new(zero);
        timeline.mark("b", zero + Duration::from_millis(100));
        timeline.mark("a", zero + Duration::from_millis(50));
        let drawn = timeline.draw();
        let lines: Vec<&str> = drawn.lines().collect();
        assert_eq!(lines.len(), 2);
        assert!(
            lines[0].starts_with('a') && lines[0].contains("50.0 ms"),
            "{drawn}"
        );
        assert!(
            lines[1].contains("100.0 ms") && lines[1].contains("+50.0"),
            "{drawn}"
        );
        assert!(Timeline::new(zero).draw().is_empty());
    }
}
