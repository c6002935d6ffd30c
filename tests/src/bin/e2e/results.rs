//! Runs cases one after another, says how each went, and writes the results down.

use std::fs;
use std::io::Write;
use std::panic::AssertUnwindSafe;
use std::time::Instant;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::cases;
use crate::options::Options;
use crate::suite::{Case, Needs, Suite};

/// Runs what was asked for; returns how many cases failed.
pub fn run_all(options: &Options) -> Result<usize> {
    let selected = select(options);
    if options.list {
        for case in selected {
            println!("{}/{}", case.group, case.name);
        }
        return Ok(0);
    }
    let mut suite = Suite::prepare(options)?;
    let started = Instant::now();
    let mut records: Vec<Value> = Vec::new();
    let mut failed = Vec::new();
    for case in &selected {
        let begin = Instant::now();
        let name = format!("{}/{}", case.group, case.name);
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
            failed.push(name.clone());
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
    }
    suite.finish();
    write(options, &suite, &records, started)?;
    for name in &failed {
        println!("failed: {name}");
    }
    println!(
        "{} passed, {} failed",
        records.len() - failed.len(),
        failed.len()
    );
    Ok(failed.len())
}

fn select(options: &Options) -> Vec<&'static Case> {
    let brig = options.runtime.contains("brig");
    let (part, of) = options.shard;
    cases::all()
        .into_iter()
        .filter(|case| {
            // A case of Brig alone runs elsewhere only if it is named in full.
            let name = format!("{}/{}", case.group, case.name);
            brig || case.needs == Needs::AnyRuntime || options.filters.contains(&name)
        })
        .filter(|case| !options.smoke || case.smoke)
        .filter(|case| {
            let name = format!("{}/{}", case.group, case.name);
            options.filters.is_empty() || options.filters.iter().any(|filter| name.contains(filter))
        })
        .filter(|case| cases::shard_of(case, of) == part - 1)
        .collect()
}

fn write(options: &Options, suite: &Suite, records: &[Value], started: Instant) -> Result<()> {
    let runtime = options.runtime.rsplit('.').nth(1).unwrap_or("runtime");
    let file = options.results.join(format!(
        "e2e-{runtime}-{}-{}of{}.json",
        suite.containerd, options.shard.0, options.shard.1
    ));
    let report = json!({
        "runtime": options.runtime,
        "containerd": suite.containerd,
        "seconds": started.elapsed().as_secs(),
        "cases": records,
    });
    fs::write(&file, serde_json::to_vec_pretty(&report)?)
        .with_context(|| format!("cannot write {}", file.display()))
}
