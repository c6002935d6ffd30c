//! Containers and images that attack the agent.
mod guest;

use std::{fs, os::unix::fs::symlink};

use brig_agent_protocol::agent::*;
use guest::*;
use serde_json::{Value, json};

#[tokio::test]
async fn an_image_with_a_symlink_for_proc_is_refused() {
    let mut guest = Guest::start().await;
    let root = guest.rootfs("c1");
    fs::remove_dir(root.join("proc")).unwrap();
    symlink("etc", root.join("proc")).unwrap();
    let (_, text) = refusal(guest.create("c1", &spec("true"), Stdio::default()).await);
    assert!(text.contains("/proc") && text.contains("symlink"), "{text}");
    guest.stop().await;
}

#[tokio::test]
async fn mount_points_and_devices_through_symlinks_stay_in_the_root() {
    let mut guest = Guest::start().await;
    let outside = guest.dir.path().join("outside");
    fs::create_dir(&outside).unwrap();
    let root = guest.rootfs("c1");
    symlink(&outside, root.join("vol")).unwrap();
    fs::remove_dir(root.join("dev")).unwrap();
    symlink("../../../../../../../..", root.join("dev")).unwrap();
    let mut attack = spec("ls -d /vol/../null");
    attack["mounts"] = json!([
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/vol/made", "type": "tmpfs", "source": "tmpfs"}
    ]);
    attack["process"]["cwd"] = "/vol/cwd".into();
    let created = guest.create("c1", &attack, Stdio::default()).await;
    if created.is_ok() {
        guest.delete("c1", "").await.unwrap();
    }
    assert!(
        fs::read_dir(&outside).unwrap().next().is_none(),
        "the outside was written"
    );
    guest.stop().await;
}

#[tokio::test]
async fn a_false_ptmx_of_the_image_is_not_taken_for_a_terminal() {
    let mut guest = Guest::start().await;
    let root = guest.rootfs("c1");
    fs::create_dir(root.join("dev/pts")).unwrap();
    fs::write(root.join("dev/pts/ptmx"), "").unwrap();
    let mut attack = spec("true");
    attack["process"]["terminal"] = true.into();
    attack["mounts"] = json!([{"destination": "/proc", "type": "proc", "source": "proc"}]);
    let (stdio, _ends) = guest.stdio(false, true).await;
    let (_, text) = refusal(guest.create("c1", &attack, stdio).await);
    assert!(text.contains("devpts"), "{text}");
    guest.stop().await;
}

/// CVE-2019-5736: a container that overwrites the runtime through /proc/PID/exe of a helper. All
/// capabilities, so that only the read-only mount and the namespaces stand in the way.
#[tokio::test]
async fn the_agents_binary_cannot_be_written_through_a_helper() {
    let mut guest = Guest::start().await;
    guest.rootfs("c1");
    let mut attack = spec(
        "while :; do for p in /proc/[0-9]*; do [ $p = /proc/1 ] && continue; case $(readlink $p/exe) in *busybox) ;; ?*) \
         (printf overwritten > $p/exe) 2>/dev/null && echo WRITTEN; [ -e $p/exe ] && echo met >> /tmp/met;; esac; done; done",
    );
    let all: Vec<String> = (0..41).filter_map(caps_name).collect();
    attack["process"]["capabilities"] =
        json!({"bounding": all, "effective": all, "permitted": all});
    attack["process"]["noNewPrivileges"] = false.into();
    attack["linux"]["resources"]["devices"] = json!([{"allow": true, "access": "rwm"}]);
    let (stdio, ends) = guest.stdio(false, false).await;
    guest.create("c1", &attack, stdio).await.unwrap();
    guest.run("c1", "").await.unwrap();
    let before = fs::read(env!("CARGO_BIN_EXE_brig-agent")).unwrap();
    for n in 0..40 {
        assert_eq!(
            guest
                .exec("c1", &format!("e{n}"), &shell("exit 0"))
                .await
                .status,
            0
        );
    }
    guest.kill("c1", "", libc::SIGKILL, true).await.unwrap();
    assert_eq!(ends.read_all().await.0, "");
    assert!(
        fs::read(env!("CARGO_BIN_EXE_brig-agent")).unwrap() == before,
        "the binary was changed"
    );
    guest.stop().await;
}

fn caps_name(n: u8) -> Option<String> {
    [
        "CAP_SYS_ADMIN",
        "CAP_SYS_PTRACE",
        "CAP_DAC_OVERRIDE",
        "CAP_DAC_READ_SEARCH",
        "CAP_KILL",
        "CAP_MKNOD",
        "CAP_SYS_CHROOT",
        "CAP_SETPCAP",
    ]
    .get(usize::from(n))
    .map(|s| (*s).to_owned())
}

/// CVE-2024-21626: a working directory behind a descriptor of the runtime.
#[tokio::test]
async fn a_working_directory_behind_a_descriptor_is_refused() {
    let mut guest = Guest::start().await;
    guest.rootfs("c1");
    for n in 3..20 {
        let mut attack = spec("ls; pwd");
        attack["process"]["cwd"] = format!("/proc/self/fd/{n}").into();
        let created = guest.create("c1", &attack, Stdio::default()).await;
        assert!(created.is_err(), "descriptor {n}");
    }
    guest.stop().await;
}

#[tokio::test]
async fn a_container_can_neither_see_nor_signal_the_agent() {
    let mut guest = Guest::start().await;
    guest.rootfs("c1");
    let outcome = guest.whole("c1", &spec("ls -d /proc/[0-9]* | wc -l; kill -9 -1; echo $?; ls /run /sys/fs/cgroup | grep -c brig")).await;
    let lines: Vec<&str> = outcome.stdout.lines().collect();
    // The shell, ls and wc.
    assert!(lines[0].parse::<u32>().unwrap() <= 4, "{lines:?}");
    assert_eq!(lines[2], "0");
    guest.client.ping(ctx(), &Empty::new()).await.unwrap();
    guest.stop().await;
}

#[tokio::test]
async fn a_fork_bomb_of_orphans_is_reaped() {
    let mut guest = Guest::start().await;
    guest.rootfs("c1");
    let mut spec = spec("for i in $(seq 200); do (true &) ; done; echo done");
    spec["linux"]["namespaces"][0]["path"] = "/shared".into();
    assert_eq!(guest.whole("c1", &spec).await.stdout, "done\n");
    guest.client.ping(ctx(), &Empty::new()).await.unwrap();
    guest.stop().await;
}

/// The process that holds the shared pid namespace stands beside containers that may trace it.
#[tokio::test]
async fn the_holder_of_the_shared_pid_namespace_leads_nowhere() {
    let mut guest = Guest::start().await;
    let script = "echo root $(ls -A /proc/1/root/); readlink /proc/1/cwd; echo fds $(ls /proc/1/fd)
        grep -E '^(Cap|NoNewPrivs)' /proc/1/status | awk '{print $2}' | sort -u | tr '\\n' ' '
        [ $(readlink /proc/1/ns/mnt) = $(readlink /proc/self/ns/mnt) ] && echo same mounts
        awk '{print $5, $6}' /proc/1/mountinfo; touch /proc/1/root/x 2>/dev/null && echo written
        case $(cat /proc/1/cgroup) in *_pause) echo cgroup apart;; esac; cat /proc/1/comm";
    let got = output(&mut guest, script, |spec| {
        spec["linux"]["namespaces"][0]["path"] = "/proc/123/ns/pid".into();
        let all: Vec<String> = (0..8).filter_map(caps_name).collect();
        spec["process"]["capabilities"] =
            json!({"bounding": all, "effective": all, "permitted": all});
    })
    .await;
    assert_eq!(
        got,
        "root\n/\nfds\n0000000000000000 1 / ro,nosuid,nodev,noexec,relatime\ncgroup apart\npause\n"
    );
    guest.stop().await;
}

/// A file of the machine, in the component test the guest's, that no image here has.
const OF_THE_GUEST: &str = "usr/bin/env";

/// In a pid namespace shared with others, at the path the shim gives it.
fn among_others(script: &str) -> Value {
    let mut spec = spec(script);
    spec["linux"]["namespaces"][0]["path"] = "/proc/123/ns/pid".into();
    spec
}

/// Every process that it can trace leads it nowhere but to roots of containers: while those come and go whose pid
/// namespace is the sandbox's (with and without options of procfs, with a user namespace), while one joins the
/// watcher's own, and while programs are run in them.
#[tokio::test]
async fn a_tracer_among_the_pids_of_others_never_sees_the_guests_root() {
    for own_namespace in [false, true] {
        let mut guest = Guest::start().await;
        let watch = format!(
            "echo watching; while [ ! -e /tmp/stop ]; do for p in /proc/[0-9]*; do
             for way in $p/root $p/cwd $p/fd/*/..; do [ -e $way/{OF_THE_GUEST} ] && echo $way; done; done; done; echo done"
        );
        let mut watcher = if own_namespace {
            spec(&watch)
        } else {
            among_others(&watch)
        };
        let mut tracer = CAPS.to_vec();
        tracer.extend(["CAP_SYS_PTRACE", "CAP_DAC_READ_SEARCH"]);
        watcher["process"]["capabilities"] =
            json!({"bounding": tracer, "effective": tracer, "permitted": tracer});
        let (stdio, mut ends) = guest.stdio(false, false).await;
        guest.started("watcher", &watcher, stdio).await;
        ends.said("watching\n").await;
        for n in 0..12 {
            let id = format!("beside{n}");
            let root = guest.rootfs(&id);
            let mut beside = among_others("sleep 1000");
            if n % 3 == 1 {
                beside["mounts"][0]["options"] = json!(["nosuid", "hidepid=invisible"]);
            }
            if n % 3 == 2 && !own_namespace {
                for entry in ["", "tmp", "root"] {
                    std::os::unix::fs::chown(root.join(entry), Some(100_000), Some(100_000))
                        .unwrap();
                }
                let map = json!([{"containerID": 0, "hostID": 100_000, "size": 1000}]);
                let linux = &mut beside["linux"];
                linux["namespaces"]
                    .as_array_mut()
                    .unwrap()
                    .push(json!({"type": "user"}));
                (linux["uidMappings"], linux["gidMappings"]) = (map.clone(), map);
            }
            let (stdio, ends) = guest.stdio(false, false).await;
            let request = CreateContainerRequest {
                id: id.clone(),
                spec: serde_json::to_vec(&beside).unwrap(),
                stdio: Some(stdio).into(),
                rootfs: format!("{id}/rootfs"),
                pid_namespace_of: if own_namespace {
                    "watcher".into()
                } else {
                    String::new()
                },
                ..Default::default()
            };
            guest
                .client
                .create_container(ctx(), &request)
                .await
                .unwrap();
            guest.run(&id, "").await.unwrap();
            let seen = guest
                .exec(&id, "e", &shell("readlink /proc/self; id -u"))
                .await;
            assert!(
                seen.stdout.ends_with("\n0\n") && !seen.stdout.starts_with('\n'),
                "{seen:?}"
            );
            guest.kill(&id, "", libc::SIGKILL, true).await.unwrap();
            guest.outcome(&id, "", ends).await;
        }
        fs::write(guest.share().join("watcher/rootfs/tmp/stop"), "").unwrap();
        assert_eq!(guest.outcome("watcher", "", ends).await.stdout, "done\n");
        guest.stop().await;
    }
}

/// As with a pid namespace of its own: the kernel's word on a bad option, and nothing is left behind.
#[tokio::test]
async fn a_bad_option_of_procfs_is_named_among_the_pids_of_others() {
    let mut guest = Guest::start().await;
    guest.rootfs("c1");
    for mut bad in [spec("true"), among_others("true")] {
        bad["mounts"][0]["options"] = json!(["nosuid", "hidepid=maybe"]);
        let (code, text) = refusal(guest.create("c1", &bad, Stdio::default()).await);
        assert_eq!(code, ttrpc::Code::INVALID_ARGUMENT);
        assert!(text.contains("/proc") && text.contains("hidepid"), "{text}");
    }
    guest.stop().await;
}

/// Owner and mode of the machine's own, which a failure of the test below must not leave changed.
struct Null(u32, u32);

impl Null {
    fn now() -> (u32, u32) {
        use std::os::unix::fs::MetadataExt as _;
        let found = fs::metadata("/dev/null");
        found.map_or((0, 0), |found| (found.mode() & 0o7777, found.uid()))
    }
}

impl Drop for Null {
    fn drop(&mut self) {
        use std::os::unix::fs::PermissionsExt as _;
        let _ = std::os::unix::fs::chown("/dev/null", Some(self.1), None);
        let _ = fs::set_permissions("/dev/null", fs::Permissions::from_mode(self.0));
    }
}

#[tokio::test]
async fn what_a_container_does_to_its_null_device_is_its_own_affair() {
    let before = Null::now();
    let _put_back = Null(before.0, before.1);
    let mut guest = Guest::start().await;
    // Behind a mask, at the descriptor that the host gives no stream for, and by its name.
    let script = "for f in /proc/timer_list /dev/stdin /dev/null; do chown 7 $f; chmod 664 $f; stat -Lc '%a %u %t:%T' $f; done";
    let mut init = spec(&format!("{script}; sleep 1000"));
    let (stdio, mut ends) = guest.stdio(false, false).await;
    init["process"]["env"] = json!(["PATH=/bin"]);
    guest.started("c1", &init, stdio).await;
    let told = "664 7 1:3\n".repeat(3);
    ends.said(&told).await;
    assert_eq!(Null::now(), before);
    let outcome = guest.exec("c1", "e1", &shell(script)).await;
    assert_eq!(outcome.stdout, told, "{}", outcome.stderr);
    assert_eq!(Null::now(), before);
    // A neighbour's is untouched, and one whose /dev is its image's has one of its own too.
    let got = output(
        &mut guest,
        "stat -Lc '%a %u' /proc/timer_list /dev/stdin",
        |spec| {
            let mounts = spec["mounts"].as_array_mut().unwrap();
            mounts.retain(|mount| !mount["destination"].as_str().unwrap().starts_with("/dev"));
        },
    )
    .await;
    assert_eq!(got, "666 0\n666 0\n");
    guest.stop().await;
}

#[tokio::test]
async fn cgroups_of_a_container_have_an_end_and_go_with_it() {
    let mut guest = Guest::start().await;
    // Names so long that no path leads to the last of them.
    let script = r#"cd /sys/fs/cgroup; name=$(printf %0200d 0); depth=0
        while [ $depth -lt 60 ] && mkdir $name 2>/dev/null && cd -P $name 2>/dev/null; do depth=$((depth+1)); done; echo $depth"#;
    let got = output(&mut guest, script, |spec| {
        let mounts = spec["mounts"].as_array_mut().unwrap();
        mounts.push(json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["rw"]}));
    })
    .await;
    assert_eq!(got, "32\n");
    guest.stop().await;
}
