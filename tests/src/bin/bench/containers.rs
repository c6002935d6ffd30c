//! Containers under containerd: start, exec and memory of a pod, Brig against runc.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use brig_tests::node::check::equal;
use brig_tests::node::ctr::{Ctr, Run};
use brig_tests::node::{memory, task};
use serde_json::Value;

use crate::report::Report;

const IMAGE: &str = "docker.io/brig/probe:test";
const PROBE: &str = "/bin/brig-probe";
/// A pod is idle once its start has had time to settle.
const SETTLE: Duration = Duration::from_secs(5);
/// And a guest once it has reported what it does not use, which the agent lets it do when it rests.
const REPORTED: Duration = Duration::from_secs(26);

/// Samples of one runtime.
#[derive(Default)]
struct Samples {
    run: Vec<u64>,
    exec: Vec<u64>,
    total: Vec<u64>,
    shim: Vec<u64>,
    guest: Vec<u64>,
    vmm: Vec<u64>,
    container: Vec<u64>,
}

fn millis(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}

/// Interleaved rounds of both runtimes.
pub fn measure(report: &mut Report, rounds: usize) -> Result<()> {
    let ctr = |runtime: &str| Ctr {
        namespace: "brig-bench".to_owned(),
        runtime: runtime.to_owned(),
    };
    let runtimes = [ctr("io.containerd.brig.v2"), ctr("io.containerd.runc.v2")];
    runtimes[0].ok(&["image", "import", "/host/bin/probe.tar"])?;
    let mut samples = [Samples::default(), Samples::default()];
    for round in 0..rounds {
        eprintln!("containers, round {} of {rounds}", round + 1);
        for (ctr, samples) in runtimes.iter().zip(&mut samples) {
            one(ctr, samples).with_context(|| ctr.runtime.clone())?;
        }
    }
    let [brig, runc] = samples;
    report.section("(b) the same containerd and image");
    report.row(
        "ctr run of a program that exits at once",
        "ms",
        brig.run,
        "runc",
        runc.run,
    );
    report.row("ctr exec of the same", "ms", brig.exec, "runc", runc.exec);
    report.section("(c) PSS on the host of an idle pod that sleeps");
    report.row("all processes", "KiB", brig.total, "runc", runc.total);
    report.row("shim", "KiB", brig.shim, "runc", runc.shim);
    report.row("VMM without guest RAM", "KiB", brig.vmm, "", Vec::new());
    report.row("guest RAM touched", "KiB", brig.guest, "", Vec::new());
    report.row(
        "container's own process",
        "KiB",
        Vec::new(),
        "runc",
        runc.container,
    );
    Ok(())
}

fn one(ctr: &Ctr, samples: &mut Samples) -> Result<()> {
    let start = Instant::now();
    let outcome = ctr.run(&Run::new("true", IMAGE, &[PROBE, "exit", "0"]))?;
    equal("exit status of the run", 0, outcome.code).context(outcome.stderr)?;
    samples.run.push(millis(start));

    let run = Run::new("idle", IMAGE, &[PROBE, "sleep"]);
    let container = ctr.start(&run)?;
    let start = Instant::now();
    let outcome = container.exec(&[PROBE, "exit", "0"])?;
    equal("exit status of the exec", 0, outcome.code).context(outcome.stderr)?;
    samples.exec.push(millis(start));

    let is_brig = ctr.runtime.contains("brig");
    std::thread::sleep(if is_brig { REPORTED } else { SETTLE });
    let (_, pid) = ctr.status(&run.id)?.context("no task")?;
    let pid = i32::try_from(pid)?;
    let shim = shim_of(ctr, &run.id, pid)?;
    let shim_share = memory::of(shim, 0)?;
    samples.shim.push(shim_share.total);
    if is_brig {
        let vmm = memory::of(pid, memory::largest(pid)?)?;
        samples.guest.push(vmm.guest);
        samples.vmm.push(vmm.own());
        samples.total.push(shim_share.total + vmm.total);
    } else {
        let container = memory::of(pid, 0)?;
        samples.container.push(container.total);
        samples.total.push(shim_share.total + container.total);
    }
    Ok(())
}

/// The shim: named by Brig's journal, or the parent of runc's container.
pub fn shim_of(ctr: &Ctr, id: &str, pid: i32) -> Result<i32> {
    let journal = PathBuf::from("/run/brig")
        .join(&ctr.namespace)
        .join(id)
        .join("pod.json");
    if let Ok(text) = fs::read_to_string(journal) {
        let pod: Value = serde_json::from_str(&text)?;
        let shim = pod
            .pointer("/shim/pid")
            .and_then(Value::as_i64)
            .context("no shim")?;
        return Ok(i32::try_from(shim)?);
    }
    task::bundle(&ctr.namespace, id)?;
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let parent: i32 = status
        .lines()
        .find_map(|line| line.strip_prefix("PPid:"))
        .context("no parent")?
        .trim()
        .parse()?;
    ensure!(parent > 1, "the container's shim is gone");
    Ok(parent)
}
