//! Devices that a handler's configuration names: there when the guest boots, for all containers of its pods. And what a
//! node does to a device that a pod has.

use std::fs;

use anyhow::{Context, Result};
use brig_tests::node::check::{contains, equal, that};
use brig_tests::node::clock;
use brig_tests::node::given::{E1000E, Given, NVME};

use super::handlers::Own;
use super::life::sandbox_pid;
use super::passthrough::{only_brig, with};
use crate::container::eventually;
use crate::node;
use crate::pod::{Pod, PodSpec};
use crate::suite::{Case, SLEEP, Suite, case};

pub const CASES: &[Case] = &[
    case(
        "passthrough",
        "a handler's list: there from the start, for all containers, the next free one for the next pod",
        list,
    ),
    case(
        "passthrough",
        "a handler's list that cannot be had is refused with the reason",
        list_refused,
    ),
    case(
        "passthrough",
        "a device that the node takes back under load is an I/O error in the pod, and the node's again",
        taken_back,
    ),
];

/// KiB of a process that are pinned.
pub(super) fn pinned(pid: i32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmLck:"));
    let number = line.and_then(|line| line.split_ascii_whitespace().next());
    Ok(number.context("no VmLck")?.parse()?)
}

fn listed(suite: &Suite, name: &str) -> Result<Pod> {
    PodSpec::new(Own::HANDLER, name).run(&suite.cri)
}

fn list(suite: &mut Suite) -> Result<()> {
    only_brig(suite)?;
    let (one, two) = (Given::nth(NVME, 0)?, Given::nth(NVME, 1)?);
    let text = "devices = [\"1b36:0010\"]\nmemory = \"192MiB\"\n";
    let _own = Own::new(suite, text, &[])?;
    let first = listed(suite, "listed")?;
    // Before there is a container.
    let locked = pinned(sandbox_pid(&first)?)?;
    that(
        &format!("all of 192 MiB is pinned, not {locked} KiB"),
        locked >= 192 << 10,
    )?;
    let writer = first.container("writer", SLEEP).start()?;
    let serial = "cat /sys/class/nvme/nvme0/serial";
    equal("the first free one", "brig", writer.sh(serial)?)?;
    writer.sh("test -b /dev/nvme0n1 && echo mine > /dev/nvme0n1 && sync")?;
    let reader = first.container("reader", SLEEP).start()?;
    equal("for all", "mine", reader.sh("head -n 1 /dev/nvme0n1")?)?;
    let balloons = "ls -d /sys/bus/virtio/drivers/virtio_balloon/virtio* 2>/dev/null | wc -l";
    equal("balloons", "0", reader.sh(balloons)?)?;
    // Asked for besides, it is the same one.
    let both = with(first.container("both", SLEEP), &[&one]).start()?;
    equal("once more", "mine", both.sh("head -n 1 /dev/nvme0n1")?)?;
    both.sh("! test -e /dev/vfio && ! test -e /dev/iommu")?;

    let second = listed(suite, "listed-next")?;
    let other = second.container("main", SLEEP).start()?;
    equal("the next free one", "brig2", other.sh(serial)?)?;
    let third = match listed(suite, "listed-none") {
        Ok(_) => anyhow::bail!("a pod without a device was started"),
        Err(error) => format!("{error:#}"),
    };
    contains(
        "no more",
        "device 1b36:0010 (devices of Brig's configuration)",
        &third,
    )?;
    for given in [&one, &two] {
        let held = format!("({}) is in use by another pod", given.address);
        contains("each with its reason", &held, &third)?;
    }
    drop((writer, reader, both));
    first.stop()?;
    drop(first);
    let again = listed(suite, "listed-again")?;
    let container = again.container("main", SLEEP).start()?;
    equal(
        "free again",
        "mine",
        container.sh("head -n 1 /dev/nvme0n1")?,
    )
}

fn list_refused(suite: &mut Suite) -> Result<()> {
    only_brig(suite)?;
    // Elsewhere it is the node that is refused.
    Given::nth(NVME, 0)?;
    let refused = |name: &str, limit: Option<&'static str>| -> Result<String> {
        let spec = PodSpec::new(Own::HANDLER, name);
        let spec = match limit {
            Some(limit) => spec.memory_limit(limit),
            None => spec,
        };
        match spec.run(&suite.cri) {
            Ok(_) => anyhow::bail!("{name} was started"),
            Err(error) => Ok(format!("{error:#}")),
        }
    };
    {
        let _own = Own::new(suite, "devices = [\"0000:77:00.0\"]\n", &[])?;
        let said = refused("list-missing", None)?;
        contains(
            "none there",
            "device 0000:77:00.0 (devices of Brig's configuration): ",
            &said,
        )?;
    }
    {
        let _own = Own::new(suite, "devices = [\"gpu\"]\n", &[])?;
        let said = refused("list-wrong", None)?;
        contains("no device's name", "\"gpu\" names no PCI device", &said)?;
    }
    let given = Given::take(E1000E)?;
    let text = format!("devices = [\"{}\"]\nmemory = \"192MiB\"\n", given.address);
    let _own = Own::new(suite, &text, &[])?;
    let said = refused("list-limited", Some("134217728"))?;
    for part in [
        "all 192 MiB",
        "66 MiB are missing",
        "is limited to 128 MiB",
        "overhead",
    ] {
        contains("a limit below the VM's size", part, &said)?;
    }
    let address = given.address.clone();
    drop(given);
    let held = Given::bind(&address, "uio_pci_generic")?;
    let said = refused("list-held", None)?;
    contains(
        "held by the node",
        "the node uses it (uio_pci_generic",
        &said,
    )?;
    contains("held by the node", "bind it to vfio-pci", &said)?;
    drop(held);
    Ok(())
}

fn taken_back(suite: &mut Suite) -> Result<()> {
    only_brig(suite)?;
    let (given, other) = (Given::nth(NVME, 0)?, Given::nth(NVME, 1)?);
    let pod = suite.run("taken-back")?;
    let script = "n=0; while dd if=/dev/zero of=$(ls /dev/nvme?n1) bs=64k count=64 oflag=direct 2>/tmp/said; do \
                  n=$((n + 1)); echo round $n; done; cat /tmp/said; echo over; exec sleep 1000000";
    let load = with(pod.container("load", &["sh", "-c", script]), &[&given]).start()?;
    let neighbour = with(pod.container("neighbour", SLEEP), &[&other]).start()?;
    load.wait_line("round 3")?;
    let numbers = load.sh("stat -c '%t %T' $(ls /dev/nvme?n1)")?;
    // As an operator does; it returns when the device is free.
    fs::write("/sys/bus/pci/drivers/vfio-pci/unbind", &given.address).context("unbinding")?;
    equal("the device's driver", None, given.driver())?;
    eventually("the load ends", clock::seconds(6), || {
        Ok(load
            .lines()?
            .iter()
            .any(|line| line.text == "over")
            .then_some(()))
    })?;
    let lines = load.lines()?;
    let said = lines.iter().map(|line| line.text.as_str());
    let said: Vec<_> = said.filter(|text| !text.starts_with("round")).collect();
    that(
        &format!("an error is told: {said:?}"),
        said.iter().any(|text| {
            ["error", "No space", "No such", "can't open"]
                .iter()
                .any(|word| text.contains(word))
        }),
    )?;
    that("the pod is ready", pod.is_ready()?)?;
    // Its number may be another one's soon.
    let refused = load.sh_fails(&format!(
        "set -- {numbers}; mknod /gone b $((0x$1)) $((0x$2)) && : < /gone"
    ))?;
    contains("its number is nobody's", "not permitted", &refused)?;
    neighbour.sh("test -b $(ls /dev/nvme?n1 | tail -n 1) && head -c 4096 $(ls /dev/nvme?n1 | tail -n 1) > /dev/null")?;
    // The node's driver takes it up.
    fs::write(given.directory().join("driver_override"), "\n")?;
    node::run("modprobe", &["nvme"])?;
    fs::write("/sys/bus/pci/drivers_probe", &given.address)?;
    equal("its driver", Some("nvme"), given.driver().as_deref())?;
    let said = match with(pod.container("late", SLEEP), &[&given]).start() {
        Ok(_) => anyhow::bail!("a device that the node has was given"),
        Err(error) => format!("{error:#}"),
    };
    // Its node in /dev has gone with it, which containerd finds out itself.
    contains("it is not there to be given", &given.node(), &said)
}
