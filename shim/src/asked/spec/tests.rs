//! What the shim makes of specs as containerd, and whoever else, writes them.

use super::*;
use crate::error::Kind;
use proptest::prelude::*;

fn parse(text: &str) -> Spec {
    Spec::parse(text.as_bytes()).unwrap()
}

#[test]
fn unknown_capabilities_and_fields_do_not_matter_here() {
    let spec = parse(
        r#"{"ociVersion":"9.9","process":{"capabilities":{"bounding":["CAP_OF_TOMORROW"]},
        "oomScoreAdj":-7},"novel":{"x":[1]},"linux":null,"mounts":null}"#,
    );
    assert_eq!(spec.oom_score_adj(), Some(-7));
    assert_eq!(spec.bind_mounts().unwrap(), Vec::new());
}

#[test]
fn users_and_groups_that_mean_none_are_refused_wherever_they_are_named() {
    const NONE: u32 = u32::MAX;
    for (text, field) in [
        (
            format!(r#"{{"process":{{"user":{{"uid":{NONE},"gid":0}}}}}}"#),
            "process.user.uid",
        ),
        (
            format!(r#"{{"linux":{{"devices":[{{"path":"/dev/x","gid":{NONE}}}]}}}}"#),
            "linux.devices /dev/x: gid",
        ),
        (
            format!(
                r#"{{"linux":{{"uidMappings":[{{"containerID":0,"hostID":{NONE},"size":1}}]}}}}"#
            ),
            "linux: uidMappings[0].hostID",
        ),
        (
            format!(
                r#"{{"mounts":[{{"destination":"/v","gidMappings":[{{"containerID":1,"hostID":0,"size":{NONE}}}]}}]}}"#
            ),
            "mount on /v: gidMappings[0].containerID",
        ),
    ] {
        let error = parse(&text).check_ids().unwrap_err();
        assert_eq!(error.kind, Kind::InvalidArgument);
        assert!(error.message.contains(field), "{error}");
    }
    let usual = r#"{"process":{"user":{"uid":4294967294,"additionalGids":[1]}},"linux":{"devices":null,
        "uidMappings":[{"containerID":0,"hostID":0,"size":4294967295}]}}"#;
    parse(usual).check_ids().unwrap();
    parse("{}").check_ids().unwrap();
}

#[test]
fn the_hosts_network_is_refused_and_others_are_told_apart() {
    let error = parse(r#"{"linux":{"namespaces":[{"type":"pid"}]}}"#)
        .network()
        .unwrap_err();
    assert_eq!(error.kind, Kind::InvalidArgument);
    assert!(error.message.contains("host network"), "{error}");
    let new = parse(r#"{"linux":{"namespaces":[{"type":"network"}]}}"#);
    assert_eq!(new.network().unwrap(), Network::New);
    let given = parse(r#"{"linux":{"namespaces":[{"type":"network","path":"/run/netns/a"}]}}"#);
    assert_eq!(
        given.network().unwrap(),
        Network::Path("/run/netns/a".into())
    );
}

#[test]
fn only_bind_mounts_are_taken_from_the_host() {
    let spec = parse(
        r#"{"mounts":[{"destination":"/proc","type":"proc","source":"proc"},
        {"destination":"/a","type":"bind","source":"/srv/a","options":["rbind","ro"]},
        {"destination":"/dev/shm","type":"tmpfs","source":"shm"},
        {"destination":"/b","source":"/srv/b","options":["bind"],
         "uidMappings":[{"containerID":0,"hostID":7,"size":1}],
         "gidMappings":[{"containerID":0,"hostID":8,"size":1}]}]}"#,
    );
    let mounts = spec.bind_mounts().unwrap();
    assert_eq!(mounts.len(), 2);
    assert_eq!((mounts[0].index, mounts[1].index), (1, 3));
    assert!(mounts[0].readonly && mounts[0].recursive);
    assert_eq!(mounts[0].propagation, Propagation::Private);
    assert!(!mounts[1].readonly && !mounts[1].recursive);
    assert!(mounts[0].id_map.is_none() && mounts[1].id_map.is_some());
}

#[test]
fn a_bind_source_that_climbs_or_is_relative_is_refused() {
    for source in ["srv/a", "/srv/../etc", ""] {
        let spec = parse(&format!(
            r#"{{"mounts":[{{"destination":"/a","type":"bind","source":"{source}"}}]}}"#
        ));
        assert!(spec.bind_mounts().is_err(), "{source}");
    }
}

#[test]
fn the_root_is_relative_to_the_bundle_unless_absolute() {
    let bundle = Path::new("/run/bundle");
    assert_eq!(
        parse("{}").root_path(bundle),
        Path::new("/run/bundle/rootfs")
    );
    let absolute = parse(r#"{"root":{"path":"/srv/root","readonly":true}}"#);
    assert_eq!(absolute.root_path(bundle), Path::new("/srv/root"));
    assert!(absolute.root_readonly());
}

#[test]
fn cris_annotations_tell_what_a_container_is() {
    let role = |annotations: &str| parse(&format!(r#"{{"annotations":{annotations}}}"#)).role();
    assert_eq!(role("{}").unwrap(), Role::Single);
    assert_eq!(
        role(&format!(
            r#"{{"{CONTAINER_TYPE}":"sandbox","{SANDBOX_ID}":"s"}}"#
        ))
        .unwrap(),
        Role::Sandbox
    );
    assert_eq!(
        role(&format!(
            r#"{{"{CONTAINER_TYPE}":"container","{SANDBOX_ID}":"s"}}"#
        ))
        .unwrap(),
        Role::Member("s".to_owned())
    );
    assert!(role(&format!(r#"{{"{CONTAINER_TYPE}":"container"}}"#)).is_err());
    assert!(role(&format!(r#"{{"{CONTAINER_TYPE}":"pod"}}"#)).is_err());
}

#[test]
fn a_pod_whose_user_namespace_has_no_root_is_refused() {
    let checked = |users: u32, groups: u32| {
        let map = |id: u32| format!(r#"[{{"containerID":{id},"hostID":9,"size":65536}}]"#);
        parse(&format!(
            r#"{{"linux":{{"namespaces":[{{"type":"network"}},{{"type":"pid"}},{{"type":"ipc"}},{{"type":"user"}}],
                "uidMappings":{},"gidMappings":{}}}}}"#,
            map(users),
            map(groups)
        ))
        .check_sandbox()
    };
    checked(0, 0).unwrap();
    for (users, groups, field) in [(1, 0, "uidMappings"), (0, 1, "gidMappings")] {
        let error = checked(users, groups).unwrap_err();
        assert_eq!(error.kind, Kind::InvalidArgument);
        assert!(error.message.contains(field), "{error}");
    }
}

#[test]
fn a_host_name_is_as_long_as_linux_takes_it() {
    check_hostname(&"h".repeat(64)).unwrap();
    let error = check_hostname(&"h".repeat(65)).unwrap_err();
    assert!(error.message.contains("65 bytes"), "{error}");
}

#[test]
fn a_pod_that_wants_the_nodes_namespaces_is_refused_by_the_fields_name() {
    for (kinds, field) in [
        (vec!["pid", "ipc"], "hostNetwork"),
        (vec!["network", "ipc"], "hostPID"),
        (vec!["network", "pid"], "hostIPC"),
    ] {
        let list: Vec<_> = kinds
            .iter()
            .map(|kind| format!(r#"{{"type":"{kind}"}}"#))
            .collect();
        let text = format!(r#"{{"linux":{{"namespaces":[{}]}}}}"#, list.join(","));
        let error = parse(&text).check_sandbox().unwrap_err();
        assert!(error.message.contains(field), "{error}");
    }
}

#[test]
fn a_container_that_is_a_pod_by_itself_has_namespaces_of_its_own() {
    let checked = |namespaces: &[(&str, &str)]| {
        let list: Vec<_> = namespaces
            .iter()
            .map(|(kind, path)| format!(r#"{{"type":"{kind}","path":"{path}"}}"#))
            .collect();
        parse(&format!(
            r#"{{"linux":{{"namespaces":[{}]}}}}"#,
            list.join(",")
        ))
        .check_alone()
    };
    let net = ("network", "/run/netns/a");
    checked(&[net, ("pid", ""), ("ipc", ""), ("uts", "")]).unwrap();
    // The guest has the node's name.
    checked(&[net, ("pid", ""), ("ipc", "")]).unwrap();
    for (namespaces, words) in [
        (vec![("pid", ""), ("ipc", "")], "host network"),
        (vec![net, ("ipc", "")], "hostPID"),
        (vec![net, ("pid", "")], "hostIPC"),
        (
            vec![net, ("pid", "/proc/1/ns/pid"), ("ipc", "")],
            "pid namespace /proc/1/ns/pid",
        ),
        (
            vec![net, ("pid", ""), ("ipc", "/proc/9/ns/ipc")],
            "ipc namespace /proc/9/ns/ipc",
        ),
        (
            vec![net, ("pid", ""), ("ipc", ""), ("uts", "/proc/9/ns/uts")],
            "uts namespace /proc/9/ns/uts",
        ),
    ] {
        let error = checked(&namespaces).unwrap_err();
        assert_eq!(error.kind, Kind::InvalidArgument);
        assert!(error.message.contains(words), "{error}");
    }
}

#[test]
fn the_pods_shared_memory_is_not_taken_from_the_host() {
    let spec = |source: &str| {
        parse(&format!(
            r#"{{"annotations":{{"{SANDBOX_ID}":"s"}},"mounts":[{{"destination":"/dev/shm",
            "type":"bind","source":"{source}","options":["rbind","ro"]}}]}}"#
        ))
    };
    let shared = spec("/run/containerd/io.containerd.grpc.v1.cri/sandboxes/s/shm");
    assert_eq!(shared.bind_mounts().unwrap(), Vec::new());
    assert!(shared.sandbox_shm().is_some());
    let volume = spec("/srv/sandboxes/other/shm");
    assert_eq!(volume.bind_mounts().unwrap().len(), 1);
    assert!(volume.sandbox_shm().is_none());
}

#[test]
fn the_pods_size_is_read_from_the_sandbox_container() {
    let spec = |quota: &str, period: &str, memory: &str| {
        parse(&format!(
            r#"{{"annotations":{{"{SANDBOX_CPU_QUOTA}":"{quota}","{SANDBOX_CPU_PERIOD}":"{period}",
            "{SANDBOX_MEMORY}":"{memory}"}}}}"#
        ))
    };
    let whole = spec("150000", "100000", "134217728");
    assert_eq!(
        (whole.sandbox_cpu_millis().limit, whole.sandbox_memory()),
        (Some(1500), Some(128 << 20))
    );
    let exclusive = parse(&format!(
        r#"{{"annotations":{{"{SANDBOX_CPU_QUOTA}":"-1","{SANDBOX_CPU_PERIOD}":"100000",
        "{SANDBOX_CPU_SHARES}":"4096"}}}}"#
    ));
    assert_eq!(exclusive.sandbox_cpu_millis().wanted(), Some(4000));
    let mixed = parse(&format!(
        r#"{{"annotations":{{"{SANDBOX_CPU_QUOTA}":"50000","{SANDBOX_CPU_PERIOD}":"100000",
        "{SANDBOX_CPU_SHARES}":"4198"}}}}"#
    ));
    assert_eq!(mixed.sandbox_cpu_millis().wanted(), Some(4100));
    for none in [
        spec("0", "100000", "0"),
        spec("-1", "100000", "-5"),
        spec("5", "0", "x"),
    ] {
        let found = (none.sandbox_cpu_millis().wanted(), none.sandbox_memory());
        assert_eq!(found, (None, None));
    }
}

proptest! {
    #[test]
    fn any_bytes_are_parsed_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..256)) {
        if let Ok(spec) = Spec::parse(&bytes) {
            let _ = spec.network();
            let _ = spec.bind_mounts();
        }
    }
}
