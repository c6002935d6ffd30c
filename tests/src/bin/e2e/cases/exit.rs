//! Exit statuses arrive as they were.

use anyhow::Result;
use brig_tests::node::check::{contains, equal};

use crate::suite::{Case, PROBE, Suite, case, smoke};

pub const CASES: &[Case] = &[
    smoke(
        "exit",
        "a container's output and exit status arrive",
        container,
    ),
    case(
        "exit",
        "a container that exits 255 is told from one that is lost",
        lost,
    ),
    smoke("exit", "the exit status of an exec is exact", exec),
    smoke("exit", "a kernel of its own", kernel),
];

fn container(suite: &mut Suite) -> Result<()> {
    let zero = suite.ctr.run(&suite.probe("exit", &["echo", "hello"]))?;
    zero.says(0, "hello\n")?;
    let one = suite.ctr.run(&suite.probe("exit", &["exit", "1"]))?;
    equal("exit status", 1, one.code)
}

fn lost(suite: &mut Suite) -> Result<()> {
    let outcome = suite
        .ctr
        .run(&suite.probe("exit", &["echo", "alive", "255"]))?;
    outcome.says(255, "alive\n")
}

fn exec(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    for code in ["0", "1", "137", "143", "255"] {
        let outcome = shared.exec(&[PROBE, "exit", code])?;
        equal("exit status of an exec", code.parse::<i32>()?, outcome.code)?;
    }
    for (signal, code) in [("KILL", 137), ("TERM", 143), ("SEGV", 139)] {
        let outcome = shared.exec(&[PROBE, "die", signal])?;
        equal(&format!("exit status after {signal}"), code, outcome.code)?;
    }
    Ok(())
}

fn kernel(suite: &mut Suite) -> Result<()> {
    let brig = suite.is_brig();
    let node = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let node_boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let facts = suite.shared()?.probe(&["facts"])?;
    let guest = facts["kernel"].as_str().unwrap_or_default();
    let same_boot = facts["boot_id"].as_str() == Some(node_boot.trim());
    equal("shares the node's kernel", !brig, same_boot)?;
    if brig {
        contains("kernel release", "-brig", guest)?;
    } else {
        equal("kernel release", node.trim(), guest)?;
    }
    Ok(())
}
