//! A table in Markdown, as the documents have it.

use crate::report::{median, ratio};

/// A table that grows by lines.
pub struct Table {
    title: String,
    lines: Vec<String>,
}

impl Table {
    /// An empty one with these columns.
    pub fn new(title: &str, columns: &[&str]) -> Self {
        let mut table = Self {
            title: title.to_owned(),
            lines: Vec::new(),
        };
        table.row(columns.iter().map(|name| (*name).to_owned()));
        table.row(columns.iter().map(|_| "---".to_owned()));
        table
    }

    /// Adds a line.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let cells: Vec<String> = cells.into_iter().collect();
        self.lines.push(format!("| {} |", cells.join(" | ")));
    }

    /// Prints it.
    pub fn print(&self) {
        println!("\n{}\n", self.title);
        for line in &self.lines {
            println!("{line}");
        }
    }
}

/// What is not there.
pub fn none() -> String {
    "–".to_owned()
}

/// The median of the ratios of samples of the same round: what slows a whole round slows both.
pub fn paired(ours: &[u64], others: &[u64]) -> String {
    let ratios: Vec<u64> = ours
        .iter()
        .zip(others)
        .filter_map(|(one, other)| (one * 100).checked_div(*other))
        .collect();
    median(&ratios).map_or_else(none, |hundredths| ratio(hundredths, 100))
}

/// Two decimals of a count for each of `units`.
pub fn each(count: Option<u64>, units: u64) -> String {
    count.map_or_else(none, |count| ratio(count, units))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_compared_with_those_of_their_own_round() {
        // The second round was three times as slow for both.
        assert_eq!(paired(&[20, 60, 22], &[10, 30, 10]), "2.00");
        assert_eq!(paired(&[5], &[0]), none());
        assert_eq!(each(Some(10), 4), "2.50");
    }
}
