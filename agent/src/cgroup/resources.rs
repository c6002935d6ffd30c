//! OCI `linux.resources` as writes to cgroup v2 files.
//!
//! The mapping is a pure function from the resources to (file, value) pairs, so that it can be tested
//! without controllers; names and numbers that reach a path are checked here.
use std::{fs, io, path::Path};

use super::{cpuset, file::set, undo::Undo};
use crate::{
    error::{Error, Result},
    spec::{BlockIo, Cpu, Memory, Resources, ThrottleDevice},
};

/// Writes the limits of `resources` into the cgroup directory `path`. The answer names what was left
/// out because it is about the host's processors, in sentences.
///
/// # Errors
/// `InvalidArgument` naming the field that is unsupported or was refused by the kernel; others may have been set.
pub fn apply(path: &Path, resources: &Resources) -> Result<Vec<String>> {
    write(path, resources, |_, _| {})
}

/// As [`apply`], of a cgroup that is in use: `undo` is what brings back what it had.
///
/// # Errors
/// As of [`apply`].
pub fn change(path: &Path, resources: &Resources, undo: &mut Undo) -> Result<Vec<String>> {
    write(path, resources, |file, value| undo.note(path, file, value))
}

fn write(
    path: &Path,
    resources: &Resources,
    mut before: impl FnMut(&str, &str),
) -> Result<Vec<String>> {
    let mut notes = Vec::new();
    if let Some(memory) = resources
        .memory
        .filter(|m| m.check_before_update == Some(true))
    {
        check_usage(path, &memory)?;
    }
    let writes = plan(resources, &|file| fs::read_to_string(path.join(file)).ok())?;
    for (index, (file, value)) in writes.iter().enumerate() {
        before(file, value);
        // The node's numbers (kubelet's CPU manager): the guest has not as many. All it has, then.
        if cpuset::has_list(file) && !cpuset::is_here(file, value) {
            cpuset::clear(path, file).map_err(|e| Error::io(file, e))?;
            notes.push(format!("{file} = {value} is not in the guest"));
            continue;
        }
        match set(&path.join(file), value) {
            Ok(()) => {}
            // It must fit the quota, and the new quota must fit it: the next try has the new one.
            Err(error)
                if file == "cpu.max.burst"
                    && error.raw_os_error() == Some(libc::EINVAL)
                    && writes
                        .iter()
                        .skip(index + 1)
                        .any(|(later, _)| later == file) => {}
            // The weight has two homes, after the I/O scheduler in use.
            Err(_) if file == "io.bfq.weight" => {}
            // Without swap there is nothing to limit; CRI always sends this with a memory limit.
            Err(error) if file == "memory.swap.max" && error.kind() == io::ErrorKind::NotFound => {}
            // kubelet names each page size of its node, also where nothing is asked for.
            Err(error)
                if file.starts_with("hugetlb.")
                    && value == "0"
                    && error.kind() == io::ErrorKind::NotFound => {}
            Err(error) if cpuset::has_list(file) => {
                cpuset::clear(path, file).map_err(|e| Error::io(file, e))?;
                notes.push(format!("{file} = {value} is not in the guest: {error}"));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(Error::InvalidArgument(format!(
                    "the guest kernel has no {file}"
                )));
            }
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {
                return Err(Error::InvalidArgument(format!(
                    "{file} = {value}: the guest has no such device; limits of the node's devices do not reach into it"
                )));
            }
            Err(error) => return Err(Error::InvalidArgument(format!("{file} = {value}: {error}"))),
        }
    }
    Ok(notes)
}

fn check_usage(path: &Path, memory: &Memory) -> Result<()> {
    let usage = fs::read_to_string(path.join("memory.current"))
        .ok()
        .and_then(|t| t.trim().parse::<i64>().ok());
    match (usage, memory.limit) {
        (Some(usage), Some(limit)) if limit > 0 && usage > limit => Err(Error::InvalidArgument(
            format!("memory limit {limit} is below the {usage} bytes in use (checkBeforeUpdate)"),
        )),
        _ => Ok(()),
    }
}

/// The kernel's own of a quota of CPU time, in microseconds.
const DEFAULT_PERIOD: &str = "100000";

type Writes = Vec<(String, String)>;

/// What a file of the cgroup has, if it has one: the other half of what comes by halves.
type InForce<'a> = &'a dyn Fn(&str) -> Option<String>;

/// The writes that express `resources`, in order. What they do not name stays as it is `in_force`, also where two fields of
/// theirs share a file.
///
/// # Errors
/// `InvalidArgument` for what cgroup v2 has no counterpart of.
pub fn plan(resources: &Resources, in_force: InForce<'_>) -> Result<Writes> {
    let mut writes = Writes::new();
    if let Some(memory) = &resources.memory {
        plan_memory(memory, in_force, &mut writes)?;
    }
    if let Some(cpu) = &resources.cpu {
        plan_cpu(cpu, in_force, &mut writes)?;
    }
    // 0 means "not set" to runc and to containerd.
    if let Some(limit) = resources.pids.and_then(|p| p.limit).filter(|l| *l != 0) {
        put(&mut writes, "pids.max", or_max(limit));
    }
    if let Some(block_io) = &resources.block_io {
        plan_block_io(block_io, &mut writes)?;
    }
    for limit in &resources.hugepage_limits {
        if limit.page_size.is_empty() || !limit.page_size.bytes().all(|b| b.is_ascii_alphanumeric())
        {
            return Err(unsupported("hugepageLimits.pageSize", &limit.page_size));
        }
        for kind in ["max", "rsvd.max"] {
            put(
                &mut writes,
                &format!("hugetlb.{}.{kind}", limit.page_size),
                limit.limit.to_string(),
            );
        }
    }
    if resources
        .network
        .as_ref()
        .is_some_and(|n| n.as_object().is_some_and(|o| !o.is_empty()))
    {
        return Err(Error::InvalidArgument(
            "linux.resources.network (classID, priorities) needs cgroup v1".into(),
        ));
    }
    for (device, limit) in &resources.rdma {
        let counts = [
            ("hca_handle", limit.hca_handles),
            ("hca_object", limit.hca_objects),
        ];
        for (key, count) in counts {
            if let Some(count) = count {
                put(&mut writes, "rdma.max", format!("{device} {key}={count}"));
            }
        }
    }
    for (file, value) in &resources.unified {
        // Only controller files: a name with a slash would leave the directory, and cgroup.* moves processes.
        if file.contains('/')
            || !file.contains('.')
            || file.starts_with("cgroup.")
            || file.starts_with('.')
        {
            return Err(unsupported("unified", file));
        }
        // The kernel takes one line at a time of what is kept for each device.
        for line in value.lines().filter(|line| !line.is_empty()) {
            put(&mut writes, file, line.to_owned());
        }
    }
    Ok(writes)
}

fn put(writes: &mut Writes, file: &str, value: String) {
    writes.push((file.to_owned(), value));
}

fn unsupported(field: &str, value: &str) -> Error {
    Error::InvalidArgument(format!(
        "linux.resources.{field} = {value:?} is not supported"
    ))
}

/// Negative numbers are "no limit" in the OCI specification.
fn or_max(value: i64) -> String {
    if value < 0 {
        "max".into()
    } else {
        value.to_string()
    }
}

fn plan_memory(memory: &Memory, in_force: InForce<'_>, writes: &mut Writes) -> Result<()> {
    if memory.disable_oom_killer == Some(true) {
        return Err(Error::InvalidArgument(
            "linux.resources.memory.disableOOMKiller needs cgroup v1".into(),
        ));
    }
    let limit = memory.limit.filter(|l| *l != 0);
    if let Some(swap) = memory.swap.filter(|s| *s != 0) {
        // v1 counts memory and swap together, v2 apart.
        let held = || in_force("memory.max")?.trim().parse().ok();
        let value = match limit.or_else(held) {
            _ if swap < 0 => "max".to_owned(),
            // Nothing to take off.
            Some(limit) if limit < 0 => swap.to_string(),
            Some(limit) if limit > 0 && swap >= limit => (swap - limit).to_string(),
            _ => {
                return Err(Error::InvalidArgument(format!(
                    "linux.resources.memory.swap = {swap} needs a memory limit that is not larger"
                )));
            }
        };
        put(writes, "memory.swap.max", value);
    } else if limit.is_some_and(|limit| limit < 0) {
        // As with runc: who takes the one limit away and says nothing of the other means both.
        put(writes, "memory.swap.max", "max".to_owned());
    }
    if let Some(limit) = limit {
        put(writes, "memory.max", or_max(limit));
    }
    if let Some(reservation) = memory.reservation.filter(|r| *r != 0) {
        put(writes, "memory.low", or_max(reservation));
    }
    Ok(())
}

fn plan_cpu(cpu: &Cpu, in_force: InForce<'_>, writes: &mut Writes) -> Result<()> {
    if cpu.realtime_runtime.is_some_and(|r| r != 0) || cpu.realtime_period.is_some_and(|p| p != 0) {
        return Err(Error::InvalidArgument(
            "linux.resources.cpu.realtime* needs cgroup v1".into(),
        ));
    }
    if let Some(idle) = cpu.idle {
        put(writes, "cpu.idle", idle.to_string());
    }
    if let Some(shares) = cpu.shares.filter(|s| *s != 0)
        && cpu.idle != Some(1)
    {
        put(writes, "cpu.weight", weight_of_shares(shares).to_string());
    }
    let burst = cpu.burst.map(|burst| burst.to_string());
    if let Some(burst) = burst.clone() {
        put(writes, "cpu.max.burst", burst);
    }
    // 0 is "not set" to runc, which kubelet counts on.
    let (quota, period) = (
        cpu.quota.filter(|q| *q != 0),
        cpu.period.filter(|p| *p != 0),
    );
    if quota.is_some() || period.is_some() {
        let is_whole = quota.is_some() && period.is_some();
        let held = if is_whole { None } else { in_force("cpu.max") }.unwrap_or_default();
        let mut held = held.split_whitespace();
        let (held_quota, held_period) = (held.next(), held.next());
        let quota = match quota {
            Some(quota) if quota > 0 => quota.to_string(),
            Some(_) => "max".to_owned(),
            None => held_quota.unwrap_or("max").to_owned(),
        };
        let period = match period {
            Some(period) => period.to_string(),
            None => held_period.unwrap_or(DEFAULT_PERIOD).to_owned(),
        };
        put(writes, "cpu.max", format!("{quota} {period}"));
        // Again, as runc does it: one of the two orders is refused where both go up, or both down.
        if let Some(burst) = burst {
            put(writes, "cpu.max.burst", burst);
        }
    }
    for (file, list) in [("cpuset.cpus", &cpu.cpus), ("cpuset.mems", &cpu.mems)] {
        let wrong = |b: u8| !b.is_ascii_digit() && !b",-:/ ".contains(&b);
        if list.bytes().any(wrong) {
            return Err(unsupported("cpu", &format!("{file}: {list}")));
        }
        if !list.trim().is_empty() {
            put(writes, file, list.clone());
        }
    }
    Ok(())
}

/// The most that `cpu.weight` takes.
const MAX_WEIGHT: u32 = 10_000;

/// cpu.weight of cgroup v1 shares: 2..=262144 onto 1..=10000, so that the default of the one, 1024, is that of the
/// other, 100. runc's formula from 1.3.2 on.
fn weight_of_shares(shares: u64) -> u32 {
    let shares = u32::try_from(shares).unwrap_or(u32::MAX);
    let log = f64::from(shares.clamp(2, 262_144)).log2();
    let weight = 10_f64.powf((log * log + 125.0 * log) / 612.0 - 7.0 / 34.0);
    // Rounded up.
    let reaches = |candidate: &u32| f64::from(*candidate) >= weight;
    (1..MAX_WEIGHT).find(reaches).unwrap_or(MAX_WEIGHT)
}

fn plan_block_io(block_io: &BlockIo, writes: &mut Writes) -> Result<()> {
    if block_io.leaf_weight.is_some_and(|w| w != 0) {
        return Err(Error::InvalidArgument(
            "linux.resources.blockIO.leafWeight needs cgroup v1".into(),
        ));
    }
    if let Some(weight) = block_io.weight.filter(|w| *w != 0) {
        put(writes, "io.bfq.weight", weight.to_string());
        // 10..=1000 onto 1..=10000.
        let wide = 1 + (u64::from(weight.clamp(10, 1000)) - 10) * 9_999 / 990;
        put(writes, "io.weight", wide.to_string());
    }
    for device in &block_io.weight_device {
        if device.leaf_weight.is_some_and(|w| w != 0) {
            return Err(Error::InvalidArgument(
                "linux.resources.blockIO.weightDevice.leafWeight needs cgroup v1".into(),
            ));
        }
        if let Some(weight) = device.weight {
            put(
                writes,
                "io.bfq.weight",
                format!("{}:{} {weight}", device.major, device.minor),
            );
        }
    }
    let throttles: [(&str, &[ThrottleDevice]); 4] = [
        ("rbps", &block_io.throttle_read_bps_device),
        ("wbps", &block_io.throttle_write_bps_device),
        ("riops", &block_io.throttle_read_iops_device),
        ("wiops", &block_io.throttle_write_iops_device),
    ];
    for (key, devices) in throttles {
        for device in devices {
            let rate = if device.rate == 0 {
                "max".into()
            } else {
                device.rate.to_string()
            };
            put(
                writes,
                "io.max",
                format!("{}:{} {key}={rate}", device.major, device.minor),
            );
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
