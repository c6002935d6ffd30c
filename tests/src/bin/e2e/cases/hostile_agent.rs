//! Pods whose agent is not Brig's but one that breaks the rules, over the real vsock path: the judge is the node, the
//! neighbours, and containerd, which must be able to kill and remove such a pod.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use brig_tests::cpio::{self, Entry};
use brig_tests::node::check::that;
use brig_tests::node::leaks::Snapshot;
use brig_tests::node::memory;
use brig_tests::node::{clock, process};
use serde_json::Value;

use crate::suite::{Case, Suite, brig, patience};

/// What the shim of such a pod may grow by, in KiB.
const GROWTH: u64 = 16 << 10;
/// How long an attack goes on before the pod is killed.
const ATTACK: u32 = 1;

/// As `brig-hostile-guest` knows them.
const ATTACKS: &[&str] = &[
    "obedient in words alone",
    "silent",
    "deaf",
    "empty events",
    "kills for memory",
    "events of unknown fields",
    "giant events",
    "giant answers",
    "answers to nobody",
    "a truncated frame",
    "bytes",
];

pub const CASES: &[Case] = &[brig(
    "hostile",
    "an agent that breaks the rules harms no more than its pod, which can be killed and removed",
    agents,
)];

/// What a process has.
#[derive(Clone, Copy)]
struct Has {
    kib: u64,
    descriptors: usize,
    threads: usize,
}

fn has(pid: i32) -> Result<Has> {
    let count =
        |what: &str| -> Result<usize> { Ok(fs::read_dir(format!("/proc/{pid}/{what}"))?.count()) };
    Ok(Has {
        kib: memory::of(pid, 0)?.rss,
        descriptors: count("fd")?,
        threads: count("task")?,
    })
}

/// The shim of a container, by Brig's journal.
pub fn shim_of(suite: &Suite, id: &str) -> Result<i32> {
    let file = format!("/run/brig/{}/{id}/pod.json", suite.ctr.namespace);
    let text = fs::read_to_string(&file).with_context(|| format!("cannot read {file}"))?;
    let pod: Value = serde_json::from_str(&text)?;
    let pid = pod.pointer("/shim/pid").and_then(Value::as_i64);
    Ok(i32::try_from(pid.context("no shim")?)?)
}

fn agents(suite: &mut Suite) -> Result<()> {
    let directory = Path::new("/run/brig-e2e");
    fs::create_dir_all(directory)?;
    let program = fs::read("/host/bin/brig-hostile-guest")?;
    let neighbour = suite.shared()?.id.clone();
    let before = Snapshot::take();
    let mut attacked = Vec::new();
    for (number, attack) in ATTACKS.iter().enumerate() {
        let initramfs = directory.join(format!("hostile-agent-{number}.cpio"));
        let file = Entry::Program("agent-attack", attack.as_bytes());
        fs::write(&initramfs, cpio::init_with(&program, &[file])?)?;
        let config = directory.join(format!("hostile-agent-{number}.toml"));
        fs::write(
            &config,
            format!(
                "time_scale = {}\ninitramfs = \"{}\"\n",
                time_scale(),
                initramfs.display()
            ),
        )?;
        let run = suite
            .probe(&format!("hostile-agent-{number}"), &["sleep"])
            .with("--runtime-config-path", &config.to_string_lossy());
        let about = || format!("the attack '{attack}'");
        let container = suite.ctr.start(&run).with_context(about)?;
        let killed = one(suite, attack, &container.id, &neighbour).with_context(about)?;
        attacked.push((*attack, container, killed));
    }
    // 30 s for SIGKILL, and what ends the VM.
    let limit = Duration::from_secs_f64(30.0 * time_scale()) + patience();
    for (attack, container, killed) in attacked {
        let running = |suite: &Suite| -> Result<bool> {
            let status = suite.ctr.status(&container.id)?;
            Ok(status.is_some_and(|(status, _)| status != "STOPPED"))
        };
        while running(suite)? {
            that(
                &format!("the container of '{attack}' ends"),
                killed.elapsed() < limit,
            )?;
            std::thread::sleep(Duration::from_millis(200));
        }
        println!(
            "      {attack}: seen to have ended {:?} after SIGKILL",
            killed.elapsed()
        );
        let delete = suite.ctr.command(&["task", "delete", &container.id]);
        process::run(delete, clock::seconds(30))?;
    }
    for number in 0..ATTACKS.len() {
        for kind in ["cpio", "toml"] {
            let _ = fs::remove_file(directory.join(format!("hostile-agent-{number}.{kind}")));
        }
    }
    before.nothing_left(patience())
}

/// Twice the real time-outs under emulation: a boot fits.
fn time_scale() -> f64 {
    clock::scale().min(2.0)
}

/// How long a call of containerd took.
fn timed(suite: &Suite, args: &[&str]) -> Result<Duration> {
    let before = Instant::now();
    let _ = suite.ctr.call(args)?;
    Ok(before.elapsed())
}

/// Watches the node during an attack, and kills the container; returns when that was.
fn one(suite: &Suite, attack: &str, id: &str, neighbour: &str) -> Result<Instant> {
    let shim = shim_of(suite, id)?;
    let first = has(shim)?;
    // What a call costs in this node without any attack.
    let usual = timed(suite, &["task", "metrics", neighbour])?;
    let end = Instant::now() + clock::seconds(ATTACK);
    let (mut own, mut others) = (Duration::ZERO, Duration::ZERO);
    let mut most = first;
    while Instant::now() < end {
        own = own.max(timed(suite, &["task", "metrics", id])?);
        others = others.max(timed(suite, &["task", "metrics", neighbour])?);
        // The shim lives until the task is deleted.
        let now = has(shim)?;
        most.kib = most.kib.max(now.kib);
        most.threads = most.threads.max(now.threads);
        most.descriptors = most.descriptors.max(now.descriptors);
    }
    println!(
        "      {attack}: memory {} to {} KiB, descriptors {} to {}, threads {} to {}, its figures within {own:?}, \
         the neighbour's within {others:?} (usually {usual:?})",
        first.kib, most.kib, first.descriptors, most.descriptors, first.threads, most.threads
    );
    that("the shim stays small", most.kib <= first.kib + GROWTH)?;
    that(
        "no descriptors are added",
        most.descriptors <= first.descriptors + 8,
    )?;
    // Those of blocking work come and go.
    that("no threads are added", most.threads <= first.threads + 8)?;
    let word = Duration::from_secs_f64(time_scale());
    that(
        "its own figures are answered in time",
        own <= usual * 3 + word * 2,
    )?;
    that("the neighbour's too", others <= usual * 3 + word)?;
    let killed = Instant::now();
    let _ = suite
        .ctr
        .call(&["task", "kill", "--signal", "SIGKILL", id])?;
    that(
        "Kill returns in time",
        killed.elapsed() <= usual * 3 + word * 2,
    )?;
    Ok(killed)
}
