//! Volumes whose owners are seen through a map, as a pod with a user namespace has them.
#![allow(clippy::unwrap_used)]
mod guest;

use brig_agent_protocol::agent::*;
use guest::*;
use serde_json::{Value, json};
use update_volume_request::Kind;

fn entry(path: &str, mode: u32, owner: (u32, u32)) -> VolumeEntry {
    VolumeEntry {
        path: path.into(),
        mode,
        uid: owner.0,
        gid: owner.1,
        content: "text".into(),
        ..Default::default()
    }
}

async fn put(guest: &Guest, id: &str, kind: Kind, entries: Vec<VolumeEntry>) {
    let request = UpdateVolumeRequest {
        id: id.into(),
        kind: kind.into(),
        size: 4 << 20,
        entries,
        ..Default::default()
    };
    guest.client.update_volume(ctx(), &request).await.unwrap();
}

/// A replica at /v, memory at /m, and the replica once more where memory has no directory yet.
fn spec_of(script: &str, map: &Value) -> Value {
    let mut spec = spec(script);
    let mount = |at: &str, options: &[&str]| json!({"destination": at, "type": "bind", "source": "/x", "options": options, "uidMappings": map, "gidMappings": map});
    spec["mounts"] = json!([
        {"destination": "/proc", "type": "proc", "source": "proc"},
        mount("/v", &["rbind", "ro"]),
        mount("/m", &["rbind", "ridmap"]),
        mount("/m/made/for", &["rbind", "ro", "idmap"])
    ]);
    spec
}

fn sources() -> Vec<MountSource> {
    let source = |index, volume: &str| MountSource {
        index,
        volume: volume.into(),
        ..Default::default()
    };
    vec![source(1, "v1"), source(2, "v2"), source(3, "v1")]
}

#[tokio::test]
async fn a_user_namespace_sees_a_volumes_owners_as_they_are_on_the_node() {
    let mut guest = Guest::start().await;
    let directory = libc::S_IFDIR | 0o755;
    let replica = vec![
        entry("", directory, (0, 0)),
        entry("key", libc::S_IFREG | 0o640, (0, 2000)),
        entry("stranger", libc::S_IFREG | 0o644, (70_000, 70_000)),
    ];
    put(&guest, "v1", Kind::REPLICA, replica).await;
    // As kubelet prepares one for fsGroup.
    let memory = vec![entry("", libc::S_IFDIR | 0o2775, (0, 2000))];
    put(&guest, "v2", Kind::MEMORY, memory).await;

    let root = guest.rootfs("c1");
    for path in ["", "v", "m"] {
        std::fs::create_dir_all(root.join(path)).unwrap();
        std::os::unix::fs::chown(root.join(path), Some(100_000), Some(100_000)).unwrap();
    }
    let map = json!([{"containerID": 0, "hostID": 100_000, "size": 65_536}]);
    let script =
        "stat -c '%n %u %g' /v/key /v/stranger /m /m/made/for/key && touch /m/new && echo written";
    let mut mapped = spec_of(script, &map);
    let linux = &mut mapped["linux"];
    let namespaces = linux["namespaces"].as_array_mut().unwrap();
    namespaces.push(json!({"type": "user"}));
    linux["uidMappings"] = map.clone();
    linux["gidMappings"] = map;
    mapped["process"]["user"] = json!({"uid": 1000, "gid": 1000, "additionalGids": [2000]});
    let outcome = guest.whole_with("c1", &mapped, sources()).await;
    assert_eq!(
        outcome.stdout,
        "/v/key 0 2000\n/v/stranger 65534 65534\n/m 0 2000\n/m/made/for/key 0 2000\nwritten\n",
        "{}",
        outcome.stderr
    );

    guest.rootfs("c2");
    let mut plain = spec_of("stat -c '%n %u %g' /m/new /m/made", &json!([]));
    plain["mounts"][2]["options"] = json!(["rbind"]);
    plain["mounts"][3]["options"] = json!(["rbind"]);
    let outcome = guest.whole_with("c2", &plain, sources()).await;
    assert_eq!(
        outcome.stdout, "/m/new 1000 2000\n/m/made 0 0\n",
        "{}",
        outcome.stderr
    );
}

#[tokio::test]
async fn what_the_host_has_mapped_is_not_mapped_again() {
    let mut guest = Guest::start().await;
    guest.rootfs("c1");
    std::fs::create_dir_all(guest.share().join("c1/m1")).unwrap();
    std::os::unix::fs::chown(guest.share().join("c1/m1"), Some(5), Some(6)).unwrap();
    let map = json!([{"containerID": 0, "hostID": 100_000, "size": 65_536}]);
    let mut spec = spec_of("stat -c '%u %g' /v", &map);
    spec["mounts"].as_array_mut().unwrap().truncate(2);
    let source = |mapped_on_host| MountSource {
        index: 1,
        share_path: "c1/m1".into(),
        mapped_on_host,
        ..Default::default()
    };
    let outcome = guest.whole_with("c1", &spec, vec![source(true)]).await;
    assert_eq!(outcome.stdout, "5 6\n", "{}", outcome.stderr);
}
