//! Runs the cases that were asked for, and writes the results down: a file for each handler and
//! containerd.

use std::fs;
use std::process::Command;
use std::time::Instant;

use anyhow::Result;
use brig_suite::lock;
use brig_suite::results::Place;
use brig_suite::run::{self, Totals, Verdict};
use brig_tests::node::{clock, process};
use serde_json::{Value, json};

use crate::options::Options;
use crate::suite::{Case, Suite};
use crate::{cases, churn, node, soak, table};

/// Runs what was asked for; returns how many cases failed.
pub fn run_all(options: &Options) -> Result<usize> {
    let shard = options.common.shard;
    let all = cases::all();
    options.common.check(&all)?;
    let selected: Vec<Case> = all
        .into_iter()
        // Every case is asked of every handler; what cannot be asked says so itself.
        .filter(|case| options.common.wants(case, true))
        .enumerate()
        .filter_map(|(place, case)| shard.has(place).then_some(case))
        .collect();
    if options.common.list {
        run::list(&selected);
        return Ok(0);
    }
    if options.table {
        print!("{}", table::of_directory(&options.common.results)?);
        return Ok(0);
    }
    let results = Place::prepare(&options.common.results)?;
    let _lock = lock::only_one("brig-cri")?;
    node::prepare(options.common.containerd.as_deref())?;
    let mut totals = Totals::default();
    for handler in &options.handlers {
        match (options.churn, options.soak) {
            (Some(pods), _) => churn::run(handler, pods, &results, &mut totals)?,
            (None, Some(pods)) => soak::run(
                handler,
                (pods, options.hours),
                options.seed,
                &results,
                &mut totals,
            )?,
            (None, None) => run_handler(handler, &selected, &results, &mut totals)?,
        }
    }
    Ok(totals.print())
}

/// All cases with one handler.
fn run_handler(
    handler: &str,
    selected: &[Case],
    results: &Place,
    totals: &mut Totals,
) -> Result<()> {
    let begin = Instant::now();
    let mut suite = Suite::new(handler)?;
    let mut records: Vec<Value> = Vec::new();
    let prefix = format!("{handler} on {}: ", suite.containerd);
    run::run(selected, &prefix, &mut suite, totals, |suite, outcome| {
        if matches!(outcome.verdict, Verdict::Failed(_)) {
            // What a failed case left of the shared pod is not trusted by the next.
            suite.forget_shared();
        }
        let mut record = outcome.record();
        record["date"] = json!(today());
        records.push(record);
        // Now, so that an interrupted run has its results.
        write_records(results, suite, &records)
    })?;
    suite.forget_shared();
    println!("{prefix}{} s", begin.elapsed().as_secs());
    Ok(())
}

/// Writes a handler's records; of cases that were not selected, an earlier run's stay.
fn write_records(results: &Place, suite: &Suite, records: &[Value]) -> Result<()> {
    let file = format!("cri-{}-{}.json", suite.handler, suite.containerd);
    let earlier: Value = fs::read(results.file(&file))
        .ok()
        .and_then(|data| serde_json::from_slice(&data).ok())
        .unwrap_or_default();
    let merged: Vec<Value> = cases::all()
        .iter()
        .filter_map(|case| {
            let old = earlier["cases"].as_array().into_iter().flatten();
            records
                .iter()
                .chain(old)
                .find(|record| record["group"] == case.group && record["name"] == case.name)
                .cloned()
        })
        .collect();
    let report = json!({
        "handler": suite.handler,
        "containerd": suite.containerd,
        "versions": versions(suite),
        "cases": merged,
    });
    results.write(&file, &report)
}

/// What ran: the part of a result that its reader cannot guess.
fn versions(suite: &Suite) -> Value {
    let ask = |program: &str, args: &[&str]| {
        let mut command = Command::new(program);
        command.args(args);
        process::run(command, clock::seconds(5))
            .map(|outcome| outcome.text().lines().next().unwrap_or_default().to_owned())
            .unwrap_or_default()
    };
    json!({
        "containerd": suite.containerd_release,
        "kernel": ask("uname", &["-r"]),
        "runc": ask("runc", &["--version"]),
    })
}

/// The day, as 2026-11-20 (UTC).
pub fn today() -> String {
    let seconds = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |elapsed| elapsed.as_secs());
    date_of(seconds / 86_400)
}

/// The proleptic Gregorian date of a day number since 1970-01-01.
fn date_of(day: u64) -> String {
    // Counted in years that begin in March, so that the leap day is a year's last.
    let shifted = day + 719_468;
    let era = shifted / 146_097;
    let of_era = shifted % 146_097;
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * of_year + 2) / 153;
    let day_of_month = of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = (month_from_march + 2) % 12 + 1;
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day_of_month:02}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_day_number_is_its_date() {
        for (day, date) in [
            (0, "1970-01-01"),
            (11_016, "2000-02-29"),
            (20_777, "2026-11-20"),
        ] {
            assert_eq!(date_of(day), date);
        }
    }
}
