//! One thing done by runc, Brig and QEMU: how long it took in each round, and what it cost the node once.

use serde_json::{Value, json};

use crate::subjects::Cost;
use crate::table::{Table, each, paired};

/// A line of a table. The three are runc, Brig and QEMU.
pub struct Line {
    /// What was done.
    pub name: String,
    /// What counts are divided by.
    pub unit: &'static str,
    /// How many of these were done.
    pub units: u64,
    /// Microseconds by round.
    pub samples: [Vec<u64>; 3],
    /// What it cost; runc has no VMM.
    pub costs: [Option<Cost>; 3],
}

impl Line {
    /// Nothing measured yet.
    pub fn new(name: String, unit: &'static str, units: u64) -> Self {
        Self {
            name,
            unit,
            units,
            samples: Default::default(),
            costs: [None; 3],
        }
    }

    /// A table of such lines, whose first column is `first`.
    pub fn table(title: &str, first: &str) -> Table {
        let columns = [
            first,
            "done",
            "for each",
            "Brig : runc",
            "Brig : QEMU",
            "exits",
            "calls",
            "QEMU's exits",
            "QEMU's calls",
        ];
        Table::new(title, &columns)
    }

    /// Adds this one.
    pub fn add_to(&self, table: &mut Table, first: &str) {
        let [runc, brig, qemu] = &self.samples;
        let of = |cost: Option<Cost>, pick: fn(Cost) -> u64| each(cost.map(pick), self.units);
        table.row([
            first.to_owned(),
            self.name.clone(),
            self.unit.to_owned(),
            paired(brig, runc),
            paired(brig, qemu),
            of(self.costs[1], |cost| cost.exits),
            of(self.costs[1], |cost| cost.calls),
            of(self.costs[2], |cost| cost.exits),
            of(self.costs[2], |cost| cost.calls),
        ]);
    }

    /// All of it.
    pub fn json(&self, first: &str) -> Value {
        let [runc, brig, qemu] = &self.samples;
        let told = |cost: Cost| json!({"exits": cost.exits, "calls": cost.calls});
        json!({
            "of": first, "done": self.name, "unit": self.unit, "units": self.units,
            "micros": {"runc": runc, "brig": brig, "qemu": qemu},
            "brig": self.costs[1].map(told), "qemu": self.costs[2].map(told),
        })
    }
}

/// What a command costs beyond its program's start, which has been counted by itself.
pub fn beyond(whole: Option<Cost>, start: Option<Cost>) -> Option<Cost> {
    whole.zip(start).map(|(whole, start)| Cost {
        calls: whole.calls.saturating_sub(start.calls),
        exits: whole.exits.saturating_sub(start.exits),
    })
}

/// A command as the runner takes it.
pub fn words(command: &[String]) -> Vec<&str> {
    command.iter().map(String::as_str).collect()
}
