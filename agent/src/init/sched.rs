//! Scheduling: CPU affinity, policy, I/O priority, personality and NUMA policy.
use std::io;

use serde_json::Value;

use super::failure::{Context as _, Failure, Result};
use crate::spec::{IoPriority, Personality, Process, Scheduler};

/// Refuses names that nothing maps to.
///
/// # Errors
/// A sentence naming the field.
pub fn check(process: &Process) -> std::result::Result<(), String> {
    if let Some(scheduler) = &process.scheduler {
        attributes(scheduler)?;
    }
    if let Some(priority) = &process.io_priority {
        io_priority(priority)?;
    }
    if let Some(affinity) = &process.exec_cpu_affinity {
        cpu_list(&affinity.initial)?;
        cpu_list(&affinity.final_)?;
    }
    Ok(())
}

/// `execCPUAffinity.initial`: before the cgroup is joined. Of an exec: it is not for a container's init process.
pub fn set_initial_affinity(process: &Process) -> Result<()> {
    match &process.exec_cpu_affinity {
        Some(affinity) => set_affinity(&affinity.initial),
        None => Ok(()),
    }
}

/// `execCPUAffinity.final`, of an exec in the container's cgroup; without one the container's.
pub fn set_final_affinity(process: &Process) -> Result<()> {
    match &process.exec_cpu_affinity {
        Some(affinity) if !affinity.final_.trim().is_empty() => set_affinity(&affinity.final_),
        _ => reset_affinity(),
    }
}

/// In the container's cgroup: all CPUs that its cpuset allows, whatever was inherited. The kernel takes of the CPUs asked for
/// those that are there, and follows the cpuset from then on.
pub fn reset_affinity() -> Result<()> {
    let mut all = nix::sched::CpuSet::new();
    for cpu in 0..nix::sched::CpuSet::count() {
        all.set(cpu).during("the affinity to CPUs")?;
    }
    nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &all)
        .during("the affinity to CPUs")
}

/// The rest of it, in the container's cgroup.
pub fn apply(
    process: &Process,
    personality: Option<&Personality>,
    memory_policy: Option<&Value>,
) -> Result<()> {
    if let Some(scheduler) = &process.scheduler {
        let attributes = attributes(scheduler).map_err(Failure::from)?;
        // SAFETY: the attributes are a live sched_attr that says its own size; 0 is this thread.
        let result = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
        check_result(result, "process.scheduler")?;
    }
    if let Some(priority) = &process.io_priority {
        let value = io_priority(priority).map_err(Failure::from)?;
        const WHO_PROCESS: libc::c_int = 1;
        // SAFETY: ioprio_set takes integers only.
        let result = unsafe { libc::syscall(libc::SYS_ioprio_set, WHO_PROCESS, 0, value) };
        check_result(result, "process.ioPriority")?;
    }
    if let Some(personality) = personality {
        let domain: libc::c_ulong = match personality.domain.as_str() {
            "LINUX" => 0,
            "LINUX32" => 8,
            other => {
                return Err(Failure::from(format!(
                    "linux.personality.domain {other:?} is not known"
                )));
            }
        };
        // SAFETY: personality takes an integer only.
        let result = unsafe { libc::personality(domain) };
        check_result(result.into(), "linux.personality")?;
    }
    if memory_policy.is_some() {
        return Err(Failure::from(
            "linux.memoryPolicy is not supported: a guest has one NUMA node".to_owned(),
        ));
    }
    Ok(())
}

fn check_result(result: libc::c_long, what: &str) -> Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error()).during(what)
    } else {
        Ok(())
    }
}

fn set_affinity(list: &str) -> Result<()> {
    let cpus = cpu_list(list).map_err(Failure::from)?;
    if cpus.is_empty() {
        return Ok(());
    }
    let mut set = nix::sched::CpuSet::new();
    for cpu in cpus {
        set.set(cpu).during("process.execCPUAffinity")?;
    }
    nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &set)
        .during("process.execCPUAffinity")
}

/// `0-3,7` as numbers.
fn cpu_list(list: &str) -> std::result::Result<Vec<usize>, String> {
    let bad = || format!("process.execCPUAffinity {list:?} is not a list of CPUs");
    let mut cpus = Vec::new();
    for part in list.split(',').map(str::trim).filter(|p| !p.is_empty()) {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        let from: usize = from.parse().map_err(|_| bad())?;
        let to: usize = to.parse().map_err(|_| bad())?;
        if to >= nix::sched::CpuSet::count() || from > to {
            return Err(bad());
        }
        cpus.extend(from..=to);
    }
    Ok(cpus)
}

/// struct sched_attr, version 0 (sched_setattr(2)).
#[repr(C)]
#[derive(Debug)]
struct SchedAttr {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

fn attributes(scheduler: &Scheduler) -> std::result::Result<SchedAttr, String> {
    let policy = match scheduler.policy.as_str() {
        "SCHED_OTHER" => 0,
        "SCHED_FIFO" => 1,
        "SCHED_RR" => 2,
        "SCHED_BATCH" => 3,
        "SCHED_ISO" => 4,
        "SCHED_IDLE" => 5,
        "SCHED_DEADLINE" => 6,
        other => return Err(format!("process.scheduler.policy {other:?} is not known")),
    };
    let mut flags = 0;
    for flag in &scheduler.flags {
        flags |= match flag.as_str() {
            "SCHED_FLAG_RESET_ON_FORK" => 1,
            "SCHED_FLAG_RECLAIM" => 2,
            "SCHED_FLAG_DL_OVERRUN" => 4,
            "SCHED_FLAG_KEEP_POLICY" => 8,
            "SCHED_FLAG_KEEP_PARAMS" => 16,
            "SCHED_FLAG_UTIL_CLAMP_MIN" => 32,
            "SCHED_FLAG_UTIL_CLAMP_MAX" => 64,
            other => return Err(format!("process.scheduler.flags {other:?} is not known")),
        };
    }
    Ok(SchedAttr {
        size: 48,
        policy,
        flags,
        nice: scheduler.nice,
        priority: scheduler.priority,
        runtime: scheduler.runtime,
        deadline: scheduler.deadline,
        period: scheduler.period,
    })
}

fn io_priority(priority: &IoPriority) -> std::result::Result<i32, String> {
    let class = match priority.class.as_str() {
        "IOPRIO_CLASS_RT" => 1,
        "IOPRIO_CLASS_BE" => 2,
        "IOPRIO_CLASS_IDLE" => 3,
        other => return Err(format!("process.ioPriority.class {other:?} is not known")),
    };
    if !(0..=7).contains(&priority.priority) {
        return Err(format!(
            "process.ioPriority.priority {} is not in 0 to 7",
            priority.priority
        ));
    }
    Ok(class << 13 | priority.priority)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn cpu_lists_are_ranges_and_numbers() {
        assert_eq!(cpu_list("0-2, 5").unwrap(), [0, 1, 2, 5]);
        assert!(cpu_list("").unwrap().is_empty());
        for bad in ["3-1", "x", "0-99999999", "-"] {
            assert!(cpu_list(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_scheduler_attributes_have_the_size_the_kernel_expects() {
        assert_eq!(size_of::<SchedAttr>(), 48);
    }

    #[test]
    fn unknown_names_are_refused() {
        assert!(
            attributes(&Scheduler {
                policy: "SCHED_X".into(),
                ..Scheduler::default()
            })
            .is_err()
        );
        assert_eq!(
            io_priority(&IoPriority {
                class: "IOPRIO_CLASS_BE".into(),
                priority: 4
            }),
            Ok(2 << 13 | 4)
        );
        assert!(
            io_priority(&IoPriority {
                class: "IOPRIO_CLASS_BE".into(),
                priority: 9
            })
            .is_err()
        );
    }

    proptest! {
        #[test]
        fn any_text_is_a_list_or_an_error(text in "[0-9,\\- x]{0,20}") {
            if let Ok(cpus) = cpu_list(&text) {
                prop_assert!(cpus.iter().all(|c| *c < nix::sched::CpuSet::count()));
            }
        }
    }
}
