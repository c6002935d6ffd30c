//! What a container sees of its specification, field by field (docs/runtime-spec.md).
#![allow(clippy::unwrap_used)]
mod guest;

use std::fs;

use brig_agent_protocol::agent::*;
use guest::*;
use serde_json::{Value, json};
use ttrpc::Code;

#[tokio::test]
async fn mounts_masks_and_readonly_paths() {
    let mut guest = Guest::start().await;
    let script = r#"
        for t in /proc /dev /dev/pts /dev/shm /dev/mqueue /sys /run; do awk -v t=$t '$2==t {print t, $3}' /proc/mounts; done
        touch /sys/x 2>/dev/null || echo sys read-only
        sysctl -w net.core.somaxconn=5 >/dev/null 2>&1 || echo proc-sys read-only
        wc -c < /proc/timer_list
        ls /sys/firmware | grep -c .
        touch /sys/firmware/x 2>/dev/null || echo mask read-only
        stat -c %a /dev/shm /run
        ls -l /dev/fd /dev/stdin /dev/ptmx | awk '{print $9, $11}'
        mount | grep -c newroot"#;
    let got = output(&mut guest, script, |_| {}).await;
    let expected = "/proc proc\n/dev tmpfs\n/dev/pts devpts\n/dev/shm tmpfs\n/dev/mqueue mqueue\n/sys sysfs\n/run tmpfs\n\
        sys read-only\nproc-sys read-only\n0\n0\nmask read-only\n1777\n755\n\
        /dev/fd /proc/self/fd\n/dev/ptmx pts/ptmx\n/dev/stdin /proc/self/fd/0\n0\n";
    assert_eq!(got, expected);
    guest.stop().await;
}

#[tokio::test]
async fn nothing_of_the_guest_is_left_in_the_mount_table_or_the_descriptors() {
    let mut guest = Guest::start().await;
    let got = output(&mut guest, "awk '{print $5}' /proc/self/mountinfo | sort | tr '\\n' ' '; ls /proc/self/fd | tr '\\n' ' '", |spec| {
        spec["linux"]["maskedPaths"] = json!([]);
        spec["linux"]["readonlyPaths"] = json!([]);
    })
    .await;
    // 3 is ls's own descriptor of the directory.
    assert_eq!(
        got,
        "/ /dev /dev/mqueue /dev/pts /dev/shm /proc /run /sys 0 1 2 3 "
    );
    guest.stop().await;
}

#[tokio::test]
async fn default_devices_work_and_others_are_refused() {
    let mut guest = Guest::start().await;
    let script = r#"
        echo x > /dev/null && head -c 2 /dev/zero | wc -c && head -c 2 /dev/urandom | wc -c
        mknod /tmp/mem c 1 1 && (cat /tmp/mem >/dev/null 2>&1 || echo no mem)
        stat -c '%a %t:%T %u' /dev/extra
        stat -c '%F' /dev/pipe"#;
    let got = output(&mut guest, script, |spec| {
        spec["linux"]["devices"] = json!([
            {"path": "/dev/extra", "type": "c", "major": 10, "minor": 229, "fileMode": 0o640, "uid": 33, "gid": 0},
            {"path": "/dev/pipe", "type": "p"}
        ]);
    })
    .await;
    assert_eq!(got, "2\n2\nno mem\n640 a:e5 33\nfifo\n");
    guest.stop().await;
}

#[tokio::test]
async fn a_device_of_the_spec_can_be_used_when_its_rule_allows_it() {
    let mut guest = Guest::start().await;
    let script = "head -c 1 /dev/fuse >/dev/null 2>&1; : < /dev/fuse && echo open; (: > /dev/fuse) 2>/dev/null || echo not for writing";
    let got = output(&mut guest, script, |spec| {
        spec["linux"]["devices"] =
            json!([{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229}]);
        spec["linux"]["resources"]["devices"] = json!([
            {"allow": false, "access": "rwm"},
            {"allow": true, "type": "c", "major": 10, "minor": 229, "access": "r"}
        ]);
    })
    .await;
    assert_eq!(got, "open\nnot for writing\n");
    guest.stop().await;
}

#[tokio::test]
async fn a_device_that_is_bound_by_name_is_the_guests_and_its_rule_decides() {
    let mut guest = Guest::start().await;
    let bound = |spec: &mut Value, name: &str| {
        let mounts = spec["mounts"].as_array_mut().unwrap();
        let options = json!(["rbind", "rw"]);
        mounts.push(json!({"destination": format!("/d/{name}"), "type": "bind", "source": "/x", "options": options}));
        vec![MountSource {
            index: u32::try_from(mounts.len() - 1).unwrap(),
            device: name.into(),
            ..Default::default()
        }]
    };
    // Tunnels are allowed without a rule, as with runc.
    for (id, name, opens) in [("tun", "net/tun", true), ("fuse", "fuse", false)] {
        guest.rootfs(id);
        let script = format!("test -c /d/{name} && (: < /d/{name}) 2>/dev/null && echo open; true");
        let mut spec = spec(&script);
        let sources = bound(&mut spec, name);
        let outcome = guest.whole_with(id, &spec, sources).await;
        assert_eq!(outcome.status, 0, "{}", outcome.stderr);
        assert_eq!(
            outcome.stdout == "open\n",
            opens,
            "{name}: {}",
            outcome.stdout
        );
    }
    for (name, words) in [
        ("no-such", "VFIO, CDI"),
        ("ptmx", "of its own"),
        ("../etc", "not the name"),
    ] {
        guest.rootfs("refused");
        let mut spec = spec("true");
        let sources = bound(&mut spec, name);
        let (stdio, _ends) = guest.stdio(false, false).await;
        let (code, text) = refusal(guest.create_with("refused", &spec, stdio, sources).await);
        assert_eq!(code, Code::INVALID_ARGUMENT);
        assert!(text.contains(words), "{text}");
        fs::remove_dir_all(guest.share().join("refused")).unwrap();
    }
    guest.stop().await;
}

#[tokio::test]
async fn a_privileged_container_has_nodes_for_loop_devices_to_come() {
    let mut guest = Guest::start().await;
    let privileged = |spec: &mut Value| {
        spec["linux"]["resources"]["devices"] = json!([
            {"allow": false, "access": "rwm"}, {"allow": true, "access": "rwm"}
        ]);
        spec["linux"]["devices"] =
            json!([{"path": "/dev/loop-control", "type": "c", "major": 10, "minor": 237}]);
    };
    let script = "stat -c '%F %t:%T' /dev/loop0 /dev/loop7";
    assert_eq!(
        output(&mut guest, script, privileged).await,
        "block special file 7:0\nblock special file 7:7\n"
    );
    let script = "ls /dev | grep -c '^loop[0-9]'; true";
    assert_eq!(output(&mut guest, script, |_| {}).await, "0\n");
    guest.stop().await;
}

#[tokio::test]
async fn user_groups_umask_home_and_working_directory() {
    let mut guest = Guest::start().await;
    let script = "id; umask; echo $HOME; pwd; touch /tmp/f; stat -c %a /tmp/f; echo x >/dev/stdout";
    let got = output(&mut guest, script, |spec| {
        spec["process"]["user"] =
            json!({"uid": 33, "gid": 44, "additionalGids": [100, 101], "umask": 0o077});
        spec["process"]["cwd"] = "/made/for/it".into();
    })
    .await;
    assert_eq!(
        got,
        "uid=33(web) gid=44 groups=100,101\n0077\n/home/web\n/made/for/it\n600\nx\n"
    );
    let got = output(&mut guest, "umask; echo $HOME $A", |spec| {
        spec["process"]["env"] = json!(["PATH=/bin", "HOME=/x", "A=b"]);
    })
    .await;
    assert_eq!(got, "0022\n/x b\n");
    // A shell would keep one of them by itself.
    let got = output(&mut guest, "cat /proc/1/environ | tr '\\0' '\\n'", |spec| {
        spec["process"]["env"] = json!(["TWICE=first", "PATH=/bin", "HOME=/x", "TWICE=last"]);
    })
    .await;
    assert_eq!(got, "PATH=/bin\nHOME=/x\nTWICE=last\n");
    guest.stop().await;
}

#[tokio::test]
async fn volumes_are_bound_with_their_options_and_single_files_stand_alone() {
    let mut guest = Guest::start().await;
    let share = guest.share();
    fs::create_dir_all(share.join("c1/m1/sub")).unwrap();
    fs::write(share.join("c1/m1/data"), "volume").unwrap();
    fs::write(share.join("c1/file"), "alone").unwrap();
    let root = guest.rootfs("c1");
    let script = r#"cat /vol/data; echo; cat /etc/one; echo; touch /vol/x && echo writable; touch /ro/x 2>/dev/null || echo read-only
        awk '$2=="/ro" {print $4}' /proc/mounts | tr , '\n' | grep -E '^(ro|nosuid|noexec)$' | tr '\n' ' '; ls -d /etc/on*"#;
    let mut with_volumes = spec(script);
    let mounts = with_volumes["mounts"].as_array_mut().unwrap();
    let first = u32::try_from(mounts.len()).unwrap();
    mounts.push(json!({"destination": "/vol", "type": "bind", "source": "/host/a", "options": ["rbind", "rprivate", "rw"]}));
    mounts.push(json!({"destination": "/etc/one", "type": "bind", "source": "/host/f", "options": ["bind", "ro"]}));
    mounts.push(json!({"destination": "/ro", "type": "bind", "source": "/host/a", "options": ["rbind", "ro", "nosuid", "noexec"]}));
    let source = |index, share_path: &str| MountSource {
        index,
        share_path: share_path.into(),
        ..Default::default()
    };
    let sources = vec![
        source(first, "c1/m1"),
        source(first + 1, "c1/file"),
        source(first + 2, "c1/m1"),
    ];
    let outcome = guest.whole_with("c1", &with_volumes, sources).await;
    assert_eq!(
        outcome.stdout, "volume\nalone\nwritable\nread-only\nro nosuid noexec /etc/one\n",
        "{}",
        outcome.stderr
    );
    assert!(
        exists(&share.join("c1/m1/x"))
            && !exists(&share.join("c1/m1/y"))
            && exists(&root.join("vol"))
    );
    guest.stop().await;
}

#[tokio::test]
async fn a_bind_of_a_host_path_that_was_not_shared_is_refused_by_name() {
    let mut guest = Guest::start().await;
    guest.rootfs("c1");
    let mut bad = spec("true");
    bad["mounts"].as_array_mut().unwrap().push(json!({"destination": "/x", "type": "bind", "source": "/host/secret", "options": ["rbind"]}));
    let (code, text) = refusal(guest.create("c1", &bad, Stdio::default()).await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(text.contains("/host/secret"), "{text}");
    guest.stop().await;
}

#[tokio::test]
async fn the_shared_memory_of_the_sandbox_is_one_for_its_containers() {
    let mut guest = Guest::start().await;
    let change = |spec: &mut Value| {
        spec["mounts"][3] = json!({"destination": "/dev/shm", "type": "bind", "source": "/run/containerd/x/shm", "options": ["rbind", "ro=no"]});
        spec["mounts"][3]["options"] = json!(["rbind", "rprivate"]);
    };
    output(&mut guest, "echo seen > /dev/shm/f", change).await;
    assert_eq!(output(&mut guest, "cat /dev/shm/f", change).await, "seen\n");
    guest.stop().await;
}

#[tokio::test]
async fn tmpfs_limits_and_unknown_options() {
    let mut guest = Guest::start().await;
    let got = output(&mut guest, "df -k /small | awk 'NR==2 {print $2}'; stat -c %a /small /tmp; touch /tmp/f && echo ok", |spec| {
        let mounts = spec["mounts"].as_array_mut().unwrap();
        mounts.push(json!({"destination": "/small", "type": "tmpfs", "source": "tmpfs", "options": ["size=64k", "mode=700"]}));
        // No mode: that of the directory in the image.
        mounts.push(json!({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid"]}));
    })
    .await;
    assert_eq!(got, "64\n700\n1777\nok\n");
    let mut bad = spec("true");
    bad["mounts"].as_array_mut().unwrap().push(json!({"destination": "/x", "type": "tmpfs", "source": "tmpfs", "options": ["frobnicate=1"]}));
    guest.rootfs("bad");
    let (_, text) = refusal(guest.create("bad", &bad, Stdio::default()).await);
    assert!(text.contains("frobnicate"), "{text}");
    bad["mounts"].as_array_mut().unwrap().pop();
    bad["mounts"]
        .as_array_mut()
        .unwrap()
        .push(json!({"destination": "/x", "type": "nosuchfs", "source": "none"}));
    let (_, text) = refusal(guest.create("bad", &bad, Stdio::default()).await);
    assert!(text.contains("nosuchfs"), "{text}");
    guest.stop().await;
}

#[tokio::test]
async fn what_is_to_be_read_only_is_so_when_its_contents_are_there() {
    let mut guest = Guest::start().await;
    let script = "for d in /t /dev; do touch $d/x 2>/dev/null || echo $d read-only; done; touch /t/v/x && echo writable
        test -c /dev/null && echo devices; pwd";
    let got = output(&mut guest, script, |spec| {
        let mounts = spec["mounts"].as_array_mut().unwrap();
        mounts[1]["options"].as_array_mut().unwrap().push("ro".into());
        mounts.push(json!({"destination": "/t", "type": "tmpfs", "source": "tmpfs", "options": ["ro"]}));
        mounts.push(json!({"destination": "/t/v", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]}));
        spec["process"]["cwd"] = "/t/made".into();
    })
    .await;
    assert_eq!(
        got,
        "/t read-only\n/dev read-only\nwritable\ndevices\n/t/made\n"
    );
    guest.stop().await;
}

#[tokio::test]
async fn root_and_scheduling_fields() {
    let mut guest = Guest::start().await;
    let got = output(
        &mut guest,
        "touch /x 2>/dev/null || echo root read-only; touch /run/x && echo tmpfs writable",
        |spec| {
            spec["root"]["readonly"] = true.into();
        },
    )
    .await;
    assert_eq!(got, "root read-only\ntmpfs writable\n");
    let got = output(
        &mut guest,
        "awk '{print $19}' /proc/self/stat; uname -m; ionice -p $$",
        |spec| {
            spec["process"]["scheduler"] = json!({"policy": "SCHED_OTHER", "nice": 7});
            spec["process"]["ioPriority"] = json!({"class": "IOPRIO_CLASS_BE", "priority": 6});
            spec["linux"]["personality"] = json!({"domain": "LINUX32"});
        },
    )
    .await;
    assert_eq!(got, "7\ni686\nbest-effort: prio 6\n");
    guest.stop().await;
}

#[tokio::test]
async fn an_exec_has_from_its_container_what_it_does_not_say_itself() {
    let mut guest = Guest::start().await;
    let affinity = "grep Cpus_allowed_list /proc/self/status | cut -f2";
    let mut init = spec(&format!("{affinity}; sleep 1000"));
    init["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200}]);
    init["process"]["oomScoreAdj"] = 500.into();
    init["process"]["execCPUAffinity"] = json!({"initial": "0-1", "final": "0"});
    init["linux"]["personality"] = json!({"domain": "LINUX32"});
    init["process"]["user"]["umask"] = 0o077.into();
    let (stdio, mut ends) = guest.stdio(false, false).await;
    guest.started("c1", &init, stdio).await;
    // The affinity is for execs alone.
    let own = fields(&fs::read_to_string("/proc/self/status").unwrap());
    ends.said(&format!("{}\n", own["Cpus_allowed_list"])).await;
    let script = format!(
        "uname -m; umask; ulimit -Sn; ulimit -Hn; cat /proc/self/oom_score_adj; {affinity}; grep CapBnd /proc/self/status | cut -f2"
    );
    let mut process = shell(&script);
    process.as_object_mut().unwrap().remove("capabilities");
    let outcome = guest.exec("c1", "e1", &process).await;
    // containerd's default capabilities.
    let expected = "i686\n0077\n100\n200\n500\n0\n00000000a80425fb\n";
    assert_eq!(outcome.stdout, expected, "{}", outcome.stderr);
    process["capabilities"] = json!({});
    process["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 50, "hard": 60}]);
    process["oomScoreAdj"] = 600.into();
    process["execCPUAffinity"] = json!({"final": "1"});
    process["user"]["umask"] = 0o027.into();
    let outcome = guest.exec("c1", "e2", &process).await;
    let expected = "i686\n0027\n50\n60\n600\n1\n0000000000000000\n";
    assert_eq!(outcome.stdout, expected, "{}", outcome.stderr);
    guest.stop().await;
}

/// The agent's own affinity is nobody else's, and neither is that of an exec before it was in the container.
#[tokio::test]
async fn a_process_may_run_on_all_cpus_of_its_container() {
    let all = fs::read_to_string("/sys/devices/system/cpu/online").unwrap();
    let mut one = nix::sched::CpuSet::new();
    one.set(0).unwrap();
    // Of this thread, whose child the agent is.
    nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &one).unwrap();
    let mut guest = Guest::start().await;
    let affinity = "grep Cpus_allowed_list /proc/self/status | cut -f2";
    let (stdio, mut ends) = guest.stdio(false, false).await;
    guest
        .started("c1", &spec(&format!("{affinity}; sleep 1000")), stdio)
        .await;
    ends.said(&all).await;
    let mut process = shell(affinity);
    assert_eq!(guest.exec("c1", "e1", &process).await.stdout, all);
    process["execCPUAffinity"] = json!({"initial": "0"});
    assert_eq!(guest.exec("c1", "e2", &process).await.stdout, all);
    process["execCPUAffinity"] = json!({"initial": "0", "final": "0"});
    assert_eq!(guest.exec("c1", "e3", &process).await.stdout, "0\n");
    guest.stop().await;
}

#[tokio::test]
async fn what_cannot_be_applied_is_refused_over_the_wire() {
    let mut guest = Guest::start().await;
    guest.rootfs("c1");
    for (pointer, value, word) in [
        (
            "hooks",
            json!({"createContainer": [{"path": "/bin/x"}]}),
            "hooks.createContainer",
        ),
        ("vm", json!({}), "vm"),
    ] {
        let mut bad = spec("true");
        bad[pointer] = value;
        let (code, text) = refusal(guest.create("c1", &bad, Stdio::default()).await);
        assert_eq!(code, Code::INVALID_ARGUMENT);
        assert!(text.contains(word), "{text}");
    }
    let request = CreateContainerRequest {
        id: "c1".into(),
        spec: b"{".to_vec(),
        rootfs: "c1/rootfs".into(),
        ..Default::default()
    };
    refused(
        guest.client.create_container(ctx(), &request).await,
        Code::INVALID_ARGUMENT,
    );
    let request = CreateContainerRequest {
        id: "../x".into(),
        ..request
    };
    refused(
        guest.client.create_container(ctx(), &request).await,
        Code::INVALID_ARGUMENT,
    );
    let request = CreateContainerRequest {
        id: "c1".into(),
        rootfs: "../../etc".into(),
        spec: b"{}".to_vec(),
        ..request
    };
    refused(
        guest.client.create_container(ctx(), &request).await,
        Code::INVALID_ARGUMENT,
    );
    guest.stop().await;
}

#[tokio::test]
async fn devices_of_the_node_are_refused_and_dropped_for_a_privileged_container() {
    let mut guest = Guest::start().await;
    guest.rootfs("c1");
    let disk = json!({"path": "/dev/disk-of-node", "type": "b", "major": 511, "minor": 7});
    let mut ordinary = spec("true");
    ordinary["linux"]["devices"] = json!([disk]);
    let (code, text) = refusal(guest.create("c1", &ordinary, Stdio::default()).await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(text.contains("/dev/disk-of-node"), "{text}");
    // The guest here is this machine, whose /dev has fuse.
    let got = output(
        &mut guest,
        "ls /dev/disk-of-node 2>/dev/null; ls /dev/fuse; : < /dev/fuse && echo open; ls -l /dev/ptmx | awk '{print $11}'",
        |spec| {
            spec["linux"]["devices"] = json!([disk]);
            spec["linux"]["resources"]["devices"] =
                json!([{"allow": false, "access": "rwm"}, {"allow": true, "access": "rwm"}]);
        },
    )
    .await;
    assert_eq!(got, "/dev/fuse\nopen\npts/ptmx\n");
    guest.stop().await;
}
