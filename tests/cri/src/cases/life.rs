//! The life of a node: containerd restarts, VMs die, pods come and go.

use std::fs;

use anyhow::{Context, Result, ensure};
use brig_tests::node::check::{equal, that};
use brig_tests::node::clock;
use k8s_cri::v1::ContainerState;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::client::Cri;
use crate::container::eventually;
use crate::node;
use crate::pod::PodSpec;
use crate::suite::{Case, SLEEP, Suite, case, not_here, smoke};

pub const CASES: &[Case] = &[
    smoke(
        "life",
        "containerd restarted: pods run on, exec and logs too",
        containerd_restart,
    ),
    smoke(
        "life",
        "a pod whose sandbox process dies is NotReady and removable",
        sandbox_dies,
    ),
    case(
        "life",
        "four pods one after another leave nothing behind",
        one_after_another,
    ),
    case(
        "life",
        "a pod whose shim is killed is NotReady, removable, and leaves nothing",
        shim_dies,
    ),
    case("life", "eight pods at once", at_once),
];

fn containerd_restart(suite: &mut Suite) -> Result<()> {
    let pod = suite.run("survivor")?;
    let script = "i=0; while :; do i=$((i + 1)); echo line $i; sleep 0.5; done";
    let container = pod.container("main", &["sh", "-c", script]).start()?;
    container.wait_line("line 2")?;
    node::restart_and_reconnect(&suite.cri)?;
    that("the pod is ready", pod.is_ready()?)?;
    let status = container.status()?;
    equal("state", ContainerState::ContainerRunning, status.state())?;
    container.sh("true").context("exec after the restart")?;
    let seen = container.lines()?.len();
    eventually("the log goes on", clock::seconds(3), || {
        Ok((container.lines()?.len() > seen + 2).then_some(()))
    })?;
    let later = pod.container("later", SLEEP).start()?;
    later
        .sh("true")
        .context("a container made after the restart")?;
    container.stop(0)?;
    equal("exit code", 137, container.wait()?.exit_code)
}

/// The process that the sandbox is: runc's pause, Brig's VMM.
pub fn sandbox_pid(pod: &crate::pod::Pod) -> Result<i32> {
    let request = k8s_cri::v1::PodSandboxStatusRequest {
        pod_sandbox_id: pod.id.clone(),
        verbose: true,
    };
    let info = pod
        .cri
        .call("PodSandboxStatus", |mut client| async move {
            client.pod_sandbox_status(request).await
        })?
        .info;
    let info: serde_json::Value = serde_json::from_str(info.get("info").context("no info")?)?;
    let pid = info["pid"]
        .as_i64()
        .context("no pid in the sandbox's info")?;
    Ok(i32::try_from(pid)?)
}

fn sandbox_dies(suite: &mut Suite) -> Result<()> {
    let pod = suite.run("victim")?;
    let container = pod.container("main", SLEEP).start()?;
    let pid = sandbox_pid(&pod)?;
    ensure!(pid > 1, "the sandbox's pid is {pid}");
    kill(Pid::from_raw(pid), Signal::SIGKILL).context("cannot kill the sandbox's process")?;
    eventually("the pod is NotReady", clock::seconds(4), || {
        Ok((!pod.is_ready()?).then_some(()))
    })?;
    if suite.is_brig() {
        // Its containers were in the VM. (runc's live on until kubelet stops them.)
        let status = container.wait()?;
        that("its container has failed", status.exit_code != 0)?;
    }
    pod.stop()?;
    pod.remove()?;
    let again = suite.run("victim")?;
    that("kubelet can start it anew", again.is_ready()?)
}

fn shim_dies(suite: &mut Suite) -> Result<()> {
    if !suite.is_brig() && !suite.containerd.starts_with("1.") {
        return not_here("with runc containerd 2.1 leaves a process and two cgroups there");
    }
    // A pod that may make what all share, so that the rest can be counted.
    drop(suite.run("before")?);
    let before = inventory()?;
    let pod = suite.run("shimless")?;
    let container = pod.container("main", SLEEP).start()?;
    let shim = shim_of(&pod)?;
    kill(Pid::from_raw(shim), Signal::SIGKILL).context("cannot kill the shim")?;
    eventually("the pod is NotReady", clock::seconds(4), || {
        // An error is no answer: kubelet asks again.
        Ok(matches!(pod.is_ready(), Ok(false)).then_some(()))
    })?;
    // Kubelet repeats both until they work.
    eventually("the pod is removed", clock::seconds(4), || {
        Ok(pod.stop().and_then(|()| pod.remove()).ok())
    })
    .with_context(|| format!("{:?}", pod.stop().and_then(|()| pod.remove())))?;
    drop(container);
    drop(pod);
    nothing_left(before)?;
    let again = suite.run("shimless")?;
    that("kubelet can start it anew", again.is_ready()?)
}

/// The shim that has the sandbox's id on its command line.
pub fn shim_of(pod: &crate::pod::Pod) -> Result<i32> {
    for entry in fs::read_dir("/proc")?.flatten() {
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).into_owned();
        if line.contains("containerd-shim") && line.contains(&pod.id) {
            let name = entry.file_name();
            return Ok(name.to_string_lossy().parse()?);
        }
    }
    anyhow::bail!("no shim has {} on its command line", pod.id)
}

/// Mounts, processes and cgroups of the node.
pub fn inventory() -> Result<(usize, usize, usize)> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?.lines().count();
    // Kernel threads come and go; they have no command line.
    let processes = fs::read_dir("/proc")?
        .flatten()
        .filter(|entry| fs::read(entry.path().join("cmdline")).is_ok_and(|line| !line.is_empty()))
        .count();
    let cgroups = count_directories("/sys/fs/cgroup".as_ref());
    Ok((mounts, processes, cgroups))
}

fn count_directories(directory: &std::path::Path) -> usize {
    fs::read_dir(directory).map_or(0, |entries| {
        entries
            .flatten()
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .map(|entry| 1 + count_directories(&entry.path()))
            .sum()
    })
}

fn one_after_another(suite: &mut Suite) -> Result<()> {
    let run_one = |number: u32| -> Result<()> {
        let pod = suite.run("churn")?;
        let script = format!("exit {number}");
        let (_container, status) = pod.container("main", &["sh", "-c", &script]).finish()?;
        equal("exit code", i32::try_from(number)?, status.exit_code)
    };
    // The first may make what all share.
    run_one(0)?;
    let before = inventory()?;
    for number in 1..4 {
        run_one(number).with_context(|| format!("pod {number}"))?;
    }
    nothing_left(before)
}

pub fn nothing_left(before: (usize, usize, usize)) -> Result<()> {
    eventually("nothing is left", clock::seconds(3), || {
        let after = inventory()?;
        Ok((after.0 <= before.0 && after.1 <= before.1 && after.2 <= before.2).then_some(()))
    })
    .with_context(|| {
        format!(
            "(mounts, processes, cgroups): before {before:?}, after {:?}",
            inventory()
        )
    })
}

fn at_once(suite: &mut Suite) -> Result<()> {
    // Eight VMs starting on an emulated CPU are slow, and that is not what is measured.
    suite.forget_shared();
    let threads: Vec<_> = (0..8)
        .map(|number| {
            let handler = suite.handler.clone();
            std::thread::spawn(move || -> Result<String> {
                let cri = std::rc::Rc::new(Cri::connect()?);
                let name = format!("at-once-{number}");
                let pod = PodSpec::new(&handler, &name).run(&cri)?;
                let container = pod.container("main", SLEEP).start()?;
                container.sh("hostname")
            })
        })
        .collect();
    for (number, thread) in threads.into_iter().enumerate() {
        let said = thread
            .join()
            .map_err(|_| anyhow::anyhow!("a thread died"))?
            .with_context(|| format!("pod {number}"))?;
        equal("hostname", format!("at-once-{number}"), said)?;
    }
    Ok(())
}
