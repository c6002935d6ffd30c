//! Files of a container, beside the same files under runc: every result, every error.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use brig_tests::node::check::{clip, equal, field, that};
use brig_tests::node::ctr::Ctr;
use brig_tests::node::process::Running;
use brig_tests::node::{clock, leaks};
use nix::sys::signal::Signal;

use crate::suite::{Case, PROBE, Suite, brig, case};

/// On the node's disk.
const DIRECTORY: &str = "/var/tmp/brig-e2e-files";
const MOUNTED: &str = "/mnt/a";
/// Operations of a sequence.
const LENGTH: &str = "300";
/// How many sequences are compared: a longer run asks for more.
const SEQUENCES: &str = "BRIG_FILE_SEQUENCES";

pub const CASES: &[Case] = &[
    case(
        "files",
        "an ACL holds for everybody, and a default ACL decides instead of the umask",
        acls,
    ),
    case(
        "files",
        "an empty directory lists its dots, and a file without a name can be linked",
        gaps,
    ),
    brig(
        "files",
        "a file that is made and removed takes the file server few system calls",
        calls,
    ),
    brig(
        "files",
        "random sequences of file operations end as under runc",
        sequences,
    ),
];

fn fresh(name: &str) -> Result<String> {
    let path = format!("{DIRECTORY}-{name}");
    let _ = fs::remove_dir_all(&path);
    fs::create_dir_all(&path)?;
    Ok(path)
}

/// In the image's own files and in a volume.
fn everywhere(
    suite: &mut Suite,
    name: &str,
    check: fn(&serde_json::Value) -> Result<()>,
) -> Result<()> {
    let directory = fresh(name)?;
    let run = suite.probe(name, &["sleep"]).with(
        "--mount",
        &format!("type=bind,src={directory},dst={MOUNTED},options=rbind:rw"),
    );
    let container = suite.ctr.start(&run)?;
    for place in ["/work", MOUNTED] {
        let facts = container.probe(&["file-facts", place])?;
        check(&facts).with_context(|| format!("in {place}"))?;
    }
    Ok(())
}

fn acls(suite: &mut Suite) -> Result<()> {
    everywhere(suite, "acl", |facts| {
        field(facts, "/acl/named user", "ok")?;
        field(facts, "/acl/owning group", "EACCES")?;
        field(facts, "/acl/somebody", "EACCES")?;
        field(facts, "/acl/inherited mode", "660")?;
        field(facts, "/acl/inherits for the named user", "ok")
    })
}

fn gaps(suite: &mut Suite) -> Result<()> {
    everywhere(suite, "gaps", |facts| {
        field(facts, "/empty directory", ". Directory, .. Directory")?;
        field(facts, "/unnamed file, linked", "ok")?;
        field(facts, "/syncfs", "ok")?;
        field(facts, "/time of birth", "known")?;
        field(facts, "/immutable", "EPERM")
    })
}

/// Calls of the file server for a file that is made empty, closed and removed. By request: what it does, the wait
/// for it, the interrupt; GETATTR of the directory 1, LOOKUP 1, CREATE 3, RELEASE 1, GETATTR 1, UNLINK 1, FORGET 1.
const MOST_CALLS: usize = 24;

fn calls(suite: &mut Suite) -> Result<()> {
    let before = leaks::pids_of("brig-vmm");
    let container = suite.ctr.start(&suite.probe("calls", &["sleep"]))?;
    let after = leaks::pids_of("brig-vmm");
    let vmm = after.iter().find(|pid| !before.contains(pid));
    let thread = file_server(*vmm.context("no VMM came")?)?;
    let make = |count: &str| {
        container
            .exec(&[PROBE, "make-files", "/work", count])?
            .success()
    };
    // What is looked up once is known then.
    make("2")?;
    let few = traced(thread, || make("10").map(drop))?;
    let many = traced(thread, || make("60").map(drop))?;
    let each = many.saturating_sub(few) / 50;
    eprintln!(
        "brig-e2e: {each} system calls of the file server for a file that is made and removed"
    );
    that(
        &format!("{each} system calls a file are at most {MOST_CALLS}, and not none"),
        (1..=MOST_CALLS).contains(&each),
    )
}

/// The file server's thread of a VMM.
fn file_server(vmm: i32) -> Result<i32> {
    for thread in fs::read_dir(format!("/proc/{vmm}/task"))? {
        let thread = thread?;
        if fs::read_to_string(thread.path().join("comm"))?.trim() == "fs" {
            return Ok(thread.file_name().to_string_lossy().parse()?);
        }
    }
    bail!("the VMM {vmm} has no file server")
}

/// How many system calls a thread ends while `act` runs.
fn traced(thread: i32, act: impl FnOnce() -> Result<()>) -> Result<usize> {
    const TRACE: &str = "/run/brig-e2e-strace";
    let mut command = Command::new("strace");
    command.args([
        "--quiet=all",
        "--signal=none",
        "--output",
        TRACE,
        "--attach",
    ]);
    command.arg(thread.to_string());
    let strace = Running::start(command)?;
    let attached = || -> Result<bool> {
        let status = fs::read_to_string(format!("/proc/{thread}/status"))?;
        Ok(!status.contains("TracerPid:\t0"))
    };
    let end = Instant::now() + clock::seconds(10);
    while !attached()? {
        that("strace attaches in time", Instant::now() < end)?;
        std::thread::sleep(Duration::from_millis(50));
    }
    act()?;
    strace.signal(Signal::SIGINT)?;
    strace.finish(clock::seconds(10))?;
    let trace = fs::read_to_string(TRACE)?;
    fs::remove_file(TRACE)?;
    Ok(trace.lines().count())
}

fn sequences(suite: &mut Suite) -> Result<()> {
    let count: u32 = match std::env::var(SEQUENCES) {
        Ok(text) => text
            .parse()
            .with_context(|| format!("{SEQUENCES}={text}"))?,
        Err(_) => 2,
    };
    let runc = Ctr {
        runtime: "io.containerd.runc.v2".to_owned(),
        ..suite.ctr.clone()
    };
    let outputs =
        [("runc", &runc), ("brig", &suite.ctr)].map(|(name, ctr)| -> Result<Vec<String>> {
            let directory = fresh(name)?;
            let run = suite.probe(&format!("files-{name}"), &["sleep"]).with(
                "--mount",
                &format!("type=bind,src={directory},dst={MOUNTED},options=rbind:rw"),
            );
            let container = ctr.start(&run)?;
            (1..=count)
                .map(|seed| {
                    let place = format!("{MOUNTED}/{seed}");
                    fs::create_dir(format!("{directory}/{seed}"))?;
                    let seed = seed.to_string();
                    let done = container.exec(&[PROBE, "operations", &seed, LENGTH, &place])?;
                    Ok(done.success()?.text())
                })
                .collect()
        });
    let [expected, found] = outputs;
    for (seed, (expected, found)) in (1..).zip(expected?.iter().zip(found?.iter())) {
        compare(seed, expected, found)?;
    }
    Ok(())
}

/// Names the first operation that ended otherwise, with the ones before it.
fn compare(seed: u32, expected: &str, found: &str) -> Result<()> {
    let pairs = expected.lines().zip(found.lines());
    let Some((number, (runc, brig))) = pairs.enumerate().find(|(_, (one, other))| one != other)
    else {
        return equal(
            &format!("lines of sequence {seed}"),
            expected.lines().count(),
            found.lines().count(),
        );
    };
    let before: Vec<&str> = found
        .lines()
        .skip(number.saturating_sub(12))
        .take(12.min(number))
        .collect();
    bail!(
        "sequence {seed} differs: runc has \"{}\", Brig \"{}\", after:\n{}",
        clip(runc),
        clip(brig),
        before.join("\n")
    )
}
