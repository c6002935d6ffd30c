//! Runs cases one after another, says how each went, and writes the results down: a file for each
//! handler and containerd.

use std::fs;
use std::io::Write;
use std::panic::AssertUnwindSafe;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result};
use brig_tests::node::{clock, process};
use serde_json::{Value, json};

use crate::options::Options;
use crate::suite::{Case, NotHere, Suite};
use crate::{cases, churn, node, table};

/// Runs what was asked for; returns how many cases failed.
pub fn run_all(options: &Options) -> Result<usize> {
    let selected: Vec<Case> = cases::all()
        .into_iter()
        .filter(|case| {
            let name = format!("{}/{}", case.group, case.name);
            let asked = options.filters.is_empty()
                || options.filters.iter().any(|part| name.contains(part));
            asked && (case.smoke || !options.smoke)
        })
        .skip(options.shard.0 - 1)
        .step_by(options.shard.1)
        .collect();
    if options.list {
        for case in selected {
            println!("{}/{}", case.group, case.name);
        }
        return Ok(0);
    }
    if options.table {
        print!("{}", table::of_directory(&options.results)?);
        return Ok(0);
    }
    let _lock = node::only_one()?;
    node::prepare(options.containerd.as_deref())?;
    if let Some(pods) = options.churn {
        return churn::run(options, pods);
    }
    let (mut passed, mut failed) = (0, Vec::new());
    for handler in &options.handlers {
        let outcome = run_handler(options, handler, &selected)?;
        passed += outcome.0;
        failed.extend(outcome.1);
    }
    for name in &failed {
        println!("failed: {name}");
    }
    println!("{passed} passed, {} failed", failed.len());
    Ok(failed.len())
}

/// All cases with one handler: how many passed, and the names of those that failed.
fn run_handler(
    options: &Options,
    handler: &str,
    selected: &[Case],
) -> Result<(usize, Vec<String>)> {
    let begin = Instant::now();
    let mut suite = Suite::new(handler)?;
    let mut records: Vec<Value> = Vec::new();
    let (mut passed, mut failed) = (0, Vec::new());
    for case in selected {
        let begin = Instant::now();
        let name = format!(
            "{handler} on {}: {}/{}",
            suite.containerd, case.group, case.name
        );
        let outcome = std::panic::catch_unwind(AssertUnwindSafe(|| (case.run)(&mut suite)))
            .unwrap_or_else(|_| Err(anyhow::anyhow!("the case panicked")));
        let millis = u64::try_from(begin.elapsed().as_millis()).unwrap_or(u64::MAX);
        let outcome = match outcome {
            Ok(()) => {
                println!("PASS  {name}  ({millis} ms)");
                passed += 1;
                json!({"passed": true})
            }
            Err(error) if error.is::<NotHere>() => {
                println!("n/a   {name}  ({millis} ms)\n      {error:#}");
                json!({"passed": null, "message": format!("{error:#}")})
            }
            Err(error) => {
                println!("FAIL  {name}  ({millis} ms)\n      {error:#}");
                failed.push(name);
                // What a failed case left of the shared pod is not trusted by the next.
                suite.forget_shared();
                json!({"passed": false, "message": format!("{error:#}")})
            }
        };
        let _ = std::io::stdout().flush();
        let mut record =
            json!({"group": case.group, "name": case.name, "millis": millis, "date": today()});
        if let (Some(record), Some(outcome)) = (record.as_object_mut(), outcome.as_object()) {
            record.extend(outcome.clone());
        }
        records.push(record);
        // Now, so that an interrupted run has its results.
        write_records(options, &suite, &records)?;
    }
    suite.forget_shared();
    println!(
        "{handler} on {}: {} s",
        suite.containerd,
        begin.elapsed().as_secs()
    );
    Ok((passed, failed))
}

/// Writes a handler's records; of cases that were not selected, an earlier run's stay.
fn write_records(options: &Options, suite: &Suite, records: &[Value]) -> Result<()> {
    let file = options
        .results
        .join(format!("cri-{}-{}.json", suite.handler, suite.containerd));
    let earlier: Value = fs::read(&file)
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
    fs::write(&file, serde_json::to_vec_pretty(&report)?)
        .with_context(|| format!("cannot write {}", file.display()))
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
