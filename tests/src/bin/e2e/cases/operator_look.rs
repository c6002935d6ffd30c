//! What an operator sees of one pod with `brig`, however the pod is named: while it lives, and after it failed. What
//! is secret is in none of it.

use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use brig_tests::node::check::{contains, equal, that};
use brig_tests::node::clock;
use brig_tests::node::process::{self, Outcome};
use serde_json::Value;

use crate::suite::{Case, Suite, brig, patience};

pub const CASES: &[Case] = &[
    brig(
        "operator",
        "a pod is looked into by id and name, a guest only where its handler allows it, and nothing secret is told",
        living,
    ),
    brig(
        "operator",
        "of a pod that failed the reason, the log and the timeline are kept when it is gone",
        failed,
    ),
];

/// In every place where a pod may keep a secret.
const SECRET: &str = "planted-2f9c1e";
const DIR: &str = "/run/brig-e2e-operator";

fn brig_outcome(args: &[&str]) -> Result<Outcome> {
    let mut command = Command::new("brig");
    command.args(args);
    process::run(command, clock::seconds(20))
}

fn ask(args: &[&str]) -> Result<String> {
    let outcome = brig_outcome(args)?.success();
    Ok(outcome
        .with_context(|| format!("brig {}", args.join(" ")))?
        .text())
}

fn ask_json(args: &[&str]) -> Result<Value> {
    let text = ask(args)?;
    serde_json::from_str(&text).with_context(|| text)
}

/// What brig says on standard error when it refuses.
fn refused(args: &[&str]) -> Result<String> {
    let outcome = brig_outcome(args)?;
    that(
        &format!("brig {} is refused", args.join(" ")),
        outcome.code != 0,
    )?;
    Ok(outcome.stderr)
}

/// All files of a bundle, one after the other.
fn bundle(id: &str) -> Result<String> {
    let file = format!("{DIR}/dump.tar");
    ask(&["dump", id, "--output", &file])?;
    let mut tar = Command::new("tar");
    tar.args(["--extract", "--to-stdout", "--file", &file]);
    Ok(process::run(tar, clock::seconds(10))?.success()?.text())
}

/// A configuration that lets the node look into the guest.
fn debug_config() -> Result<String> {
    fs::create_dir_all(DIR)?;
    let file = format!("{DIR}/debug.toml");
    let scale = clock::scale();
    let text = format!(
        "time_scale = {scale}\nallow_slow_kvm = true\nmemory = \"192MiB\"\ndebug = true\ndebug_console = true\nlog_format = \"json\"\n"
    );
    fs::write(&file, text)?;
    Ok(file)
}

fn living(suite: &mut Suite) -> Result<()> {
    let result = look(suite);
    let _ = fs::remove_dir_all(DIR);
    result
}

fn look(suite: &mut Suite) -> Result<()> {
    let config = debug_config()?;
    let plain = suite
        .probe("plain", &["sleep"])
        .with("--env", &format!("PASSWORD={SECRET}"))
        .with("--annotation", &format!("example.org/token={SECRET}"))
        .with("--annotation", "io.kubernetes.cri.sandbox-name=web-0")
        .with("--annotation", "io.kubernetes.cri.sandbox-namespace=shop")
        .with("--annotation", "io.kubernetes.cri.container-name=server");
    let open = suite
        .probe("open", &["sleep"])
        .with("--runtime-config-path", &config);
    let _plain = suite.ctr.start(&plain)?;
    let _open = suite.ctr.start(&open)?;

    // However it is named.
    let whole = ask_json(&["inspect", &plain.id, "--json"])?;
    equal(
        "the pod of a prefix",
        whole["id"].as_str(),
        Some(plain.id.as_str()),
    )?;
    let named = ask_json(&["inspect", "shop/web-0", "--json"])?;
    equal(
        "the pod of a name",
        named["id"].as_str(),
        Some(plain.id.as_str()),
    )?;
    contains(
        "what is said of nobody",
        "no pod nobody",
        &refused(&["inspect", "nobody"])?,
    )?;

    // Configuration, each value with where it is from.
    let told = ask_json(&["inspect", &open.id, "--json"])?;
    let memory = &told["shim"]["config"]["memory"];
    equal("memory", memory["value"].as_str(), Some("192MiB"))?;
    equal(
        "where it is from",
        memory["from"].as_str(),
        Some(config.as_str()),
    )?;
    let vcpus = &told["shim"]["config"]["vcpus"]["from"];
    equal("where vcpus is from", vcpus.as_str(), Some("default"))?;
    let text = ask(&["inspect", &plain.id])?;
    for part in [
        "container ",
        "server",
        "configuration in force",
        "lo ",
        "kernel ",
    ] {
        contains("the text of inspect", part, &text)?;
    }

    // What it really uses.
    let all = ask_json(&["ps", "--json"])?;
    let row = all
        .as_array()
        .into_iter()
        .flatten()
        .find(|row| row["id"] == plain.id.as_str());
    let row = row.context("the pod is not in brig ps")?;
    let memory = &row["guestMemory"];
    let kib = |name: &str| {
        memory[name]
            .as_u64()
            .with_context(|| format!("no {name}: {memory}"))
    };
    that(
        "a guest uses some of what it has",
        kib("usedKiB")? > 1000 && kib("usedKiB")? < kib("sizeKiB")?,
    )?;
    that("memory of the node behind it", kib("residentKiB")? > 1000)?;
    kib("reclaimableKiB")?;
    that("CPU time", row["cpuSeconds"].as_f64() > Some(0.0))?;
    let table = ask(&["top", "--once"])?;
    contains("brig top", "web-0", &table)?;
    that(
        "no cursor is moved where there is no terminal",
        !table.contains('\u{1b}'),
    )?;

    // The guest itself: its kernel's log always, the rest where it is allowed.
    contains("dmesg", "Linux version", &ask(&["dmesg", &plain.id])?)?;
    let sentence = refused(&["exec", &plain.id, "--", "ps"])?;
    contains("why exec is refused", "debug = true", &sentence)?;
    contains(
        "why the console is",
        "debug = true",
        &refused(&["console", &plain.id])?,
    )?;
    contains(
        "exec ps",
        "brig-probe",
        &ask(&["exec", &open.id, "--", "ps"])?,
    )?;
    contains(
        "exec cat",
        "Linux version",
        &ask(&["exec", &open.id, "--", "cat", "/proc/version"])?,
    )?;
    contains(
        "exec ls",
        "devices",
        &ask(&["exec", &open.id, "--", "ls", "/sys"])?,
    )?;
    contains(
        "exec mounts",
        "cgroup2",
        &ask(&["exec", &open.id, "--", "mounts"])?,
    )?;
    contains("exec ip", "lo ", &ask(&["exec", &open.id, "--", "ip"])?)?;
    let sentence = refused(&["exec", &open.id, "--", "sh"])?;
    contains("what there is instead of a shell", "dmesg", &sentence)?;
    contains(
        "the console",
        "Linux version",
        &ask(&["console", &open.id])?,
    )?;

    // All of the guest's memory, where the guest may be looked into, which lives on.
    let core = format!("{DIR}/core");
    let dump = ["debug", &open.id, "--dump-memory", &core, "--json"];
    let told = ask_json(&dump)?;
    let size = 192 << 20;
    equal("bytes of memory", told["memoryBytes"].as_u64(), Some(size))?;
    equal("left out", told["leftOutBytes"].as_u64(), Some(0))?;
    let metadata = fs::metadata(&core)?;
    equal("who may read it", metadata.mode() & 0o777, 0o600)?;
    that("its size", metadata.len() > size)?;
    that("holes where nothing was", metadata.blocks() * 512 < size)?;
    let banner = ask(&["exec", &open.id, "--", "cat", "/proc/version"])?;
    let banner = banner.trim();
    // The kernel's image is not far from the beginning.
    let mut bytes = Vec::new();
    File::open(&core)?.take(64 << 20).read_to_end(&mut bytes)?;
    let found = bytes
        .windows(banner.len())
        .any(|window| window == banner.as_bytes());
    that("the kernel's banner is in it", found)?;
    contains("a second into the same file", "exists", &refused(&dump)?)?;
    let forbidden = format!("{DIR}/forbidden");
    let sentence = refused(&["debug", &plain.id, "--dump-memory", &forbidden])?;
    contains("why a dump is refused", "debug = true", &sentence)?;
    that("nothing is left of it", !fs::exists(&forbidden)?)?;

    // The log: a line for each state, and its level while the pod lives.
    let log = ask(&["logs", &plain.id])?;
    for part in [
        "the sandbox is starting",
        "the sandbox is ready",
        "for_ms=",
        "pod=\"shop/web-0\"",
    ] {
        contains("the log", part, &log)?;
    }
    let first = ask(&["logs", &open.id])?;
    let line: Value = serde_json::from_str(first.lines().next_back().context("an empty log")?)?;
    equal("a JSON log", line["runtime"].as_str(), Some("brig"))?;
    contains(
        "the level before",
        "info",
        &ask(&["level", &plain.id, "debug"])?,
    )?;
    let told = ask_json(&["inspect", &plain.id, "--json"])?;
    equal(
        "the level",
        told["shim"]["logLevel"].as_str(),
        Some("debug"),
    )?;

    // The bundle, and that nothing of all this tells the secret.
    let dumped = bundle(&plain.id)?;
    for part in [
        "Linux version",
        "\"kernelRelease\"",
        "sandbox.started",
        "MemTotal",
    ] {
        contains("the bundle", part, &dumped)?;
    }
    let containerd = fs::read_to_string("/host/results/containerd.log").unwrap_or_default();
    let told = [
        dumped,
        containerd,
        text,
        log,
        ask(&["list"])?,
        ask(&["ps"])?,
        ask(&["metrics"])?,
        ask(&["timeline", &plain.id])?,
        named.to_string(),
    ];
    for (number, text) in told.iter().enumerate() {
        that(
            &format!("text {number} does not tell the secret"),
            !text.contains(SECRET),
        )?;
    }
    Ok(())
}

/// How many pods are remembered.
fn remembered() -> Result<usize> {
    let entries = fs::read_dir("/run/brig.ended")?;
    let names = entries.flatten().map(|entry| entry.file_name());
    Ok(names
        .filter(|name| name.to_string_lossy().ends_with(".json"))
        .count())
}

fn failed(suite: &mut Suite) -> Result<()> {
    let result = fail(suite);
    let _ = fs::remove_dir_all(DIR);
    result
}

fn fail(suite: &mut Suite) -> Result<()> {
    fs::create_dir_all(DIR)?;
    let run = suite
        .probe("doomed", &["sleep"])
        .with("--env", &format!("PASSWORD={SECRET}"));
    let container = suite.ctr.start(&run)?;
    let told = ask_json(&["inspect", &run.id, "--json"])?;
    let vmm = told["vmmPid"].as_i64().context("no VMM")?;
    kill(vmm)?;
    let ended = Instant::now() + patience();
    while ask_json(&["inspect", &run.id, "--json"])?["shim"]["state"] != "ended" {
        if Instant::now() > ended {
            bail!("the pod's end was not noticed");
        }
        sleep(Duration::from_millis(200));
    }
    let text = ask(&["inspect", &run.id])?;
    contains("inspect while it is there", "killed by signal 9", &text)?;
    drop(container);
    let ended = Instant::now() + patience();
    while ask(&["list"])?.contains(&run.id) {
        if Instant::now() > ended {
            bail!("the pod is still there");
        }
        sleep(Duration::from_millis(200));
    }
    let sentence = refused(&["inspect", &run.id])?;
    let hint = format!("has failed and is gone: 'brig dump {}'", run.id);
    contains("what is said of a pod that is gone", &hint, &sentence)?;
    let dumped = bundle(&run.id)?;
    for part in [
        "killed by signal 9",
        "the sandbox is ended",
        "sandbox.started",
        "\"from\": \"default\"",
    ] {
        contains("the bundle of a pod that is gone", part, &dumped)?;
    }
    that("it does not tell the secret", !dumped.contains(SECRET))?;
    that("not more is kept than there should be", remembered()? <= 16)?;

    // One that never came up.
    let file = format!("{DIR}/wrong.toml");
    fs::write(&file, format!("kernel = \"{DIR}/no-such-kernel\"\n"))?;
    let run = suite
        .probe("stillborn", &["sleep"])
        .with("--runtime-config-path", &file);
    that(
        "a pod without a kernel fails",
        suite.ctr.start(&run).is_err(),
    )?;
    suite.ctr.remove(&run.id);
    contains("why it never came up", "no-such-kernel", &bundle(&run.id)?)
}

fn kill(pid: i64) -> Result<()> {
    let pid = nix::unistd::Pid::from_raw(i32::try_from(pid)?);
    Ok(nix::sys::signal::kill(
        pid,
        nix::sys::signal::Signal::SIGKILL,
    )?)
}
