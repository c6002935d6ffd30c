//! Nothing stays on the node after containers have come and gone.

use anyhow::{Context, Result};
use brig_tests::node::check::equal;
use brig_tests::node::clock;
use brig_tests::node::leaks::Snapshot;
use brig_tests::node::process::Running;

use crate::suite::{Case, Suite, case, patience, smoke};

const RUNS: usize = 20;
const AT_ONCE: usize = 4;

pub const CASES: &[Case] = &[
    smoke("leaks", "nothing is left after one run", one),
    case(
        "leaks",
        "nothing is left after 20 runs one after another",
        serial,
    ),
    case(
        "leaks",
        "nothing is left after several runs at once",
        at_once,
    ),
];

/// What there is before. Taken after at least one container has run: what a runtime makes once and
/// keeps is no leak.
pub fn baseline(suite: &mut Suite) -> Result<Snapshot> {
    suite.forget_shared();
    if !suite.warm {
        let run = suite.probe("warm", &["exit", "0"]);
        equal("exit status", 0, suite.ctr.run(&run)?.code)?;
        suite.warm = true;
    }
    Ok(Snapshot::take())
}

fn one(suite: &mut Suite) -> Result<()> {
    let before = baseline(suite)?;
    let run = suite.probe("one", &["echo", "x"]);
    equal("exit status", 0, suite.ctr.run(&run)?.code)?;
    before.nothing_left(patience())
}

fn serial(suite: &mut Suite) -> Result<()> {
    let before = baseline(suite)?;
    for number in 0..RUNS {
        let run = suite.probe("serial", &["echo", "x"]);
        let outcome = suite.ctr.run(&run)?;
        equal("exit status", 0, outcome.code)
            .with_context(|| format!("run {number}: {}", outcome.stderr))?;
    }
    before.nothing_left(patience())
}

fn at_once(suite: &mut Suite) -> Result<()> {
    let before = baseline(suite)?;
    let runs: Vec<_> = (0..AT_ONCE)
        .map(|_| suite.probe("parallel", &["echo", "x"]))
        .collect();
    let result = runs
        .iter()
        .map(|run| Running::start(suite.ctr.run_command(run, &["--rm"])))
        .collect::<Result<Vec<_>>>()
        .and_then(|running| {
            running
                .into_iter()
                .map(|run| run.finish(clock::seconds(30)))
                .collect::<Result<Vec<_>>>()
        });
    if result.is_err() {
        for run in &runs {
            suite.ctr.remove(&run.id);
        }
    }
    for outcome in result? {
        equal("exit status", 0, outcome.code).with_context(|| outcome.stderr.clone())?;
        equal("stdout", "x\n", outcome.text())?;
    }
    before.nothing_left(patience())
}
