//! Devices that kubelet has assigned to a pod's containers, in the VM when its guest boots (`pod_resources` of a handler).

use std::fs;
use std::path::Path;

use anyhow::Result;
use brig_tests::node::check::{contains, equal, that};
use brig_tests::node::given::{Given, NVME};
use serde_json::json;

use super::handlers::Own;
use super::life::sandbox_pid;
use super::passthrough::{only_brig, with};
use super::passthrough_list::pinned;
use crate::kubelet::{Assignment, Kubelet};
use crate::pod::PodSpec;
use crate::suite::{Case, SLEEP, Suite, case};

pub const CASES: &[Case] = &[case(
    "passthrough",
    "what kubelet has assigned is there when the guest boots, and one container's alone",
    assigned,
)];

const SOCKET: &str = "/run/brig-cri-kubelet.sock";
const NAMES: &str = "/etc/cdi/brig-assigned.json";
/// KiB of the handler's memory.
const MEMORY: u64 = 192 << 10;

/// Gone at the end.
struct File(&'static str);

impl Drop for File {
    fn drop(&mut self) {
        let _ = fs::remove_file(self.0);
    }
}

fn assigned(suite: &mut Suite) -> Result<()> {
    only_brig(suite)?;
    let (one, two) = (Given::nth(NVME, 0)?, Given::nth(NVME, 1)?);
    let text = format!("pod_resources = \"{SOCKET}\"\nmemory = \"192MiB\"\n");
    let _own = Own::new(suite, &text, &[])?;
    let run = |name: &str| PodSpec::new(Own::HANDLER, name).run(&suite.cri);
    let assignment = |pod, resource, id| Assignment {
        pod,
        container: "main",
        resource,
        id,
    };
    // One is known by its address, the other one by the CDI name that its plugin has for it.
    let names = json!({"cdiVersion": "0.5.0", "kind": "brig.io/nvme", "devices": [
        {"name": "two", "containerEdits": {"deviceNodes": [{"path": two.node()}]}}]});
    fs::create_dir_all("/etc/cdi")?;
    let _names = File(NAMES);
    fs::write(NAMES, names.to_string())?;
    let _socket = File(SOCKET);
    let kubelet = Kubelet::start(
        Path::new(SOCKET),
        &[
            assignment("assigned", "brig.io/other", one.address.as_str()),
            assignment("assigned", "brig.io/unknown", "7"),
            assignment("by-name", "brig.io/nvme", "two"),
        ],
    )?;
    let pod = run("assigned")?;
    let locked = pinned(sandbox_pid(&pod)?)?;
    that(
        &format!("all of {MEMORY} KiB is pinned before there is a container, not {locked}"),
        locked >= MEMORY,
    )?;
    let other = pod.container("other", SLEEP).start()?;
    other.sh("! ls /dev/nvme?n1")?;
    for round in 0..2 {
        let main = with(pod.container("main", SLEEP), &[&one]).start()?;
        equal("a disk", "1", main.sh("ls /dev/nvme?n1 | wc -l")?)?;
        let said = main.sh(&format!(
            "echo round {round} > /dev/nvme0n1 && sync && head -n 1 /dev/nvme0n1"
        ))?;
        equal("what is read", format!("round {round}"), said)?;
        other.sh("! ls /dev/nvme?n1")?;
        let balloons = "ls -d /sys/bus/virtio/drivers/virtio_balloon/virtio* 2>/dev/null | wc -l";
        equal("balloons", "0", main.sh(balloons)?)?;
        main.remove()?;
    }
    // Beside it one that kubelet has not assigned comes hot.
    let both = with(pod.container("both", SLEEP), &[&one, &two]).start()?;
    equal("disks", "2", both.sh("ls /dev/nvme?n1 | wc -l")?)?;
    drop((both, other));
    pod.stop()?;
    drop(pod);

    let pod = run("by-name")?;
    let locked = pinned(sandbox_pid(&pod)?)?;
    that(&format!("by its CDI name: {locked} KiB"), locked >= MEMORY)?;
    let main = with(pod.container("main", SLEEP), &[&two]).start()?;
    equal(
        "its serial",
        "brig2",
        main.sh("cat /sys/class/nvme/nvme0/serial")?,
    )?;
    let refused = match with(run("none")?.container("late", SLEEP), &[&two]).start() {
        Ok(_) => anyhow::bail!("a device of another pod was given"),
        Err(error) => format!("{error:#}"),
    };
    contains("in another pod", "in use by another pod", &refused)?;
    drop(main);
    pod.stop()?;
    drop(pod);

    // A pod that kubelet has assigned nothing to is as any other.
    let plain = run("plain")?;
    equal("KiB pinned", 0, pinned(sandbox_pid(&plain)?)?)?;
    drop(plain);
    drop(kubelet);
    fs::remove_file(SOCKET)?;
    let refused = match run("unanswered") {
        Ok(_) => anyhow::bail!("a pod was started although kubelet could not be asked"),
        Err(error) => format!("{error:#}"),
    };
    contains("the refusal", SOCKET, &refused)?;
    contains(
        "the refusal",
        "pod_resources of Brig's configuration",
        &refused,
    )
}
