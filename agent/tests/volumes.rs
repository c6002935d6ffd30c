//! Volumes in the guest's memory, as containers see them.
#![allow(clippy::unwrap_used)]
mod guest;

use std::{fs, os::unix::fs::symlink};

use brig_agent_protocol::agent::*;
use guest::*;
use serde_json::{Value, json};
use ttrpc::Code;
use update_volume_request::Kind;

fn entry(path: &str, mode: u32, content: &str, identity: u64) -> VolumeEntry {
    VolumeEntry {
        path: path.into(),
        mode,
        content: content.into(),
        identity,
        ..Default::default()
    }
}

fn update(id: &str, kind: Kind, entries: Vec<VolumeEntry>) -> UpdateVolumeRequest {
    UpdateVolumeRequest {
        id: id.into(),
        kind: kind.into(),
        entries,
        size: 4 << 20,
        ..Default::default()
    }
}

fn generation(number: u64) -> Vec<VolumeEntry> {
    let name = format!("..2026_{number}");
    let mut key = entry(
        &format!("{name}/key"),
        libc::S_IFREG | 0o440,
        &format!("generation {number}\n"),
        number * 10 + 1,
    );
    key.gid = 2000;
    vec![
        entry("", libc::S_IFDIR | 0o755, "", 1),
        entry(&name, libc::S_IFDIR | 0o755, "", number * 10),
        key,
        entry("..data", libc::S_IFLNK | 0o777, &name, number * 10 + 2),
        entry("key", libc::S_IFLNK | 0o777, "..data/key", 2),
    ]
}

fn source(index: u32, volume: &str, path: &str) -> MountSource {
    MountSource {
        index,
        volume: volume.into(),
        volume_path: path.into(),
        ..Default::default()
    }
}

/// A spec whose only mount besides /proc is a bind of a volume at /v.
fn with_volume(script: &str, options: Value) -> Value {
    let mut spec = spec(script);
    spec["mounts"] = json!([
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/v", "type": "bind", "source": "/var/lib/kubelet/x", "options": options}
    ]);
    spec
}

async fn put(guest: &Guest, request: UpdateVolumeRequest) {
    guest.client.update_volume(ctx(), &request).await.unwrap();
}

async fn removed(guest: &Guest, id: &str) {
    let request = VolumeRef {
        id: id.into(),
        ..Default::default()
    };
    guest.client.remove_volume(ctx(), &request).await.unwrap();
}

#[tokio::test]
async fn a_replica_is_read_only_updates_live_and_is_shared_by_containers() {
    let mut guest = Guest::start().await;
    put(&guest, update("v1", Kind::REPLICA, generation(1))).await;
    guest.rootfs("c1");
    // That inotify tells of the swap is shown in the end-to-end suites: busybox has no program for it.
    let script = "
        stat -f -c %T /v; cat /v/key; stat -Lc '%a %u %g' /v/key
        touch /v/x 2>/dev/null || echo read-only
        while grep -q 'generation 1' /v/key; do sleep 0.05; done
        cat /v/key; ls -A /v | tr '\\n' ' '";
    let spec = with_volume(script, json!(["rbind", "ro"]));
    let (stdio, mut ends) = guest.stdio(false, false).await;
    let sources = vec![source(1, "v1", "")];
    guest
        .create_with("c1", &spec, stdio, sources.clone())
        .await
        .unwrap();
    guest.run("c1", "").await.unwrap();
    // Then it waits for the update.
    ends.said("tmpfs\ngeneration 1\n440 0 2000\nread-only\n")
        .await;
    put(&guest, update("v1", Kind::REPLICA, generation(2))).await;
    let (stdout, stderr) = ends.read_all().await;
    assert_eq!(stderr, "");
    assert_eq!(stdout, "generation 2\n..2026_2 ..data key ");
    guest.exit_of("c1", "").await;
    guest.delete("c1", "").await.unwrap();

    guest.rootfs("c2");
    let spec = with_volume("cat /v/key", json!(["rbind", "ro"]));
    let outcome = guest.whole_with("c2", &spec, sources.clone()).await;
    assert_eq!(outcome.stdout, "generation 2\n");
    assert!(!exists(&guest.share().join("c2/m1")));

    removed(&guest, "v1").await;
    removed(&guest, "v1").await;
    guest.rootfs("c3");
    let (stdio, _ends) = guest.stdio(false, false).await;
    let (code, message) = refusal(guest.create_with("c3", &spec, stdio, sources).await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(message.contains("volume v1"), "{message}");
    guest.stop().await;
}

#[tokio::test]
async fn nothing_of_an_update_is_seen_before_its_last_request() {
    let mut guest = Guest::start().await;
    let spec = with_volume("ls -A /v | tr '\\n' ' '", json!(["rbind", "ro"]));
    let part = |number: u64, from: usize, to: usize| {
        let entries = generation(number)[from..to].to_vec();
        update("v1", Kind::REPLICA, entries)
    };
    let mut first = part(1, 0, 2);
    first.more = true;
    let mut last = part(1, 2, 5);
    last.continued = true;
    // The start of an update that never came to its end.
    let mut lost = part(8, 0, 3);
    lost.more = true;
    let steps = [
        ("c1", vec![first], ""),
        ("c2", vec![last], "..2026_1 ..data key "),
        ("c3", vec![lost, part(2, 0, 5)], "..2026_2 ..data key "),
    ];
    for (id, requests, wanted) in steps {
        for request in requests {
            put(&guest, request).await;
        }
        guest.rootfs(id);
        let outcome = guest.whole_with(id, &spec, vec![source(1, "v1", "")]).await;
        assert_eq!(outcome.stdout, wanted, "{}", outcome.stderr);
    }
    guest.stop().await;
}

#[tokio::test]
async fn a_memory_volume_has_its_limit_and_outlives_its_containers() {
    let mut guest = Guest::start().await;
    let mut top = entry("", libc::S_IFDIR | 0o2775, "", 1);
    top.gid = 2000;
    put(&guest, update("v1", Kind::MEMORY, vec![top])).await;
    // The first container of the pod makes what a later one has as its sub-path.
    let script = "id -G; df -k /v | awk 'END {print $2}'; mkdir -p /v/deep && echo x > /v/deep/f
        stat -c '%u %g %a' /v/deep/f; (head -c 5000000 /dev/zero > /v/big) 2>/dev/null || echo full; rm /v/big";
    let mut spec = with_volume(script, json!(["rbind", "rw"]));
    spec["process"]["user"] = json!({"uid": 1000, "gid": 1000, "additionalGids": [2000]});
    guest.rootfs("c1");
    let outcome = guest
        .whole_with("c1", &spec, vec![source(1, "v1", "")])
        .await;
    assert_eq!(outcome.stdout, "1000 2000\n4096\n1000 2000 644\nfull\n");
    // Kubelet has made the sub-path on the host, which is missing in the guest or is there already.
    let mut made = entry("other", libc::S_IFDIR | 0o2777, "", 2);
    made.gid = 2000;
    let there = entry("deep", libc::S_IFDIR | 0o700, "", 3);
    put(&guest, update("v1", Kind::MEMORY, vec![made, there])).await;
    for (id, path, wanted) in [
        ("c2", "deep", "f\n1000 2000 2755\n"),
        ("c3", "other", "0 2000 2777\n"),
        ("c4", "deep/f", "/v\n1000 2000 644\n"),
    ] {
        guest.rootfs(id);
        let spec = with_volume("ls -A /v; stat -c '%u %g %a' /v", json!(["rbind", "rw"]));
        let outcome = guest
            .whole_with(id, &spec, vec![source(1, "v1", path)])
            .await;
        assert_eq!(outcome.stdout, wanted, "{path} {}", outcome.stderr);
    }
    guest.stop().await;
}

#[tokio::test]
async fn a_link_that_a_container_left_in_a_volume_does_not_lead_out_of_it() {
    let mut guest = Guest::start().await;
    put(&guest, update("v1", Kind::MEMORY, Vec::new())).await;
    guest.rootfs("c1");
    let script = "ln -s / /v/root; ln -s ../../../../.. /v/up; ln -s /proc/1/root /v/magic";
    let spec = with_volume(script, json!(["rbind", "rw"]));
    let sources = vec![source(1, "v1", "")];
    guest.whole_with("c1", &spec, sources).await;
    let spec = with_volume("ls /v | tr '\\n' ' '", json!(["rbind", "rw"]));
    for (id, path) in [("c2", "root"), ("c3", "up")] {
        guest.rootfs(id);
        let outcome = guest
            .whole_with(id, &spec, vec![source(1, "v1", path)])
            .await;
        // The links lead to the volume's own top.
        assert_eq!(outcome.stdout, "magic root up ", "{path}");
    }
    guest.rootfs("c4");
    let (stdio, _ends) = guest.stdio(false, false).await;
    let sources = vec![source(1, "v1", "magic")];
    assert!(
        guest
            .create_with("c4", &spec, stdio, sources)
            .await
            .is_err()
    );
    guest.stop().await;
}

#[tokio::test]
async fn a_device_of_the_guest_can_be_mounted_and_nonsense_is_refused() {
    let mut guest = Guest::start().await;
    guest.rootfs("c1");
    let device = |name: &str| {
        vec![MountSource {
            index: 1,
            device: name.into(),
            ..Default::default()
        }]
    };
    let spec = with_volume("echo x > /v && wc -c < /v", json!(["rbind", "rw"]));
    let outcome = guest.whole_with("c1", &spec, device("null")).await;
    assert_eq!(outcome.stdout, "0\n", "{}", outcome.stderr);
    for sources in [
        device("../etc"),
        device("none"),
        vec![source(1, "../v1", "")],
        vec![source(1, "v1", "../x")],
        vec![source(1, "v1", "")],
    ] {
        guest.rootfs("c2");
        let (stdio, _ends) = guest.stdio(false, false).await;
        let refused = guest.create_with("c2", &spec, stdio, sources.clone()).await;
        let (code, _) = refusal(refused);
        assert_eq!(code, Code::INVALID_ARGUMENT, "{sources:?}");
        fs::remove_dir_all(guest.share().join("c2")).unwrap();
    }
    let outside = guest.dir.path().join("outside");
    symlink("/etc", &outside).unwrap();
    for bad in [
        entry("../outside", libc::S_IFREG, "x", 1),
        entry("/etc/x", libc::S_IFREG, "x", 1),
        entry("c", libc::S_IFCHR, "", 1),
    ] {
        let request = update("v2", Kind::REPLICA, vec![bad]);
        let (code, _) = refusal(guest.client.update_volume(ctx(), &request).await);
        assert_eq!(code, Code::INVALID_ARGUMENT);
    }
    guest.stop().await;
}

#[tokio::test]
async fn what_the_host_holds_read_only_is_not_made_so_again() {
    let mut guest = Guest::start().await;
    for (id, readonly_on_host, wanted) in [("c1", false, "read-only\n"), ("c2", true, "")] {
        guest.rootfs(id);
        let volume = guest.share().join(id).join("m1/below");
        fs::create_dir_all(&volume).unwrap();
        let script = "touch /v/below/x 2>/dev/null || echo read-only";
        let spec = with_volume(script, json!(["rbind", "ro"]));
        let sources = vec![MountSource {
            index: 1,
            share_path: format!("{id}/m1"),
            readonly_on_host,
            ..Default::default()
        }];
        let outcome = guest.whole_with(id, &spec, sources).await;
        assert_eq!(outcome.stdout, wanted, "{}", outcome.stderr);
        assert_eq!(exists(&volume.join("x")), readonly_on_host);
    }
    guest.stop().await;
}

#[tokio::test]
async fn mounts_of_one_container_are_seen_by_those_that_ask_for_them_and_not_outside() {
    let mut guest = Guest::start().await;
    let volume = guest.share().join("shared/v");
    fs::create_dir_all(volume.join("below")).unwrap();
    let request = UpdateVolumeRequest {
        share_path: "shared/v".into(),
        ..update("s1", Kind::SHARED, Vec::new())
    };
    put(&guest, request).await;
    // The one that mounts waits for the others, which tell by files in the volume what they see.
    let mounts = "until [ -e /v/a ] && [ -e /v/b ]; do sleep 0.05; done
        mount -t tmpfs none /v/below && echo up > /v/below/f && touch /v/go
        until [ -e /v/done ]; do sleep 0.05; done; umount /v/below";
    let looks = |me: &str| {
        format!(
            "touch /v/{me}; until [ -e /v/go ]; do sleep 0.05; done; ls /v/below; touch /v/saw-{me}"
        )
    };
    let mut ends = Vec::new();
    let containers = [
        ("c1", mounts.to_owned(), "rshared"),
        ("c2", looks("a"), "rslave"),
        ("c3", looks("b"), "rprivate"),
    ];
    for (id, script, propagation) in &containers {
        guest.rootfs(id);
        let mut spec = with_volume(script, json!(["rbind", "rw", propagation]));
        let mut caps = CAPS.to_vec();
        caps.push("CAP_SYS_ADMIN");
        for set in ["bounding", "effective", "permitted"] {
            spec["process"]["capabilities"][set] = json!(caps);
        }
        let (stdio, end) = guest.stdio(false, false).await;
        let sources = vec![source(1, "s1", "")];
        guest.create_with(id, &spec, stdio, sources).await.unwrap();
        guest.run(id, "").await.unwrap();
        ends.push(end);
    }
    let mut outputs = Vec::new();
    for end in ends.drain(1..) {
        outputs.push(end.read_all().await);
    }
    let empty = String::new();
    assert_eq!(outputs[0], ("f\n".to_owned(), empty.clone()), "rslave");
    assert_eq!(outputs[1], (empty.clone(), empty.clone()), "rprivate");
    // This process stands for the host.
    assert!(!exists(&volume.join("below/f")));
    // One that comes later has it too.
    guest.rootfs("c4");
    let spec = with_volume("ls /v/below; touch /v/done", json!(["rbind", "rshared"]));
    let late = guest
        .whole_with("c4", &spec, vec![source(1, "s1", "")])
        .await;
    assert_eq!(late.stdout, "f\n", "{}", late.stderr);
    let (_, stderr) = ends.remove(0).read_all().await;
    assert_eq!(stderr, "");
    for (id, ..) in &containers {
        guest.exit_of(id, "").await;
        guest.delete(id, "").await.unwrap();
    }
    removed(&guest, "s1").await;
    assert!(!exists(&guest.dir.path().join("run/volumes/s1")));
    guest.stop().await;
}

#[tokio::test]
async fn huge_pages_are_a_file_system_of_their_own_with_the_owner_that_was_told() {
    let mut guest = Guest::start().await;
    let mut top = entry("", libc::S_IFDIR | 0o2775, "", 1);
    top.gid = 2000;
    put(&guest, update("h1", Kind::HUGE, vec![top])).await;
    guest.rootfs("c1");
    let script = "awk '$2 == \"/v\" { print $3 }' /proc/mounts; stat -c '%a %u %g' /v; touch /v/f";
    let spec = with_volume(script, json!(["rbind"]));
    let outcome = guest
        .whole_with("c1", &spec, vec![source(1, "h1", "")])
        .await;
    assert_eq!(outcome.stdout, "hugetlbfs\n2775 0 2000\n");
    assert_eq!(outcome.stderr, "");
    removed(&guest, "h1").await;
}
