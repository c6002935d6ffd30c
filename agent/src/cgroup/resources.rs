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
        let held = in_force("cpu.max").unwrap_or_default();
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
mod tests {
    use super::*;
    use serde_json::json;

    fn planned(value: serde_json::Value) -> Vec<String> {
        planned_over(value, &[])
    }

    /// With these files in the cgroup.
    fn planned_over(value: serde_json::Value, files: &[(&str, &str)]) -> Vec<String> {
        let held = |file: &str| {
            let found = files.iter().find(|(name, _)| *name == file);
            found.map(|(_, text)| (*text).to_owned())
        };
        let writes = plan(&serde_json::from_value(value).unwrap(), &held).unwrap();
        writes
            .into_iter()
            .map(|(f, v)| format!("{f}={v}"))
            .collect()
    }

    fn refused(value: serde_json::Value) -> String {
        plan(&serde_json::from_value(value).unwrap(), &|_| None)
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn a_list_of_which_the_guest_has_a_part_is_left_out_with_a_word() {
        let dir = tempfile::tempdir().unwrap();
        let list = dir.path().join("cpuset.cpus");
        fs::write(&list, "").unwrap();
        let applied = |cpus: &str| {
            let resources = json!({"cpu": {"cpus": cpus}});
            apply(dir.path(), &serde_json::from_value(resources).unwrap()).unwrap()
        };
        assert!(applied("0").is_empty());
        assert_eq!(fs::read_to_string(&list).unwrap(), "0");
        let notes = applied("0,4000");
        assert!(notes[0].contains("cpuset.cpus = 0,4000"), "{notes:?}");
        assert_eq!(fs::read_to_string(&list).unwrap(), "\n");
    }

    #[test]
    fn kubernetes_limits_map_to_v2_files() {
        let got = planned(json!({
            "memory": {"limit": 64 << 20, "swap": 96 << 20, "reservation": 1 << 20},
            "cpu": {"shares": 1024, "quota": 50_000, "period": 100_000, "cpus": "0-1", "mems": "0"},
            "pids": {"limit": 100},
            "hugepageLimits": [{"pageSize": "2MB", "limit": 4 << 20}],
            "unified": {"memory.high": "1000000"}
        }));
        assert_eq!(
            got,
            [
                "memory.swap.max=33554432",
                "memory.max=67108864",
                "memory.low=1048576",
                "cpu.weight=100",
                "cpu.max=50000 100000",
                "cpuset.cpus=0-1",
                "cpuset.mems=0",
                "pids.max=100",
                "hugetlb.2MB.max=4194304",
                "hugetlb.2MB.rsvd.max=4194304",
                "memory.high=1000000",
            ]
        );
    }

    #[test]
    fn what_the_kernel_lacks_is_refused_by_name_unless_nothing_is_asked_of_it() {
        // No file is ever made, which a cgroup answers with another error than "not found".
        let dir = tempfile::tempdir().unwrap();
        let applied = |value| apply(dir.path(), &serde_json::from_value(value).unwrap());
        assert!(applied(json!({"memory": {"swap": -1}})).is_ok());
        assert!(applied(json!({"hugepageLimits": [{"pageSize": "1GB", "limit": 0}]})).is_ok());
        for (asked, file) in [
            (json!({"pids": {"limit": 5}}), "pids.max"),
            (
                json!({"hugepageLimits": [{"pageSize": "1GB", "limit": 1}]}),
                "hugetlb.1GB.max",
            ),
        ] {
            assert!(applied(asked).unwrap_err().to_string().contains(file));
        }
        assert!(fs::read_dir(dir.path()).unwrap().next().is_none());
    }

    #[test]
    fn what_was_set_before_one_is_refused_is_set_back() {
        let dir = tempfile::tempdir().unwrap();
        let put = |file: &str, text: &str| fs::write(dir.path().join(file), text).unwrap();
        let text = |file: &str| fs::read_to_string(dir.path().join(file)).unwrap();
        put("memory.max", "100000000\n");
        put("cpu.weight", "39\n");
        put("cpu.idle", "0\n");
        // It takes nothing.
        fs::create_dir(dir.path().join("cpu.max")).unwrap();
        let wanted = json!({"memory": {"limit": 400_000_000},
            "cpu": {"idle": 0, "shares": 512, "quota": 500}});
        let wanted = serde_json::from_value(wanted).unwrap();
        let mut undo = Undo::default();
        let error = change(dir.path(), &wanted, &mut undo).unwrap_err();
        assert!(error.to_string().contains("cpu.max"), "{error}");
        assert_eq!(text("memory.max"), "400000000\n");
        assert!(undo.all(dir.path()).is_empty());
        // A plain file is not cut to what is written.
        for (file, value) in [
            ("memory.max", "100000000"),
            ("cpu.weight", "39"),
            ("cpu.idle", "0"),
        ] {
            assert!(text(file).starts_with(value), "{file}");
        }
    }

    #[test]
    fn a_burst_is_tried_before_the_quota_and_after_it() {
        let both = json!({"cpu": {"quota": 50_000, "period": 100_000, "burst": 9}});
        let order = ["cpu.max.burst=9", "cpu.max=50000 100000", "cpu.max.burst=9"];
        assert_eq!(planned(both), order);
        assert_eq!(planned(json!({"cpu": {"burst": 9}})), ["cpu.max.burst=9"]);
    }

    #[test]
    fn what_shares_a_file_with_what_is_named_stays() {
        let cpu = [("cpu.max", "20000 50000\n")];
        for (asked, written) in [
            (json!({"quota": 10_000}), "10000 50000"),
            (json!({"quota": -1}), "max 50000"),
            (json!({"period": 100_000}), "20000 100000"),
            (json!({"quota": 0, "period": 100_000}), "20000 100000"),
            (json!({"quota": 1000, "period": 2000}), "1000 2000"),
        ] {
            let got = planned_over(json!({"cpu": asked}), &cpu);
            assert_eq!(got, [format!("cpu.max={written}")], "{asked}");
        }
        assert!(planned_over(json!({"cpu": {"quota": 0, "period": 0}}), &cpu).is_empty());
        assert_eq!(
            planned(json!({"cpu": {"period": 7000}})),
            ["cpu.max=max 7000"]
        );

        let swap =
            |held: &str| planned_over(json!({"memory": {"swap": 4096}}), &[("memory.max", held)]);
        assert_eq!(swap("1024\n"), ["memory.swap.max=3072"]);
        assert_eq!(swap("4096\n"), ["memory.swap.max=0"]);
        let both = json!({"memory": {"limit": 1000, "swap": 4096}});
        assert_eq!(
            planned_over(both, &[("memory.max", "9")]),
            ["memory.swap.max=3096", "memory.max=1000"]
        );
        assert_eq!(
            planned_over(json!({"memory": {"limit": 7}}), &[("memory.max", "9")]),
            ["memory.max=7"]
        );
        for held in ["max\n", "8192\n"] {
            let held = |_: &str| Some(held.to_owned());
            let asked = serde_json::from_value(json!({"memory": {"swap": 4096}})).unwrap();
            assert!(plan(&asked, &held).is_err());
        }
    }

    #[test]
    fn a_limit_of_a_device_leaves_its_other_one() {
        assert_eq!(
            planned(json!({"rdma": {"mlx5_0": {"hcaHandles": 3}, "mlx5_1": {}}})),
            ["rdma.max=mlx5_0 hca_handle=3"]
        );
        assert_eq!(
            planned(json!({"rdma": {"mlx5_0": {"hcaHandles": 3, "hcaObjects": 4}}})),
            [
                "rdma.max=mlx5_0 hca_handle=3",
                "rdma.max=mlx5_0 hca_object=4"
            ]
        );
    }

    #[test]
    fn unlimited_is_max_and_zero_is_unset() {
        assert_eq!(
            planned(json!({"memory": {"limit": -1, "swap": -1}})),
            ["memory.swap.max=max", "memory.max=max"]
        );
        assert_eq!(
            planned(json!({"cpu": {"quota": -1}})),
            ["cpu.max=max 100000"]
        );
        let zeros = json!({"memory": {"limit": 0}, "pids": {"limit": 0},
            "cpu": {"shares": 0, "quota": 0, "period": 0, "cpus": ""}});
        assert!(planned(zeros).is_empty());
    }

    #[test]
    fn shares_cover_the_whole_range() {
        for (shares, weight) in [
            (0, 1),
            (2, 1),
            (3, 2),
            (102, 17),
            (512, 59),
            (1024, 100),
            (2048, 174),
            (262_144, 10_000),
        ] {
            assert_eq!(weight_of_shares(shares), weight, "{shares}");
        }
        assert_eq!(weight_of_shares(u64::MAX), 10_000);
    }

    #[test]
    fn io_limits_name_the_device() {
        let got = planned(json!({"blockIO": {"weight": 500,
            "throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 1024}],
            "throttleWriteIOPSDevice": [{"major": 8, "minor": 0, "rate": 7}]}}));
        assert_eq!(
            got,
            [
                "io.bfq.weight=500",
                "io.weight=4950",
                "io.max=8:0 rbps=1024",
                "io.max=8:0 wiops=7"
            ]
        );
    }

    #[test]
    fn a_value_of_several_lines_is_written_line_by_line() {
        let got = planned(json!({"unified": {
            "io.max": "8:0 rbps=1\n8:16 rbps=2\n", "memory.high": "7"}}));
        assert_eq!(
            got,
            ["io.max=8:0 rbps=1", "io.max=8:16 rbps=2", "memory.high=7"]
        );
    }

    #[test]
    fn swap_beside_memory_without_a_limit_is_taken_as_it_is() {
        assert_eq!(
            planned(json!({"memory": {"limit": -1, "swap": 4096}})),
            ["memory.swap.max=4096", "memory.max=max"]
        );
        assert!(refused(json!({"memory": {"swap": 4096}})).contains("swap"));
    }

    #[test]
    fn what_v2_cannot_do_is_refused_by_name() {
        assert!(
            refused(json!({"memory": {"disableOOMKiller": true}})).contains("disableOOMKiller")
        );
        assert!(refused(json!({"cpu": {"realtimeRuntime": 5}})).contains("realtime"));
        assert!(refused(json!({"cpu": {"cpus": "all"}})).contains("cpuset.cpus"));
        assert!(refused(json!({"network": {"classID": 5}})).contains("classID"));
        assert!(refused(json!({"memory": {"limit": 100, "swap": 50}})).contains("swap"));
        for file in [
            "../cgroup.procs",
            "cgroup.procs",
            "cgroup.subtree_control",
            ".x",
            "tasks",
        ] {
            assert!(
                refused(json!({"unified": {file: "1"}})).contains("unified"),
                "{file}"
            );
        }
        assert!(
            refused(json!({"hugepageLimits": [{"pageSize": "../x", "limit": 1}]}))
                .contains("pageSize")
        );
    }
}
