//! Devices that come to a running VM and go, with the guest's agent and without a shim: what the VMM and the guest
//! make of it.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use brig_agent_protocol::agent::FoundDevice;
use brig_tests::node::agent::Agent;
use brig_tests::node::check::{equal, that};
use brig_tests::node::clock;
use brig_tests::node::machine::{Boot, Machine};

use crate::suite::{Case, Suite, brig};

/// Comings and goings of one device.
const CYCLES: usize = 120;
/// Devices at once: more than the slots of a bus, which the guest finds as functions.
const AT_ONCE: usize = 100;

pub const CASES: &[Case] = &[brig(
    "plug",
    "disks come to a running VM and go, a hundred times and a hundred at once",
    disks,
)];

/// What a VMM holds of the host, which must be what it was.
#[derive(Debug, PartialEq, Eq)]
struct Held {
    descriptors: usize,
    threads: usize,
}

impl Held {
    fn by(machine: &Machine) -> Result<Self> {
        let count = |what: &str| -> Result<usize> {
            Ok(fs::read_dir(format!("/proc/{}/{what}", machine.pid()))?.count())
        };
        Ok(Self {
            descriptors: count("fd")?,
            threads: count("task")?,
        })
    }

    /// It holds no more than before. A thread that has ended may be seen for a moment, now and when it was counted before.
    fn returns_to(&self, machine: &Machine, after: &str) -> Result<()> {
        let end = Instant::now() + clock::seconds(2);
        loop {
            let now = Self::by(machine)?;
            if now.descriptors <= self.descriptors && now.threads <= self.threads {
                return Ok(());
            }
            ensure!(Instant::now() < end, "{after}: {now:?}, not {self:?}");
            sleep(Duration::from_millis(20));
        }
    }
}

fn disks(_: &mut Suite) -> Result<()> {
    let directory = Path::new("/run/brig-e2e/plug");
    fs::create_dir_all(directory)?;
    let file = disk(directory, "disk", 8 << 20)?;
    let mut boot = Boot::installed(&directory.join("log"));
    // Vectors for a hundred disks.
    boot.vcpus = 2;
    let mut machine = Machine::start(&boot)?;
    machine.agent_connected(clock::seconds(20))?;
    let agent = Agent::new(machine.take_agent()?)?;
    agent.ping()?;

    let mut functions = BTreeSet::new();
    // The first half is not counted: meanwhile the guest starts to use its other devices.
    let mut before = None;
    for cycle in 0..=CYCLES {
        let function = machine.plug_disk(&file, cycle % 2 == 0, "cycle")?;
        let found = find(&agent, function)?;
        equal("its node", "vda", name(&found)?)?;
        agent.remove_device(function)?;
        machine.unplug(function)?;
        functions.insert(function);
        if cycle == CYCLES / 2 {
            before = Some(Held::by(&machine)?);
        }
    }
    let before = before.context("no cycle")?;
    equal("functions used by turns", 1, functions.len())?;
    before.returns_to(&machine, "after the last went")?;

    let mut plugged = Vec::new();
    for _ in 0..AT_ONCE {
        plugged.push(machine.plug_disk(&file, true, "many")?);
    }
    // One scan finds them all.
    let mut names = BTreeSet::new();
    for function in &plugged {
        names.insert(name(&find(&agent, *function)?)?);
    }
    equal("disks of their own names", AT_ONCE, names.len())?;

    // One goes without a word to the guest, while the others stay.
    let lost = plugged.swap_remove(AT_ONCE / 2);
    machine.unplug(lost)?;
    find(&agent, plugged[0])?;
    agent.remove_device(lost)?;
    that(
        "a function that went is not found",
        agent.find_device(lost, clock::seconds(1)).is_err(),
    )?;
    let again = machine.unplug(lost).err().map(|error| error.to_string());
    ensure!(
        again
            .as_ref()
            .is_some_and(|text| text.contains("no device was plugged")),
        "a second removal was answered {again:?}"
    );

    // Until something runs out: with its numbers, and the rest goes on.
    let refused = loop {
        match machine.plug_disk(&file, true, "more") {
            Ok(function) => plugged.push(function),
            Err(error) => break format!("{error:#}"),
        }
    };
    ensure!(
        refused.contains("interrupt vectors") && refused.contains("360"),
        "{refused}"
    );
    for function in plugged {
        agent.remove_device(function)?;
        machine.unplug(function)?;
    }
    before.returns_to(&machine, "after all went")?;
    agent.ping()
}

fn disk(directory: &Path, name: &str, size: u64) -> Result<PathBuf> {
    let path = directory.join(name);
    fs::File::create(&path)?.set_len(size)?;
    Ok(path)
}

fn find(agent: &Agent, function: u8) -> Result<FoundDevice> {
    let found = agent.find_device(function, clock::seconds(6))?;
    equal("its driver", "virtio-pci", found.driver.as_str())?;
    Ok(found)
}

fn name(found: &FoundDevice) -> Result<String> {
    let node = found.nodes.first().context("no node")?;
    ensure!(node.block, "not a block device: {node:?}");
    Ok(node.name.clone())
}
