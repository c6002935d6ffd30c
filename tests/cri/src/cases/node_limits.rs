//! What limits of containers mean for the node, where a VM works for them: its CPUs, and its kernel when somebody has taken the controllers of the
//! pod's cgroup, as systemd does whenever the limits of a pod's slice change.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use brig_tests::node::check::{equal, that};
use brig_tests::node::clock;
use k8s_cri::v1::LinuxContainerResources;

use super::shutdown::processes;
use crate::container::eventually;
use crate::pod::Pod;
use crate::suite::{Case, SLEEP, Suite, case, not_here, refused};

pub const CASES: &[Case] = &[
    case(
        "resources",
        "cpuset: a VM runs on the CPUs of its containers, and on all once one of them may",
        cpuset,
    ),
    case(
        "resources",
        "cpuset: what is held on the node is held again when a pod's cgroup has lost its controllers",
        taken,
    ),
    case(
        "resources",
        "a VM that the node kills for memory is OOMKilled, whatever controllers its cgroup has",
        killed_elsewhere,
    ),
];

fn on(cpus: &str) -> LinuxContainerResources {
    LinuxContainerResources {
        cpuset_cpus: cpus.to_owned(),
        ..LinuxContainerResources::default()
    }
}

fn allowed(pid: &str) -> Result<String> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("Cpus_allowed_list:"))
        .context("no list of CPUs")?;
    Ok(line.trim().to_owned())
}

/// Where the pod's processes on the node may run.
fn runs_on(pod: &Pod) -> Result<String> {
    let lists: Result<BTreeSet<String>> = processes(pod)?
        .iter()
        .map(|pid| allowed(&pid.to_string()))
        .collect();
    let lists: Vec<String> = lists?.into_iter().collect();
    Ok(lists.join(" and "))
}

/// As kubelet's static CPU manager does: at creation, and by an update of whoever shares the rest.
fn cpuset(suite: &mut Suite) -> Result<()> {
    if !suite.is_brig() {
        return not_here("each container has a cgroup of its own");
    }
    let all = allowed("self")?;
    if !all.starts_with("0-") {
        return not_here("the node has one CPU");
    }
    let pod = suite.run("cpuset")?;
    equal(
        "where an empty pod runs",
        all.as_str(),
        runs_on(&pod)?.as_str(),
    )?;
    let wants = |name: &str, cpus: &str| {
        let container = pod.container(name, SLEEP);
        container.resources(|wanted| *wanted = on(cpus)).start()
    };
    let first = wants("first", "1")?;
    equal("with one", "1", runs_on(&pod)?.as_str())?;
    // The guest has no second CPU: it may use all that there are.
    equal("CPUs of the container", "1", first.sh("nproc")?.as_str())?;
    first.update(on("0")).context("another CPU")?;
    equal("after an update", "0", runs_on(&pod)?.as_str())?;
    first
        .update(on("1"))
        .context("and back, in the guest too")?;
    let second = wants("second", "0")?;
    equal("with both", "0-1", runs_on(&pod)?.as_str())?;
    second.update(on("1"))?;
    equal("with both on one", "1", runs_on(&pod)?.as_str())?;
    let free = pod.container("free", SLEEP).start()?;
    equal(
        "with one that may run on all",
        all.as_str(),
        runs_on(&pod)?.as_str(),
    )?;
    free.stop(0)?;
    free.remove()?;
    eventually("it is as without that", clock::seconds(4), || {
        Ok((runs_on(&pod)? == "1").then_some(()))
    })?;
    let wanted = wants("nowhere", "0,4000");
    refused(
        "a CPU that the node has not",
        wanted,
        &["linux.resources.cpu.cpus: the node does not have all of 0-1,4000"],
    )?;
    that("the pod is ready", pod.is_ready()?)
}

/// Takes controllers from all cgroups in the pod's.
fn take(pod: &Pod, controllers: &[&str]) -> Result<()> {
    for controller in controllers {
        let control = pod.cgroup().join("cgroup.subtree_control");
        fs::write(&control, format!("-{controller}")).with_context(|| (*controller).to_owned())?;
    }
    Ok(())
}

/// The cgroup that the shim has made in the pod's.
fn own(pod: &Pod) -> Result<PathBuf> {
    let entries = fs::read_dir(pod.cgroup())?.flatten();
    let mut below = entries
        .map(|entry| entry.path())
        .filter(|path| path.is_dir());
    below.next().context("nothing in the pod's cgroup")
}

fn taken(suite: &mut Suite) -> Result<()> {
    if !suite.is_brig() {
        return not_here("each container has a cgroup of its own");
    }
    let pod = suite.run("taken")?;
    let container = pod.container("main", SLEEP);
    let container = container.resources(|wanted| *wanted = on("0")).start()?;
    let list = own(&pod)?.join("cpuset.cpus");
    equal("the list", "0", fs::read_to_string(&list)?.trim())?;
    take(&pod, &["cpuset"])?;
    eventually("the list is there again", clock::seconds(4), || {
        let text = fs::read_to_string(&list).unwrap_or_default();
        Ok((text.trim() == "0").then_some(()))
    })?;
    // And where the change follows, as kubelet has it: the pod's first, then the container's.
    take(&pod, &["cpuset"])?;
    container.update(on("0"))?;
    equal("the list", "0", fs::read_to_string(&list)?.trim())
}

fn killed_elsewhere(suite: &mut Suite) -> Result<()> {
    if !suite.is_brig() {
        return not_here("the node kills the container's own process");
    }
    // The kernel counts memory apart, unseen, as long as it does I/O.
    let all: [&[&str]; 3] = [&[], &["memory"], &["io", "memory"]];
    for taken in all {
        let pod = suite.pod("killed").memory_limit("120M").run(&suite.cri)?;
        take(&pod, taken)?;
        let seen = own(&pod)?.join("memory.events").exists();
        equal(
            "whether its own cgroup tells of kills",
            taken.is_empty(),
            seen,
        )?;
        let script = ["sh", "-c", "exec tail -c 120000000 /dev/zero"];
        let (_container, status) = pod.container("greedy", &script).finish()?;
        let told = (status.exit_code, status.reason.as_str());
        equal(
            &format!("its end without {taken:?}"),
            (137, "OOMKilled"),
            told,
        )?;
        eventually("the pod is not ready", clock::seconds(4), || {
            Ok((!pod.is_ready()?).then_some(()))
        })?;
    }
    Ok(())
}
