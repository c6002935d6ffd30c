//! Resources: limits, their updates while the container runs, and the end of one that asks too much.

use std::collections::HashMap;

use anyhow::{Context, Result};
use brig_tests::node::check::{equal, that};
use k8s_cri::v1::{HugepageLimit, LinuxContainerResources};

use crate::suite::{Case, SLEEP, Suite, case, smoke};

pub const CASES: &[Case] = &[
    smoke(
        "resources",
        "limits are in the container's own cgroup",
        limits,
    ),
    smoke("resources", "limits change while it runs", update),
    case(
        "resources",
        "a change of limits of which one is refused changes none",
        refused_update,
    ),
    smoke(
        "resources",
        "beyond its memory: OOMKilled, its neighbour lives",
        oom,
    ),
    case(
        "resources",
        "oom_score_adj and cpu shares are applied",
        scores,
    ),
    case(
        "resources",
        "a pod with a memory limit starts a VM that has it",
        sized,
    ),
    case(
        "resources",
        "a container may use all of a large limit",
        large,
    ),
];

const MIB: i64 = 1 << 20;

fn resources() -> LinuxContainerResources {
    LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: 25_000,
        memory_limit_in_bytes: 48 * MIB,
        // Kubelet names each size its node has, 0 where a container asks for none. (containerd passes it on
        // only with disable_hugetlb_controller = false.)
        hugepage_limits: vec![HugepageLimit {
            page_size: "2MB".to_owned(),
            limit: 0,
        }],
        cpuset_cpus: "0".to_owned(),
        unified: HashMap::from([("memory.high".to_owned(), (40 * MIB).to_string())]),
        ..LinuxContainerResources::default()
    }
}

fn limits(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let container = shared
        .pod
        .container("limits", SLEEP)
        .resources(|wanted| *wanted = resources())
        .start()?;
    let files = [
        "memory.max",
        "memory.high",
        "cpu.max",
        "cpuset.cpus.effective",
    ];
    let script = format!("cd /sys/fs/cgroup && grep -H . {}", files.join(" "));
    equal(
        "limits",
        format!(
            "memory.max:{}\nmemory.high:{}\ncpu.max:25000 100000\ncpuset.cpus.effective:0",
            48 * MIB,
            40 * MIB
        ),
        container.sh(&script)?,
    )
}

fn update(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let container = shared
        .pod
        .container("update", SLEEP)
        .resources(|wanted| *wanted = resources())
        .start()?;
    container.update(LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: 75_000,
        memory_limit_in_bytes: 96 * MIB,
        ..LinuxContainerResources::default()
    })?;
    for (file, value) in [
        ("memory.max", (96 * MIB).to_string()),
        ("cpu.max", "75000 100000".to_owned()),
    ] {
        equal(
            file,
            value,
            container.sh(&format!("cat /sys/fs/cgroup/{file}"))?,
        )?;
    }
    let told = container.status()?.resources.and_then(|all| all.linux);
    if let Some(told) = told {
        equal(
            "ContainerStatus: memory",
            96 * MIB,
            told.memory_limit_in_bytes,
        )?;
    }
    Ok(())
}

fn refused_update(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let container = shared
        .pod
        .container("refused-update", SLEEP)
        .resources(|wanted| *wanted = resources())
        .start()?;
    // The kernel's least quota is 1,000.
    let asked = container.update(LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: 500,
        memory_limit_in_bytes: 96 * MIB,
        ..LinuxContainerResources::default()
    });
    that("a quota of 500 is refused", asked.is_err())?;
    equal(
        "memory.max and cpu.max",
        format!("{}\n25000 100000", 48 * MIB),
        container.sh("cd /sys/fs/cgroup && cat memory.max cpu.max")?,
    )?;
    // The next one is taken.
    container.update(LinuxContainerResources {
        memory_limit_in_bytes: 64 * MIB,
        ..LinuxContainerResources::default()
    })?;
    equal(
        "memory.max",
        (64 * MIB).to_string(),
        container.sh("cat /sys/fs/cgroup/memory.max")?,
    )
}

fn oom(suite: &mut Suite) -> Result<()> {
    let pod = suite.run("oom")?;
    let neighbour = pod.container("neighbour", SLEEP).start()?;
    // `tail` keeps what it reads.
    let script = ["sh", "-c", "exec tail -c 200000000 /dev/zero"];
    let (_container, status) = pod
        .container("greedy", &script)
        .resources(|wanted| {
            wanted.memory_limit_in_bytes = 24 * MIB;
            wanted.memory_swap_limit_in_bytes = 24 * MIB;
        })
        .finish()?;
    equal("exit code", 137, status.exit_code)?;
    equal("reason", "OOMKilled", status.reason.as_str())?;
    neighbour.sh("true").context("the neighbour")?;
    that("the pod is ready", pod.is_ready()?)
}

fn scores(suite: &mut Suite) -> Result<()> {
    let brig = suite.is_brig();
    let shared = suite.shared()?;
    let container = shared
        .pod
        .container("scores", SLEEP)
        .resources(|wanted| {
            wanted.oom_score_adj = 936;
            wanted.cpu_shares = 512;
        })
        .start()?;
    equal(
        "oom_score_adj",
        "936",
        container.sh("cat /proc/1/oom_score_adj")?,
    )?;
    // 512 shares are weight 59 by the conversion of runc from 1.3.2 on, 20 by that of older ones.
    let weight = container.sh("cat /sys/fs/cgroup/cpu.weight")?;
    let of_old = !brig && weight == "20";
    that(
        &format!("cpu.weight is that of 512 shares: {weight}"),
        weight == "59" || of_old,
    )
}

fn sized(suite: &mut Suite) -> Result<()> {
    let pod = suite
        .pod("sized")
        .linux(|linux| {
            linux.resources = Some(LinuxContainerResources {
                cpu_period: 100_000,
                cpu_quota: 100_000,
                memory_limit_in_bytes: 300 * MIB,
                ..LinuxContainerResources::default()
            });
        })
        .run(&suite.cri)?;
    let container = pod
        .container("main", SLEEP)
        .resources(|wanted| wanted.memory_limit_in_bytes = 300 * MIB)
        .start()?;
    equal(
        "memory.max",
        (300 * MIB).to_string(),
        container.sh("cat /sys/fs/cgroup/memory.max")?,
    )?;
    container.sh("head -c 60000000 /dev/zero > /dev/shm/fill && rm /dev/shm/fill")?;
    let total: i64 = container
        .sh("awk '/^MemTotal:/ { print $2 }' /proc/meminfo")?
        .parse()?;
    that(
        "its kernel has at least that much",
        total * 1024 >= 300 * MIB,
    )
}

/// The guest's kernel needs more memory of its own the more it manages: that must not be the container's.
fn large(suite: &mut Suite) -> Result<()> {
    const LIMIT: i64 = 2048 * MIB;
    let pod = suite
        .pod("large")
        .linux(|linux| {
            linux.resources = Some(LinuxContainerResources {
                memory_limit_in_bytes: LIMIT,
                ..LinuxContainerResources::default()
            });
        })
        .run(&suite.cri)?;
    // `dd` fills a buffer of that size; the rest is for its page tables.
    let script = ["dd", "if=/dev/zero", "of=/dev/null", "bs=2030M", "count=1"];
    let (_container, status) = pod
        .container("main", &script)
        .resources(|wanted| {
            wanted.memory_limit_in_bytes = LIMIT;
            wanted.memory_swap_limit_in_bytes = LIMIT;
        })
        .finish()?;
    equal(
        "exit code and reason",
        (0, "Completed"),
        (status.exit_code, status.reason.as_str()),
    )
}
