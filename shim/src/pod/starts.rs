//! How long starts of pods have taken on this node since it has booted, stage by stage: a file of counts beside the state
//! directory, to which each pod's shim adds once and which whoever tells of it only reads.

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::node::remains::Remains;
use crate::pod::timeline::Timeline;

const FILE: &str = "starts";
/// Upper bounds of the buckets in microseconds.
const BOUNDS: [u64; 11] = [
    10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000, 2_500_000, 5_000_000, 10_000_000,
    30_000_000,
];
/// One more than there are bounds, for what took longer than all of them.
const BUCKETS: usize = BOUNDS.len() + 1;
/// The moment without which a pod has not started.
const STARTED: &str = "sandbox.started";
/// A stage, the moment with which it begins (none: containerd's call) and the one with which it ends.
const STAGES: [(&str, Option<&str>, &str); 5] = [
    ("shim", None, "create.received"),
    ("launch", Some("create.received"), "vmm.launched"),
    ("boot", Some("vmm.launched"), "agent.connected"),
    ("sandbox", Some("agent.connected"), STARTED),
    ("total", None, STARTED),
];

/// Histograms by stage.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Written")]
pub struct Starts {
    bounds: [u64; BOUNDS.len()],
    stages: BTreeMap<String, Histogram>,
}

/// As a file has it, of whichever version.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    bounds: [u64; BOUNDS.len()],
    stages: BTreeMap<String, Histogram>,
}

/// How long one stage took.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Histogram {
    /// Of each bound those that were not longer, and not within the bound before.
    within: [u64; BUCKETS],
    /// Microseconds of all of them.
    micros: u64,
}

impl Default for Starts {
    fn default() -> Self {
        // All of them from the first scrape on: Prometheus does not see what begins with its first pod.
        let stages = STAGES.map(|(stage, ..)| (stage.to_owned(), Histogram::default()));
        Self {
            bounds: BOUNDS,
            stages: stages.into(),
        }
    }
}

impl TryFrom<Written> for Starts {
    type Error = &'static str;

    fn try_from(Written { bounds, stages }: Written) -> Result<Self, Self::Error> {
        let ours = Self::default();
        if bounds != ours.bounds || !stages.keys().eq(ours.stages.keys()) {
            return Err("these are not the bounds and stages of this version");
        }
        Ok(Self { bounds, stages })
    }
}

impl Starts {
    /// Those of the pods that [`count`] was called for; `None` if the file is damaged or of another version.
    #[must_use]
    pub fn of(remains: &Remains) -> Option<Self> {
        remains.counted(FILE)
    }

    /// The stages by name.
    pub fn stages(&self) -> impl Iterator<Item = (&str, &Histogram)> {
        let stages = self.stages.iter();
        stages.map(|(stage, histogram)| (stage.as_str(), histogram))
    }

    fn add(&mut self, took: &[(&'static str, u64)]) {
        for (stage, micros) in took {
            let histogram = self.stages.entry((*stage).to_owned()).or_default();
            let longer = BOUNDS.iter().position(|bound| micros <= bound);
            let bucket = &mut histogram.within[longer.unwrap_or(BOUNDS.len())];
            *bucket = bucket.saturating_add(1);
            histogram.micros = histogram.micros.saturating_add(*micros);
        }
    }
}

impl Histogram {
    /// Each upper bound with how many took no longer.
    pub fn buckets(&self) -> impl Iterator<Item = (Duration, u64)> {
        let bounds = BOUNDS.iter().map(|bound| Duration::from_micros(*bound));
        bounds
            .zip(self.within)
            .scan(0_u64, |so_far, (bound, within)| {
                *so_far = so_far.saturating_add(within);
                Some((bound, *so_far))
            })
    }

    /// All that were counted.
    #[must_use]
    pub fn count(&self) -> u64 {
        let all = self.within.iter();
        all.fold(0, |sum, within| sum.saturating_add(*within))
    }

    /// The time of all of them together.
    #[must_use]
    pub fn sum(&self) -> Duration {
        Duration::from_micros(self.micros)
    }
}

/// How long the stages of a start took, in microseconds; `None` for a pod that has not started.
#[must_use]
pub fn took(timeline: &Timeline) -> Option<Vec<(&'static str, u64)>> {
    let moment = |name: &str| {
        let mark = timeline.marks.iter().find(|mark| mark.name == name);
        mark.map(|mark| mark.micros)
    };
    moment(STARTED)?;
    let stages = STAGES.iter().filter_map(|(stage, begin, end)| {
        let begin = begin.map_or(Some(0), moment)?;
        Some((*stage, moment(end)?.saturating_sub(begin)))
    });
    Some(stages.collect())
}

/// Adds what one pod's start took, for which this is to be called once.
///
/// # Errors
/// What the host says.
pub fn count(remains: &Remains, took: &[(&'static str, u64)]) -> io::Result<()> {
    remains.count(FILE, |starts: &mut Starts| starts.add(took))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};
    use std::fs;
    use std::time::SystemTime;

    fn timeline(marks: &[(&str, u64)]) -> Timeline {
        let zero = SystemTime::UNIX_EPOCH;
        let mut timeline = Timeline::new(zero);
        for (name, millis) in marks {
            timeline.mark(name, zero + Duration::from_millis(*millis));
        }
        timeline
    }

    fn counts(remains: &Remains) -> Vec<(String, u64)> {
        let starts = Starts::of(remains).unwrap();
        let stages = starts.stages();
        stages
            .map(|(stage, histogram)| (stage.to_owned(), histogram.count()))
            .collect()
    }

    #[test]
    fn a_start_is_counted_in_the_stages_whose_moments_are_known() {
        let base = tempfile::tempdir().unwrap();
        let remains = Remains::beside(&base.path().join("brig"));
        assert_eq!(counts(&remains).len(), STAGES.len());
        assert!(counts(&remains).iter().all(|(_, count)| *count == 0));
        assert_eq!(took(&timeline(&[("create.received", 20)])), None);
        let started = timeline(&[
            ("create.received", 20),
            ("vmm.launched", 30),
            ("sandbox.started", 40_000),
        ]);
        count(&remains, &took(&started).unwrap()).unwrap();
        let starts = Starts::of(&remains).unwrap();
        let stage = |name| starts.stages().find(|(stage, _)| *stage == name).unwrap().1;
        let within: Vec<u64> = stage("shim").buckets().map(|(_, count)| count).collect();
        assert_eq!(within, [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]);
        assert!(stage("total").buckets().all(|(_, count)| count == 0));
        assert_eq!(stage("total").count(), 1);
        assert_eq!(stage("total").sum(), Duration::from_secs(40));
        assert_eq!((stage("launch").count(), stage("boot").count()), (1, 0));
    }

    #[test]
    fn shims_that_count_at_the_same_time_are_all_counted() {
        let base = tempfile::tempdir().unwrap();
        let remains = Remains::beside(&base.path().join("brig"));
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..10 {
                        count(&remains, &[("total", 5)]).unwrap();
                    }
                });
            }
        });
        assert!(counts(&remains).contains(&("total".to_owned(), 80)));
    }

    #[test]
    fn a_file_that_is_damaged_or_of_another_version_says_nothing_and_begins_anew() {
        let base = tempfile::tempdir().unwrap();
        let remains = Remains::beside(&base.path().join("brig"));
        count(&remains, &[("total", 5)]).unwrap();
        let file = base.path().join("brig.ended").join(FILE);
        let whole = fs::read(&file).unwrap();
        assert!(whole.len() < 4096, "{}", whole.len());
        for end in 0..whole.len() {
            fs::write(&file, &whole[..end]).unwrap();
            assert_eq!(Starts::of(&remains), None, "{end}");
        }
        let changed = |change: fn(&mut Value)| {
            let mut value: Value = serde_json::from_slice(&whole).unwrap();
            change(&mut value);
            value
        };
        for other in [
            json!({}),
            json!({ "total": 7 }),
            changed(|value| value["bounds"][0] = 5.into()),
            changed(|value| value["more"] = 5.into()),
            changed(|value| value["stages"]["pull"] = value["stages"]["boot"].clone()),
            changed(|value| value["stages"]["boot"]["within"] = json!([1, 2])),
            changed(|value| value["stages"]["boot"]["within"][0] = (-1).into()),
        ] {
            fs::write(&file, other.to_string()).unwrap();
            assert_eq!(Starts::of(&remains), None, "{other}");
            count(&remains, &[("total", 5)]).unwrap();
            assert!(counts(&remains).contains(&("total".to_owned(), 1)));
        }
        let most =
            changed(|value| value["stages"]["total"]["within"] = vec![u64::MAX; BUCKETS].into());
        fs::write(&file, most.to_string()).unwrap();
        count(&remains, &[("total", u64::MAX)]).unwrap();
        assert!(counts(&remains).contains(&("total".to_owned(), u64::MAX)));
    }
}
