//! Statistics: the same questions get answers of the same kind from every handler.

use anyhow::{Context, Result};
use brig_tests::node::check::{equal, that};
use brig_tests::node::clock;
use k8s_cri::v1::{
    ContainerStatsFilter, ListContainerStatsRequest, ListPodSandboxStatsRequest,
    PodSandboxStatsFilter, UInt64Value,
};

use crate::container::eventually;
use crate::suite::{Case, SLEEP, Suite, between, case};

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
    case("stats", "containers of a pod are listed by its id", listed),
    case(
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
