//! Disks of pods with several CPUs: a queue for each, and what limits hold for all of them.

use std::path::Path;

use anyhow::{Context, Result};
use brig_hypervisor::control::Counters;
use brig_tests::node::check::{equal, that};
use serde_json::Value;

use super::block::{number, volume};
use super::handlers::Own;
use crate::container::Container;
use crate::loops::Loop;
use crate::node::{self, Directory};
use crate::pod::{Pod, PodSpec};
use crate::suite::{Case, SLEEP, Suite, case};

pub const CASES: &[Case] = &[
    case(
        "volumes",
        "raw block volume: a queue for each CPU, each used, a limit holds for all of them together",
        queues,
    ),
    case(
        "volumes",
        "raw block volume: in a guest that goes on from a template a queue for each CPU that the pod has, each used",
        queues_of_a_clone,
    ),
];

const MIB: u64 = 1 << 20;

/// Has both CPUs write to `/dev/data` at once, each its own half, by the script that is returned.
fn both_write(pod: &Pod, container: &Container, disk: &Loop) -> Result<(String, f64)> {
    let number = number(container)?;
    let count = format!("ls -d /sys/dev/block/{number}/mq/* | wc -l");
    equal("queues", "2", container.sh(&count)?)?;
    let half = |cpu: u32| {
        format!(
            "yes cpu-{cpu} | taskset {mask:x} dd of=/dev/data bs=64k count=32 seek={seek} iflag=fullblock oflag=direct conv=notrunc 2>/dev/null",
            mask = 1 << cpu,
            seek = 32 * cpu
        )
    };
    let both = format!("{} & {}; wait", half(0), half(1));
    let taken = seconds(container, &both)?;
    for (cpu, offset) in [(0, 0), (1, 2 * MIB)] {
        let there = disk.read(offset, 6)?;
        equal(
            "on the node",
            format!("cpu-{cpu}\n"),
            String::from_utf8_lossy(&there),
        )?;
    }
    let counted = served(pod)?;
    that(
        &format!("both queues have served requests and interrupted: {counted:?}"),
        counted.len() == 2
            && counted
                .iter()
                .all(|(chains, interrupts)| *chains > 16 && *interrupts > 0),
    )?;
    Ok((both, taken))
}

/// The template of a handler's file, made now and dropped at the end.
struct Template(String);

impl Template {
    fn of(file: &Path) -> Result<Self> {
        let file = file.display().to_string();
        let built = node::run("brig", &["template", "build", "--json", "--config", &file])?;
        let built: Value = serde_json::from_str(&built)?;
        let key = built["template"].as_str().context("a template's key")?;
        Ok(Self(key.to_owned()))
    }
}

impl Drop for Template {
    fn drop(&mut self) {
        let _ = node::run("brig", &["template", "drop", &self.0]);
    }
}

fn queues_of_a_clone(suite: &mut Suite) -> Result<()> {
    // A guest is captured with one CPU; the other comes to it when it goes on.
    let own = Own::new(suite, "vcpus = 2\nmax_vcpus = 2\ntemplate = true\n", &[])?;
    let template = Template::of(own.file())?;
    let directory = Directory::new("block-queues")?;
    let disk = Loop::new(&directory.path.join("disk"), 8 * MIB)?;
    let pod = PodSpec::new(Own::HANDLER, "block-clone").run(&suite.cri)?;
    let container = pod
        .container("main", SLEEP)
        .edit(volume(&disk, "/dev/data", "mrw"))
        .start()?;
    let told = node::run("brig", &["inspect", "--json", &pod.id])?;
    let told: Value = serde_json::from_str(&told)?;
    equal(
        "what it goes on from",
        template.0.as_str(),
        told["shim"]["template"].as_str().unwrap_or("-"),
    )?;
    equal("its CPUs", "2", container.sh("nproc")?)?;
    both_write(&pod, &container, &disk)?;
    container.remove()?;
    drop(pod);
    disk.freed()
}

fn queues(suite: &mut Suite) -> Result<()> {
    let _own = Own::new(suite, "vcpus = 2\n", &[])?;
    let directory = Directory::new("block-queues")?;
    let disk = Loop::new(&directory.path.join("disk"), 8 * MIB)?;
    let pod = PodSpec::new(Own::HANDLER, "block-queues")
        .security(|security| security.privileged = true)
        .run(&suite.cri)?;
    let container = pod
        .container("main", SLEEP)
        .security(|security| security.privileged = true)
        .edit(volume(&disk, "/dev/data", "mrw"))
        .start()?;
    let (both, unlimited) = both_write(&pod, &container, &disk)?;
    let number = number(&container)?;

    // 4 MiB at half of one a second, in a group below the container's own, which has no processes then.
    let limited = container.sh(&format!(
        "cd /sys/fs/cgroup; mkdir rest limited
        for pid in $(cat cgroup.procs); do echo $pid > rest/cgroup.procs 2>/dev/null; done
        echo +io > cgroup.subtree_control && echo '{number} wbps={limit}' > limited/io.max || exit 1
        echo $$ > limited/cgroup.procs; before=$(cut -d. -f1 /proc/uptime)
        {both}
        echo $(($(cut -d. -f1 /proc/uptime) - before))",
        limit = MIB / 2
    ))?;
    let limited: f64 = limited.parse()?;
    that(
        &format!("{limited} s with the limit are six at least, where {unlimited} s are without"),
        limited >= 6.0,
    )?;
    container.remove()?;
    disk.freed()
}

/// What a script takes by the clock of its guest.
fn seconds(container: &Container, script: &str) -> Result<f64> {
    let uptime = || -> Result<f64> { Ok(container.sh("cut -d' ' -f1 /proc/uptime")?.parse()?) };
    let before = uptime()?;
    container.sh(script)?;
    Ok(uptime()? - before)
}

/// Requests and interrupts of each queue of the pod's only disk.
fn served(pod: &Pod) -> Result<Vec<(u64, u64)>> {
    let counters: Counters = serde_json::from_str(&node::run("brig", &["counters", &pod.id])?)?;
    let mut disks = counters
        .devices
        .into_iter()
        .filter(|one| one.device == "block");
    let disk = disks.next().context("no disk")?;
    that("one disk", disks.next().is_none())?;
    Ok(disk.queues)
}
