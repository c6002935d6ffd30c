//! Runs cases one after another, says how each went, and writes the results down: a file for each
//! handler and containerd, and one table of all that are there.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::io::Write;
use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::cases;
use crate::node;
use crate::options::Options;
use crate::suite::{Case, Suite};

/// Runs what was asked for; returns how many cases failed.
pub fn run_all(options: &Options) -> Result<usize> {
    let selected: Vec<Case> = cases::all()
        .into_iter()
        .filter(|case| {
            let name = format!("{}/{}", case.group, case.name);
            options.filters.is_empty() || options.filters.iter().any(|part| name.contains(part))
        })
        .collect();
    if options.list {
        for case in selected {
            println!("{}/{}", case.group, case.name);
        }
        return Ok(0);
    }
    if options.table {
        write_table(&options.results)?;
        return Ok(0);
    }
    let _lock = node::only_one()?;
    node::prepare(options.containerd.as_deref())?;
    let (mut passed, mut failed) = (0, Vec::new());
    for handler in &options.handlers {
        let outcome = run_handler(options, handler, &selected)?;
        passed += outcome.0;
        failed.extend(outcome.1);
    }
    write_table(&options.results)?;
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
    let mut suite = Suite::new(handler)?;
    let mut records: Vec<Value> = Vec::new();
    let mut failed = Vec::new();
    for case in selected {
        let begin = Instant::now();
        let name = format!("{handler}: {}/{}", case.group, case.name);
        let outcome = std::panic::catch_unwind(AssertUnwindSafe(|| (case.run)(&mut suite)))
            .unwrap_or_else(|_| Err(anyhow::anyhow!("the case panicked")));
        let millis = u64::try_from(begin.elapsed().as_millis()).unwrap_or(u64::MAX);
        let message = outcome.as_ref().err().map(|error| format!("{error:#}"));
        match &message {
            None => println!("PASS  {name}  ({millis} ms)"),
            Some(message) => println!("FAIL  {name}  ({millis} ms)\n      {message}"),
        }
        let _ = std::io::stdout().flush();
        if message.is_some() {
            failed.push(name);
            // What a failed case left of the shared pod is not trusted by the next.
            suite.forget_shared();
        }
        records.push(json!({
            "group": case.group,
            "name": case.name,
            "passed": message.is_none(),
            "millis": millis,
            "message": message,
        }));
        // Now, so that an interrupted run has its results.
        write_records(options, &suite, &records)?;
    }
    suite.forget_shared();
    Ok((selected.len() - failed.len(), failed))
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
    let same = |a: &Value, b: &Value| a["group"] == b["group"] && a["name"] == b["name"];
    let mut merged = Vec::new();
    for case in cases::all() {
        let key = json!({"group": case.group, "name": case.name});
        let old = earlier["cases"].as_array().into_iter().flatten();
        merged.extend(
            records
                .iter()
                .chain(old)
                .find(|record| same(record, &key))
                .cloned(),
        );
    }
    let report = json!({
        "handler": suite.handler,
        "containerd": suite.containerd,
        "date": today(),
        "cases": merged,
    });
    fs::write(&file, serde_json::to_vec_pretty(&report)?)
        .with_context(|| format!("cannot write {}", file.display()))
}

/// Writes the table of all results in the directory: case × (handler, containerd).
fn write_table(results: &Path) -> Result<()> {
    let mut reports = Vec::new();
    for entry in fs::read_dir(results)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with("cri-") && name.ends_with(".json") {
            let report: Value = serde_json::from_slice(&fs::read(&path)?)
                .with_context(|| format!("{} is not JSON", path.display()))?;
            reports.push(report);
        }
    }
    fs::write(results.join("cri-table.md"), table(&mut reports)).context("cannot write the table")
}

/// runc first, then Brig, each by containerd's version.
fn table(reports: &mut [Value]) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    reports.sort_by_key(|report| {
        (
            report["handler"] != "runc",
            text(&report["handler"]),
            text(&report["containerd"]),
        )
    });
    let dates: BTreeSet<String> = reports.iter().map(|report| text(&report["date"])).collect();
    let mut out = format!(
        "# Pods through the CRI: runc and Brig\n\nMeasured {} by `brig-cri` in the disposable node. ✓ as stated, ✗ not, – not run.\n\n| Case |",
        Vec::from_iter(dates).join(", ")
    );
    for report in reports.iter() {
        let _ = write!(
            out,
            " {}, containerd {} |",
            text(&report["handler"]),
            text(&report["containerd"])
        );
    }
    out.push_str("\n|---|");
    out.push_str(&"---|".repeat(reports.len()));
    out.push('\n');
    let mut group = "";
    for case in cases::all() {
        if case.group != group {
            group = case.group;
            let _ = writeln!(out, "| **{group}** |{}", " |".repeat(reports.len()));
        }
        let _ = write!(out, "| {} |", case.name);
        for report in reports.iter() {
            let found = report["cases"]
                .as_array()
                .into_iter()
                .flatten()
                .find(|record| record["group"] == case.group && record["name"] == case.name);
            let mark = match found.map(|record| record["passed"] == true) {
                Some(true) => "✓",
                Some(false) => "✗",
                None => "–",
            };
            let _ = write!(out, " {mark} |");
        }
        out.push('\n');
    }
    out
}

/// The day, as 2026-11-20 (UTC).
fn today() -> String {
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

    #[test]
    fn the_table_has_a_column_for_each_report_and_shows_failures() {
        let case = &cases::all()[0];
        let record =
            |passed: bool| json!({"group": case.group, "name": case.name, "passed": passed});
        let report = |handler: &str, passed: bool| json!({"handler": handler, "containerd": "1.7", "date": "2026-11-20", "cases": [record(passed)]});
        let text = table(&mut [report("brig", false), report("runc", true)]);
        assert!(text.contains("| Case | runc, containerd 1.7 | brig, containerd 1.7 |"));
        assert!(text.contains(&format!("| {} | ✓ | ✗ |", case.name)));
    }
}
