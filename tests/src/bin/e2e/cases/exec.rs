//! Processes added to a running container.

use anyhow::{Context, Result};
use brig_tests::node::check::{contains_one, equal, field, that};
use brig_tests::node::{clock, ctr};

use crate::suite::{Case, PROBE, Suite, case, smoke};

/// Their streams are more than an agent's kernel lets wait by itself (128).
const AT_ONCE: usize = 60;

pub const CASES: &[Case] = &[
    smoke(
        "exec",
        "runs in the container with a directory and a user of its own",
        attributes,
    ),
    case(
        "exec",
        "60 at once each keep their own output and exit status",
        many,
    ),
    case(
        "exec",
        "a command that is not there is refused and the container lives on",
        missing,
    ),
    case("exec", "a detached exec runs and is listed", detached),
];

fn attributes(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let facts = shared.probe(&["facts"])?;
    that(
        "an exec is not PID 1",
        facts["pid"].as_u64().is_some_and(|pid| pid > 1),
    )?;
    that(
        "an exec sees the container's init",
        facts["processes"].as_u64().is_some_and(|count| count >= 2),
    )?;
    let outcome = shared
        .exec_with(&["--cwd", "/work", "--user", "1000"], &[PROBE, "facts"])?
        .success()?;
    let facts = ctr::json(&outcome)?;
    field(&facts, "/cwd", "/work")?;
    field(&facts, "/uids/0", 1000)
}

fn many(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let running = (0..AT_ONCE)
        .map(|number| {
            let token = format!("token-{number}");
            let code = number.to_string();
            shared.spawn(
                &format!("many-{number}-{}", std::process::id()),
                &[PROBE, "echo", &token, &code],
            )
        })
        .collect::<Result<Vec<_>>>()?;
    for (number, exec) in running.into_iter().enumerate() {
        let outcome = exec
            .finish(clock::seconds(60))
            .with_context(|| format!("exec {number} of {AT_ONCE}"))?;
        outcome.says(i32::try_from(number)?, &format!("token-{number}\n"))?;
    }
    Ok(())
}

fn missing(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let outcome = shared.exec(&["/bin/no-such-program"])?;
    that("ctr fails", outcome.code != 0)?;
    contains_one("error", &["no such file", "not found"], &outcome.stderr)?;
    let outcome = shared.exec(&[PROBE, "echo", "still here"])?;
    outcome.says(0, "still here\n")
}

fn detached(suite: &mut Suite) -> Result<()> {
    suite.events()?;
    let id = suite.shared()?.id.clone();
    let mark = suite.events()?.mark();
    let exec = format!("detached-{}", std::process::id());
    suite.ctr.ok(&[
        "task",
        "exec",
        "--detach",
        "--exec-id",
        &exec,
        &id,
        PROBE,
        "sleep",
    ])?;
    let listed = suite.ctr.ok(&["task", "ps", &id])?;
    // A header, init and the exec.
    that(
        &format!("two processes are listed, not: {listed}"),
        listed.lines().count() >= 3,
    )?;
    suite
        .ctr
        .ok(&["task", "kill", "--signal", "TERM", "--exec-id", &exec, &id])?;
    let exit = suite.events()?.wait(mark, clock::seconds(6), |event| {
        event.topic == "/tasks/exit" && event.container() == id && event.exec() == exec
    })?;
    equal("exit status in the event", 143, exit.exit_status())?;
    // ctr exits with the status of what it deleted.
    let deleted = suite
        .ctr
        .call(&["task", "delete", "--exec-id", &exec, &id])?;
    equal("exit status of ctr task delete", 143, deleted.code)
}
