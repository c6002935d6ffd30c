//! How long pods take to start, stage by stage, as histograms over all pods that were met. One that starts and ends
//! between two scrapes is not met.

use std::collections::{BTreeMap, BTreeSet};

use super::family::Family;
use crate::pods::Row;

/// Upper bounds in seconds.
const BOUNDS: [f64; 11] = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];
/// A stage, the moment with which it begins (none: containerd's call) and the one with which it ends.
const STAGES: [(&str, Option<&str>, &str); 5] = [
    ("shim", None, "create.received"),
    ("launch", Some("create.received"), "vmm.launched"),
    ("boot", Some("vmm.launched"), "agent.connected"),
    ("sandbox", Some("agent.connected"), "sandbox.started"),
    ("total", None, "sandbox.started"),
];

/// The pods that were counted, and the histograms.
#[derive(Debug)]
pub struct Starts {
    counted: BTreeSet<(String, String)>,
    stages: BTreeMap<&'static str, Histogram>,
}

#[derive(Debug, Default)]
struct Histogram {
    /// Of each bound those that were not longer, and not within the bound before.
    within: [u32; BOUNDS.len()],
    count: u32,
    sum: f64,
}

impl Default for Starts {
    fn default() -> Self {
        let stages = STAGES
            .iter()
            .map(|(stage, ..)| (*stage, Histogram::default()));
        Self {
            counted: BTreeSet::new(),
            // Each of them from the first scrape on: Prometheus does not see what begins with its first pod.
            stages: stages.collect(),
        }
    }
}

impl Starts {
    /// Counts a pod that has started, once.
    pub fn count(&mut self, row: &Row, moments: &BTreeMap<String, f64>) {
        let key = (row.namespace.clone(), row.id.clone());
        if !moments.contains_key("sandbox.started") || !self.counted.insert(key) {
            return;
        }
        for (stage, begin, end) in STAGES {
            let begin = begin.map_or(Some(0.0), |begin| moments.get(begin).copied());
            let (Some(begin), Some(end)) = (begin, moments.get(end)) else {
                continue;
            };
            let took = (end - begin).max(0.0);
            let histogram = self.stages.entry(stage).or_default();
            if let Some(at) = BOUNDS.iter().position(|bound| took <= *bound) {
                histogram.within[at] += 1;
            }
            histogram.count += 1;
            histogram.sum += took;
        }
    }

    /// An id that is gone may come again.
    pub fn forget_all_but(&mut self, rows: &[Row]) {
        let there: BTreeSet<(&str, &str)> = rows
            .iter()
            .map(|row| (row.namespace.as_str(), row.id.as_str()))
            .collect();
        self.counted
            .retain(|(namespace, id)| there.contains(&(namespace.as_str(), id.as_str())));
    }

    /// The family.
    pub fn family(&self) -> Family {
        let mut family = Family::new(
            "brig_start_stage_seconds",
            "histogram",
            "seconds",
            "How long stages of a pod's start took.",
        );
        for (stage, histogram) in &self.stages {
            let stage = ("stage", *stage);
            let mut so_far = 0;
            for (bound, within) in BOUNDS.iter().zip(histogram.within) {
                so_far += within;
                let bound = format!("{bound:?}");
                family.add_as("_bucket", &[stage, ("le", &bound)], f64::from(so_far));
            }
            let count = f64::from(histogram.count);
            family.add_as("_bucket", &[stage, ("le", "+Inf")], count);
            family.add_as("_count", &[stage], count);
            family.add_as("_sum", &[stage], histogram.sum);
        }
        family
    }
}

#[cfg(test)]
mod tests {
    use super::super::family::text;
    use super::*;
    use crate::pods;

    fn moments(all: &[(&str, f64)]) -> BTreeMap<String, f64> {
        all.iter()
            .map(|(name, at)| ((*name).to_owned(), *at))
            .collect()
    }

    #[test]
    fn a_pod_is_counted_once_and_when_it_has_started() {
        let base = tempfile::tempdir().unwrap();
        pods::fake(base.path(), "default", "web");
        let rows = pods::rows(base.path());
        let mut starts = Starts::default();
        starts.count(&rows[0], &moments(&[("create.received", 0.02)]));
        let told = text(&[starts.family()]);
        assert!(told.contains("_count{stage=\"shim\"} 0\n"), "{told}");
        assert!(!told.contains("} 1\n"), "{told}");
        let started = moments(&[
            ("create.received", 0.02),
            ("vmm.launched", 0.03),
            ("sandbox.started", 40.0),
        ]);
        starts.count(&rows[0], &started);
        starts.count(&rows[0], &started);
        starts.forget_all_but(&rows);
        starts.count(&rows[0], &started);
        let told = text(&[starts.family()]);
        for line in [
            "brig_start_stage_seconds_bucket{stage=\"shim\",le=\"0.01\"} 0\n",
            "brig_start_stage_seconds_bucket{stage=\"shim\",le=\"0.025\"} 1\n",
            "brig_start_stage_seconds_bucket{stage=\"shim\",le=\"30.0\"} 1\n",
            "brig_start_stage_seconds_bucket{stage=\"total\",le=\"30.0\"} 0\n",
            "brig_start_stage_seconds_bucket{stage=\"total\",le=\"+Inf\"} 1\n",
            "brig_start_stage_seconds_sum{stage=\"total\"} 40\n",
        ] {
            assert!(told.contains(line), "{line}{told}");
        }
        assert!(!told.contains("_count{stage=\"boot\"} 1\n"));
        starts.forget_all_but(&[]);
        starts.count(&rows[0], &started);
        let told = text(&[starts.family()]);
        assert!(told.contains("_count{stage=\"total\"} 2\n"), "{told}");
    }
}
