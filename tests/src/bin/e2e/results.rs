//! Runs the cases that were asked for, and writes the results down.

use std::time::Instant;

use anyhow::Result;
use brig_suite::results::Place;
use brig_suite::run::{self, Totals};
use serde_json::json;

use crate::cases;
use crate::options::Options;
use crate::suite::{Case, Suite};

/// Runs what was asked for; returns how many cases failed.
pub fn run_all(options: &Options) -> Result<usize> {
    let selected = select(options)?;
    if options.common.list {
        run::list(selected);
        return Ok(0);
    }
    let results = Place::prepare(&options.common.results)?;
    let mut suite = Suite::prepare(options)?;
    let started = Instant::now();
    let runtime = options.runtime.rsplit('.').nth(1).unwrap_or("runtime");
    let shard = options.common.shard;
    let file = format!(
        "e2e-{runtime}-{}-{}of{}.json",
        suite.containerd, shard.part, shard.of
    );
    let (mut records, mut totals) = (Vec::new(), Totals::default());
    run::run(selected, "", &mut suite, &mut totals, |suite, outcome| {
        if matches!(outcome.verdict, run::Verdict::Failed(_)) {
            // What a failed case left of the shared pod is not trusted by the next.
            suite.forget_shared();
        }
        records.push(outcome.record());
        let report = json!({
            "runtime": options.runtime,
            "containerd": suite.containerd,
            "seconds": started.elapsed().as_secs(),
            "cases": records,
        });
        // Now, so that an interrupted run has its results.
        results.write(&file, &report)
    })?;
    suite.finish();
    Ok(totals.print())
}

/// Whole groups make a part, so that pods stay shared.
fn select(options: &Options) -> Result<Vec<&'static Case>> {
    let all = cases::all();
    options.common.check(all.iter().copied())?;
    let brig = options.runtime.contains("brig");
    let shard = options.common.shard;
    Ok(all
        .into_iter()
        .filter(|case| options.common.wants(case, brig))
        .filter(|case| shard.has(cases::shard_of(case, shard.of)))
        .collect())
}
