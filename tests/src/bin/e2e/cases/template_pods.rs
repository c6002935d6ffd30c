//! Pods that go on from a template: who makes it, what becomes of it, and what its pods have of their own.
//!
//! Each case has a size of memory of its own, and with it a kind of template of its own.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, ensure};
use brig_tests::node::check::{equal, that};
use brig_tests::node::ctr::{Container, Run};
use brig_tests::node::process::{self, Running};
use brig_tests::node::{clock, leaks};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::leaks::baseline;
use crate::suite::{Case, Suite, brig, patience};

const IMAGE: &str = "docker.io/brig/busybox:test";
const TAR: &str = "/host/assets/images/busybox.tar";
pub(super) const TEMPLATES: &str = "/run/brig.templates";
/// The cgroup of those who make them.
const MAKERS: &str = "/sys/fs/cgroup/brig-templates";
/// Pods of one template.
const CLONES: usize = 20;
/// A pod that lives long enough for its shim to have a template made, which it begins when the guest is ready.
pub(super) const BRIEF: &str = "sleep 2";
/// First pods at once, `BRIG_FIRST_PODS` if that is set.
const AT_ONCE: usize = 4;

pub const CASES: &[Case] = &[
    brig(
        "template",
        "20 pods of one template have random numbers, ids, addresses, sequence numbers and the time of their own",
        differ,
    ),
    brig(
        "template",
        "the time is right in a pod of an hour-old template, after it stood still, and when the node's clock is set",
        right_time,
    ),
    brig(
        "template",
        "first pods that start at once have one template made, in a cgroup of its own",
        one_maker,
    ),
    brig(
        "template",
        "a maker that is killed at any moment leaves nothing, and the next pod has the template made",
        killed,
    ),
    brig(
        "template",
        "a maker whose VM the node has killed says so, is not repeated by the next pod, and not given up for good",
        vm_killed,
    ),
    brig(
        "template",
        "a maker that comes to its end while its pod does is in nobody's way",
        ends_with_its_pod,
    ),
    brig(
        "template",
        "another VMM makes another template, and the old one goes",
        another_vmm,
    ),
    brig(
        "template",
        "a damaged template costs its pod a cold start, and is dropped",
        damaged,
    ),
    brig(
        "template",
        "a pod that needs more CPUs and memory than its template has gets them",
        larger,
    ),
];

/// A handler whose VMs have a size that no other case's have.
pub(super) struct Handler {
    file: PathBuf,
    mib: u64,
}

impl Handler {
    pub(super) fn new(suite: &Suite, mib: u64, more: &str) -> Result<Self> {
        suite.import(IMAGE, TAR)?;
        let directory = Path::new("/run/brig-e2e");
        fs::create_dir_all(directory)?;
        let file = directory.join(format!("template-{mib}.toml"));
        let scale = clock::scale();
        let text = format!("template = true\nmemory = {mib}\ntime_scale = {scale}\n{more}\n");
        fs::write(&file, text)?;
        let handler = Self { file, mib };
        for key in handler.keys()? {
            brig_command(&["template", "drop", &key])?;
        }
        Ok(handler)
    }

    pub(super) fn run(&self, script: &str) -> Run {
        Run::new("template", IMAGE, &["sh", "-c", script])
            .with("--runtime-config-path", &self.file.to_string_lossy())
    }

    /// What a pod's shell prints.
    pub(super) fn sh(&self, suite: &Suite, script: &str) -> Result<String> {
        let outcome = suite.ctr.run(&self.run(script))?.success()?;
        Ok(outcome.text().trim().to_owned())
    }

    /// The templates of this size.
    fn keys(&self) -> Result<Vec<String>> {
        let list: Value = serde_json::from_str(&brig_command(&["template", "list", "--json"])?)?;
        let bytes = Value::from(self.mib << 20);
        let ours = list.as_array().into_iter().flatten().filter(|entry| {
            entry["recipe"]["machine"]["memory"] == bytes && entry["failed"].is_null()
        });
        let keys = ours.filter_map(|entry| Some(entry["template"].as_str()?.to_owned()));
        Ok(keys.collect())
    }

    /// Waits for the one template of this size.
    pub(super) fn made(&self) -> Result<String> {
        let end = Instant::now() + clock::seconds(20);
        loop {
            let mut keys = self.keys()?;
            ensure!(keys.len() < 2, "there are {keys:?}");
            // It is kept before its maker has left its cgroup.
            if let (Some(key), false) = (keys.pop(), Path::new(MAKERS).exists()) {
                return Ok(key);
            }
            ensure!(
                Instant::now() < end,
                "no template was made: {}, the makers are {:?}",
                brig_command(&["template", "list"])?,
                makers()
            );
            sleep(Duration::from_millis(50));
        }
    }
}

pub(super) fn brig_command(args: &[&str]) -> Result<String> {
    let mut command = Command::new("brig");
    command.args(args);
    Ok(process::run(command, clock::seconds(20))?.success()?.text())
}

/// The processes that make templates.
fn makers() -> Vec<i32> {
    let pids = leaks::pids_of("exe").into_iter();
    let pids = pids.chain(leaks::pids_of("containerd-shim-brig-v2"));
    pids.filter(|pid| {
        fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| {
            line.split(|byte| *byte == 0)
                .any(|word| word == b"build-template")
        })
    })
    .collect()
}

/// Waits until a template is being made, and so much longer. `booting` pods share the node's CPU until then.
fn wait_for_maker(booting: usize, after: Duration) -> Result<i32> {
    let rounds = u32::try_from(booting.div_ceil(AT_ONCE))?;
    let end = Instant::now() + clock::seconds(10 * rounds);
    loop {
        if let Some(pid) = makers().first() {
            sleep(after);
            return Ok(*pid);
        }
        ensure!(Instant::now() < end, "nobody makes a template");
        sleep(Duration::from_millis(2));
    }
}

fn differ(suite: &mut Suite) -> Result<()> {
    let handler = Handler::new(suite, 136, "")?;
    handler.sh(suite, BRIEF)?;
    let key = handler.made()?;
    let file = Path::new(TEMPLATES).join(&key);
    let before = fs::read(&file)?;
    // The MAC address is one that the guest's kernel draws.
    let script = "cat /proc/sys/kernel/random/boot_id; head -c 24 /dev/urandom | od -An -tx1 | tr -d '\\n'; echo; \
                  grep stack /proc/self/maps | cut -d- -f1; grep vdso /proc/self/maps | cut -d- -f1; \
                  ip link add drawn type dummy && cat /sys/class/net/drawn/address; date +%s; /probe sequence-numbers; \
                  cat /sys/class/dmi/id/product_uuid /etc/machine-id 2>/dev/null; \
                  head -c 60000000 /dev/urandom > /dev/shm/x; echo end";
    let mut seen = vec![BTreeSet::new(); 5];
    let mut sequences: Vec<[u32; 2]> = Vec::new();
    for number in 0..CLONES {
        let run = handler.run(script).with("--cap-add", "CAP_NET_ADMIN").with(
            "--mount",
            "type=bind,src=/host/bin/brig-probe,dst=/probe,options=rbind:ro",
        );
        let before = now()?;
        let outcome = suite.ctr.run(&run)?.success()?;
        let after = now()?;
        let text = outcome.text();
        let lines: Vec<&str> = text.lines().collect();
        // And no machine id, neither the machine's nor the image's.
        ensure!(lines.len() == 8, "{text}");
        for (seen, value) in seen.iter_mut().zip(&lines) {
            ensure!(
                seen.insert((*value).to_owned()),
                "pod {number} has {value} of another pod, in {lines:?}"
            );
        }
        let its: u64 = lines[5].parse().context("the time")?;
        ensure!(
            (before - 1..=after + 1).contains(&its),
            "pod {number}: {its} is not between {before} and {after}"
        );
        let of: Vec<u32> = serde_json::from_str(lines[6]).context("sequence numbers")?;
        let of: [u32; 3] = of.try_into().ok().context("three sequence numbers")?;
        // With one secret, they would differ by the time between the connections alone: a tick is 64 ns.
        let apart = [of[1].wrapping_sub(of[0]), of[2].wrapping_sub(of[1])];
        let alike = |other: &[u32; 2]| {
            let mut both = other.iter().zip(&apart);
            both.all(|(a, b)| {
                let distance = a.wrapping_sub(*b);
                distance.min(distance.wrapping_neg()) < 1 << 21
            })
        };
        ensure!(
            !sequences.iter().any(alike),
            "pod {number} draws its sequence numbers as another: {apart:?} among {sequences:?}"
        );
        sequences.push(apart);
    }
    that("the template is the same", fs::read(&file)? == before)?;
    equal("templates", vec![key], handler.keys()?)
}

/// The node's clock is put back at the end of the scope.
struct Moved;

impl Moved {
    fn an_hour_on() -> Result<Self> {
        set_clock("+1 hour").map(|()| Self)
    }
}

impl Drop for Moved {
    fn drop(&mut self) {
        if let Err(error) = set_clock("-1 hour") {
            eprintln!("brig-e2e: the node's clock is wrong: {error:#}");
        }
    }
}

fn set_clock(way: &str) -> Result<()> {
    let mut command = Command::new("date");
    command.args(["--set", way]);
    process::run(command, clock::seconds(2))?
        .success()
        .map(drop)
}

/// Seconds since the epoch.
fn now() -> Result<u64> {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
    Ok(since.as_secs())
}

/// The container soon shows the node's time, to a second.
fn has_the_nodes_time(container: &Container, when: &str) -> Result<()> {
    let end = Instant::now() + clock::seconds(1);
    loop {
        let before = now()?;
        let its: u64 = container
            .exec(&["date", "+%s"])?
            .success()?
            .text()
            .trim()
            .parse()?;
        let after = now()?;
        if (before - 1..=after + 1).contains(&its) {
            return Ok(());
        }
        ensure!(
            Instant::now() < end,
            "{when}: {its} is not between {before} and {after}"
        );
    }
}

fn right_time(suite: &mut Suite) -> Result<()> {
    let handler = Handler::new(suite, 148, "")?;
    handler.sh(suite, BRIEF)?;
    let key = handler.made()?;
    // A node has no way to sleep here: what its clock does then is done to it.
    let moved = Moved::an_hour_on()?;
    let container = suite.ctr.start(&handler.run("sleep 100000"))?;
    went_on_from(&container, &key)?;
    has_the_nodes_time(&container, "at first")?;
    let (_, pid) = suite.ctr.status(&container.id)?.context("no task")?;
    let vmm = Pid::from_raw(i32::try_from(pid)?);
    kill(vmm, Signal::SIGSTOP)?;
    sleep(Duration::from_secs(5));
    kill(vmm, Signal::SIGCONT)?;
    has_the_nodes_time(&container, "after its VMM stood still")?;
    drop(moved);
    has_the_nodes_time(&container, "when the clock was put back")
}

fn one_maker(suite: &mut Suite) -> Result<()> {
    let handler = Handler::new(suite, 138, "")?;
    let set = std::env::var("BRIG_FIRST_PODS").ok();
    let at_once = set.map_or(Ok(AT_ONCE), |text| text.parse::<usize>());
    let mut pods: Vec<Running> = Vec::new();
    let at_once = at_once.context("BRIG_FIRST_PODS")?;
    for _ in 0..at_once {
        let run = handler.run("sleep 2");
        pods.push(Running::start(suite.ctr.run_command(&run, &["--rm"]))?);
    }
    let pid = wait_for_maker(at_once, Duration::ZERO)?;
    leaves_the_pod(pid)?;
    let mut most = 1;
    while !makers().is_empty() {
        most = most.max(makers().len());
        sleep(Duration::from_millis(10));
    }
    equal("makers at once", 1, most)?;
    for pod in pods {
        pod.finish(clock::seconds(60))?.success()?;
    }
    let keys = handler.keys()?;
    handler.made()?;
    equal("templates in the end", keys, handler.keys()?)
}

fn killed(suite: &mut Suite) -> Result<()> {
    let handler = Handler::new(suite, 140, "")?;
    let before = baseline(suite)?;
    for after in [0, 60, 150, 400, 900] {
        let mut pod = Running::start(suite.ctr.run_command(&handler.run("sleep 1"), &["--rm"]))?;
        let pid = wait_for_maker(1, Duration::from_millis(after))?;
        // It may have come to its end just now.
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        while !pod.is_done() {
            sleep(Duration::from_millis(50));
        }
        pod.finish(clock::seconds(20))?.success()?;
        before.nothing_left(patience())?;
        if let Some(key) = handler.keys()?.pop() {
            brig_command(&["template", "drop", &key])?;
        }
        let left: Vec<_> = fs::read_dir(TEMPLATES)?
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .filter(|name: &Result<String>| {
                name.as_ref().is_ok_and(|name| name.ends_with("failed"))
            })
            .collect::<Result<_>>()?;
        ensure!(left.is_empty(), "after {after} ms: {left:?}");
    }
    handler.sh(suite, BRIEF)?;
    handler.made().map(drop)
}

/// Waits for a VM of a maker's.
fn wait_for_vm() -> Result<i32> {
    let end = Instant::now() + clock::seconds(10);
    loop {
        let there = fs::read_to_string(Path::new(MAKERS).join("cgroup.procs")).unwrap_or_default();
        let vms = leaks::pids_of("brig-vmm");
        let pids = there.lines().filter_map(|line| line.parse().ok());
        if let Some(pid) = pids.into_iter().find(|pid| vms.contains(pid)) {
            return Ok(pid);
        }
        ensure!(Instant::now() < end, "no maker has a VM");
        sleep(Duration::from_millis(2));
    }
}

/// As the kernel does when memory is short.
fn vm_killed(suite: &mut Suite) -> Result<()> {
    let handler = Handler::new(suite, 145, "")?;
    let mut known = failed_later()?;
    let pod = Running::start(suite.ctr.run_command(&handler.run(BRIEF), &["--rm"]))?;
    kill(Pid::from_raw(wait_for_vm()?), Signal::SIGKILL)?;
    let end = Instant::now() + clock::seconds(10);
    let (key, reason) = loop {
        let mut now = failed_later()?;
        now.retain(|one| !known.contains(one));
        if let Some(one) = now.pop() {
            break one;
        }
        ensure!(
            Instant::now() < end,
            "{}",
            brig_command(&["template", "list"])?
        );
        sleep(Duration::from_millis(50));
    };
    // It may have had its jail closed by then, or not yet.
    let told = ["Signal(9)", "before its jail was closed"];
    ensure!(told.iter().any(|words| reason.contains(words)), "{reason}");
    pod.finish(clock::seconds(20))?.success()?;
    // The moment is not over.
    handler.sh(suite, BRIEF)?;
    ensure!(
        makers().is_empty() && handler.keys()?.is_empty(),
        "it was tried again"
    );
    brig_command(&["template", "drop", &key])?;
    handler.sh(suite, BRIEF)?;
    equal("its key", &key, &handler.made()?)?;
    known.retain(|one| one.0 == key);
    ensure!(known.is_empty() && failed_later()?.iter().all(|one| one.0 != key));
    Ok(())
}

/// What could not be made for the moment, with the reason.
fn failed_later() -> Result<Vec<(String, String)>> {
    let list: Value = serde_json::from_str(&brig_command(&["template", "list", "--json"])?)?;
    let entries = list.as_array().into_iter().flatten();
    let later = entries.filter(|entry| entry["later"] == Value::Bool(true));
    let told = later.filter_map(|entry| {
        let word = |name: &str| Some(entry[name].as_str()?.to_owned());
        Some((word("template")?, word("failed")?))
    });
    Ok(told.collect())
}

/// The cgroup of a process, whose freezer stands still what is in it.
fn cgroup_of(pid: i32) -> Result<PathBuf> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let path = text.trim().strip_prefix("0::/").context("its cgroup")?;
    Ok(Path::new("/sys/fs/cgroup").join(path))
}

/// A maker enters its own cgroup first of all.
fn leaves_the_pod(maker: i32) -> Result<()> {
    let end = Instant::now() + clock::seconds(2);
    while cgroup_of(maker)? != Path::new(MAKERS) {
        ensure!(Instant::now() < end, "the maker is in the pod's cgroup");
        sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn ends_with_its_pod(suite: &mut Suite) -> Result<()> {
    let handler = Handler::new(suite, 150, "")?;
    let before = baseline(suite)?;
    let pod = Running::start(suite.ctr.run_command(&handler.run("sleep 1"), &["--rm"]))?;
    let maker = wait_for_maker(1, Duration::ZERO)?;
    leaves_the_pod(maker)?;
    let pods = cgroup_of(process::parent(maker)?)?;
    ensure!(
        pods != Path::new(MAKERS),
        "the shim is where templates are made"
    );
    // Whoever goes into the pod's cgroup again would not come out of it.
    fs::write(pods.join("cgroup.freeze"), "1")?;
    let made = handler.made();
    fs::write(pods.join("cgroup.freeze"), "0")?;
    made?;
    pod.finish(clock::seconds(60))?.success()?;
    before.nothing_left(patience())
}

fn another_vmm(suite: &mut Suite) -> Result<()> {
    let vmm = Path::new("/run/brig-e2e/template-vmm");
    let place = || -> Result<()> {
        let new = vmm.with_extension("new");
        fs::copy("/host/bin/brig-vmm", &new)?;
        Ok(fs::rename(new, vmm)?)
    };
    place()?;
    let handler = Handler::new(suite, 142, &format!("vmm = {vmm:?}"))?;
    handler.sh(suite, BRIEF)?;
    let first = handler.made()?;
    place()?;
    handler.sh(suite, BRIEF)?;
    let end = Instant::now() + clock::seconds(20);
    while handler.keys()? == [first.clone()] {
        ensure!(Instant::now() < end, "no other template was made");
        sleep(Duration::from_millis(50));
    }
    let second = handler.made()?;
    ensure!(first != second, "both are {first}");
    Ok(())
}

fn damaged(suite: &mut Suite) -> Result<()> {
    let handler = Handler::new(suite, 144, "")?;
    handler.sh(suite, BRIEF)?;
    let key = handler.made()?;
    let file = Path::new(TEMPLATES).join(&key);
    let mut bytes = fs::read(&file)?;
    bytes[20..24].copy_from_slice(b"oops");
    fs::remove_file(&file)?;
    fs::write(&file, bytes)?;
    equal(
        "the pod",
        "hello",
        handler.sh(suite, "echo hello")?.as_str(),
    )?;
    that("it is dropped", !file.exists())
}

fn larger(suite: &mut Suite) -> Result<()> {
    let handler = Handler::new(suite, 146, "vcpus = 2\nmax_vcpus = 3")?;
    handler.sh(suite, BRIEF)?;
    let key = handler.made()?;
    let run = handler
        .run("nproc; sleep 1000")
        .with("--memory-limit", "268435456");
    let container = suite.ctr.start(&run)?;
    let text = container
        .exec(&[
            "sh",
            "-c",
            "nproc; grep MemTotal /proc/meminfo; cat /proc/cmdline",
        ])?
        .success()?
        .text();
    let mut words = text.split_whitespace();
    equal("CPUs", Some("2"), words.next())?;
    let kib: u64 = words.nth(1).context("no memory")?.parse()?;
    ensure!(kib > 260_000, "the guest has {kib} KiB");
    that("it is a clone", text.contains("brig_capture"))?;
    went_on_from(&container, &key)?;
    // One whose limit is beyond the node has all that there is.
    let run = handler
        .run("sleep 1000")
        .with("--memory-limit", "35184372088832");
    let container = suite.ctr.start(&run)?;
    let script = "awk '/^MemTotal:/ { print $2 }' /proc/meminfo";
    let text = container.exec(&["sh", "-c", script])?.success()?.text();
    let kib: u64 = text.trim().parse()?;
    let node = fs::read_to_string("/proc/meminfo")?;
    let node: u64 = node
        .split_whitespace()
        .nth(1)
        .context("no memory")?
        .parse()?;
    ensure!(
        kib > node / 2,
        "the guest has {kib} KiB, and the node {node} KiB"
    );
    went_on_from(&container, &key)
}

/// The pod says itself from which template it went on.
fn went_on_from(container: &Container, key: &str) -> Result<()> {
    let inspected: Value =
        serde_json::from_str(&brig_command(&["inspect", &container.id, "--json"])?)?;
    equal(
        "its template",
        &Value::from(key),
        &inspected["shim"]["template"],
    )
}
