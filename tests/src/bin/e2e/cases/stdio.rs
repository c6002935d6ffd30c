//! Bytes in and out are complete and in order.

use std::io::Write;
use std::process::Stdio;

use anyhow::{Context, Result};
use brig_tests::node::check::{equal, field};
use brig_tests::node::{clock, ctr, process};
use brig_tests::pattern::{self, Checksum};

use crate::suite::{Case, PROBE, Suite, case, patience, smoke};

const FLOOD: u64 = 8 * 1024 * 1024;
const STREAM: u64 = 20 * 1024 * 1024;

pub const CASES: &[Case] = &[
    smoke(
        "stdio",
        "8 MiB written before an exit at once arrive complete",
        flood,
    ),
    case(
        "stdio",
        "8 MiB to stderr of an exec that exits at once arrive complete",
        flood_stderr,
    ),
    case(
        "stdio",
        "20 MiB through stdin, cat and stdout are unchanged",
        cat,
    ),
    smoke(
        "stdio",
        "the end of stdin reaches the process",
        end_of_input,
    ),
    case("stdio", "stdout and stderr are not mixed", separate),
];

fn sum(data: &[u8]) -> Result<String> {
    let mut sum = Checksum::default();
    sum.write_all(data)?;
    Ok(sum.hex())
}

fn flood(suite: &mut Suite) -> Result<()> {
    let outcome = suite
        .ctr
        .run(&suite.probe("flood", &["flood", &FLOOD.to_string()]))?;
    equal("exit status", 0, outcome.code)?;
    equal("bytes", FLOOD, outcome.stdout.len() as u64)?;
    equal("checksum", pattern::checksum(FLOOD), sum(&outcome.stdout)?)
}

fn flood_stderr(suite: &mut Suite) -> Result<()> {
    let file = tempfile()?;
    let bytes = FLOOD.to_string();
    let mut command = suite
        .shared()?
        .exec_process(&[], &[PROBE, "flood", &bytes, "stderr"]);
    command.stderr(std::fs::File::create(&file)?);
    command.stdin(Stdio::null());
    let running = process::Running::start_raw(command, "flood to stderr")?;
    let outcome = running.finish(clock::seconds(20))?;
    let data = std::fs::read(&file)?;
    let _ = std::fs::remove_file(&file);
    equal("exit status", 0, outcome.code)?;
    equal("bytes", FLOOD, data.len() as u64)?;
    equal("checksum", pattern::checksum(FLOOD), sum(&data)?)
}

fn tempfile() -> Result<std::path::PathBuf> {
    let path = std::env::temp_dir().join(format!("brig-e2e-{}", std::process::id()));
    let _ = std::fs::remove_file(&path);
    Ok(path)
}

fn cat(suite: &mut Suite) -> Result<()> {
    let mut input = Vec::new();
    pattern::write(&mut input, STREAM)?;
    let outcome = suite
        .shared()?
        .exec_with_input(&[PROBE, "cat"], input, clock::seconds(40))?;
    equal("exit status", 0, outcome.code)?;
    equal("bytes", STREAM, outcome.stdout.len() as u64)?;
    equal("checksum", pattern::checksum(STREAM), sum(&outcome.stdout)?)
}

fn end_of_input(suite: &mut Suite) -> Result<()> {
    let input = b"one line\n".to_vec();
    let expected = sum(&input)?;
    suite.events()?;
    let mark = suite.events()?.mark();
    let run = suite.probe("stdin", &["sum"]);
    let mut command = suite.ctr.run_command(&run, &["--rm"]);
    command.stdin(Stdio::piped());
    let mut running = process::Running::start(command)?;
    // ctr forgets to close stdin if it meets its end before the task has started.
    let outcome = suite
        .events()?
        .wait_topic(mark, patience(), &run.id, "/tasks/start")
        .and_then(|_| {
            let mut stdin = running.child().stdin.take().context("no stdin")?;
            stdin.write_all(&input)?;
            drop(stdin);
            running.finish(patience())
        });
    if outcome.is_err() {
        suite.ctr.remove(&run.id);
    }
    let seen = ctr::json(&outcome?.success()?)?;
    field(&seen, "/bytes", 9)?;
    field(&seen, "/sha256", expected)
}

fn separate(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let outcome = shared.exec(&[PROBE, "no-such-command"])?;
    equal("exit status", 2, outcome.code)?;
    equal("stdout", "", outcome.text())?;
    equal(
        "stderr names the program",
        true,
        outcome.stderr.starts_with("brig-probe:"),
    )?;
    let outcome = shared.exec(&[PROBE, "echo", "to stdout"])?;
    outcome.says(0, "to stdout\n")?;
    equal("stderr", "", outcome.stderr)
}
