//! Exec, logs and terminals.

use std::fs;
use std::time::Instant;

use anyhow::{Context, Result};
use brig_tests::node::check::{clip, contains_one, equal, that};
use brig_tests::node::clock;

use crate::container::eventually;
use crate::suite::{Case, Suite, case, smoke};

pub const CASES: &[Case] = &[
    smoke(
        "streams",
        "exec: output, errors and the exit code are apart",
        exec,
    ),
    case("streams", "exec: 1 MiB of output is whole", exec_large),
    smoke(
        "streams",
        "exec: past its time-out it is an error and its process ended",
        exec_timeout,
    ),
    case(
        "streams",
        "exec: a missing program is an error with its name",
        exec_missing,
    ),
    smoke(
        "streams",
        "logs: CRI format, both streams, in order",
        log_format,
    ),
    case(
        "streams",
        "logs: a line of 40,000 bytes comes in parts",
        log_long_line,
    ),
    case(
        "streams",
        "logs: whole for a container that ends at once",
        log_quick,
    ),
    smoke("streams", "logs: reopened after a rotation", log_rotation),
    case("streams", "logs: 5,000 lines are whole", log_many),
    case("streams", "a container with a terminal has one", terminal),
];

fn exec(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let outcome = shared
        .container
        .exec(&["sh", "-c", "echo out; echo err >&2; exit 9"])?;
    equal("exit code", 9, outcome.code)?;
    equal("stdout", "out", outcome.text())?;
    equal("stderr", "err\n", outcome.stderr.as_str())
}

fn exec_large(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let outcome = shared
        .container
        .exec(&["sh", "-c", "head -c 1048576 /dev/zero | tr '\\0' x"])?;
    equal("bytes", 1_048_576, outcome.stdout.len())?;
    that(
        "each of them is right",
        outcome.stdout.iter().all(|byte| *byte == b'x'),
    )
}

fn exec_timeout(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let begin = Instant::now();
    let outcome = shared.container.exec_within(&["sleep", "5555"], 5);
    let error = outcome.err().context("the exec did not time out")?;
    contains_one(
        "the error",
        &["deadline", "timeout", "timed out"],
        &format!("{error:#}"),
    )?;
    that(
        "soon after its time-out",
        begin.elapsed() < clock::seconds(6),
    )?;
    eventually("the process is gone", clock::seconds(3), || {
        let all = shared.container.sh("ps -o args")?;
        Ok((!all.contains("sleep 5555")).then_some(()))
    })
}

fn exec_missing(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let outcome = shared.container.exec(&["no-such-program"]);
    let error = outcome.err().context("the exec succeeded")?;
    contains_one("the error", &["no-such-program"], &format!("{error:#}"))?;
    // What kubectl takes for a probe's failure is an error, not an exit code.
    contains_one(
        "the error",
        &["not found", "no such file"],
        &format!("{error:#}"),
    )
}

fn log_format(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let script = "echo one; sleep 0.3; echo two >&2; sleep 0.3; echo; printf unfinished";
    let (container, _) = shared
        .pod
        .container("format", &["sh", "-c", script])
        .finish()?;
    container.wait_line("unfinished")?;
    let lines: Vec<_> = container
        .lines()?
        .into_iter()
        .map(|line| (line.stream, line.text))
        .collect();
    let expected = [
        ("stdout", "one"),
        ("stderr", "two"),
        ("stdout", ""),
        ("stdout", "unfinished"),
    ]
    .map(|(stream, text)| (stream.to_owned(), text.to_owned()));
    equal("log", expected.to_vec(), lines)
}

fn log_long_line(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let script = "head -c 40000 /dev/zero | tr '\\0' y; echo; echo end";
    let (container, _) = shared
        .pod
        .container("long", &["sh", "-c", script])
        .finish()?;
    container.wait_line("end")?;
    let lines = container.lines()?;
    let long = lines.first().context("no line")?;
    equal("bytes", 40_000, long.text.len())?;
    let data = fs::read_to_string(&container.log)?;
    that("it comes in parts", data.contains(" stdout P "))
}

fn log_quick(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    for attempt in 0..3 {
        let (container, _) = shared
            .pod
            .container("quick", &["echo", "gone already"])
            .attempt(attempt)
            .finish()?;
        container.wait_line("gone already")?;
        container.remove()?;
        fs::remove_file(&container.log)?;
    }
    Ok(())
}

fn log_rotation(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let script = "echo before; while :; do test -e /dev/shm/go && echo after; sleep 0.5; done";
    let container = shared
        .pod
        .container("rotated", &["sh", "-c", script])
        .start()?;
    container.wait_line("before")?;
    let old = container.log.with_extension("log.1");
    fs::rename(&container.log, &old)?;
    container.reopen_log()?;
    shared.container.sh("touch /dev/shm/go")?;
    let outcome = container.wait_line("after");
    shared.container.sh("rm /dev/shm/go")?;
    outcome?;
    let rotated = fs::read_to_string(&old)?;
    that(
        &format!("the rotated file ends before: '{}'", clip(&rotated)),
        rotated.contains("before") && !rotated.contains("after"),
    )
}

fn log_many(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let (container, _) = shared.pod.container("many", &["seq", "5000"]).finish()?;
    container.wait_line("5000")?;
    let lines = container.lines()?;
    equal("lines", 5_000, lines.len())?;
    let in_order = lines
        .iter()
        .zip(1..)
        .all(|(line, number): (_, u32)| line.text == number.to_string());
    that("in order", in_order)
}

fn terminal(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let script = "test -t 0 && test -t 1 && test -t 2 && echo terminal; tty; exit 4";
    let (container, status) = shared
        .pod
        .container("terminal", &["sh", "-c", script])
        .edit(|config| {
            config.tty = true;
            config.stdin = true;
        })
        .finish()?;
    equal("exit code", 4, status.exit_code)?;
    eventually("its log", clock::seconds(3), || {
        let data = fs::read_to_string(&container.log)?;
        Ok((data.contains("terminal") && data.contains("/dev/pts/")).then_some(()))
    })
}
