//! Limits, and what happens at them.

use anyhow::{Context, Result};
use brig_tests::node::check::{contains, equal, field, that};
use brig_tests::node::task;
use serde_json::json;

use crate::suite::{Case, Suite, case, patience, smoke};

const MIB: u64 = 1024 * 1024;

pub const CASES: &[Case] = &[
    smoke(
        "resources",
        "a container over its memory limit ends with 137 and an OOM event",
        oom,
    ),
    case(
        "resources",
        "update changes memory, CPU and pids of a running container",
        update,
    ),
    case("resources", "metrics show what a container uses", metrics),
];

fn oom(suite: &mut Suite) -> Result<()> {
    suite.events()?;
    let mark = suite.events()?.mark();
    let run = suite
        .probe("oom", &["eat", "300"])
        .with("--memory-limit", &(64 * MIB).to_string());
    let outcome = suite.ctr.run(&run)?;
    equal("exit status", 137, outcome.code)?;
    that(
        "it got some memory first",
        outcome.text().contains("ate 8\n"),
    )?;
    suite
        .events()?
        .wait_topic(mark, patience(), &run.id, "/tasks/oom")?;
    let exit = suite
        .events()?
        .wait_topic(mark, patience(), &run.id, "/tasks/exit")?;
    equal("exit status in the event", 137, exit.exit_status())
}

fn update(suite: &mut Suite) -> Result<()> {
    let run = suite
        .probe("update", &["sleep"])
        .with("--memory-limit", &(200 * MIB).to_string())
        .with(
            "--mount",
            "type=cgroup,src=cgroup,dst=/sys/fs/cgroup,options=ro",
        );
    let container = suite.ctr.start(&run)?;
    let facts = container.probe(&["facts"])?;
    field(&facts, "/cgroup/memory.max", (200 * MIB).to_string())?;
    field(&facts, "/cgroup/cpu.max", "max 100000")?;
    task::update(
        &suite.ctr.namespace,
        &run.id,
        &json!({
            "memory": {"limit": 96 * MIB},
            "cpu": {"quota": 20000, "period": 100_000},
            "pids": {"limit": 12},
        }),
    )?;
    let facts = container.probe(&["facts"])?;
    field(&facts, "/cgroup/memory.max", (96 * MIB).to_string())?;
    field(&facts, "/cgroup/cpu.max", "20000 100000")?;
    field(&facts, "/cgroup/pids.max", "12")?;
    // The effect, not only the number.
    let burnt = container.probe(&["burn", "2000"])?;
    let cpu = burnt["cpu_ms"].as_u64().context("no CPU time")?;
    that(
        &format!("a fifth of a CPU gives about 400 ms in 2000, not {cpu}"),
        cpu <= 900,
    )?;
    let forked = container.probe(&["fork-bomb", "40"])?;
    let made = forked["made"].as_u64().context("no count")?;
    that(&format!("fewer than 12 children, not {made}"), made < 12)?;
    field(&forked, "/error", "EAGAIN")?;
    let eaten = container.exec(&["/bin/brig-probe", "eat", "150"])?;
    equal("exit status of an exec over the new limit", 137, eaten.code)
}

fn metrics(suite: &mut Suite) -> Result<()> {
    let id = suite.shared()?.id.clone();
    let text = suite.ctr.ok(&["task", "metrics", &id])?;
    contains("metrics", "memory.", &text)?;
    contains("metrics", "cpu.", &text)?;
    let used = text
        .lines()
        .find(|line| line.starts_with("memory.usage_in_bytes") || line.starts_with("memory.usage"))
        .and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok())
        .with_context(|| format!("no memory usage in {text}"))?;
    that(
        &format!("memory in use is more than a page and less than the node's, not {used}"),
        (4096..16 * 1024 * MIB).contains(&used),
    )
}
