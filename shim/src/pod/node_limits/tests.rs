//! Limits of containers and what of them reaches the files of a pod's cgroup.

use std::fs;
use std::path::Path;

use super::*;
use crate::asked::spec::{NumberList, Throttled};
use crate::error::Kind;

fn text(dir: &Path, file: &str) -> String {
    fs::read_to_string(dir.join(file)).unwrap()
}

fn throttles(list: &[(Numbers, Throttled, u64)]) -> Throttles {
    let entries = list
        .iter()
        .map(|(numbers, what, rate)| ((*numbers, *what), *rate));
    entries.collect()
}

fn cgroup(dir: &Path) -> Cgroup {
    let json = serde_json::json!({ "dirs": [dir], "parents": [], "home": null });
    serde_json::from_value(json).unwrap()
}

fn logger() -> Logger {
    Logger::root(slog::Discard, slog::o!())
}

fn limited(list: &[(Numbers, Throttled, u64)]) -> OnNode {
    OnNode {
        throttles: throttles(list),
        ..OnNode::default()
    }
}

fn runs_on(cpus: &str) -> OnNode {
    OnNode {
        cpus: NumberList::parse(cpus),
        ..OnNode::default()
    }
}

fn of(asked: OnNode) -> Container {
    Container {
        asked,
        ..Container::default()
    }
}

#[test]
fn a_pod_may_do_what_its_limited_containers_may_together_but_on_their_disks() {
    let disk = (254, 0);
    let containers = [
        of(OnNode::default()),
        of(limited(&[(disk, Throttled::ReadBytes, 100)])),
        Container {
            disks: [(7, 1)].into(),
            asked: limited(&[
                (disk, Throttled::ReadBytes, u64::MAX),
                (disk, Throttled::Writes, 0),
                ((7, 1), Throttled::Writes, 5),
                ((7, 2), Throttled::Writes, 6),
            ]),
        },
    ];
    let wanted = [
        (disk, Throttled::ReadBytes, u64::MAX),
        ((7, 2), Throttled::Writes, 6),
    ];
    assert_eq!(Wanted::by(containers.iter()).throttles, throttles(&wanted));
}

#[test]
fn a_pod_runs_where_any_of_its_containers_may() {
    let cpus = |asked: &[&str]| {
        let containers: Vec<_> = asked.iter().map(|cpus| of(runs_on(cpus))).collect();
        Wanted::by(containers.iter())
            .cpus
            .map(|cpus| cpus.to_string())
    };
    assert_eq!(cpus(&["2-3"]).as_deref(), Some("2-3"));
    assert_eq!(cpus(&["2-3", "0,4"]).as_deref(), Some("0,2-4"));
    // One without a list may run on all.
    assert_eq!(cpus(&["2-3", ""]), None);
    assert_eq!(cpus(&[]), None);
}

#[test]
fn the_list_of_a_cgroup_is_written_where_somebody_has_one_and_never_emptied() {
    let (dir, devices) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    fs::create_dir(devices.path().join("cpu")).unwrap();
    fs::write(devices.path().join("cpu/possible"), "0-7\n").unwrap();
    let cgroup = cgroup(dir.path());
    let mut lists = Lists::default();
    let mut apply = |asked: &[OnNode]| {
        let containers: Vec<_> = asked.iter().cloned().map(of).collect();
        lists.apply_below(devices.path(), &cgroup, &Wanted::by(containers.iter()))
    };
    // Nobody has, and there is no file either.
    apply(&[OnNode::default()]).unwrap();
    let refused = apply(&[runs_on("2-3")]).unwrap_err();
    assert_eq!(refused.kind, Kind::FailedPrecondition);
    assert!(refused.message.contains("cpuset controller"), "{refused}");
    for file in ["cpuset.cpus", "cpuset.mems"] {
        fs::write(dir.path().join(file), "").unwrap();
    }
    apply(&[runs_on("2-3")]).unwrap();
    assert_eq!(text(dir.path(), "cpuset.cpus"), "2-3");
    // Between two containers.
    apply(&[]).unwrap();
    assert_eq!(text(dir.path(), "cpuset.cpus"), "2-3");
    // The files are none of a cgroup's, and keep what is beyond a shorter list.
    fs::write(dir.path().join("cpuset.cpus"), "").unwrap();
    apply(&[runs_on("2-3"), OnNode::default()]).unwrap();
    assert_eq!(text(dir.path(), "cpuset.cpus"), "0-7");
    let memory = OnNode {
        mems: NumberList::parse("1"),
        ..OnNode::default()
    };
    apply(&[memory]).unwrap();
    assert_eq!(text(dir.path(), "cpuset.mems"), "1");
    // A kernel without NUMA.
    apply(&[OnNode::default()]).unwrap();
    assert_eq!(text(dir.path(), "cpuset.mems"), "0");
}

#[test]
fn a_device_that_cannot_be_limited_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let what = ((8, 16), Throttled::WrittenBytes);
    let limits = throttles(&[(what.0, what.1, 7)]);
    let none = Throttles::new();
    let error = io::apply(&cgroup(dir.path()), &mut none.clone(), &limits).unwrap_err();
    assert_eq!(error.kind, Kind::FailedPrecondition);
    assert!(error.message.contains("8:16") && error.message.contains("io controller"));
    fs::write(dir.path().join("io.max"), "").unwrap();
    let mut applied = none.clone();
    io::apply(&cgroup(dir.path()), &mut applied, &limits).unwrap();
    assert_eq!(text(dir.path(), "io.max"), "8:16 wbps=7");
    fs::write(dir.path().join("io.max"), "").unwrap();
    io::apply(&cgroup(dir.path()), &mut applied, &none).unwrap();
    assert_eq!(text(dir.path(), "io.max"), "8:16 wbps=max");
    assert!(applied.is_empty());
    let none = std::io::Error::from_raw_os_error(libc::ENODEV);
    assert_eq!(io::refused((8, 17), &none).kind, Kind::InvalidArgument);
}

#[tokio::test]
async fn limits_come_and_go_with_their_containers_and_one_that_is_refused_changes_none() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("io.max");
    let (limits, logger, none) = (NodeLimits::default(), logger(), BTreeSet::new());
    let one = limited(&[((8, 0), Throttled::Reads, 7)]);
    let admit = |cgroup| limits.admit("a", one.clone(), none.clone(), cgroup, &logger);
    let error = admit(None).await;
    assert!(error.unwrap_err().message.contains("cgroupsPath"));
    let error = admit(Some(cgroup(dir.path()))).await.unwrap_err();
    assert!(error.message.contains("io controller"), "{error}");
    fs::write(&file, "").unwrap();
    admit(None).await.unwrap();
    assert_eq!(text(dir.path(), "io.max"), "8:0 riops=7");
    let update = |change: &'static [u8]| limits.update("a", change, &logger);
    let nine = br#"{"blockIO":{"throttleReadIOPSDevice":[{"major":8,"minor":0,"rate":9}]}}"#;
    let five = br#"{"blockIO":{"throttleReadIOPSDevice":[{"major":8,"minor":0,"rate":5}]}}"#;
    let _ = update(nine).await.unwrap();
    // The file keeps what was there beyond what is written, as this one is no cgroup's.
    assert_eq!(text(dir.path(), "io.max"), "8:0 riops=9");
    fs::remove_file(&file).unwrap();
    update(five).await.unwrap_err();
    let as_before = throttles(&[((8, 0), Throttled::Reads, 9)]);
    assert_eq!(limits.wanted().throttles, as_before);
    fs::write(&file, "").unwrap();
    let _ = update(b"{}").await.unwrap();
    assert_eq!(text(dir.path(), "io.max"), "");
    // The guest refuses the rest of a change.
    let changed = update(five).await.unwrap();
    assert_eq!(text(dir.path(), "io.max"), "8:0 riops=5");
    changed.undo().await;
    assert_eq!(text(dir.path(), "io.max"), "8:0 riops=9");
    assert_eq!(limits.wanted().throttles, as_before);
    limits.gone("a", &logger);
    while !text(dir.path(), "io.max").contains("riops=max") {
        tokio::task::yield_now().await;
    }
    assert!(limits.wanted().is_nothing());
}

#[tokio::test]
async fn what_somebody_takes_from_the_cgroup_is_written_again() {
    let root = tempfile::tempdir().unwrap();
    let own = root.path().join("pod.slice/sandbox");
    fs::create_dir_all(&own).unwrap();
    let control = root.path().join("pod.slice/cgroup.subtree_control");
    for file in [&control, &own.join("io.max"), &own.join("cpuset.cpus")] {
        fs::write(file, "").unwrap();
    }
    let (limits, logger) = (NodeLimits::default(), logger());
    let mut asked = limited(&[((8, 0), Throttled::Reads, 7)]);
    asked.cpus = NumberList::parse("1");
    limits.is_in(cgroup(&own));
    limits.containers().insert("a".into(), of(asked));
    limits.write().unwrap();
    let taken = Taken::watch_below(root.path(), &cgroup(&own)).unwrap();
    let task = tokio::spawn(follow(Arc::downgrade(&limits.0), taken, logger));
    for file in ["io.max", "cpuset.cpus"] {
        fs::write(own.join(file), "").unwrap();
    }
    fs::write(&control, "-io -cpuset").unwrap();
    while text(&own, "cpuset.cpus") != "1" || text(&own, "io.max") != "8:0 riops=7" {
        tokio::task::yield_now().await;
    }
    // Who follows does not keep the pod's limits alive.
    drop(limits);
    fs::write(&control, "-io").unwrap();
    task.await.unwrap();
}
