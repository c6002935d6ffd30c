//! Pods in pause mode: a sandbox container and the containers of its pod share one server and one VM.

use std::time::Duration;

use containerd_shim_protos::api::{StatsRequest, Status};
use ttrpc::Code;

use super::harness::{Harness, code};
use crate::guest::fakes::Behaviour;

const SANDBOX: &str = r#"{"hostname":"pod","annotations":{
    "io.kubernetes.cri.container-type":"sandbox","io.kubernetes.cri.sandbox-id":"c",
    "io.kubernetes.cri.sandbox-memory":"1073741824"},
    "linux":{"namespaces":[{"type":"network","path":""},{"type":"pid"},{"type":"ipc"}],"cgroupsPath":"/pods/c"}}"#;
const MEMBER: &str = r#"{"process":{"args":["true"]},"annotations":{
    "io.kubernetes.cri.container-type":"container","io.kubernetes.cri.sandbox-id":"c"},
    "linux":{"namespaces":[{"type":"network","path":"/proc/7/ns/net"}],"cgroupsPath":"/pods/app"}}"#;

async fn running(behaviour: Behaviour) -> Harness {
    let harness = Harness::new(behaviour).await;
    let pid = harness.create_as("c", SANDBOX).await.unwrap();
    assert_eq!(harness.start("").await.unwrap(), pid);
    let own = harness.create_as("app", MEMBER).await.unwrap();
    assert!(own != pid && harness.start_of("app", "").await.unwrap() == own);
    harness
}

/// A task whose state is not told within two seconds has the pid 0 for whoever asks containerd.
#[tokio::test]
async fn a_sandbox_whose_vm_is_being_launched_is_not_there_yet_and_what_else_is_asked_waits() {
    let behaviour = Behaviour {
        slow_launch: Duration::from_secs(3),
        ..Behaviour::default()
    };
    let harness = Harness::new(behaviour).await;
    let create = harness.create_as("c", SANDBOX);
    let meanwhile = async {
        let began = std::time::Instant::now();
        let memory = (1_u64 << 30) + (1_u64 << 30).div_ceil(63) + (64 << 20);
        harness.record.until(&format!("launch {memory}")).await;
        let asked = harness.status("").await;
        assert!(began.elapsed() < Duration::from_secs(2));
        assert_eq!(code(asked).0, Code::NOT_FOUND);
        harness.start("").await
    };
    let (created, started) = tokio::join!(create, meanwhile);
    let pid = created.unwrap();
    assert!(pid != 0 && started.unwrap() == pid);
    assert_eq!(harness.status("").await.unwrap(), Status::RUNNING);
    harness.kill("", 9).await.unwrap();
    harness.wait("").await.unwrap();
    harness.delete("").await.unwrap();
    harness.end().await;
}

#[tokio::test]
async fn what_a_file_says_by_now_does_not_matter_to_a_pod_that_runs() {
    let harness = running(Behaviour::default()).await;
    harness.configured("memroy = 1");
    harness.create_as("later", MEMBER).await.unwrap();
    harness.start_of("later", "").await.unwrap();
    harness.kill("", 9).await.unwrap();
    for id in ["app", "later", "c"] {
        harness.wait_of(id, "").await.unwrap();
        harness.delete_of(id, "").await.unwrap();
    }
    harness.end().await;
    let next = Harness::new(Behaviour::default()).await;
    next.configured("memroy = 1");
    let refused = next.create_as("c", SANDBOX).await.unwrap_err();
    assert!(refused.to_string().contains("memroy"), "{refused}");
    next.end().await;
}

#[tokio::test]
async fn a_pod_that_goes_on_without_a_container_that_was_refused_has_not_failed() {
    let harness = running(Behaviour::default()).await;
    let mounts = r#"{"mounts":[{"destination":"/x","type":"bind","source":"/nowhere","options":["rbind"]}],"#;
    let wrong = MEMBER.replacen('{', mounts, 1);
    assert!(harness.create_as("wrong", &wrong).await.is_err());
    harness.kill("", 9).await.unwrap();
    for id in ["app", "c"] {
        harness.wait_of(id, "").await.unwrap();
        harness.delete_of(id, "").await.unwrap();
    }
    assert!(harness.remembered().await.is_empty());
    harness.end().await;
}

#[tokio::test]
async fn a_pod_is_one_vm_that_outlives_its_containers_and_ends_with_its_sandbox() {
    let harness = running(Behaviour::default()).await;
    let record = harness.record.clone();
    assert!(record.has("sandbox pod") && record.has("create app"));
    assert!(!record.has("create c"), "the pause image is run");
    assert!(
        !record.has("attach .own/c/rootfs"),
        "the pause image is mounted"
    );
    // The limit, what describes its pages, and what the guest takes itself.
    let memory = (1_u64 << 30) + (1_u64 << 30).div_ceil(63) + (64 << 20);
    assert!(record.has(&format!("launch {memory}")));
    assert!(
        !record.has("cgroup /pods/app"),
        "a cgroup on the node for a container"
    );

    harness.kill_of("app", "", 9).await.unwrap();
    assert_eq!(harness.wait_of("app", "").await.unwrap(), 137);
    harness.delete_of("app", "").await.unwrap();
    assert_eq!(harness.status("").await.unwrap(), Status::RUNNING);
    assert!(
        !record.has("shutdown"),
        "the pod ended with its last container"
    );
    harness.create_as("app", MEMBER).await.unwrap();
    harness.start_of("app", "").await.unwrap();

    let figures = StatsRequest {
        id: "c".into(),
        ..StatsRequest::default()
    };
    let answer = harness.client.stats(super::ctx(), &figures).await;
    assert!(answer.is_ok(), "collectors ask every task: {answer:?}");
    // A signal that a pause process ignores.
    harness.kill("", 10).await.unwrap();
    assert_eq!(harness.status("").await.unwrap(), Status::RUNNING);
    harness.kill("", 9).await.unwrap();
    assert_eq!(harness.wait("").await.unwrap(), 137);
    assert!(
        record.has("shutdown"),
        "the end was told before the VM had ended"
    );
    assert_eq!(harness.wait_of("app", "").await.unwrap(), 137);
    assert_eq!(harness.delete_of("app", "").await.unwrap(), 137);
    assert_eq!(harness.delete("").await.unwrap(), 137);
    let topics = harness.end().await;
    assert_eq!(
        topics.iter().filter(|t| *t == "/tasks/exit").count(),
        3,
        "{topics:?}"
    );
    assert_eq!(topics.last().unwrap(), "/tasks/delete");
}

#[tokio::test]
async fn a_pod_whose_vm_dies_is_told_of_container_by_container() {
    let harness = running(Behaviour::default()).await;
    let pid = harness.start("").await;
    assert_eq!(code(pid).0, Code::FAILED_PRECONDITION);
    let vmm = harness
        .client
        .connect(super::ctx(), &connect("c"))
        .await
        .unwrap()
        .task_pid;
    let vmm = rustix::process::Pid::from_raw(i32::try_from(vmm).unwrap()).unwrap();
    rustix::process::kill_process(vmm, rustix::process::Signal::KILL).unwrap();
    assert_eq!(harness.wait("").await.unwrap(), 137);
    assert_eq!(harness.wait_of("app", "").await.unwrap(), 137);
    let again = code(harness.create_as("b", MEMBER).await);
    assert_ne!(again.0, Code::OK);
    harness.delete_of("app", "").await.unwrap();
    harness.delete("").await.unwrap();
    harness.end().await;
}

#[tokio::test]
async fn a_container_without_its_sandbox_is_refused() {
    let harness = Harness::new(Behaviour::default()).await;
    let (refused, message) = code(harness.create_as("app", MEMBER).await);
    assert_eq!(refused, Code::FAILED_PRECONDITION, "{message}");
    assert!(message.contains("sandbox c"), "{message}");
    harness.end().await;
}

#[tokio::test]
async fn a_sandbox_whose_guest_does_not_start_says_why() {
    let behaviour = Behaviour {
        refuse_start: Some("no such CPU".into()),
        ..Behaviour::default()
    };
    let harness = Harness::new(behaviour).await;
    let failed = match harness.create_as("c", SANDBOX).await {
        Ok(_) => code(harness.start("").await),
        Err(error) => code(Err::<u32, _>(error)),
    };
    assert!(failed.1.contains("no such CPU"), "{failed:?}");
    let _ = harness.delete("").await;
    harness.end().await;
}

fn connect(id: &str) -> containerd_shim_protos::api::ConnectRequest {
    containerd_shim_protos::api::ConnectRequest {
        id: id.into(),
        ..Default::default()
    }
}

#[tokio::test]
async fn a_container_names_the_one_whose_pid_namespace_it_joins_by_its_pid() {
    let harness = Harness::new(Behaviour::default()).await;
    let sandbox = harness.create_as("c", SANDBOX).await.unwrap();
    harness.start("").await.unwrap();
    let with_pids = |pid: u32| {
        let namespace = format!(r#"[{{"type":"pid","path":"/proc/{pid}/ns/pid"}},"#);
        MEMBER.replace('[', &namespace)
    };
    let first = harness.create_as("first", MEMBER).await.unwrap();
    let second = harness.create_as("second", MEMBER).await.unwrap();
    assert!(first != second && first != sandbox && second != sandbox);
    assert!(std::path::Path::new(&format!("/proc/{second}/ns/pid")).exists());
    harness
        .create_as("debug", &with_pids(second))
        .await
        .unwrap();
    harness
        .create_as("shared", &with_pids(sandbox))
        .await
        .unwrap();
    let record = &harness.record;
    assert!(record.has("debug joins second") && record.has("create shared"));
    assert!(
        !record
            .all()
            .iter()
            .any(|entry| entry.starts_with("shared joins"))
    );

    for id in ["second", "debug"] {
        harness.start_of(id, "").await.unwrap();
        harness.kill_of(id, "", 9).await.unwrap();
        harness.wait_of(id, "").await.unwrap();
        harness.delete_of(id, "").await.unwrap();
    }
    let late = harness.create_as("debug", &with_pids(second)).await;
    assert_eq!(code(late).0, Code::FAILED_PRECONDITION);
}

#[tokio::test]
async fn a_container_that_cannot_be_killed_takes_its_pod_along_only_when_nobody_else_lives() {
    let behaviour = Behaviour {
        unkillable: &["app"],
        ..Behaviour::default()
    };
    let harness = running(behaviour).await;
    harness.create_as("other", MEMBER).await.unwrap();
    harness.start_of("other", "").await.unwrap();
    harness.kill_of("app", "", 9).await.unwrap();
    // A guest has three seconds for it here.
    let patience = Duration::from_secs(7);
    let waited = tokio::time::timeout(patience, harness.wait_of("app", "")).await;
    assert!(waited.is_err(), "{waited:?}");
    assert_eq!(
        harness.status_of("other", "").await.unwrap(),
        Status::RUNNING
    );
    harness.kill_of("other", "", 9).await.unwrap();
    assert_eq!(harness.wait_of("other", "").await.unwrap(), 137);
    // Now the VM goes, and the container with it.
    assert_eq!(harness.wait_of("app", "").await.unwrap(), 137);
    for id in ["app", "other"] {
        harness.delete_of(id, "").await.unwrap();
    }
    harness.wait("").await.unwrap();
    harness.delete("").await.unwrap();
    harness.end().await;
}
