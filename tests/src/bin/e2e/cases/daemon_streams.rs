//! Stdio by the streaming service (`io_type = "streaming"`), as containerd 2.2 to 2.4 dial it.

use anyhow::{Context, Result};
use brig_tests::node::check::{equal, that};
use brig_tests::node::daemon::Daemon;
use brig_tests::node::daemon::generation::Generation;
use brig_tests::node::daemon::pod::{Pod, Streams};
use brig_tests::node::daemon::stream::Stream;
use brig_tests::pattern;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::Value;

use super::daemon_pods::config;
use super::leaks::baseline;
use crate::suite::{Case, PROBE, Suite, brig, patience};

pub const CASES: &[Case] = &[
    brig(
        "daemon",
        "2.4: streams carry every byte both ways with version 3, in windows, and end with the container",
        |suite| streams(suite, Generation::V2_4),
    ),
    brig(
        "daemon",
        "2.2: streams carry every byte both ways with version 2, in windows, and end with the container",
        |suite| streams(suite, Generation::V2_2),
    ),
    brig(
        "daemon",
        "a shim that is started with few descriptors has enough for its streams, and its containers have those few",
        few_descriptors,
    ),
];

/// Several windows.
const LENGTH: usize = 300_000;

fn streams(suite: &mut Suite, generation: Generation) -> Result<()> {
    let daemon = Daemon::new(generation, &suite.ctr.runtime, "streams")?;
    let before = baseline(suite)?;
    let pod = Pod::by_sandbox_api(&daemon, "streams", &config())?;
    let address = pod.endpoint.address.clone();
    let uri = |id: &str| format!("ttrpc+{address}?streaming_id={id}");
    let dial = |id: &str| Stream::open(&address, id, patience());

    // containerd dials before Create names the streams.
    let (mut stdin, mut stdout) = (dial("cat-stdin")?, dial("cat-stdout")?);
    let streams = Streams {
        stdin: uri("cat-stdin"),
        stdout: uri("cat-stdout"),
        stderr: uri("cat-stderr"),
    };
    let mut stderr = dial("cat-stderr")?;
    let container = pod.container_with("cat", &[PROBE, "cat"], &streams)?;
    let ended = container.waiting();
    container.start()?;
    let mut sent = Vec::new();
    pattern::write(&mut sent, u64::try_from(LENGTH)?)?;
    let half = LENGTH / 2;
    let (first, second) = sent.split_at(half);
    let mut came = both_ways(&mut stdin, first, &mut stdout, Some(half))?;

    // A containerd that comes back dials again and goes on.
    drop((stdin, stdout));
    daemon.die();
    daemon.live()?;
    let (mut stdin, mut stdout) = (dial("cat-stdin")?, dial("cat-stdout")?);
    came.extend(both_ways(
        &mut stdin,
        second,
        &mut stdout,
        Some(LENGTH - half),
    )?);
    stdin.finish()?;
    container.close_stdin()?;
    came.extend(stdout.read(None)?);
    equal("bytes that came back", LENGTH, came.len())?;
    that("they are those that were sent", came == sent)?;
    equal("standard error", Vec::<u8>::new(), stderr.read(None)?)?;
    equal(
        "exit status",
        0,
        ended.recv_timeout(patience())??.exit_status,
    )?;
    container.delete()?;
    pod.end()?;
    before.nothing_left(patience())
}

/// Writes and reads at once, as `cat` neither begins nor ends with either.
fn both_ways(
    stdin: &mut Stream,
    bytes: &[u8],
    stdout: &mut Stream,
    expected: Option<usize>,
) -> Result<Vec<u8>> {
    std::thread::scope(|scope| {
        let writing = scope.spawn(|| stdin.write(bytes));
        let read = stdout.read(expected)?;
        match writing.join() {
            Ok(written) => written.map(|()| read),
            Err(_) => anyhow::bail!("the writer panicked"),
        }
    })
}

/// What a service of systemd's has that names no limit, as containerd's own unit since 2.0.
const FEW: u64 = 1024;

fn few_descriptors(suite: &mut Suite) -> Result<()> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    // Of this process, whose child `start` is.
    setrlimit(Resource::RLIMIT_NOFILE, FEW, hard)?;
    let result = with_few_descriptors(suite);
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard)?;
    result
}

fn with_few_descriptors(suite: &mut Suite) -> Result<()> {
    let daemon = Daemon::new(Generation::V2_4, &suite.ctr.runtime, "few")?;
    let before = baseline(suite)?;
    let pod = Pod::by_sandbox_api(&daemon, "few", &config())?;
    for server in daemon.servers() {
        let limits = std::fs::read_to_string(format!("/proc/{server}/limits"))?;
        let line = limits
            .lines()
            .find_map(|line| line.strip_prefix("Max open files"));
        let soft: u64 = line
            .and_then(|line| line.split_whitespace().next())
            .context("no limit of open files")?
            .parse()?;
        that(
            &format!("{soft} descriptors are enough for 1024 streams"),
            soft >= 4 * FEW,
        )?;
    }
    let container = pod.container("facts", &[PROBE, "facts"])?;
    let (said, status) = container.run(patience())?;
    equal("exit status", 0, status)?;
    let facts: Value = serde_json::from_str(&said)?;
    equal(
        "the container's soft limit",
        Some(FEW),
        facts["rlimits"]["nofile"][0].as_u64(),
    )?;
    container.delete()?;
    pod.end()?;
    before.nothing_left(patience())
}
