//! Statistics: the same questions get answers of the same kind from every handler.

use anyhow::{Context, Result};
use brig_tests::node::check::{equal, that};
use brig_tests::node::clock;
use k8s_cri::v1::{
    ContainerStatsFilter, ListContainerStatsRequest, ListPodSandboxStatsRequest,
    PodSandboxStatsFilter, UInt64Value,
};

use crate::container::eventually;
use crate::suite::{Case, SLEEP, Suite, between, case, smoke};

pub const CASES: &[Case] = &[
    case(
        "stats",
        "container: processor time grows with work",
        container_cpu,
    ),
    case(
        "stats",
        "container: the working set is that of its memory",
        container_memory,
    ),
    smoke(
        "stats",
        "container: the figures are those of its cgroup",
        container_exact,
    ),
    case(
        "stats",
        "container: the writable layer's bytes are told",
        writable_layer,
    ),
    smoke(
        "stats",
        "the sandbox's process has the pod's network figures",
        process_network,
    ),
    case("stats", "containers of a pod are listed by its id", listed),
    smoke(
        "stats",
        "pod: processor, memory and processes are told",
        pod,
    ),
    case(
        "stats",
        "pod: network counters grow with traffic",
        pod_network,
    ),
];

fn value(field: Option<&UInt64Value>) -> u64 {
    field.map_or(0, |field| field.value)
}

fn container_cpu(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let used = || -> Result<u64> {
        let stats = shared.container.stats()?;
        let cpu = stats.cpu.context("no cpu statistics")?;
        Ok(value(cpu.usage_core_nano_seconds.as_ref()))
    };
    let before = used()?;
    that("time was used before", before > 0)?;
    let work = "t=$(cut -d. -f1 /proc/uptime); while [ $(cut -d. -f1 /proc/uptime) -lt $((t + 3)) ]; do :; done";
    shared.container.sh(work)?;
    // Cached for a second or so.
    eventually("half a second more", clock::seconds(2), || {
        Ok((used()? > before + 500_000_000).then_some(()))
    })
}

fn container_memory(suite: &mut Suite) -> Result<()> {
    const MIB: u64 = 1 << 20;
    let pod = suite.run("memory-stats")?;
    let container = pod
        .container("main", SLEEP)
        .resources(|wanted| wanted.memory_limit_in_bytes = 128 << 20)
        .start()?;
    // What it writes to a tmpfs is charged to it and stays.
    container.sh("head -c 33554432 /dev/zero > /dev/shm/fill")?;
    eventually("a working set of 32 MiB", clock::seconds(3), || {
        let memory = container.stats()?.memory.context("no memory statistics")?;
        let working_set = value(memory.working_set_bytes.as_ref());
        Ok((working_set >= 30 * MIB).then_some(working_set))
    })
    .and_then(|working_set| between("working set", 30 * MIB, 48 * MIB, working_set))
}

/// The same question asked of the container's own cgroup: before, and after, so that the answer lies
/// between.
fn container_exact(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let ask = || -> Result<(u64, u64)> {
        let script = "awk '/^usage_usec/ { print $2 }' /sys/fs/cgroup/cpu.stat; cat /sys/fs/cgroup/memory.current; awk '/^inactive_file/ { print $2 }' /sys/fs/cgroup/memory.stat";
        let said = shared.container.sh(script)?;
        let numbers = said
            .lines()
            .map(str::parse)
            .collect::<Result<Vec<u64>, _>>()?;
        match numbers.as_slice() {
            [cpu, memory, inactive] => Ok((cpu * 1000, memory - inactive)),
            _ => anyhow::bail!("three numbers, not '{said}'"),
        }
    };
    // Some anonymous memory and page cache to tell apart.
    shared
        .container
        .sh("head -c 8388608 /dev/zero > /filled; cat /filled > /dev/null; rm /filled; head -c 8388608 /dev/zero > /dev/shm/filled")?;
    let before = ask()?;
    // What was asked before may be a second old or so.
    std::thread::sleep(std::time::Duration::from_secs(2));
    let stats = shared.container.stats()?;
    let after = ask()?;
    shared.container.sh("rm /dev/shm/filled")?;
    let cpu = stats.cpu.context("no cpu statistics")?;
    between(
        "processor time in ns",
        before.0,
        after.0,
        value(cpu.usage_core_nano_seconds.as_ref()),
    )?;
    let memory = stats.memory.context("no memory statistics")?;
    // An exec's own pages come and go between the three looks.
    const SLACK: u64 = 2 << 20;
    between(
        "working set",
        before.1.min(after.1).saturating_sub(SLACK),
        before.1.max(after.1) + SLACK,
        value(memory.working_set_bytes.as_ref()),
    )
}

fn writable_layer(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let container = shared.pod.container("layer", SLEEP).start()?;
    container.sh("head -c 3145728 /dev/zero > /three; sync")?;
    // containerd looks at snapshots every ten seconds.
    eventually("three MiB", clock::seconds(4), || {
        let layer = container
            .stats()?
            .writable_layer
            .context("no writable layer")?;
        let used = value(layer.used_bytes.as_ref());
        Ok((3 << 20..6 << 20).contains(&used).then_some(()))
    })
}

/// Kubelet's own reading: `/proc/PID/net/dev` of the process that containerd names.
fn process_network(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let pid = super::life::sandbox_pid(&shared.pod)?;
    let received = || -> Result<u64> {
        let table = std::fs::read_to_string(format!("/proc/{pid}/net/dev"))?;
        let line = table
            .lines()
            .find_map(|line| line.trim().strip_prefix("eth0:"))
            .context("no eth0")?;
        Ok(line
            .split_whitespace()
            .next()
            .context("no figure")?
            .parse()?)
    };
    let before = received()?;
    shared
        .container
        .sh("ping -c 2 -i 0.2 -s 1000 -W 20 10.88.0.1")?;
    let after = received()?;
    that(
        &format!("bytes received grew by 2,000 or more: {before}, then {after}"),
        after >= before + 2_000,
    )?;
    // cAdvisor adds up all but these.
    let table = std::fs::read_to_string(format!("/proc/{pid}/net/dev"))?;
    let names = table
        .lines()
        .skip(2)
        .filter_map(|line| line.split(':').next());
    let names = names.map(str::trim).filter(|name| {
        let ignored = ["lo", "veth", "docker"];
        !ignored.iter().any(|prefix| name.starts_with(prefix))
    });
    equal(
        "interfaces that count",
        vec!["eth0"],
        names.collect::<Vec<_>>(),
    )
}

fn listed(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let second = shared.pod.container("listed", SLEEP).start()?;
    let request = ListContainerStatsRequest {
        filter: Some(ContainerStatsFilter {
            pod_sandbox_id: shared.pod.id.clone(),
            ..ContainerStatsFilter::default()
        }),
    };
    let all = suite
        .cri
        .call("ListContainerStats", |mut client| async move {
            client.list_container_stats(request).await
        })?
        .stats;
    for id in [&shared.container.id, &second.id] {
        let found = all
            .iter()
            .find(|stats| stats.attributes.as_ref().is_some_and(|it| it.id == *id))
            .with_context(|| format!("{id} is not listed"))?;
        that("with memory", found.memory.is_some())?;
        that("with its writable layer", found.writable_layer.is_some())?;
    }
    Ok(())
}

fn pod(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    // Rates need two samples.
    shared.pod.stats()?;
    let stats = shared.pod.stats()?;
    let linux = stats.linux.context("no Linux statistics")?;
    let cpu = linux.cpu.context("no cpu statistics")?;
    that(
        "processor time",
        value(cpu.usage_core_nano_seconds.as_ref()) > 0,
    )?;
    let memory = linux.memory.context("no memory statistics")?;
    that("working set", value(memory.working_set_bytes.as_ref()) > 0)?;
    let process = linux.process.context("no process statistics")?;
    that("processes", value(process.process_count.as_ref()) > 0)?;
    let main = linux.containers.iter().any(|stats| {
        stats
            .attributes
            .as_ref()
            .is_some_and(|it| it.id == shared.container.id)
    });
    that("its container is in it", main)?;
    let request = ListPodSandboxStatsRequest {
        filter: Some(PodSandboxStatsFilter {
            id: shared.pod.id.clone(),
            ..PodSandboxStatsFilter::default()
        }),
    };
    let all = suite
        .cri
        .call("ListPodSandboxStats", |mut client| async move {
            client.list_pod_sandbox_stats(request).await
        })?
        .stats;
    equal("pods listed by its id", 1, all.len())
}

fn pod_network(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let counters = || -> Result<(u64, u64)> {
        let linux = shared.pod.stats()?.linux.context("no Linux statistics")?;
        let network = linux.network.context("no network statistics")?;
        let interface = network.default_interface.context("no default interface")?;
        equal("its name", "eth0", interface.name.as_str())?;
        Ok((
            value(interface.rx_bytes.as_ref()),
            value(interface.tx_bytes.as_ref()),
        ))
    };
    let before = counters()?;
    shared
        .container
        .sh("ping -c 3 -i 0.2 -s 1000 -W 20 10.88.0.1")?;
    eventually("3,000 bytes each way", clock::seconds(3), || {
        let after = counters()?;
        Ok((after.0 >= before.0 + 3_000 && after.1 >= before.1 + 3_000).then_some(()))
    })
}
