//! The table of results: case × (handler, containerd), from the files that runs have left.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::cases;

/// The table of all results in the directory and in those just below it (one for each node).
pub fn of_directory(results: &Path) -> Result<String> {
    let mut reports = Vec::new();
    let mut churn = BTreeMap::new();
    let mut directories = vec![results.to_owned()];
    for entry in fs::read_dir(results)
        .with_context(|| format!("cannot list {}", results.display()))?
        .flatten()
    {
        if entry.path().is_dir() {
            directories.push(entry.path());
        }
    }
    let mut files = Vec::new();
    for directory in directories {
        for entry in fs::read_dir(directory)? {
            let entry = entry?;
            files.push((entry.metadata()?.modified()?, entry.path()));
        }
    }
    // A case that ran again has its latest result.
    files.sort();
    for (_, path) in files {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let read = || -> Result<Value> {
            serde_json::from_slice(&fs::read(&path)?)
                .with_context(|| format!("{} is not JSON", path.display()))
        };
        if name.starts_with("cri-") && name.ends_with(".json") {
            reports.push(read()?);
        } else if let Some(of) = name.strip_prefix("churn-") {
            churn.insert(of.trim_end_matches(".json").to_owned(), read()?);
        }
    }
    Ok(table(&reports) + &slopes(&churn))
}

/// Growth a pod, by handler and containerd, in the second half of the longest churn there is.
fn slopes(churn: &BTreeMap<String, Value>) -> String {
    let mut out = String::new();
    for (of, report) in churn {
        let counts = report.as_object().into_iter().flatten();
        let samples = |count: &Value| count["samples"].as_array().map_or(0, Vec::len);
        let pods = counts.clone().map(|(_, count)| samples(count)).max();
        let _ = write!(
            out,
            "\nChurn of {} pods ({of}), growth a pod over the last half:",
            pods.unwrap_or_default()
        );
        for (name, count) in counts {
            let slope = count["slope"].as_f64().unwrap_or(f64::NAN);
            let _ = write!(out, " {name} {slope:.3};");
        }
        out.pop();
        out.push_str(".\n");
    }
    out
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// runc first, then Brig, each by containerd's version; the parts of a sharded run in one column.
fn table(reports: &[Value]) -> String {
    let mut columns: BTreeMap<(bool, String, String), Vec<&Value>> = BTreeMap::new();
    let mut dates = BTreeSet::new();
    let mut versions = BTreeSet::new();
    for report in reports {
        let key = (
            report["handler"] != "runc",
            text(&report["handler"]),
            text(&report["containerd"]),
        );
        let records = report["cases"].as_array().into_iter().flatten();
        let column = columns.entry(key).or_default();
        for record in records {
            dates.insert(text(&record["date"]));
            column.push(record);
        }
        let of = &report["versions"];
        versions.insert(format!("containerd {}", text(&of["containerd"])));
        versions.insert(text(&of["runc"]));
        versions.insert(format!("kernel {}", text(&of["kernel"])));
    }
    let mut out = format!(
        "# Pods through the CRI: runc and Brig\n\n\
         Written by `brig-cri --table` from runs of {} in the disposable node ({}).\n\
         Each case is a behaviour that the suite states and checks (`tests/cri/src/cases`).\n\n\
         ✓ as stated, ✗ not, n/a cannot be asked there (reasons below), – not run.\n\n| Case |",
        Vec::from_iter(dates).join(", "),
        Vec::from_iter(versions).join(", "),
    );
    for (_, handler, containerd) in columns.keys() {
        let _ = write!(out, " {handler}, containerd {containerd} |");
    }
    out.push_str("\n|---|");
    out.push_str(&"---|".repeat(columns.len()));
    out.push('\n');
    let mut group = "";
    let mut reasons: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for case in cases::all() {
        if case.group != group {
            group = case.group;
            let _ = writeln!(out, "| **{group}** |{}", " |".repeat(columns.len()));
        }
        let _ = write!(out, "| {} |", case.name);
        for ((_, handler, _), records) in &columns {
            let found = records
                .iter()
                .rev()
                .find(|record| record["group"] == case.group && record["name"] == case.name);
            let mark = match found.map(|record| &record["passed"]) {
                Some(Value::Bool(true)) => "✓",
                Some(Value::Bool(false)) => "✗",
                Some(_) => {
                    let reason = found.map(|record| text(&record["message"]));
                    let line = format!(
                        "{}/{}: {}",
                        case.group,
                        case.name,
                        reason.unwrap_or_default()
                    );
                    reasons.entry(line).or_default().insert(handler.clone());
                    "n/a"
                }
                None => "–",
            };
            let _ = write!(out, " {mark} |");
        }
        out.push('\n');
    }
    if !reasons.is_empty() {
        out.push_str("\nn/a:\n\n");
        for (line, handlers) in reasons {
            let _ = writeln!(out, "* {line} ({})", Vec::from_iter(handlers).join(", "));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn report(handler: &str, case: usize, passed: Value) -> Value {
        let case = &cases::all()[case];
        json!({
            "handler": handler,
            "containerd": "1.7",
            "cases": [{"group": case.group, "name": case.name, "passed": passed, "message": "why", "date": "2026-11-20"}],
        })
    }

    #[test]
    fn the_table_has_a_column_for_each_handler_and_shows_failures() {
        let text = table(&[
            report("brig", 0, json!(false)),
            report("runc", 0, json!(true)),
        ]);
        assert!(text.contains("| Case | runc, containerd 1.7 | brig, containerd 1.7 |"));
        assert!(text.contains(&format!("| {} | ✓ | ✗ |", cases::all()[0].name)));
        assert!(text.contains(&format!("| {} | – | – |", cases::all()[1].name)));
    }

    #[test]
    fn churn_is_told_by_its_slopes() {
        let report = json!({"mounts": {"slope": 0.0, "samples": [1, 1, 1]}});
        let text = slopes(&BTreeMap::from([("brig-1.7".to_owned(), report)]));
        assert_eq!(
            text,
            "\nChurn of 3 pods (brig-1.7), growth a pod over the last half: mounts 0.000.\n"
        );
    }

    #[test]
    fn shards_are_one_column_and_what_cannot_be_asked_has_its_reason() {
        let text = table(&[
            report("brig", 0, json!(true)),
            report("brig", 1, json!(null)),
        ]);
        assert!(text.contains("| Case | brig, containerd 1.7 |\n"));
        assert!(text.contains(&format!("| {} | n/a |", cases::all()[1].name)));
        assert!(text.contains("why (brig)"));
    }
}
