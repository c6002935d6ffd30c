//! Containers under containerd: start, exec and memory of a pod, Brig against runc.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use brig_tests::node::check::equal;
use brig_tests::node::ctr::{Ctr, Run};
use brig_tests::node::kvm::Counts;
use brig_tests::node::{clock, memory, process, task};
use serde_json::Value;

use crate::boot::faults;
use crate::report::Report;

const IMAGE: &str = "docker.io/brig/probe:test";
/// The probe in its image.
pub const PROBE: &str = "/bin/brig-probe";
/// A pod is idle once its start has had time to settle.
const SETTLE: Duration = Duration::from_secs(5);
/// And a guest once it has reported what it does not use, which the agent lets it do when it rests.
const REPORTED: Duration = Duration::from_secs(26);

/// A handler whose pods go on from a template.
const HANDLER: &str = "/run/brig-bench-template.toml";

/// Samples of one runtime.
#[derive(Default)]
struct Samples {
    exits: Vec<u64>,
    faults: Vec<u64>,
    own: Vec<u64>,
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

/// What pods are started with.
pub struct Subject {
    /// containerd and the runtime.
    pub ctr: Ctr,
    /// A configuration of Brig's.
    config: Option<&'static str>,
}

impl Subject {
    /// runc, or Brig whose pods boot.
    pub fn of(runtime: &str) -> Self {
        Self {
            ctr: Ctr {
                namespace: "brig-bench".to_owned(),
                runtime: runtime.to_owned(),
            },
            config: None,
        }
    }

    /// Brig whose pods go on from a template, which is there when this returns.
    pub fn of_template() -> Result<Self> {
        fs::write(
            HANDLER,
            format!("template = true\ntime_scale = {}\n", clock::scale()),
        )?;
        let subject = Self {
            config: Some(HANDLER),
            ..Self::of("io.containerd.brig.v2")
        };
        let made = || -> Result<bool> {
            let container = subject.ctr.start(&subject.run("first", &["sleep"]))?;
            let told = process::run(
                brig(&["inspect", &container.id, "--json"]),
                clock::seconds(20),
            )?;
            let told: Value = serde_json::from_slice(&told.success()?.stdout)?;
            Ok(!told["shim"]["template"].is_null())
        };
        let end = Instant::now() + clock::seconds(30);
        while !made()? {
            ensure!(Instant::now() < end, "no template was made");
            std::thread::sleep(Duration::from_secs(1));
        }
        Ok(subject)
    }

    /// A run of the probe.
    pub fn run(&self, name: &str, args: &[&str]) -> Run {
        let mut all = vec![PROBE];
        all.extend(args);
        let run = Run::new(name, IMAGE, &all);
        match self.config {
            Some(config) => run.with("--runtime-config-path", config),
            None => run,
        }
    }

    /// Whether it is Brig.
    pub fn is_brig(&self) -> bool {
        self.ctr.runtime.contains("brig")
    }
}

/// `brig` with arguments.
pub fn brig(args: &[&str]) -> Command {
    let mut command = Command::new("brig");
    command.args(args);
    command
}

/// Interleaved rounds of all.
pub fn measure(report: &mut Report, rounds: usize) -> Result<()> {
    Subject::of("")
        .ctr
        .ok(&["image", "import", "/host/bin/probe.tar"])?;
    let subjects = [
        Subject::of("io.containerd.brig.v2"),
        Subject::of_template()?,
        Subject::of("io.containerd.runc.v2"),
    ];
    let mut samples = [(); 3].map(|()| Samples::default());
    for round in 0..rounds {
        eprintln!("containers, round {} of {rounds}", round + 1);
        for (subject, samples) in subjects.iter().zip(&mut samples) {
            one(subject, samples).with_context(|| subject.ctr.runtime.clone())?;
        }
    }
    let [booted, cloned, runc] = samples;
    for (what, brig) in [
        ("", &booted),
        (", Brig's pods going on from a template", &cloned),
    ] {
        report.section(&format!("(b) the same containerd and image{what}"));
        let mut row = |what: &str, unit, brig: &[u64], runc: &[u64]| {
            report.row(what, unit, brig.to_vec(), "runc", runc.to_vec());
        };
        row(
            "ctr run of a program that exits at once",
            "ms",
            &brig.run,
            &runc.run,
        );
        row("ctr exec of the same", "ms", &brig.exec, &runc.exec);
        row("VM exits until a container runs", "count", &brig.exits, &[]);
        row(
            "page faults of the VMM until then",
            "count",
            &brig.faults,
            &[],
        );
        report.section(&format!(
            "(c) PSS on the host of an idle pod that sleeps{what}"
        ));
        let mut row = |what: &str, unit, brig: &[u64], runc: &[u64]| {
            report.row(what, unit, brig.to_vec(), "runc", runc.to_vec());
        };
        row("all processes", "KiB", &brig.total, &runc.total);
        row("of it, private and written", "KiB", &brig.own, &runc.own);
        row("shim", "KiB", &brig.shim, &runc.shim);
        row("VMM without guest RAM", "KiB", &brig.vmm, &[]);
        row("guest RAM touched", "KiB", &brig.guest, &[]);
        row("container's own process", "KiB", &[], &runc.container);
    }
    Ok(())
}

fn one(subject: &Subject, samples: &mut Samples) -> Result<()> {
    let ctr = &subject.ctr;
    let start = Instant::now();
    let outcome = ctr.run(&subject.run("true", &["exit", "0"]))?;
    equal("exit status of the run", 0, outcome.code).context(outcome.stderr)?;
    samples.run.push(millis(start));

    let run = subject.run("idle", &["sleep"]);
    let container = ctr.start(&run)?;
    let (_, pid) = ctr.status(&run.id)?.context("no task")?;
    let pid = i32::try_from(pid)?;
    if subject.is_brig() {
        samples.exits.push(Counts::of(pid).exits);
        samples.faults.push(faults(pid)?);
    }
    let start = Instant::now();
    let outcome = container.exec(&[PROBE, "exit", "0"])?;
    equal("exit status of the exec", 0, outcome.code).context(outcome.stderr)?;
    samples.exec.push(millis(start));

    std::thread::sleep(if subject.is_brig() { REPORTED } else { SETTLE });
    let shim = shim_of(ctr, &run.id, pid)?;
    let shim_share = memory::of(shim, 0)?;
    samples.shim.push(shim_share.total);
    samples
        .own
        .push(memory::private(shim)? + memory::private(pid)?);
    if subject.is_brig() {
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
    let parent = process::parent(pid)?;
    ensure!(parent > 1, "the container's shim is gone");
    Ok(parent)
}
