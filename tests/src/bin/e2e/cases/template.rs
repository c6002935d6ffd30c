//! Guests that go on from a template, without a shim: what a capture keeps, and what a clone is.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use brig_hypervisor::control::exit;
use brig_hypervisor::jail::audit::{self, Extent};
use brig_hypervisor::launch::VmmExit;
use brig_tests::node::agent::Agent;
use brig_tests::node::check::{contains, equal, that};
use brig_tests::node::kvm::Counts;
use brig_tests::node::machine::{Boot, Machine, Next};
use brig_tests::node::{clock, scribbler, template};

use crate::suite::{Case, Suite, brig};

pub const CASES: &[Case] = &[
    brig(
        "template",
        "a guest that was captured goes on in its clones, all within the jail, and they leave the template as it was",
        clones,
    ),
    brig(
        "template",
        "clones have random numbers of their own where the CPU gives none",
        without_the_cpus_numbers,
    ),
    brig(
        "template",
        "a clone that writes all of its memory changes neither the template nor another clone",
        scribbled,
    ),
    brig(
        "template",
        "a template of another CPU is not gone on from",
        another_cpu,
    ),
];

/// Clones of one template, `BRIG_CLONES` if that is set.
fn count() -> Result<usize> {
    let set = std::env::var("BRIG_CLONES").ok();
    set.map_or(Ok(4), |text| text.parse().context("BRIG_CLONES"))
}

/// Captures the installed guest into a file.
fn capture(directory: &Path, cmdline: &str) -> Result<(Boot, PathBuf)> {
    fs::create_dir_all(directory)?;
    let mut boot = Boot::installed(&directory.join("log"));
    boot.memory = 128 << 20;
    boot.cmdline = format!("{} {cmdline}", template::CMDLINE);
    template::capture(boot, directory, |vmm| {
        jailed(vmm, "of a guest that is captured")
    })
}

/// The VMM has and may do what is on the list, once all of its threads have their filters.
fn jailed(machine: &Machine, what: &str) -> Result<()> {
    let end = Instant::now() + clock::seconds(2);
    loop {
        let differences = audit::differences(machine.pid(), Extent::Filtered)?;
        if differences.is_empty() {
            return Ok(());
        }
        ensure!(Instant::now() < end, "the VMM {what}: {differences:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn clones(_: &mut Suite) -> Result<()> {
    let (boot, file) = capture(Path::new("/run/brig-e2e/template"), "")?;
    let mut before = fs::read(&file)?;
    let mut cold = Counts::default();
    for number in 0..count()? {
        let mut clone = Machine::start(&boot)?;
        clone.agent_connected(clock::seconds(20))?;
        // It has said what it is told is read; no device was driven anew.
        let exits = clone.counters()?.exits;
        equal("exits to the agent's call", 1, exits.values().sum::<u64>())?;
        let counts = Counts::of(i32::try_from(clone.pid())?);
        let agent = Agent::new(clone.take_agent()?)?;
        agent.ping()?;
        jailed(&clone, "of a clone")?;
        if number == 0 {
            cold = counts;
            template::record(&file, &clone)?;
            before = fs::read(&file)?;
        } else {
            that(
                &format!(
                    "what the first clone has touched costs the others few faults: {} after {}",
                    counts.faults, cold.faults
                ),
                counts.faults * 3 < cold.faults,
            )?;
        }
    }
    ensure!(fs::read(&file)? == before, "the template has changed");
    Ok(())
}

fn without_the_cpus_numbers(_: &mut Suite) -> Result<()> {
    let hidden = "clearcpuid=rdrand,rdseed random.trust_cpu=off";
    let directory = Path::new("/run/brig-e2e/template-random");
    let (boot, _) = capture(directory, hidden)?;
    let mut seen = BTreeSet::new();
    let clones = count()?;
    for _ in 0..clones {
        let mut clone = Machine::start(&boot)?;
        clone.agent_connected(clock::seconds(20))?;
        let agent = Agent::new(clone.take_agent()?)?;
        let flags = agent.look(&["cat", "/proc/cpuinfo"])?;
        that(
            "the guest's kernel does not use the CPU's random numbers",
            flags.contains("sse2") && !flags.contains("rdrand"),
        )?;
        for file in ["uuid", "boot_id"] {
            let path = format!("/proc/sys/kernel/random/{file}");
            let value = agent.look(&["cat", &path])?;
            ensure!(seen.insert(value.clone()), "two clones have {value}");
        }
    }
    equal("numbers", 2 * clones, seen.len())
}

fn scribbled(_: &mut Suite) -> Result<()> {
    let directory = Path::new("/run/brig-e2e/template-scribbled");
    fs::create_dir_all(directory)?;
    let kernel = directory.join("vmlinux");
    fs::write(&kernel, scribbler::vmlinux())?;
    let mut boot = Boot::installed(&directory.join("log"));
    boot.kernel = kernel;
    boot.memory = scribbler::MEMORY;
    boot.share = false;
    let (boot, file) = template::capture(boot, directory, |_| Ok(()))?;
    let before = fs::read(&file)?;
    // The last one begins when the others have written everything.
    for at_once in [3, 1] {
        let mut clones = Vec::new();
        for _ in 0..at_once {
            clones.push(Machine::start(&boot)?);
        }
        for mut clone in clones {
            let end = powered_off(&mut clone)?;
            equal("the end of a clone", VmmExit::Code(exit::POWER_OFF), end)?;
        }
        ensure!(fs::read(&file)? == before, "the template has changed");
    }
    fs::remove_dir_all(directory)?;
    Ok(())
}

/// How a VM ends that runs for a while.
fn powered_off(machine: &mut Machine) -> Result<VmmExit> {
    loop {
        if let Next::Ended(end) = machine.next(clock::seconds(30))? {
            return Ok(end);
        }
    }
}

fn another_cpu(_: &mut Suite) -> Result<()> {
    let directory = Path::new("/run/brig-e2e/template-cpu");
    let (boot, file) = capture(directory, "")?;
    let mut bytes = fs::read(&file)?;
    // The number of the first leaf of what the captured CPU said of itself.
    let name = br#""cpuid":[["#;
    let found = bytes.windows(name.len()).position(|window| window == name);
    let digit = found.context("no CPUID in the head")? + name.len();
    bytes[digit] = if bytes[digit] == b'9' { b'8' } else { b'9' };
    fs::write(&file, bytes)?;
    let refused = match Machine::start(&boot) {
        Ok(_) => bail!("a clone goes on as another CPU"),
        Err(error) => format!("{error:#}"),
    };
    contains(
        "the VMM's answer",
        "this host's CPU is another one",
        &refused,
    )?;
    fs::remove_dir_all(directory)?;
    Ok(())
}
