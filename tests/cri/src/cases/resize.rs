//! In-place resize beyond the size that a pod's VM was started with: up, down, refused, under load.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use brig_tests::node::check::{equal, that};
use brig_tests::node::{clock, memory};
use k8s_cri::v1::LinuxContainerResources;

use super::handlers::Own;
use crate::container::{Container, eventually};
use crate::pod::{Pod, PodSpec};
use crate::suite::{Case, SLEEP, Suite, case, not_here, refused, smoke};

pub const CASES: &[Case] = &[
    smoke(
        "resources",
        "resize: limits grow beyond the VM's size and shrink again, the memory with them",
        up_and_down,
    ),
    case(
        "resources",
        "resize: a container that starts later may use all of its limit",
        later,
    ),
    case(
        "resources",
        "resize: more than the node has is refused, the old limits stay",
        too_much,
    ),
    case(
        "resources",
        "resize: beside a limit that no node has",
        beside_too_much,
    ),
    case(
        "resources",
        "resize: a limit that is taken away takes nothing",
        taken_away,
    ),
    case(
        "resources",
        "resize: beyond its new memory a container is OOMKilled, its neighbour lives",
        oom,
    ),
    case(
        "resources",
        "resize: CPUs come online with a limit that needs them and go with it",
        cpus,
    ),
    case(
        "resources",
        "resize: up and down again and again under load",
        again_and_again,
    ),
];

const MIB: i64 = 1 << 20;
/// How often in the last case; `BRIG_RESIZES` says otherwise.
const RESIZES: u32 = 6;

fn limit(memory: i64) -> LinuxContainerResources {
    LinuxContainerResources {
        memory_limit_in_bytes: memory,
        memory_swap_limit_in_bytes: memory,
        ..LinuxContainerResources::default()
    }
}

fn max(container: &Container) -> Result<i64> {
    Ok(container.sh("cat /sys/fs/cgroup/memory.max")?.parse()?)
}

fn has(container: &Container, bytes: i64) -> Result<()> {
    equal("memory.max", bytes, max(container)?)
}

/// What the kernel of the container has, in MiB.
fn total(container: &Container) -> Result<i64> {
    let kib: i64 = container
        .sh("awk '/^MemTotal:/ { print $2 }' /proc/meminfo")?
        .parse()?;
    Ok(kib / 1024)
}

/// The end of what all TCP sockets may have.
fn socket_pages(container: &Container) -> Result<i64> {
    Ok(container
        .sh("awk '{ print $3 }' /proc/sys/net/ipv4/tcp_mem")?
        .parse()?)
}

/// The process whose mappings are the guest's memory.
fn vmm(pod: &Pod) -> Result<i32> {
    let procs = fs::read_to_string(pod.cgroup().join("cgroup.procs")).unwrap_or_default();
    let mut pids: Vec<i32> = procs.lines().filter_map(|pid| pid.parse().ok()).collect();
    for entry in fs::read_dir(pod.cgroup())?.flatten() {
        let below = fs::read_to_string(entry.path().join("cgroup.procs")).unwrap_or_default();
        pids.extend(below.lines().filter_map(|pid| pid.parse::<i32>().ok()));
    }
    let vmm = pids.into_iter().find(|pid| {
        fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "brig-vmm")
    });
    vmm.context("no brig-vmm in the pod's cgroup")
}

/// KiB of it that are resident.
pub fn resident(pod: &Pod) -> Result<u64> {
    Ok(memory::of(vmm(pod)?, 0)?.rss)
}

/// KiB of it that were resident when most were. What a program has freed may be the node's again before it can be asked.
fn most_resident(pod: &Pod) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{}/status", vmm(pod)?))?;
    let most = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix("kB"))
        .context("no VmHWM")?;
    Ok(most.trim().parse()?)
}

/// A buffer of so many MiB, written and read. What `dd` fills is memory of its own.
fn use_memory(container: &Container, mib: i64) -> Result<()> {
    let script = format!("dd if=/dev/zero of=/dev/null bs={mib}M count=1 2>&1");
    container.sh(&script).map(drop)
}

fn up_and_down(suite: &mut Suite) -> Result<()> {
    let pod = suite.run("resize")?;
    let container = pod
        .container("main", SLEEP)
        .resources(|wanted| *wanted = limit(64 * MIB))
        .start()?;
    let before = total(&container)?;
    container.update(limit(640 * MIB))?;
    has(&container, 640 * MIB)?;
    use_memory(&container, 600).context("600 MiB of 640")?;
    if !suite.is_brig() {
        return Ok(());
    }
    let grown = total(&container)?;
    that(
        &format!("its kernel had {before} MiB and has {grown}: at least as much as the limit"),
        before < 400 && grown >= 640,
    )?;
    let buffers = socket_pages(&container)?;
    that(
        &format!("TCP's buffers may be {buffers} pages: those of a kernel with {grown} MiB"),
        // 9.37 % of them, less a tenth and what the kernel keeps.
        buffers >= grown * 256 * 8 / 100,
    )?;
    let full = most_resident(&pod)?;
    that(
        &format!("{full} KiB were resident: what was used"),
        full >= 600 * 1024,
    )?;
    container.update(limit(64 * MIB))?;
    has(&container, 64 * MIB)?;
    let shrunk = eventually("the VM shrinks", clock::seconds(30), || {
        let now = total(&container)?;
        Ok((now < grown - 256).then_some(now))
    })?;
    // What was given back is the node's at once; what is free besides is reported every two seconds.
    let left = eventually("the node has its memory back", clock::seconds(10), || {
        let now = resident(&pod)?;
        Ok((now + 400 * 1024 < full).then_some(now))
    })?;
    println!("MemTotal {before} -> {grown} -> {shrunk} MiB; the VMM's RSS {full} -> {left} KiB");
    container.update(limit(512 * MIB))?;
    use_memory(&container, 480).context("480 MiB of 512, the second time")
}

fn later(suite: &mut Suite) -> Result<()> {
    let pod = suite.run("resize-later")?;
    let first = pod.container("first", SLEEP).start()?;
    let before = total(&first)?;
    let second = pod
        .container("second", SLEEP)
        .resources(|wanted| *wanted = limit(512 * MIB))
        .start()?;
    use_memory(&second, 480)?;
    if suite.is_brig() {
        let now = total(&first)?;
        that(
            &format!("the pod's kernel had {before} MiB and has {now}"),
            now >= 512 && before < 400,
        )?;
    }
    Ok(())
}

fn too_much(suite: &mut Suite) -> Result<()> {
    if !suite.is_brig() {
        return not_here("the node's kernel takes any limit");
    }
    let pod = suite.run("resize-refused")?;
    let container = pod
        .container("main", SLEEP)
        .resources(|wanted| *wanted = limit(64 * MIB))
        .start()?;
    let asked = container.update(limit(1 << 42));
    refused("4 TiB", asked, &["may have"])?;
    has(&container, 64 * MIB)?;
    container.update(limit(96 * MIB))?;
    has(&container, 96 * MIB)
}

fn beside_too_much(suite: &mut Suite) -> Result<()> {
    let pod = suite.run("resize-beside")?;
    let _large = pod
        .container("large", SLEEP)
        .resources(|wanted| *wanted = limit(1 << 42))
        .start()?;
    let small = pod
        .container("small", SLEEP)
        .resources(|wanted| *wanted = limit(64 * MIB))
        .start()?;
    small.update(limit(96 * MIB))?;
    has(&small, 96 * MIB)
}

fn taken_away(suite: &mut Suite) -> Result<()> {
    let pod = suite.run("resize-unlimited")?;
    let container = pod
        .container("main", SLEEP)
        .resources(|wanted| *wanted = limit(64 * MIB))
        .start()?;
    container.update(limit(512 * MIB))?;
    container.update(limit(-1))?;
    equal(
        "memory.max",
        "max",
        container.sh("cat /sys/fs/cgroup/memory.max")?,
    )?;
    // By then the VM would have shrunk.
    std::thread::sleep(Duration::from_secs(3));
    use_memory(&container, 480).context("480 MiB of what it could use before")
}

fn oom(suite: &mut Suite) -> Result<()> {
    let pod = suite.run("resize-oom")?;
    let neighbour = pod.container("neighbour", SLEEP).start()?;
    let greedy = pod
        .container(
            "greedy",
            &[
                "sh",
                "-c",
                "until [ -e /go ]; do sleep 0.1; done; exec tail -c 560000000 /dev/zero",
            ],
        )
        .resources(|wanted| *wanted = limit(64 * MIB))
        .start()?;
    greedy.update(limit(512 * MIB))?;
    has(&greedy, 512 * MIB)?;
    greedy.sh("touch /go")?;
    let status = greedy.wait_within(clock::seconds(60))?;
    equal(
        "exit code and reason",
        (137, "OOMKilled"),
        (status.exit_code, status.reason.as_str()),
    )?;
    neighbour.sh("true").context("the neighbour")?;
    that("the pod is ready", pod.is_ready()?)
}

fn quota(cpus: f64) -> LinuxContainerResources {
    #[expect(clippy::cast_possible_truncation, reason = "a few CPUs")]
    let cpu_quota = (cpus * 100_000.0) as i64;
    LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota,
        ..LinuxContainerResources::default()
    }
}

fn cpus(suite: &mut Suite) -> Result<()> {
    let _own = Own::new(suite, "max_vcpus = 3\n", &[])?;
    let pod = PodSpec::new(Own::HANDLER, "resize-cpus").run(&suite.cri)?;
    let container = pod
        .container("main", SLEEP)
        .resources(|wanted| *wanted = quota(0.5))
        .start()?;
    let count = |container: &Container| container.sh("nproc");
    equal("CPUs at first", "1", count(&container)?)?;
    container.update(quota(2.5))?;
    equal("CPUs of 2.5", "3", count(&container)?)?;
    let busy = "for i in 1 2 3; do (i=0; while [ $i -lt 2000 ]; do i=$((i+1)); done) & done; wait";
    container.sh(busy)?;
    let ran = container.sh("grep -c '^cpu[0-9]' /proc/stat")?;
    equal("CPUs that have run", "3", ran)?;
    refused("four CPUs", container.update(quota(4.0)), &["may have 3"])?;
    equal(
        "cpu.max",
        "250000 100000",
        container.sh("cat /sys/fs/cgroup/cpu.max")?,
    )?;
    for (wanted, expected) in [(1.5, "2"), (0.5, "1"), (2.0, "2"), (1.0, "1")] {
        container.update(quota(wanted))?;
        eventually(
            &format!("{expected} CPUs for {wanted}"),
            clock::seconds(20),
            || Ok((count(&container)? == expected).then_some(())),
        )?;
        container.sh(busy)?;
    }
    Ok(())
}

/// A container writes all the time while its limit goes up and down, and loses nothing.
fn again_and_again(suite: &mut Suite) -> Result<()> {
    let times = std::env::var("BRIG_RESIZES").ok();
    let times = times.map_or(Ok(RESIZES), |times| times.parse())?;
    let pod = suite.run("resize-loop")?;
    let script = "i=0; while :; do i=$((i+1)); head -c 20000000 /dev/urandom > /tmp/a; cp /tmp/a /tmp/b; \
                  cmp /tmp/a /tmp/b || { echo DIFFERS; exit 1; }; echo round $i; done";
    let container = pod
        .container("main", &["sh", "-c", script])
        .resources(|wanted| *wanted = limit(128 * MIB))
        .start()?;
    for round in 0..times {
        container
            .update(limit(512 * MIB))
            .with_context(|| format!("up, round {round}"))?;
        has(&container, 512 * MIB)?;
        use_memory(&container, 300).with_context(|| format!("300 MiB, round {round}"))?;
        container
            .update(limit(128 * MIB))
            .with_context(|| format!("down, round {round}"))?;
        has(&container, 128 * MIB)?;
        if suite.is_brig() && round % 2 == 1 {
            std::thread::sleep(Duration::from_secs(1));
        }
    }
    container.wait_line("round 2")?;
    that(
        "it goes on",
        !container
            .lines()?
            .iter()
            .any(|line| line.text.contains("DIFFERS")),
    )?;
    equal("its state", 0, container.status()?.exit_code)?;
    that("the pod is ready", pod.is_ready()?)
}
