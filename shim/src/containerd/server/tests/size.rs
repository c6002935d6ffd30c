//! The VM's size follows the limits of the pod's containers.

use std::time::Duration;

use containerd_shim_protos::api::UpdateTaskRequest;
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;
use ttrpc::Code;

use super::harness::{Harness, code, ctx};
use crate::guest::fakes::Behaviour;

const MIB: u64 = 1 << 20;
/// What a VM of the default configuration starts with.
const BUILT: u64 = 256 * MIB;

fn sandbox(memory: u64) -> String {
    format!(
        r#"{{"hostname":"pod","annotations":{{"io.kubernetes.cri.container-type":"sandbox",
        "io.kubernetes.cri.sandbox-id":"c","io.kubernetes.cri.sandbox-memory":"{memory}"}},
        "linux":{{"namespaces":[{{"type":"network","path":""}},{{"type":"pid"}},{{"type":"ipc"}}],"cgroupsPath":"/pods/c"}}}}"#
    )
}

fn member(memory: u64) -> String {
    format!(
        r#"{{"process":{{"args":["true"]}},"annotations":{{"io.kubernetes.cri.container-type":"container",
        "io.kubernetes.cri.sandbox-id":"c"}},"linux":{{"namespaces":[{{"type":"network","path":"/proc/7/ns/net"}}],
        "resources":{{"memory":{{"limit":{memory}}}}}}}}}"#
    )
}

/// Of a guest whose containers may use `limit` bytes: with what describes its pages, and what it takes itself, in
/// blocks of 2 MiB.
fn needed(limit: u64) -> u64 {
    (limit + limit.div_ceil(63) + 64 * MIB).next_multiple_of(2 * MIB)
}

async fn update(harness: &Harness, id: &str, resources: &str) -> ttrpc::Result<()> {
    let request = UpdateTaskRequest {
        id: id.into(),
        resources: MessageField::some(Any {
            value: resources.as_bytes().to_vec(),
            ..Any::default()
        }),
        ..UpdateTaskRequest::default()
    };
    harness.client.update(ctx(), &request).await.map(drop)
}

fn limit(memory: u64) -> String {
    format!(r#"{{"memory":{{"limit":{memory}}}}}"#)
}

async fn running(behaviour: Behaviour, limits: &[(&str, u64)]) -> Harness {
    let harness = Harness::new(behaviour).await;
    let sum = limits.iter().map(|(_, limit)| limit).sum();
    harness.create_as("c", &sandbox(sum)).await.unwrap();
    harness.start("").await.unwrap();
    for (id, limit) in limits {
        harness.create_as(id, &member(*limit)).await.unwrap();
        harness.start_of(id, "").await.unwrap();
    }
    harness
}

#[tokio::test]
async fn a_limit_beyond_the_vms_size_has_it_grow_first_and_a_smaller_one_shrink_afterwards() {
    let harness = running(Behaviour::default(), &[("a", 100 * MIB), ("b", 50 * MIB)]).await;
    let record = harness.record.clone();
    assert!(record.has(&format!("launch {BUILT}")));
    let untouched = |entry: &String| !entry.starts_with("size");
    assert!(record.all().iter().all(untouched), "it grew without need");
    update(&harness, "a", &limit(120 * MIB)).await.unwrap();
    assert!(record.all().iter().all(untouched), "there was room");

    update(&harness, "a", &limit(900 * MIB)).await.unwrap();
    let large = needed(950 * MIB);
    let grown = format!("memory {}", large - BUILT);
    assert!(record.in_order(&format!("size {large}"), &grown));
    assert!(record.in_order(&grown, &format!("update {}", limit(900 * MIB))));

    let small = format!("size {}", needed(350 * MIB));
    update(&harness, "a", &limit(300 * MIB)).await.unwrap();
    record.until(&small).await;
    assert!(record.in_order(&format!("update {}", limit(300 * MIB)), &small));
    // Never less than the handler's, which is what it was started with.
    update(&harness, "a", &limit(10 * MIB)).await.unwrap();
    record.until(&format!("size {BUILT}")).await;
}

#[tokio::test]
async fn what_the_node_does_not_have_is_refused_with_the_numbers_and_the_old_limit_stays() {
    let harness = running(Behaviour::default(), &[("a", 100 * MIB)]).await;
    let refused = update(&harness, "a", &limit(1 << 50)).await;
    let (kind, message) = code(refused);
    assert_eq!(kind, Code::RESOURCE_EXHAUSTED);
    assert!(
        message.contains("max_memory") && message.contains("it has 256 MiB"),
        "{message}"
    );
    let asked = |entry: &String| entry.starts_with("size") || entry.starts_with("update");
    assert!(!harness.record.all().iter().any(asked));
    // Another one counts from the old limit.
    update(&harness, "a", &limit(110 * MIB)).await.unwrap();
    assert!(
        !harness
            .record
            .all()
            .iter()
            .any(|entry| entry.starts_with("size"))
    );
}

#[tokio::test]
async fn a_guest_that_does_not_take_it_all_keeps_what_it_had() {
    let behaviour = Behaviour {
        takes: Some(64 * MIB),
        ..Behaviour::default()
    };
    let harness = running(behaviour, &[("a", 100 * MIB)]).await;
    let (kind, message) = code(update(&harness, "a", &limit(512 * MIB)).await);
    assert_eq!(kind, Code::FAILED_PRECONDITION);
    assert!(
        message.contains("64 MiB of the") && message.contains("has 256 MiB as before"),
        "{message}"
    );
    let record = harness.record.clone();
    assert!(record.in_order(
        &format!("size {}", needed(512 * MIB)),
        &format!("size {BUILT}")
    ));
    assert!(!record.has(&format!("update {}", limit(512 * MIB))));
}

#[tokio::test]
async fn only_what_the_guest_can_do_without_is_taken_and_what_it_keeps_is_not_asked_for_again() {
    let behaviour = Behaviour {
        spare: Some((32 + 100) * MIB),
        keeps: 300 * MIB,
        ..Behaviour::default()
    };
    let harness = running(behaviour, &[("a", 100 * MIB)]).await;
    let record = harness.record.clone();
    update(&harness, "a", &limit(512 * MIB)).await.unwrap();
    let large = needed(512 * MIB);
    update(&harness, "a", &limit(100 * MIB)).await.unwrap();
    // It has 100 MiB beyond what is left to it, and keeps more of them than that.
    record.until(&format!("size {}", large - 100 * MIB)).await;
    record.until(&format!("size {}", BUILT + 300 * MIB)).await;
}

#[tokio::test]
async fn a_container_that_comes_later_has_the_vm_grow_and_one_that_is_too_large_starts_all_the_same()
 {
    let harness = running(Behaviour::default(), &[("a", 100 * MIB)]).await;
    harness.create_as("b", &member(400 * MIB)).await.unwrap();
    let record = harness.record.clone();
    let grown = format!("size {}", needed(500 * MIB));
    assert!(record.in_order(&grown, "create b"));
    harness.create_as("huge", &member(1 << 50)).await.unwrap();
    assert!(record.has("create huge"));
    // In all that it may have: the node's memory is seldom a multiple of the VM's blocks.
    let sizes = sizes(&harness);
    let [.., first, most] = sizes.as_slice() else {
        panic!("{sizes:?}");
    };
    assert_eq!(*first, needed(500 * MIB));
    assert!(most > first && most % (2 * MIB) == 0, "{sizes:?}");
}

/// What the VMM was asked to give, in its order.
fn sizes(harness: &Harness) -> Vec<u64> {
    let all = harness.record.all();
    let sizes = all.iter().filter_map(|entry| entry.strip_prefix("size "));
    sizes.map(|bytes| bytes.parse().unwrap()).collect()
}

#[tokio::test]
async fn a_container_that_comes_later_has_what_the_guest_takes_and_its_cpus_all_the_same() {
    let behaviour = Behaviour {
        takes: Some(64 * MIB),
        ..Behaviour::default()
    };
    let mut harness = Harness::new(behaviour).await;
    harness.settings = "max_vcpus = 3";
    harness.create_as("c", &sandbox(MIB)).await.unwrap();
    harness.start("").await.unwrap();
    let both = member(512 * MIB).replace(
        r#""memory":"#,
        r#""cpu":{"quota":200000,"period":100000},"memory":"#,
    );
    harness.create_as("a", &both).await.unwrap();
    assert_eq!(sizes(&harness), [needed(512 * MIB), BUILT + 64 * MIB]);
    assert!(harness.record.in_order("online 2", "create a"));
}

#[tokio::test]
async fn a_neighbours_limit_that_was_too_large_is_nobody_elses() {
    let harness = running(Behaviour::default(), &[("a", 1 << 50), ("b", 100 * MIB)]).await;
    let before = sizes(&harness);
    update(&harness, "b", &limit(200 * MIB)).await.unwrap();
    assert!(harness.record.has(&format!("update {}", limit(200 * MIB))));
    assert_eq!(sizes(&harness), before);
    // Its own is.
    let (kind, _) = code(update(&harness, "b", &limit(1 << 51)).await);
    assert_eq!(kind, Code::RESOURCE_EXHAUSTED);
    assert!(!harness.record.has(&format!("update {}", limit(1 << 51))));
}

#[tokio::test]
async fn a_container_that_comes_while_a_limit_changes_reckons_with_the_new_one() {
    let behaviour = Behaviour {
        slow_update: Duration::from_millis(300),
        ..Behaviour::default()
    };
    let harness = running(behaviour, &[("a", 100 * MIB)]).await;
    let record = harness.record.clone();
    let larger = limit(700 * MIB);
    let (updated, ()) = tokio::join!(update(&harness, "a", &larger), async {
        record.until(&format!("update {larger}")).await;
        harness.create_as("b", &member(500 * MIB)).await.unwrap();
    });
    updated.unwrap();
    assert_eq!(sizes(&harness), [needed(700 * MIB), needed(1200 * MIB)]);
}

#[tokio::test]
async fn a_change_that_the_guest_refuses_leaves_the_old_limit_and_the_old_size() {
    let behaviour = Behaviour {
        refuse_update: Some("\"quota\":500"),
        ..Behaviour::default()
    };
    let harness = running(behaviour, &[("a", 100 * MIB)]).await;
    let both = r#"{"memory":{"limit":943718400},"cpu":{"quota":500,"period":100000}}"#;
    let (kind, _) = code(update(&harness, "a", both).await);
    assert_eq!(kind, Code::INVALID_ARGUMENT);
    harness.record.until(&format!("size {BUILT}")).await;
    assert_eq!(sizes(&harness), [needed(900 * MIB), BUILT]);
    // The next one counts from the old limit.
    harness.create_as("b", &member(400 * MIB)).await.unwrap();
    assert_eq!(sizes(&harness).last(), Some(&needed(500 * MIB)));
}

#[tokio::test]
async fn a_limit_that_is_taken_away_takes_nothing() {
    let harness = running(Behaviour::default(), &[("a", 100 * MIB)]).await;
    update(&harness, "a", &limit(900 * MIB)).await.unwrap();
    let unlimited = r#"{"memory":{"limit":-1}}"#;
    update(&harness, "a", unlimited).await.unwrap();
    assert!(harness.record.has(&format!("update {unlimited}")));
    harness.create_as("b", &member(300 * MIB)).await.unwrap();
    let large = [needed(900 * MIB), needed(1200 * MIB)];
    assert_eq!(sizes(&harness), large);
    // Until it has another.
    update(&harness, "a", &limit(100 * MIB)).await.unwrap();
    harness
        .record
        .until(&format!("size {}", needed(400 * MIB)))
        .await;
}

#[tokio::test]
async fn who_asks_for_cpus_and_is_not_limited_has_them() {
    let mut harness = Harness::new(Behaviour::default()).await;
    harness.settings = "max_vcpus = 3";
    harness.create_as("c", &sandbox(MIB)).await.unwrap();
    harness.start("").await.unwrap();
    // As kubelet's static CPU manager has it.
    let exclusive = member(MIB).replace(
        r#""memory":"#,
        r#""cpu":{"quota":-1,"period":100000,"shares":2048},"memory":"#,
    );
    harness.create_as("a", &exclusive).await.unwrap();
    let record = harness.record.clone();
    assert!(record.in_order("online 2", "create a"));
    // A weight is never too much.
    let resources = r#"{"cpu":{"shares":65536}}"#;
    update(&harness, "a", resources).await.unwrap();
    assert!(record.in_order("online 3", &format!("update {resources}")));
}

#[tokio::test]
async fn a_change_of_something_else_is_not_refused_for_a_limit_that_was_too_large_before() {
    let harness = running(Behaviour::default(), &[("a", 1 << 50)]).await;
    let resources = r#"{"memory":{"limit":1125899906842624},"cpu":{"shares":7}}"#;
    update(&harness, "a", resources).await.unwrap();
    assert!(harness.record.has(&format!("update {resources}")));
}

#[tokio::test]
async fn cpus_come_with_a_limit_that_needs_them_and_go_with_it() {
    let mut harness = Harness::new(Behaviour::default()).await;
    harness.settings = "max_vcpus = 3";
    harness.create_as("c", &sandbox(MIB)).await.unwrap();
    harness.start("").await.unwrap();
    harness.create_as("a", &member(MIB)).await.unwrap();
    let record = harness.record.clone();
    let cpus = |quota: i64| format!(r#"{{"cpu":{{"quota":{quota},"period":100000}}}}"#);
    update(&harness, "a", &cpus(250_000)).await.unwrap();
    assert!(record.in_order("cpus 3", "online 3"));
    assert!(record.in_order("online 3", &format!("update {}", cpus(250_000))));
    let (kind, message) = code(update(&harness, "a", &cpus(400_000)).await);
    assert_eq!(kind, Code::RESOURCE_EXHAUSTED);
    assert!(
        message.contains("needs 4 CPUs") && message.contains("may have 3"),
        "{message}"
    );
    assert!(!record.has(&format!("update {}", cpus(400_000))));
    update(&harness, "a", &cpus(150_000)).await.unwrap();
    record.until("online 2").await;
    update(&harness, "a", &cpus(50_000)).await.unwrap();
    record.until("online 1").await;
    assert!(!record.all().iter().any(|entry| entry.starts_with("size")));
}

#[tokio::test]
async fn a_cpu_limit_beyond_a_vm_without_spare_cpus_holds_as_on_a_node_and_adds_none() {
    let harness = running(Behaviour::default(), &[("a", 64 * MIB)]).await;
    let resources = r#"{"cpu":{"quota":400000,"period":100000}}"#;
    update(&harness, "a", resources).await.unwrap();
    assert!(harness.record.has(&format!("update {resources}")));
    assert!(
        !harness
            .record
            .all()
            .iter()
            .any(|entry| entry.starts_with("cpus"))
    );
}
