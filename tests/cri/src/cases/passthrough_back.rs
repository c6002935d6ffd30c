//! A device comes back from a pod by whatever death: free, with the driver that it had, and of use to the next pod and to
//! the node. One loop over the deaths.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use brig_tests::node::check::equal;
use brig_tests::node::clock;
use brig_tests::node::given::{Given, NVME};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::life::{sandbox_pid, shim_of};
use super::passthrough::{only_brig, with};
use crate::container::{Container, eventually};
use crate::node;
use crate::pod::Pod;
use crate::suite::{Case, Suite, case};

pub const CASES: &[Case] = &[case(
    "passthrough",
    "a device comes back by whatever death of its pod, and the next pod and the node can use it",
    loops,
)];

/// How a pod ends.
#[derive(Debug, Clone, Copy)]
enum Death {
    /// As kubelet ends it.
    Stopped,
    Vmm,
    Shim,
    /// The guest's kernel panics, and the agent with it.
    Guest,
    /// While the device is on its way to the container.
    VmmEarly,
    ShimEarly,
}

const DEATHS: [Death; 6] = [
    Death::Vmm,
    Death::ShimEarly,
    Death::Guest,
    Death::VmmEarly,
    Death::Shim,
    Death::Stopped,
];

/// Rounds; `BRIG_PASSTHROUGH_ROUNDS` makes it more.
fn rounds() -> usize {
    let rounds = std::env::var("BRIG_PASSTHROUGH_ROUNDS").ok();
    rounds
        .and_then(|text| text.parse().ok())
        .unwrap_or(DEATHS.len())
}

fn loops(suite: &mut Suite) -> Result<()> {
    only_brig(suite)?;
    let given = Given::take(NVME)?;
    let mut written = None;
    let deaths = DEATHS.iter().cycle().take(rounds());
    for (round, death) in deaths.enumerate() {
        round_of(suite, &given, (round, *death), &mut written)
            .with_context(|| format!("round {round}, {death:?}"))?;
        free(&given).with_context(|| format!("after round {round}, {death:?}"))?;
    }
    let address = given.address.clone();
    drop(given);
    node::run("modprobe", &["nvme"])?;
    let disks = format!("/sys/bus/pci/devices/{address}/nvme");
    let line = eventually("the node's driver has it", clock::seconds(4), || {
        let names = fs::read_dir(&disks).into_iter().flatten().flatten();
        let mut names = names.map(|entry| entry.file_name().to_string_lossy().into_owned());
        let Some(name) = names.next() else {
            return Ok(None);
        };
        Ok(node::run("head", &["-n", "1", &format!("/dev/{name}n1")]).ok())
    })?;
    equal("what the node reads", written, Some(line.trim().to_owned()))
}

fn round_of(
    suite: &Suite,
    given: &Given,
    (round, death): (usize, Death),
    written: &mut Option<String>,
) -> Result<()> {
    let pod = suite.run("comes-back")?;
    let (vmm, shim) = (sandbox_pid(&pod)?, shim_of(&pod)?);
    let early = match death {
        Death::VmmEarly => Some(vmm),
        Death::ShimEarly => Some(shim),
        _ => None,
    };
    if let Some(victim) = early {
        // Another moment in each turn of the deaths.
        let turn = u32::try_from(round % 17)? + 1;
        let moment = Duration::from_millis(50).mul_f64(clock::scale()) * turn;
        let killer = std::thread::spawn(move || {
            std::thread::sleep(moment);
            kill(Pid::from_raw(victim), Signal::SIGKILL)
        });
        // It may have been in time, or not.
        let started = container(&pod, given);
        killer
            .join()
            .map_err(|_| anyhow::anyhow!("the killer panicked"))??;
        drop(started);
        return gone(&pod);
    }
    let main = container(&pod, given)?;
    if let Some(before) = written {
        let found = main.sh("head -n 1 $(ls /dev/nvme?n1)")?;
        equal("what the last pod wrote", before.as_str(), found.as_str())?;
    }
    let text = format!("round {round}");
    main.sh(&format!("echo {text} > $(ls /dev/nvme?n1) && sync"))?;
    *written = Some(text);
    // In use when it dies.
    main.sh("(while :; do cat $(ls /dev/nvme?n1); done) > /dev/null 2>&1 & sleep 0.2")?;
    match death {
        Death::Stopped => pod.stop()?,
        Death::Guest => {
            let _ = main.exec_within(&["sh", "-c", "echo c > /proc/sysrq-trigger"], 5);
        }
        Death::Shim => kill(Pid::from_raw(shim), Signal::SIGKILL)?,
        _ => kill(Pid::from_raw(vmm), Signal::SIGKILL)?,
    }
    gone(&pod)
}

fn container(pod: &Pod, given: &Given) -> Result<Container> {
    let spec = pod.container("main", crate::suite::SLEEP);
    with(spec, &[given])
        .security(|security| security.readonly_paths.clear())
        .start()
}

/// As kubelet does: again until it works.
fn gone(pod: &Pod) -> Result<()> {
    eventually("the pod is removed", clock::seconds(6), || {
        Ok(pod.stop().and_then(|()| pod.remove()).ok())
    })
}

/// Nobody holds it; it has been reset when somebody can.
fn free(given: &Given) -> Result<()> {
    given.is_with("vfio-pci")?;
    eventually("nobody has it", clock::seconds(3), || {
        Ok(given.is_free()?.then_some(()))
    })
}
