//! The node shuts down: what a pod's processes get before the lights go out.

use std::fs;

use anyhow::{Context, Result, ensure};
use brig_tests::node::check::equal;
use brig_tests::node::clock;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::life::{inventory, nothing_left};
use crate::container::eventually;
use crate::node::{Directory, WithoutContainerd};
use crate::pod::Pod;
use crate::suite::{Case, Suite, case};

pub const CASES: &[Case] = &[case(
    "life",
    "the node shuts down: SIGTERM reaches the containers, and nothing is left",
    node_shuts_down,
)];

/// The pod's processes on the node: all in its cgroup, and its shim.
pub fn processes(pod: &Pod) -> Result<Vec<Pid>> {
    let uid = &pod.config.metadata.as_ref().context("no metadata")?.uid;
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse() else {
            continue;
        };
        // One that ends meanwhile has neither.
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).into_owned();
        let cgroup = fs::read_to_string(entry.path().join("cgroup")).unwrap_or_default();
        let is_shim = line.contains("containerd-shim") && line.contains(&pod.id);
        // A zombie has a cgroup and no command line.
        if is_shim || (!line.is_empty() && cgroup.contains(uid.as_str())) {
            found.push(Pid::from_raw(pid));
        }
    }
    Ok(found)
}

/// systemd stops containerd, then sends SIGTERM to every process, and SIGKILL later.
fn node_shuts_down(suite: &mut Suite) -> Result<()> {
    // A pod that may make what all share, so that the rest can be counted.
    drop(suite.run("before")?);
    let before = inventory()?;
    let pod = suite.run("shutdown")?;
    let volume = Directory::new("shutdown")?;
    let script =
        "trap 'sleep 1; echo going > /v/said; exit 0' TERM; echo up; while :; do sleep 0.2; done";
    let container = pod
        .container("main", &["sh", "-c", script])
        .mount(&volume.path, "/v")
        .start()?;
    container.wait_line("up")?;
    let stopped = WithoutContainerd::stop(&suite.cri)?;
    let all = processes(&pod)?;
    ensure!(all.len() > 1, "only {all:?} are the pod's processes");
    for pid in &all {
        let _ = kill(*pid, Signal::SIGTERM);
    }
    eventually("the container heeds SIGTERM", clock::seconds(5), || {
        Ok(fs::read_to_string(volume.path.join("said"))
            .ok()
            .filter(|said| !said.is_empty()))
    })
    .and_then(|said| equal("what it says", "going\n", said.as_str()))?;
    if suite.is_brig() {
        // Nothing that outlives SIGTERM holds the shutdown up. (runc's shim does.)
        eventually("all of the pod ends", clock::seconds(5), || {
            Ok(processes(&pod)?.is_empty().then_some(()))
        })
        .with_context(|| format!("{:?} are left", processes(&pod)))?;
    }
    for pid in processes(&pod)? {
        let _ = kill(pid, Signal::SIGKILL);
    }
    drop(stopped);
    // The next boot of a node forgets its pods; this one's kubelet removes them.
    eventually("the pod is NotReady", clock::seconds(4), || {
        Ok(matches!(pod.is_ready(), Ok(false)).then_some(()))
    })?;
    eventually("the pod is removed", clock::seconds(4), || {
        Ok(pod.stop().and_then(|()| pod.remove()).ok())
    })?;
    drop(container);
    drop(pod);
    nothing_left(before)
}
