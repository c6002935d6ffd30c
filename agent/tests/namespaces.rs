//! The namespaces of a container: its own, the sandbox's, and ids of its own.
#![allow(clippy::unwrap_used)]
mod guest;

use std::fs;

use brig_agent_protocol::agent::*;
use guest::*;
use serde_json::{Value, json};

#[tokio::test]
async fn names_and_sysctls() {
    let mut guest = Guest::start().await;
    let script = "hostname; cat /proc/sys/kernel/domainname; cat /proc/sys/kernel/shm_rmid_forced /proc/sys/net/ipv4/ip_unprivileged_port_start";
    let got = output(&mut guest, script, |spec| {
        spec["hostname"] = "own".into();
        spec["domainname"] = "example".into();
        spec["linux"]["sysctl"] =
            json!({"kernel.shm_rmid_forced": "1", "net.ipv4.ip_unprivileged_port_start": "80"});
    })
    .await;
    assert_eq!(got, "own\nexample\n1\n80\n");
    // A path means the sandbox's own namespace, where hostname was set with the sandbox.
    let got = output(
        &mut guest,
        "hostname; cat /proc/sys/kernel/shm_rmid_forced",
        |spec| {
            spec["hostname"] = "ignored".into();
            for namespace in spec["linux"]["namespaces"].as_array_mut().unwrap() {
                if namespace["type"] == "uts" || namespace["type"] == "ipc" {
                    namespace["path"] = "/proc/123/ns/x".into();
                }
            }
        },
    )
    .await;
    assert_eq!(got, "pod-1\n0\n");
    guest.stop().await;
}

#[tokio::test]
async fn containers_share_a_pid_namespace_when_the_spec_names_one() {
    let mut guest = Guest::start().await;
    guest.rootfs("c1");
    let share_pids =
        |spec: &mut Value| spec["linux"]["namespaces"][0]["path"] = "/proc/123/ns/pid".into();
    let mut first = spec("sleep 987");
    share_pids(&mut first);
    guest.create("c1", &first, Stdio::default()).await.unwrap();
    guest.run("c1", "").await.unwrap();
    let got = output(&mut guest, "until ps | grep -q '[s]leep 987'; do :; done; ps | grep -c '[s]leep 987'; echo $$ | grep -vx 1 | wc -l", share_pids).await;
    assert_eq!(got, "1\n1\n");
    // Without any entry it would be the guest's own: it is the shared one, and the agent is not in it.
    let got = output(
        &mut guest,
        "ps | grep -c '[s]leep 987'; ps | grep -c 'serve-uni[x]'",
        |spec| {
            spec["linux"]["namespaces"]
                .as_array_mut()
                .unwrap()
                .remove(0);
        },
    )
    .await;
    assert_eq!(got, "1\n0\n");
    // What a container leaves behind dies with its init process.
    let got = output(&mut guest, "sleep 986 & echo started", share_pids).await;
    assert_eq!(got, "started\n");
    assert_eq!(
        output(&mut guest, "ps | grep -c '[s]leep 986'", share_pids).await,
        "0\n"
    );
    guest.stop().await;
}

/// In a pid namespace of its own the kernel sees to that.
#[tokio::test]
async fn the_exit_of_init_is_the_last_one_in_a_shared_pid_namespace_too() {
    let mut guest = Guest::start().await;
    let mut shared = spec("sleep 1000");
    shared["linux"]["namespaces"][0]["path"] = "/proc/123/ns/pid".into();
    guest.started("c1", &shared, Stdio::default()).await;
    for exec in ["e1", "e2", "e3"] {
        guest
            .started_exec("c1", exec, &shell("sleep 1000"), Stdio::default())
            .await;
    }
    guest.kill("c1", "", libc::SIGKILL, false).await.unwrap();
    assert_eq!(guest.exit_of("c1", "").await.status, 137);
    let exits = guest.exits();
    assert_eq!(exits.len(), 4, "{exits:?}");
    assert_eq!(exits[3], ("c1".into(), String::new()));
    guest.stop().await;
}

#[tokio::test]
async fn a_container_may_join_the_pid_namespace_of_another_one() {
    let mut guest = Guest::start().await;
    for (id, script) in [("c1", "exec sleep 987"), ("c2", "exec sleep 986")] {
        guest.started(id, &spec(script), Stdio::default()).await;
    }
    guest.rootfs("debug");
    let mut debugger = spec("cat /proc/1/cmdline | tr '\\0' ' '; set -- /proc/[0-9]*; echo $#");
    debugger["linux"]["namespaces"][0]["path"] = "/proc/123/ns/pid".into();
    let (stdio, ends) = guest.stdio(false, false).await;
    let request = CreateContainerRequest {
        id: "debug".into(),
        spec: serde_json::to_vec(&debugger).unwrap(),
        stdio: Some(stdio).into(),
        rootfs: "debug/rootfs".into(),
        pid_namespace_of: "c2".into(),
        ..Default::default()
    };
    guest
        .client
        .create_container(ctx(), &request)
        .await
        .unwrap();
    guest.run("debug", "").await.unwrap();
    // The sleep and the shell.
    assert_eq!(
        guest.outcome("debug", "", ends).await.stdout,
        "sleep 986 2\n"
    );
    // It goes with its target, which has to run.
    let mut request = CreateContainerRequest {
        id: "second".into(),
        stdio: Some(Stdio::default()).into(),
        spec: serde_json::to_vec(&spec("sleep 985")).unwrap(),
        ..request
    };
    guest
        .client
        .create_container(ctx(), &request)
        .await
        .unwrap();
    guest.run("second", "").await.unwrap();
    guest.kill("c2", "", libc::SIGKILL, false).await.unwrap();
    assert_eq!(guest.exit_of("second", "").await.status, 137);
    guest.delete("second", "").await.unwrap();
    for (target, code) in [
        ("c2", ttrpc::Code::FAILED_PRECONDITION),
        ("c3", ttrpc::Code::NOT_FOUND),
    ] {
        request.pid_namespace_of = target.into();
        refused(guest.client.create_container(ctx(), &request).await, code);
    }
    guest.stop().await;
}

#[tokio::test]
async fn a_user_namespace_maps_ids_and_keeps_what_is_outside_out_of_reach() {
    let mut guest = Guest::start().await;
    let root = guest.rootfs("c1");
    for entry in ["", "tmp", "home/web", "root"] {
        std::os::unix::fs::chown(root.join(entry), Some(100_000), Some(100_000)).unwrap();
    }
    let script = r#"id -u; awk '{print $1, $2, $3}' /proc/self/uid_map; stat -c '%u %g' /dev /run /tmp
        readlink /proc/self/ns/user > /tmp/mine && touch /dev/mine && echo writable; echo x > /dev/null && echo null
        mount -t tmpfs none /root && echo mounted; umount /sys/firmware 2>/dev/null || echo mask locked
        hostname other 2>/dev/null || echo hostname refused
        (echo 1 > /proc/sys/net/ipv4/ip_forward) 2>/dev/null || echo sysctl refused
        tr '\t' ' ' < /proc/sys/net/ipv4/ping_group_range; sleep 1000"#;
    let mut mapped = spec(script);
    let linux = &mut mapped["linux"];
    linux["namespaces"]
        .as_array_mut()
        .unwrap()
        .push(json!({"type": "user"}));
    linux["uidMappings"] = json!([{"containerID": 0, "hostID": 100_000, "size": 1000}]);
    linux["gidMappings"] = json!([{"containerID": 0, "hostID": 100_000, "size": 1000}]);
    // The groups are the container's.
    linux["sysctl"] = json!({"net.ipv4.ping_group_range": "0 999"});
    let all = json!([
        "CAP_SYS_ADMIN",
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_SETUID",
        "CAP_SETGID",
        "CAP_KILL"
    ]);
    mapped["process"]["capabilities"] =
        json!({"bounding": all, "effective": all, "permitted": all});
    let (stdio, mut ends) = guest.stdio(false, false).await;
    guest.create("c1", &mapped, stdio).await.unwrap();
    guest.run("c1", "").await.unwrap();
    let expected = "0\n0 100000 1000\n0 0\n0 0\n0 0\nwritable\nnull\nmounted\nmask locked\nhostname refused\nsysctl refused\n0 999\n";
    let mut got = vec![0; expected.len()];
    let stdout = ends.stdout.as_mut().unwrap();
    let read = tokio::time::timeout(
        PATIENCE,
        tokio::io::AsyncReadExt::read_exact(stdout, &mut got),
    )
    .await;
    assert!(
        read.is_ok_and(|r| r.is_ok()),
        "{}",
        String::from_utf8_lossy(&got)
    );
    assert_eq!(String::from_utf8(got).unwrap(), expected);
    let metadata = fs::metadata(root.join("tmp/mine")).unwrap();
    assert_eq!(std::os::unix::fs::MetadataExt::uid(&metadata), 100_000);
    // An exec is inside too, as an ordinary user of it and with a terminal of its own.
    let mut process =
        shell("id -u; id -g; stat -c %u /proc/self/fd/1; cat /proc/self/uid_map | wc -l");
    process["user"] = json!({"uid": 33, "gid": 34});
    process["noNewPrivileges"] = false.into();
    assert_eq!(
        guest.exec("c1", "e1", &process).await.stdout,
        "33\n34\n33\n1\n"
    );
    let same = guest
        .exec(
            "c1",
            "e2",
            &shell("[ $(cat /tmp/mine) = $(readlink /proc/self/ns/user) ] && echo same"),
        )
        .await;
    assert_eq!(same.stdout, "same\n", "{}", same.stderr);
    guest.stop().await;
}
