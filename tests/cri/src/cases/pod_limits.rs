//! What the cgroup that kubelet makes for a pod limits, beside what its containers are told: memory and CPUs of the whole pod
//! (`spec.resources`), processes (`podPidsLimit`), and CPUs that are a pod's own.

use anyhow::{Context, Result};
use brig_tests::node::check::{contains, equal, that};
use k8s_cri::v1::LinuxContainerResources;

use crate::container::Container;
use crate::pod::Pod;
use crate::suite::{Case, SLEEP, Suite, case, not_here};

pub const CASES: &[Case] = &[
    case(
        "resources",
        "pod level: containers that are each told the pod's limit read files in a pod of that size",
        told_the_pods,
    ),
    case(
        "resources",
        "pod level: a limit of processes holds for all of the pod's containers together",
        processes,
    ),
    case(
        "resources",
        "a pod with CPUs of its own, and one that only asks for some, has them",
        own_cpus,
    ),
];

const MIB: i64 = 1 << 20;
/// Of the pod.
const LIMIT: i64 = 300 * MIB;

fn limit(memory: i64) -> LinuxContainerResources {
    LinuxContainerResources {
        memory_limit_in_bytes: memory,
        memory_swap_limit_in_bytes: memory,
        ..LinuxContainerResources::default()
    }
}

fn total(container: &Container) -> Result<i64> {
    let kib: i64 = container
        .sh("awk '/^MemTotal:/ { print $2 }' /proc/meminfo")?
        .parse()?;
    Ok(kib / 1024)
}

fn told_the_pods(suite: &mut Suite) -> Result<()> {
    // With the 194 MiB of the class's overhead.
    let pod = suite
        .pod("pod-level")
        .memory_limit("518M")
        .linux(|linux| linux.resources = Some(limit(LIMIT)))
        .run(&suite.cri)?;
    let start = |name| -> Result<Container> {
        let container = pod.container(name, SLEEP);
        container.resources(|told| *told = limit(LIMIT)).start()
    };
    let all = [start("a")?, start("b")?, start("c")?];
    if suite.is_brig() {
        let mib = total(&all[0])?;
        that(
            &format!("its kernel has {mib} MiB: what the pod may use"),
            mib < 420,
        )?;
    }
    // More than the pod's limit in all: what was read first has to go from the cache.
    for container in &all {
        let script = "head -c 125829120 /dev/zero >/f && cat /f >/dev/null && cat /f >/dev/null";
        container.sh(script).context("120 MiB, written and read")?;
    }
    all[0]
        .update(limit(310 * MIB))
        .context("ten MiB more than the pod may use")?;
    for container in &all {
        let status = container.status()?;
        equal("its exit code", 0, status.exit_code)?;
        equal("its reason", "", status.reason.as_str())?;
        container.sh("true")?;
    }
    that("the pod is ready", pod.is_ready()?)
}

fn processes(suite: &mut Suite) -> Result<()> {
    let pod = suite.pod("pod-pids").pids_limit("128").run(&suite.cri)?;
    let first = pod.container("first", SLEEP).start()?;
    let error = first.sh_fails("for i in $(seq 200); do sleep 20 & done; wait")?;
    contains("the error", "can't fork", &error)?;
    that("the pod is ready", pod.is_ready()?)
}

fn own_cpus(suite: &mut Suite) -> Result<()> {
    let node = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    if node < 2 {
        return not_here("the node has one CPU");
    }
    let run = |suite: &Suite, name: &str, told: LinuxContainerResources| -> Result<Pod> {
        let pod = suite.pod(name);
        pod.linux(|linux| linux.resources = Some(told))
            .run(&suite.cri)
    };
    // As kubelet's static CPU manager says it, for a request without a limit, and for one beside a sidecar that has a limit: the
    // pod's quota is the sidecar's then.
    for (name, of_pod, quota, cpuset) in [
        ("own-cpus", -1, -1, "0-1"),
        ("asks-cpus", 0, 0, ""),
        ("beside-a-limit", 50_000, 0, ""),
    ] {
        let told = |quota| LinuxContainerResources {
            cpu_period: 100_000,
            cpu_quota: quota,
            cpu_shares: 2048,
            ..LinuxContainerResources::default()
        };
        let pod = run(suite, name, told(of_pod))?;
        let container = pod
            .container("main", SLEEP)
            .resources(|wanted| {
                *wanted = told(quota);
                cpuset.clone_into(&mut wanted.cpuset_cpus);
            })
            .start()?;
        let has: usize = container.sh("nproc")?.parse()?;
        that(
            &format!("{name}: a container may use {has} CPUs, two at least"),
            has >= 2,
        )?;
    }
    Ok(())
}
