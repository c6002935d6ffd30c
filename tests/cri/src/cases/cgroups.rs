//! Whose cgroup pays for what.

use std::fs;

use anyhow::{Context, Result};
use brig_tests::node::check::{contains, that};

use super::life::sandbox_pid;
use super::shutdown::processes;
use crate::suite::{Case, Suite, case};

pub const CASES: &[Case] = &[
    case(
        "resources",
        "a limit of processes holds",
        limit_of_processes,
    ),
    case(
        "resources",
        "the pod's cgroup holds all that runs for it",
        all_in_the_pods_cgroup,
    ),
];

fn limit_of_processes(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let script = "echo up; while :; do sleep 1; done";
    let container = shared
        .pod
        .container("pids", &["sh", "-c", script])
        .resources(|wanted| {
            wanted
                .unified
                .insert("pids.max".to_owned(), "16".to_owned());
        })
        .start()?;
    container.wait_line("up")?;
    let error = container.sh_fails("for i in $(seq 40); do sleep 20 & done; wait")?;
    contains("the error", "can't fork", &error)?;
    shared
        .container
        .sh("for i in $(seq 40); do sleep 1 & done; wait")
        .context("its neighbour has no such limit")
        .map(drop)
}

/// Kubelet sets the pod's limits there, and the overhead of its RuntimeClass is part of them.
fn all_in_the_pods_cgroup(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let metadata = shared.pod.config.metadata.as_ref();
    let uid = &metadata.context("no metadata")?.uid;
    let mut pids = vec![sandbox_pid(&shared.pod)?];
    if suite.is_brig() {
        // The shim too. (runc's is containerd's.)
        pids.extend(processes(&shared.pod)?.iter().map(|pid| pid.as_raw()));
        that("the shim and the VMM are found", pids.len() > 2)?;
    }
    for pid in pids {
        let cgroup = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
        contains(&format!("the cgroup of process {pid}"), uid, &cgroup)?;
    }
    Ok(())
}
