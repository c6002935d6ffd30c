//! Families of samples, written as OpenMetrics (OpenMetrics 1.0, section "Text format") or as JSON.
//!
//! Names in labels come from containerd, from users and from guests: they are escaped.

use std::fmt::Write as _;

use serde_json::{Value, json};

/// One family of samples.
///
/// A sample of a counter, and each of a histogram, comes from a source that never falls while what it is of lives, and that
/// begins at nothing with it: Prometheus takes whatever is smaller than before for such a beginning, and counts all of it as
/// an increase. So a sum over things that may end one by one (threads, pods, connections) is none, unless what has ended
/// stays in it. Nor is what this process remembers: it must be the same for who asks once and for who asks for ever.
pub struct Family {
    name: &'static str,
    /// `gauge`, `counter`, whose samples end in `_total`, or `histogram`.
    kind: &'static str,
    unit: &'static str,
    help: &'static str,
    samples: Vec<Sample>,
}

struct Sample {
    /// Comes after the family's name.
    suffix: &'static str,
    labels: Vec<(String, String)>,
    value: f64,
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
        let suffix = if self.kind == "counter" { "_total" } else { "" };
        self.add_as(suffix, labels, value);
    }

    /// Adds a sample of those that a histogram has several kinds of.
    pub fn add_as(&mut self, suffix: &'static str, labels: &[(&str, &str)], value: f64) {
        let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        self.samples.push(Sample {
            suffix,
            labels: labels.iter().map(owned).collect(),
            value,
        });
    }

    fn write(&self, text: &mut String) {
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
        for sample in &self.samples {
            let labels = sample
                .labels
                .iter()
                .map(|(name, value)| format!("{name}=\"{}\"", escaped(value)));
            let labels = labels.collect::<Vec<_>>().join(",");
            let (suffix, value) = (sample.suffix, sample.value);
            let _ = writeln!(text, "{name}{suffix}{{{labels}}} {value}");
        }
    }

    fn to_json(&self) -> Value {
        let samples = self.samples.iter().map(|sample| {
            let labels = sample.labels.iter();
            let labels = labels.map(|(name, value)| (name.clone(), Value::from(value.as_str())));
            json!({
                "name": format!("{}{}", self.name, sample.suffix),
                "labels": labels.collect::<serde_json::Map<_, _>>(),
                "value": sample.value,
            })
        });
        json!({
            "name": self.name,
            "type": self.kind,
            "unit": self.unit,
            "help": self.help,
            "samples": samples.collect::<Vec<_>>(),
        })
    }
}

/// As OpenMetrics has them.
#[must_use]
pub fn text(families: &[Family]) -> String {
    let mut text = String::new();
    for family in families {
        family.write(&mut text);
    }
    text.push_str("# EOF\n");
    text
}

/// As JSON has them: a list of families.
#[must_use]
pub fn json(families: &[Family]) -> String {
    let families: Vec<Value> = families.iter().map(Family::to_json).collect();
    format!("{}\n", Value::from(families))
}

/// A number as a sample has it, exact up to 2^53.
#[must_use]
pub fn exact(count: u64) -> f64 {
    let part = |n: u64| f64::from(u32::try_from(n).unwrap_or(u32::MAX));
    part(count >> 32) * 4_294_967_296.0 + part(count & u64::from(u32::MAX))
}

/// As the format wants a label's value.
fn escaped(value: &str) -> String {
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
            let families = [family];
            let text = text(&families);
            prop_assert_eq!(text.matches('\n').count(), 4);
            let ends_well = text.ends_with("\"} 1.5\n# EOF\n");
            prop_assert!(ends_well, "{text}");
            let told: Value = serde_json::from_str(&json(&families)).unwrap();
            prop_assert_eq!(told[0]["samples"][0]["labels"]["a"].as_str(), Some(value.as_str()));
        }
    }

    #[test]
    fn as_json_a_family_has_the_same_samples() {
        let mut family = Family::new("brig_took", "histogram", "seconds", "How long.");
        family.add_as("_bucket", &[("le", "+Inf")], 2.0);
        family.add_as("_count", &[], 2.0);
        let told: Value = serde_json::from_str(&json(&[family])).unwrap();
        assert_eq!(
            told,
            json!([{
                "name": "brig_took", "type": "histogram", "unit": "seconds", "help": "How long.",
                "samples": [
                    { "name": "brig_took_bucket", "labels": { "le": "+Inf" }, "value": 2.0 },
                    { "name": "brig_took_count", "labels": {}, "value": 2.0 },
                ],
            }])
        );
    }
}
