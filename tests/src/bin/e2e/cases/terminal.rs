//! Containers with a terminal.

use anyhow::Result;
use brig_tests::node::check::equal;
use brig_tests::node::terminal::Session;

use crate::suite::{Case, PROBE, Suite, case, patience, smoke};

pub const CASES: &[Case] = &[
    smoke(
        "terminal",
        "an exec has a terminal of the right size, follows resizing and dies of Ctrl-C",
        exec,
    ),
    case(
        "terminal",
        "a container has a terminal, echoes keys and ends with them",
        container,
    ),
];

fn exec(suite: &mut Suite) -> Result<()> {
    let mut session = suite.shared()?.terminal(&[PROBE, "tty"], 31, 101)?;
    session.wait_for("[true,true,true]", patience())?;
    session.wait_for("\"columns\":101", patience())?;
    session.wait_for("\"rows\":31", patience())?;
    session.resize(43, 132, "\"columns\":132,\"rows\":43", patience())?;
    session.send(b"\x03")?;
    session.wait_for("interrupted", patience())?;
    let outcome = session.finish(patience())?;
    equal("exit status", 130, outcome.code)
}

fn container(suite: &mut Suite) -> Result<()> {
    let run = suite.probe("tty", &["cat"]);
    let mut session = Session::start(suite.ctr.run_command(&run, &["--rm", "--tty"]), 24, 80)?;
    let result = talk(&mut session);
    let outcome = session.finish(patience());
    suite.ctr.remove(&run.id);
    result?;
    equal("exit status", 0, outcome?.code)
}

fn talk(session: &mut Session) -> Result<()> {
    // Typed before the container runs or after: the terminal keeps it.
    session.send(b"ping\r")?;
    // Once as echo, once from cat.
    session.wait_for("ping\r\nping", patience())?;
    session.send(b"\x04")
}
