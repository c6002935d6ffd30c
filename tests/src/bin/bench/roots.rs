//! The same root file system by overlayfs, blockfile and erofs: what a container's start costs under runc and under Brig, what the
//! node mounts for it, and the memory of one pod and of several.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use brig_suite::results::Place;
use brig_tests::node::calls::Calls;
use brig_tests::node::daemon::Daemon;
use brig_tests::node::daemon::pod::Netns;
use serde_json::{Value, json};

use crate::ground::Ground;
use crate::kinds::{Kind, Who};
use crate::report::median;
use crate::subjects::{Subject, daemon};
use crate::table::{Table, none, paired};

const ROOTS: [Kind; 3] = [Kind::Overlay, Kind::Blockfile, Kind::Erofs];
/// How many pods the memory is shared by.
const PODS: usize = 4;
/// Guests have reported what they do not use by then.
const SETTLE: Duration = Duration::from_secs(26);

/// Of one kind under one runtime.
#[derive(Default)]
struct Samples {
    micros: Vec<u64>,
    exits: Vec<u64>,
    calls: Vec<u64>,
    mounts: Vec<u64>,
    /// KiB of each pod, when there is one and when there are [`PODS`].
    share: [u64; 2],
}

/// Starts of all kinds, alternating.
pub fn measure(results: &Place, rounds: usize) -> Result<()> {
    let ground = Ground::prepare()?;
    let daemons = [
        (Who::Runc, daemon(Who::Runc, "roots-runc", "")?),
        (Who::Brig, daemon(Who::Brig, "roots-brig", "")?),
    ];
    let title = format!(
        "Roots: medians of {rounds} rounds. A start is from the shim's `start` to the first program's answer; its calls are those of every process that is started for it"
    );
    let columns = [
        "root",
        "runtime",
        "start : runc's",
        "exits",
        "calls",
        "mounts of the node",
        "PSS of a pod, KiB",
        "PSS of each of 4, KiB",
    ];
    let mut table = Table::new(&title, &columns);
    let mut all: Vec<Value> = Vec::new();
    for kind in ROOTS {
        let mut samples: [Samples; 2] = Default::default();
        for round in 0..rounds {
            eprintln!("roots: {}, round {} of {rounds}", kind.name(), round + 1);
            for ((who, daemon), samples) in daemons.iter().zip(&mut samples) {
                let subject = started(kind, &ground, *who, daemon, round, samples)
                    .with_context(|| format!("{} of {}", kind.name(), who.name()))?;
                subject.end()?;
            }
        }
        for ((who, daemon), samples) in daemons.iter().zip(&mut samples) {
            samples.share = shares(kind, &ground, *who, daemon, rounds)?;
        }
        let [runc, brig] = &samples;
        for (who, of) in [("runc", runc), ("Brig", brig)] {
            let middle = |samples: &[u64]| {
                median(samples)
                    .filter(|_| !samples.is_empty())
                    .map_or_else(none, |value| value.to_string())
            };
            table.row([
                kind.name().to_owned(),
                who.to_owned(),
                paired(&of.micros, &runc.micros),
                middle(&of.exits),
                middle(&of.calls),
                middle(&of.mounts),
                of.share[0].to_string(),
                of.share[1].to_string(),
            ]);
            all.push(json!({
                "root": kind.name(), "runtime": who, "micros": of.micros, "exits": of.exits,
                "calls": of.calls, "mounts": of.mounts, "pss_kib": of.share,
            }));
        }
        results.write("roots.json", &json!({"rounds": rounds, "rows": all}))?;
    }
    table.print();
    println!("\nJSON: {}", results.file("roots.json").display());
    Ok(())
}

/// Mounts of the node, without those that name networks and what this program makes for itself.
fn mounts() -> Result<u64> {
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    let lines = table.lines().filter(|line| !line.contains("/run/netns"));
    Ok(u64::try_from(lines.count())?)
}

fn started<'a>(
    kind: Kind,
    ground: &Ground,
    who: Who,
    daemon: &'a Daemon,
    number: usize,
    samples: &mut Samples,
) -> Result<Subject<'a>> {
    let id = format!("{}-{kind:?}-{number}", who.name()).to_lowercase();
    let netns = Netns::new(&id)?;
    let mounted = mounts()?;
    let made = kind.container(ground, who, &format!("root-{number}"))?;
    let calls = Calls::of_this_thread()?;
    let subject = Subject::pod(daemon, who, &id, netns, made)?;
    samples.calls.push(calls.count()?);
    samples.mounts.push(mounts()?.saturating_sub(mounted));
    if let Some(exits) = subject.exits()? {
        samples.exits.push(exits);
    }
    if let Some(time) = subject.started() {
        samples.micros.push(u64::try_from(time.as_micros())?);
    }
    Ok(subject)
}

/// KiB of each pod, of one and of several.
fn shares(
    kind: Kind,
    ground: &Ground,
    who: Who,
    daemon: &Daemon,
    first: usize,
) -> Result<[u64; 2]> {
    eprintln!("roots: {}, memory of {}", kind.name(), who.name());
    let mut subjects = Vec::new();
    let mut unused = Samples::default();
    let mut shares = [0; 2];
    for number in 1..=PODS {
        subjects.push(started(
            kind,
            ground,
            who,
            daemon,
            first + number,
            &mut unused,
        )?);
        if number == 1 || number == PODS {
            if who == Who::Brig {
                std::thread::sleep(SETTLE);
            }
            let sum: u64 = subjects.iter().map(Subject::share).sum::<Result<u64>>()?;
            shares[usize::from(number == PODS)] = sum / u64::try_from(number)?;
        }
    }
    for subject in subjects {
        subject.end()?;
    }
    Ok(shares)
}
