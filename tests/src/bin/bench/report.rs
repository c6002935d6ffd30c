//! Samples, their medians, the table and the JSON.

use std::collections::BTreeMap;

use anyhow::Result;
use brig_suite::results::Place;
use serde_json::{Value, json};

/// One line of the table: the same thing measured for Brig and for something else.
struct Row {
    what: String,
    unit: &'static str,
    brig: Vec<u64>,
    other: Vec<u64>,
    other_name: &'static str,
}

/// Everything measured.
pub struct Report {
    rounds: usize,
    sections: Vec<(String, Vec<Row>)>,
    exits: BTreeMap<String, u64>,
    syscalls: BTreeMap<&'static str, BTreeMap<String, u64>>,
}

/// The middle of the samples; the mean of the two middle ones if their number is even.
pub fn median(samples: &[u64]) -> Option<u64> {
    let mut sorted = samples.to_vec();
    sorted.sort_unstable();
    let middle = sorted.len() / 2;
    let high = *sorted.get(middle)?;
    if sorted.len() % 2 == 1 {
        return Some(high);
    }
    Some(sorted[middle - 1].midpoint(high))
}

/// Two decimals of a quotient, without floating point.
pub fn ratio(brig: u64, other: u64) -> String {
    match (brig * 100).checked_div(other) {
        Some(hundredths) => format!("{}.{:02}", hundredths / 100, hundredths % 100),
        None => "-".to_owned(),
    }
}

impl Report {
    /// An empty report.
    pub fn new(rounds: usize) -> Self {
        Self {
            rounds,
            sections: Vec::new(),
            exits: BTreeMap::new(),
            syscalls: BTreeMap::new(),
        }
    }

    /// Begins a section of the table.
    pub fn section(&mut self, title: &str) {
        self.sections.push((title.to_owned(), Vec::new()));
    }

    /// Adds a line; `other` may be empty.
    pub fn row(
        &mut self,
        what: &str,
        unit: &'static str,
        brig: Vec<u64>,
        other_name: &'static str,
        other: Vec<u64>,
    ) {
        if let Some((_, rows)) = self.sections.last_mut() {
            rows.push(Row {
                what: what.to_owned(),
                unit,
                brig,
                other,
                other_name,
            });
        }
    }

    /// VM exits by reason up to agent ready.
    pub fn exits(&mut self, exits: BTreeMap<String, u64>) {
        self.exits = exits;
    }

    /// Host system calls by name of one program.
    pub fn syscalls(&mut self, who: &'static str, calls: BTreeMap<String, u64>) {
        self.syscalls.insert(who, calls);
    }

    /// The table.
    pub fn print(&self) {
        println!();
        for (title, rows) in &self.sections {
            println!("{title}");
            println!(
                "  {:<44} {:>12} {:>12}  {:<10} {:>6}",
                "", "brig", "other", "", "ratio"
            );
            for row in rows {
                let show = |samples: &[u64]| {
                    median(samples).map_or_else(|| "-".to_owned(), |value| value.to_string())
                };
                let quotient = match (median(&row.brig), median(&row.other)) {
                    (Some(brig), Some(other)) => ratio(brig, other),
                    _ => "-".to_owned(),
                };
                println!(
                    "  {:<44} {:>12} {:>12}  {:<10} {:>6}",
                    format!("{} ({})", row.what, row.unit),
                    show(&row.brig),
                    show(&row.other),
                    row.other_name,
                    quotient
                );
            }
            println!();
        }
        Self::list("VM exits of Brig by reason, up to agent ready", &self.exits);
        for (who, calls) in &self.syscalls {
            Self::list(
                &format!("host system calls of {who}, up to agent ready"),
                calls,
            );
        }
        println!(
            "Medians of {} interleaved rounds. Times come from {}.",
            self.rounds,
            if emulated() {
                "an EMULATED node: only their ratios mean anything"
            } else {
                "a node with hardware virtualisation"
            }
        );
    }

    fn list(title: &str, counts: &BTreeMap<String, u64>) {
        let mut sorted: Vec<_> = counts.iter().collect();
        sorted.sort_by(|a, b| b.1.cmp(a.1));
        let total: u64 = counts.values().sum();
        println!("{title}: {total}");
        let parts: Vec<String> = sorted
            .iter()
            .take(14)
            .map(|(name, count)| format!("{name} {count}"))
            .collect();
        println!("  {}\n", parts.join(", "));
    }

    /// Everything as JSON.
    pub fn write(&self, results: &Place) -> Result<()> {
        let sections: Vec<Value> = self
            .sections
            .iter()
            .map(|(title, rows)| {
                let rows: Vec<Value> = rows
                    .iter()
                    .map(|row| {
                        json!({
                            "what": row.what,
                            "unit": row.unit,
                            "brig": {"median": median(&row.brig), "samples": row.brig},
                            "other": {"name": row.other_name, "median": median(&row.other), "samples": row.other},
                        })
                    })
                    .collect();
                json!({"title": title, "rows": rows})
            })
            .collect();
        let report = json!({
            "rounds": self.rounds,
            "emulated": emulated(),
            "sections": sections,
            "vm_exits": self.exits,
            "syscalls": self.syscalls,
        });
        results.write("bench.json", &report)?;
        println!("JSON: {}", results.file("bench.json").display());
        Ok(())
    }
}

/// Whether the node itself is emulated: its CPU is QEMU's, without a hypervisor's acceleration.
fn emulated() -> bool {
    brig_tests::node::clock::scale() > 2.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_is_not_moved_by_one_outlier() {
        assert_eq!(median(&[3, 1000, 2]), Some(3));
        assert_eq!(median(&[1, 2, 3, 1000]), Some(2));
        assert_eq!(median(&[]), None);
    }

    #[test]
    fn a_ratio_to_nothing_is_not_a_number() {
        assert_eq!(ratio(150, 100), "1.50");
        assert_eq!(ratio(1, 0), "-");
    }
}
