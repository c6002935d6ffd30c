//! Guests that go on from a template, without a shim: what a capture keeps, and what a clone is.

use std::fs::{self, File};
use std::io::{Seek as _, copy};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use brig_hypervisor::control::{Event, exit};
use brig_hypervisor::jail::audit::{self, Extent};
use brig_hypervisor::launch::VmmExit;
use brig_tests::node::agent::Agent;
use brig_tests::node::check::equal;
use brig_tests::node::clock;
use brig_tests::node::machine::{Boot, Machine, Next};
use rustix::fs::{MemfdFlags, memfd_create};

use crate::suite::{Case, Suite, brig};

pub const CASES: &[Case] = &[brig(
    "template",
    "a guest that was captured goes on in its clones, all within the jail, and they leave the template as it was",
    clones,
)];

/// Captures the installed guest into a file.
fn capture(directory: &Path) -> Result<(Boot, PathBuf)> {
    fs::create_dir_all(directory)?;
    let mut boot = Boot::installed(&directory.join("log"));
    boot.memory = 128 << 20;
    boot.cmdline = "brig_capture=1".to_owned();
    let mut captured = File::from(memfd_create("brig-capture", MemfdFlags::CLOEXEC)?);
    boot.capture = Some(captured.try_clone()?);
    let mut machine = Machine::start(&boot)?;
    jailed(&machine, "of a guest that is captured")?;
    loop {
        match machine.next(clock::seconds(20))? {
            Next::Event(Event::Ended { code, reason }) => {
                ensure!(
                    code == exit::CAPTURED,
                    "the VMM ended with {code}: {reason}"
                );
            }
            Next::Event(_) => {}
            Next::Ended(end) => {
                ensure!(end == VmmExit::Code(exit::CAPTURED), "{end:?}");
                break;
            }
        }
    }
    let file = directory.join("template");
    captured.rewind()?;
    copy(&mut captured, &mut File::create(&file)?)?;
    boot.capture = None;
    boot.cmdline = String::new();
    boot.template = Some(file.clone());
    Ok((boot, file))
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
    let (boot, file) = capture(Path::new("/run/brig-e2e/template"))?;
    let before = fs::read(&file)?;
    for _ in 0..3 {
        let mut clone = Machine::start(&boot)?;
        clone.agent_connected(clock::seconds(20))?;
        // It has said what it is told is read; no device was driven anew.
        let exits = clone.counters()?.exits;
        equal("exits to the agent's call", 1, exits.values().sum::<u64>())?;
        let agent = Agent::new(clone.take_agent()?)?;
        agent.ping()?;
        jailed(&clone, "of a clone")?;
    }
    ensure!(fs::read(&file)? == before, "the template has changed");
    Ok(())
}
