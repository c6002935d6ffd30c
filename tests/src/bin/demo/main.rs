//! `brig-demo`: shows, inside the disposable node, a container in a microVM of its own. Every command
//! is printed before it runs; nothing is prepared beyond importing an image.

mod device;

use std::fs;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use brig_tests::node::ctr::Ctr;
use brig_tests::node::leaks::Snapshot;
use brig_tests::node::{clock, memory, process};
use serde_json::Value;

const IMAGE: &str = "docker.io/brig/busybox:test";
const TAR: &str = "/host/assets/images/busybox.tar";
const NAMESPACE: &str = "default";
const ID: &str = "demo";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("brig-demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn heading(text: &str) {
    println!("\n\x1b[1m{text}\x1b[0m");
}

/// Prints a command, runs it, prints its output; returns its exit status.
fn show(ctr: &Ctr, args: &[&str]) -> Result<(String, i32)> {
    let quoted: Vec<String> = args
        .iter()
        .map(|arg| {
            if arg.contains(' ') {
                format!("'{arg}'")
            } else {
                (*arg).to_owned()
            }
        })
        .collect();
    println!("  \x1b[36m$ ctr {}\x1b[0m", quoted.join(" "));
    let outcome = ctr.call(args)?;
    let text = outcome.text();
    for line in text.lines().chain(outcome.stderr.lines()) {
        println!("    {line}");
    }
    Ok((text, outcome.code))
}

fn node_kernel() -> Result<String> {
    Ok(fs::read_to_string("/proc/version")?.trim().to_owned())
}

fn run() -> Result<()> {
    let ctr = Ctr {
        namespace: NAMESPACE.to_owned(),
        runtime: "io.containerd.brig.v2".to_owned(),
    };
    ctr.remove(ID);
    heading("An image, from a file: nothing is pulled");
    show(&ctr, &["image", "import", TAR])?;
    let before = Snapshot::take();

    heading("A container in a microVM of its own");
    let started = Instant::now();
    let (_, code) = show(
        &ctr,
        &[
            "run",
            "--detach",
            "--runtime",
            &ctr.runtime,
            IMAGE,
            ID,
            "sleep",
            "1000000",
        ],
    )?;
    anyhow::ensure!(code == 0, "the container did not start");
    println!(
        "    (running after {:.1} s)",
        started.elapsed().as_secs_f64()
    );
    let result = tour(&ctr).and_then(|()| device::tour(&ctr));

    heading("Gone again");
    ctr.remove(ID);
    println!("  \x1b[36m$ ctr task delete --force {ID}; ctr container delete {ID}\x1b[0m");
    before.nothing_left(clock::seconds(6))?;
    println!("    no process, mount, cgroup, interface or file of the pod is left on the node");
    result
}

fn tour(ctr: &Ctr) -> Result<()> {
    heading("Two kernels");
    let (inside, _) = show(
        ctr,
        &[
            "task",
            "exec",
            "--exec-id",
            "kernel",
            ID,
            "cat",
            "/proc/version",
        ],
    )?;
    println!("    the node      {}", node_kernel()?);
    println!("    the container {}", inside.trim());

    heading("An exec, its output and its exit code");
    let script =
        "echo \"hello from $(hostname), I see $(ls -d /proc/[0-9]* | wc -l) processes\"; exit 42";
    let (_, code) = show(
        ctr,
        &["task", "exec", "--exec-id", "hello", ID, "sh", "-c", script],
    )?;
    println!("    exit code {code}");
    anyhow::ensure!(code == 42, "expected exit code 42");

    heading("Where the time of its start went");
    let mut command = std::process::Command::new("brig");
    command.args(["timeline", "-n", NAMESPACE, ID]);
    println!("  \x1b[36m$ brig timeline {ID}\x1b[0m");
    let timeline = process::run(command, clock::seconds(3))?.success()?;
    for line in timeline.text().lines() {
        println!("    {line}");
    }
    if clock::scale() > 2.0 {
        println!("    (this node is emulated: about ten times slower than a real one)");
    }

    heading("What the pod costs on the node (PSS)");
    // An idle guest reports its free pages to the host, which takes it a moment.
    std::thread::sleep(Duration::from_secs(4));
    let pod: Value = serde_json::from_str(&fs::read_to_string(format!(
        "/run/brig/{NAMESPACE}/{ID}/pod.json"
    ))?)?;
    let pid = |who: &str| -> Result<i32> {
        let pid = pod
            .pointer(&format!("/{who}/pid"))
            .and_then(Value::as_i64)
            .with_context(|| format!("pod.json names no {who}"))?;
        Ok(i32::try_from(pid)?)
    };
    let shim = memory::of(pid("shim")?, 0)?;
    let vmm = memory::of(pid("vmm")?, 256 * 1024)?;
    for (what, kib) in [
        ("shim", shim.total),
        ("VMM itself", vmm.own()),
        ("guest RAM touched", vmm.guest),
        ("all of it", shim.total + vmm.total),
    ] {
        println!(
            "    {what:<20} {:>4}.{} MiB",
            kib / 1024,
            kib % 1024 * 10 / 1024
        );
    }
    Ok(())
}
