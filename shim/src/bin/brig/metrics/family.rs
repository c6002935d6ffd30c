//! The OpenMetrics text format (OpenMetrics 1.0, section "Text format"): families of samples, written line by line.
//!
//! Names in labels come from containerd, from users and from guests: they are escaped.

use std::fmt::Write as _;

/// One family of samples.
pub struct Family {
    name: &'static str,
    /// `gauge` or `counter`, whose samples end in `_total`.
    kind: &'static str,
    unit: &'static str,
    help: &'static str,
    /// Labels, ready to be written, and the value.
    samples: Vec<(String, f64)>,
}

impl Family {
    /// One without samples.
    #[must_use]
    pub fn new(
        name: &'static str,
        kind: &'static str,
        unit: &'static str,
        help: &'static str,
    ) -> Self {
        Self {
            name,
            kind,
            unit,
            help,
            samples: Vec::new(),
        }
    }

    /// Adds a sample.
    pub fn add(&mut self, labels: &[(&str, &str)], value: f64) {
        let labels = labels
            .iter()
            .map(|(name, value)| format!("{name}=\"{}\"", escaped(value)));
        self.samples
            .push((labels.collect::<Vec<_>>().join(","), value));
    }

    /// Writes it, with its head.
    pub fn write(&self, text: &mut String) {
        let Self {
            name,
            kind,
            unit,
            help,
            ..
        } = self;
        let _ = writeln!(text, "# TYPE {name} {kind}");
        if !unit.is_empty() {
            let _ = writeln!(text, "# UNIT {name} {unit}");
        }
        let _ = writeln!(text, "# HELP {name} {help}");
        let suffix = if *kind == "counter" { "_total" } else { "" };
        for (labels, value) in &self.samples {
            let _ = writeln!(text, "{name}{suffix}{{{labels}}} {value}");
        }
    }
}

/// As the format wants a label's value.
pub fn escaped(value: &str) -> String {
    value
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn whatever_a_label_is_a_sample_is_one_line(value in any::<String>()) {
            let mut family = Family::new("brig_x", "counter", "", "Some.");
            family.add(&[("a", &value)], 1.5);
            let mut text = String::new();
            family.write(&mut text);
            prop_assert_eq!(text.matches('\n').count(), 3);
            let ends_well = text.ends_with("\"} 1.5\n");
            prop_assert!(ends_well, "{text}");
        }
    }
}
