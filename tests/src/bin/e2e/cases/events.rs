//! Events come in order and once.

use anyhow::{Context, Result};
use brig_tests::node::check::{equal, that};

use crate::suite::{Case, PROBE, Suite, patience, smoke};

const LIFE: &[&str] = &[
    "/tasks/create",
    "/tasks/start",
    "/tasks/exec-added",
    "/tasks/exec-started",
    "/tasks/exit exec",
    "/tasks/exit init",
    "/tasks/delete",
];

pub const CASES: &[Case] = &[smoke(
    "events",
    "create, start, exec-added, exec-started, exits and delete come in order",
    order,
)];

fn order(suite: &mut Suite) -> Result<()> {
    suite.events()?;
    let mark = suite.events()?.mark();
    let run = suite.probe("events", &["sleep"]);
    let container = suite.ctr.start(&run)?;
    container.exec(&[PROBE, "exit", "3"])?;
    container.kill("SIGTERM", &[])?;
    suite.events()?.wait(mark, patience(), |event| {
        event.topic == "/tasks/exit" && event.container() == run.id && event.body["id"] == run.id
    })?;
    drop(container);
    suite
        .events()?
        .wait_topic(mark, patience(), &run.id, "/containers/delete")?;
    let events = suite.events()?.of(mark, &run.id);
    let tasks: Vec<_> = events
        .iter()
        .filter(|event| event.topic.starts_with("/tasks/"))
        .collect();
    let seen: Vec<String> = tasks
        .iter()
        .map(|event| match event.topic.as_str() {
            "/tasks/exit" if event.body["id"] == run.id => "/tasks/exit init".to_owned(),
            "/tasks/exit" => "/tasks/exit exec".to_owned(),
            topic => topic.to_owned(),
        })
        .collect();
    equal(
        "events",
        LIFE.to_vec(),
        seen.iter().map(String::as_str).collect::<Vec<_>>(),
    )?;
    let exit = |init: bool| {
        tasks
            .iter()
            .find(|event| event.topic == "/tasks/exit" && (event.body["id"] == run.id) == init)
            .map(|event| event.exit_status())
    };
    equal("the exec's exit status", Some(3), exit(false))?;
    equal("init's exit status", Some(143), exit(true))?;
    let pid = |topic: &str| {
        tasks
            .iter()
            .find(|event| event.topic == topic)
            .and_then(|event| event.body["pid"].as_u64())
    };
    let created = pid("/tasks/create").context("the create event has no pid")?;
    equal("pid in start", Some(created), pid("/tasks/start"))?;
    that("the pid is real", created > 1)
}
