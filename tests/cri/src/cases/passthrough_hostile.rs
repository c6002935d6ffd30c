//! A guest whose root drives a device of the node without a driver: what it does is `passthrough_hostile.py`, judged from
//! outside.

use std::fs;

use anyhow::{Context, Result};
use brig_tests::node::check::{equal, that};
use brig_tests::node::given::{Given, NVME};

use super::handlers::Own;
use super::life::sandbox_pid;
use super::passthrough::{only_brig, with};
use crate::node::{self, TOOLS};
use crate::pod::PodSpec;
use crate::suite::{Case, SLEEP, Suite, case};

pub const CASES: &[Case] = &[case(
    "passthrough",
    "a guest that moves a device's BARs, its interrupts and its DMA anywhere reaches nothing, and the device works",
    hostile,
)];

const SCRIPT: &str = include_str!("passthrough_hostile.py");
/// What a device may write to the node's log for itself is the IOMMU's: one line for each refused access, bounded there.
const FAULTS: &str = "dmesg | grep -c 'fault addr'; true";

fn faults() -> Result<u64> {
    Ok(node::run("sh", &["-c", FAULTS])?.trim().parse()?)
}

/// Events that a process has. Its other descriptors are files that the guest knows, and Python reads many.
fn events(pid: i32) -> Result<usize> {
    let all = fs::read_dir(format!("/proc/{pid}/fd"))?.flatten();
    let targets = all.filter_map(|entry| fs::read_link(entry.path()).ok());
    Ok(targets
        .filter(|target| target.to_string_lossy().contains("[eventfd]"))
        .count())
}

fn hostile(suite: &mut Suite) -> Result<()> {
    only_brig(suite)?;
    suite.image(TOOLS)?;
    let (given, bystanders) = (Given::nth(NVME, 0)?, Given::nth(NVME, 1)?);
    let text = format!("devices = [\"{}\"]\nmemory = \"256MiB\"\n", given.address);
    let _own = Own::new(suite, &text, &[])?;
    let other = suite.run("bystander")?;
    let bystander = with(other.container("main", SLEEP), &[&bystanders]).start()?;
    bystander.sh("echo untouched > $(ls /dev/nvme?n1) && sync")?;
    let pod = PodSpec::new(Own::HANDLER, "hostile")
        .security(|security| security.privileged = true)
        .run(&suite.cri)?;
    let attacker = pod
        .container("attacker", SLEEP)
        .image(TOOLS.0)
        .security(|security| security.privileged = true)
        .start()?;
    let vmm = sandbox_pid(&pod)?;
    let (held, refused) = (events(vmm)?, faults()?);
    for seed in 0..3 {
        let attack = attacker.exec(&["env", &format!("SEED={seed}"), "python3", "-c", SCRIPT])?;
        equal("the attack's end", "survived", attack.text().as_str())
            .with_context(|| format!("seed {seed}: {}", attack.stderr))?;
        that("the pod lives", pod.is_ready()?)?;
    }
    let now = faults()?;
    that(
        &format!("the IOMMU has refused DMA: {refused} faults before, {now} after"),
        now > refused,
    )?;
    // A vector that the guest has unmasked keeps its event.
    let after = events(vmm)?;
    that(
        &format!("events stay {held} and one for each of 65 vectors, not {after}"),
        after <= held + 65,
    )?;
    let user = pod.container("user", SLEEP).start()?;
    user.sh("echo works > $(ls /dev/nvme?n1) && sync")
        .context("a driver that keeps to the rules")?;
    equal(
        "it works",
        "works",
        user.sh("head -n 1 $(ls /dev/nvme?n1)")?,
    )?;
    equal(
        "another pod's device",
        "untouched",
        bystander.sh("head -n 1 $(ls /dev/nvme?n1)")?,
    )?;
    drop((attacker, user));
    drop(pod);
    given.is_with("vfio-pci")?;
    let next = suite.run("after-hostile")?;
    let reader = with(next.container("main", SLEEP), &[&given]).start()?;
    equal(
        "the next pod",
        "works",
        reader.sh("head -n 1 $(ls /dev/nvme?n1)")?,
    )
}
