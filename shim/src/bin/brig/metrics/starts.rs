//! How long pods have taken to start since the node has booted, stage by stage, as their shims have counted it.

use brig_shim::pod::starts::Starts;

use super::family::{Family, exact};

/// The family; without samples where nobody knows.
#[must_use]
pub fn family(starts: Option<&Starts>) -> Family {
    let mut family = Family::new(
        "brig_start_stage_seconds",
        "histogram",
        "seconds",
        "How long stages of a pod's start took, of all pods since the node has booted.",
    );
    for (stage, histogram) in starts.into_iter().flat_map(Starts::stages) {
        let stage = ("stage", stage);
        for (bound, count) in histogram.buckets() {
            let bound = format!("{:?}", bound.as_secs_f64());
            family.add_as("_bucket", &[stage, ("le", &bound)], exact(count));
        }
        let count = exact(histogram.count());
        family.add_as("_bucket", &[stage, ("le", "+Inf")], count);
        family.add_as("_count", &[stage], count);
        family.add_as("_sum", &[stage], histogram.sum().as_secs_f64());
    }
    family
}

#[cfg(test)]
mod tests {
    use super::super::family::text;
    use super::*;
    use brig_shim::node::remains::Remains;
    use brig_shim::pod::starts::count;

    #[test]
    fn buckets_hold_those_of_the_buckets_before_them() {
        let base = tempfile::tempdir().unwrap();
        let remains = Remains::beside(&base.path().join("brig"));
        let took = [("shim", 20_000), ("total", 40_000_000)];
        count(&remains, &took).unwrap();
        let told = text(&[family(Starts::of(&remains).as_ref())]);
        for line in [
            "brig_start_stage_seconds_bucket{stage=\"shim\",le=\"0.01\"} 0\n",
            "brig_start_stage_seconds_bucket{stage=\"shim\",le=\"0.025\"} 1\n",
            "brig_start_stage_seconds_bucket{stage=\"shim\",le=\"30.0\"} 1\n",
            "brig_start_stage_seconds_bucket{stage=\"total\",le=\"30.0\"} 0\n",
            "brig_start_stage_seconds_bucket{stage=\"total\",le=\"+Inf\"} 1\n",
            "brig_start_stage_seconds_sum{stage=\"total\"} 40\n",
            "brig_start_stage_seconds_count{stage=\"boot\"} 0\n",
        ] {
            assert!(told.contains(line), "{line}{told}");
        }
        let told = text(&[family(None)]);
        assert!(told.lines().all(|line| line.starts_with('#')), "{told}");
    }
}
