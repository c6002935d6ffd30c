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
    assert!(refused(json!({"memory": {"disableOOMKiller": true}})).contains("disableOOMKiller"));
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
        refused(json!({"hugepageLimits": [{"pageSize": "../x", "limit": 1}]})).contains("pageSize")
    );
}
