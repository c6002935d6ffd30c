//! What an operator sees of pods with `brig`.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use brig_tests::node::check::{contains, equal, that};
use brig_tests::node::clock;
use brig_tests::node::process;
use serde_json::Value;

use crate::suite::{Case, Suite, brig};

pub const CASES: &[Case] = &[
    brig(
        "operator",
        "brig metrics has every figure of a running pod, and none of one that has gone",
        metrics,
    ),
    brig(
        "operator",
        "brig timeline draws a start, compares two, and waits for the next",
        timelines,
    ),
];

fn ask(args: &[&str]) -> Result<String> {
    let mut command = Command::new("brig");
    command.args(args);
    Ok(process::run(command, clock::seconds(20))?.success()?.text())
}

/// The value of the only sample that begins so.
fn sample(text: &str, start: &str) -> Result<f64> {
    let line = text.lines().find(|line| line.starts_with(start));
    let line = line.with_context(|| format!("no sample {start}"))?;
    let value = line.rsplit(' ').next().unwrap_or("");
    value.parse().with_context(|| line.to_owned())
}

/// An exit that a pod's guest has had by its start: one that boots drives its devices' registers, and one that goes on from a template has said no
/// more than that it has read what it was told.
fn usual_exit(id: &str) -> Result<&'static str> {
    let inspected: Value = serde_json::from_str(&ask(&["inspect", id, "--json"])?)?;
    Ok(match inspected["shim"]["template"].is_null() {
        true => "mmio_write:bar",
        false => "mmio_write:ecam",
    })
}

fn metrics(suite: &mut Suite) -> Result<()> {
    let run = suite.probe("metrics", &["sleep"]);
    let container = suite.ctr.start(&run)?;
    let text = ask(&["metrics"])?;
    let pod = format!("namespace=\"{}\",id=\"{}\"", suite.ctr.namespace, run.id);
    for process in ["shim", "vmm"] {
        for family in [
            "brig_pod_pss_bytes",
            "brig_pod_cpu_seconds_total",
            "brig_pod_threads",
            "brig_pod_open_files",
            "brig_pod_open_files_limit",
        ] {
            let value = sample(&text, &format!("{family}{{{pod},process=\"{process}\"}}"))?;
            that(
                &format!("{family} of {process} is more than 0"),
                value > 0.0,
            )?;
        }
    }
    let size = sample(&text, &format!("brig_pod_guest_memory_size_bytes{{{pod}}}"))?;
    let guest = sample(&text, &format!("brig_pod_guest_memory_bytes{{{pod}}}"))?;
    let mib = 1024.0 * 1024.0;
    that(
        "a VM of the default size",
        (size / mib - 256.0).abs() < 65.0,
    )?;
    that(
        "memory of a guest that has booted",
        guest > 16.0 * mib && guest <= size,
    )?;
    let reason = usual_exit(&run.id)?;
    sample(
        &text,
        &format!("brig_pod_vm_exits_total{{{pod},reason=\"{reason}\"}}"),
    )?;
    sample(&text, &format!("brig_pod_start_seconds{{{pod},moment="))?;
    that("it ends as the format wants", text.ends_with("# EOF\n"))?;
    drop(container);
    let text = ask(&["metrics"])?;
    that("a pod that has gone is not in it", !text.contains(&pod))
}

fn timelines(suite: &mut Suite) -> Result<()> {
    let runs = [
        suite.probe("one", &["sleep"]),
        suite.probe("other", &["sleep"]),
    ];
    let _one = suite.ctr.start(&runs[0])?;
    let mut follower = Command::new("brig")
        .args(["timeline", "--follow", "--json"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    // From then on it knows which pods there were.
    let mut said = String::new();
    let stderr = follower.stderr.take().context("no standard error")?;
    BufReader::new(stderr).read_line(&mut said)?;
    contains("what it says first", "waiting for the next pod", &said)?;
    let other = suite.ctr.start(&runs[1]);
    if other.is_err() {
        follower.kill()?;
    }
    let followed = follower.wait_with_output()?;
    let _other = other?;
    let followed: Value = serde_json::from_slice(&followed.stdout)?;
    let own = ask(&["timeline", &runs[1].id, "--json"])?;
    let own: Value = serde_json::from_str(&own)?;
    equal(
        "the start that was followed",
        &followed["zero_unix_ns"],
        &own["zero_unix_ns"],
    )?;
    contains("its moments", "container.started", &followed.to_string())?;
    let file = format!("/run/{}.svg", runs[0].id);
    ask(&["timeline", &runs[0].id, "--svg", &file])?;
    let picture = fs::read_to_string(&file)?;
    fs::remove_file(&file)?;
    contains("the picture", &runs[0].id, &picture)?;
    that(
        "it is one",
        picture.starts_with("<svg") && picture.ends_with("</svg>\n"),
    )?;
    let text = ask(&["timeline", &runs[0].id, "--compare", &runs[1].id])?;
    let both = text.lines().filter(|line| line.matches(" ms").count() == 3);
    that("most steps are those of both", both.count() > 8)?;
    let reason = usual_exit(&runs[0].id)?;
    contains("VM exits by reason", &format!("exits: {reason}"), &text)
}
