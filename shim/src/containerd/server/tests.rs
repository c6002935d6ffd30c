//! The whole shim but the node: a client like containerd, the real server, fakes behind it.

use brig_hypervisor::control::exit as control_exit;
use containerd_shim_protos::api::{
    CloseIORequest, ExecProcessRequest, PauseRequest, PidsRequest, ResumeRequest, ShutdownRequest,
    StatsRequest, Status, UpdateTaskRequest,
};
use containerd_shim_protos::shim_async::Client;
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use tokio::time::timeout;
use ttrpc::Code;

mod harness;
mod hostile;
mod impatient;
mod operator;
mod pod;
mod processes;
mod sandbox;
mod size;
mod streaming;

use super::*;
use crate::guest::fakes::Behaviour;
use harness::{Harness, SPEC, code, ctx};

/// No test waits longer for anything.
const LONG: Duration = Duration::from_secs(20);

#[tokio::test]
async fn a_container_lives_with_its_events_in_order_and_nothing_is_left() {
    let harness = Harness::new(Behaviour::default()).await;
    let pid = harness.create().await.unwrap();
    assert!(pid > 1);
    assert_eq!(harness.status("").await.unwrap(), Status::CREATED);
    assert_eq!(harness.start("").await.unwrap(), pid);
    assert_eq!(harness.status("").await.unwrap(), Status::RUNNING);
    harness.exec("e").await.unwrap();
    assert_eq!(harness.start("e").await.unwrap(), pid);
    harness.kill("e", 9).await.unwrap();
    assert_eq!(harness.wait("e").await.unwrap(), 137);
    assert_eq!(harness.delete("e").await.unwrap(), 137);
    harness.kill("", 9).await.unwrap();
    assert_eq!(harness.wait("").await.unwrap(), 137);
    assert_eq!(harness.status("").await.unwrap(), Status::STOPPED);
    assert_eq!(harness.delete("").await.unwrap(), 137);
    let record = harness.record.clone();
    assert!(record.in_order("attach .own/c/rootfs", "create c"));
    assert!(record.in_order("delete ", "forget .own/c/rootfs"));
    assert!(record.in_order("forget .own/c/rootfs", "detach .own/c/rootfs"));
    assert!(record.has("sandbox h") && record.has("cgroup /ns/c"));
    let topics = harness.end().await;
    assert!(record.has("shutdown"), "the guest was not powered off");
    assert_eq!(
        topics,
        [
            "/tasks/create",
            "/tasks/start",
            "/tasks/exec-added",
            "/tasks/exec-started",
            "/tasks/exit",
            "/tasks/exit",
            "/tasks/delete"
        ]
    );
}

#[tokio::test]
async fn an_exit_that_overtakes_the_answer_is_told_after_the_start() {
    let behaviour = Behaviour {
        exits_at_once: Some(3),
        ..Behaviour::default()
    };
    let harness = Harness::new(behaviour).await;
    harness.create().await.unwrap();
    harness.start("").await.unwrap();
    assert_eq!(harness.wait("").await.unwrap(), 3);
    assert_eq!(harness.delete("").await.unwrap(), 3);
    let expected = [
        "/tasks/create",
        "/tasks/start",
        "/tasks/exit",
        "/tasks/delete",
    ];
    assert_eq!(harness.end().await, expected);
}

#[tokio::test]
async fn output_that_an_execs_child_keeps_open_ends_with_the_exec_and_is_not_cut_off() {
    let harness = Harness::new(Behaviour {
        left_behind: true,
        ..Behaviour::default()
    })
    .await;
    harness.create().await.unwrap();
    harness.start("").await.unwrap();
    let log = harness.dir.path().join("log");
    let request = ExecProcessRequest {
        id: "c".into(),
        exec_id: "e".into(),
        stdout: format!("file://{}", log.display()),
        spec: MessageField::some(Any {
            value: b"{}".to_vec(),
            ..Any::default()
        }),
        ..ExecProcessRequest::default()
    };
    harness.client.exec(ctx(), &request).await.unwrap();
    harness.start("e").await.unwrap();
    harness.kill("e", 9).await.unwrap();
    assert_eq!(harness.wait("e").await.unwrap(), 137);
    assert_eq!(harness.delete("e").await.unwrap(), 137);
    let asked = harness.record.all();
    assert!(asked.iter().any(|seen| seen == "delete e"), "{asked:?}");
    let cut = asked.iter().any(|seen| seen.starts_with("cut "));
    assert!(!cut, "{asked:?}");
    harness.kill("", 9).await.unwrap();
    harness.wait("").await.unwrap();
    harness.delete("").await.unwrap();
    harness.end().await;
}

#[tokio::test]
async fn v2_is_served_beside_v3() {
    let harness = Harness::new(Behaviour::default()).await;
    let address = format!("unix://{}", harness.dir.path().join("shim").display());
    let client = Client::connect(&address).await.unwrap();
    let mut request = ttrpc::Request::new();
    request.service = "containerd.task.v2.Task".into();
    request.method = "Create".into();
    request.payload = harness.creation(SPEC).write_to_bytes().unwrap();
    client.request(request).await.unwrap();
    assert_eq!(harness.status("").await.unwrap(), Status::CREATED);
    harness.delete("").await.unwrap();
    harness.end().await;
}

#[tokio::test]
async fn requests_that_do_not_fit_get_their_code() {
    let harness = Harness::new(Behaviour::default()).await;
    assert_eq!(code(harness.start("").await).0, Code::NOT_FOUND);
    harness.create().await.unwrap();
    assert_eq!(code(harness.create().await).0, Code::ALREADY_EXISTS);
    harness.start("").await.unwrap();
    assert_eq!(code(harness.start("").await).0, Code::FAILED_PRECONDITION);
    assert_eq!(code(harness.delete("").await).0, Code::FAILED_PRECONDITION);
    assert_eq!(code(harness.start("e").await).0, Code::NOT_FOUND);
    assert_eq!(code(harness.kill("", 0).await).0, Code::INVALID_ARGUMENT);
    harness.exec("e").await.unwrap();
    assert_eq!(code(harness.exec("e").await).0, Code::ALREADY_EXISTS);
    assert_eq!(
        code(harness.kill("e", 9).await).0,
        Code::FAILED_PRECONDITION
    );
    let checkpoint = harness.client.checkpoint(ctx(), &Default::default()).await;
    assert_eq!(code(checkpoint).0, Code::UNIMPLEMENTED);
    harness.kill("", 9).await.unwrap();
    harness.wait("").await.unwrap();
    assert_eq!(code(harness.kill("", 9).await).0, Code::NOT_FOUND);
    assert_eq!(code(harness.exec("f").await).0, Code::FAILED_PRECONDITION);
    let stats = StatsRequest {
        id: "c".into(),
        ..StatsRequest::default()
    };
    let stats = harness.client.stats(ctx(), &stats).await;
    assert_eq!(code(stats).0, Code::NOT_FOUND);
    harness.delete("").await.unwrap();
    assert_eq!(code(harness.delete("").await).0, Code::NOT_FOUND);
    harness.end().await;
}

#[tokio::test]
async fn figures_pids_updates_and_pauses_go_through() {
    let harness = Harness::new(Behaviour::default()).await;
    let pid = harness.create().await.unwrap();
    harness.start("").await.unwrap();
    harness.exec("e").await.unwrap();
    harness.start("e").await.unwrap();
    let id = || "c".to_owned();
    let pids = PidsRequest {
        id: id(),
        ..PidsRequest::default()
    };
    let pids = harness.client.pids(ctx(), &pids).await.unwrap().processes;
    assert_eq!(pids.len(), 2);
    assert!(pids.iter().all(|process| process.pid == pid));
    assert!(pids[0].info.is_none() && pids[1].info.is_some());
    let stats = StatsRequest {
        id: id(),
        ..StatsRequest::default()
    };
    let stats = harness.client.stats(ctx(), &stats).await.unwrap().stats;
    assert_eq!(stats.type_url, "io.containerd.cgroups.v2.Metrics");
    let mut update = UpdateTaskRequest {
        id: id(),
        resources: MessageField::some(Any {
            value: br#"{"pids":{"limit":5}}"#.to_vec(),
            ..Any::default()
        }),
        ..UpdateTaskRequest::default()
    };
    harness.client.update(ctx(), &update).await.unwrap();
    assert!(harness.record.has(r#"update {"pids":{"limit":5}}"#));
    update.resources.as_mut().unwrap().value = b"not json".to_vec();
    let refused = harness.client.update(ctx(), &update).await;
    assert_eq!(code(refused).0, Code::INVALID_ARGUMENT);
    let pause = PauseRequest {
        id: id(),
        ..PauseRequest::default()
    };
    harness.client.pause(ctx(), &pause).await.unwrap();
    assert_eq!(harness.status("").await.unwrap(), Status::PAUSED);
    assert_eq!(
        code(harness.client.pause(ctx(), &pause).await).0,
        Code::FAILED_PRECONDITION
    );
    let resume = ResumeRequest {
        id: id(),
        ..ResumeRequest::default()
    };
    harness.client.resume(ctx(), &resume).await.unwrap();
    assert_eq!(harness.status("").await.unwrap(), Status::RUNNING);
    harness.kill("", 9).await.unwrap();
    harness.wait("").await.unwrap();
    harness.delete("").await.unwrap();
    let topics = harness.end().await;
    assert!(topics.contains(&"/tasks/paused".to_owned()));
    assert!(topics.contains(&"/tasks/resumed".to_owned()));
}

#[tokio::test]
async fn stdin_closed_before_the_exec_runs_is_remembered() {
    let harness = Harness::new(Behaviour::default()).await;
    harness.create().await.unwrap();
    harness.start("").await.unwrap();
    let fifo = harness.dir.path().join("stdin");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let exec = ExecProcessRequest {
        id: "c".into(),
        exec_id: "e".into(),
        stdin: fifo.to_str().unwrap().into(),
        spec: MessageField::some(Any {
            value: b"{}".to_vec(),
            ..Any::default()
        }),
        ..ExecProcessRequest::default()
    };
    harness.client.exec(ctx(), &exec).await.unwrap();
    let close = CloseIORequest {
        id: "c".into(),
        exec_id: "e".into(),
        stdin: true,
        ..CloseIORequest::default()
    };
    harness.client.close_io(ctx(), &close).await.unwrap();
    harness.start("e").await.unwrap();
    // Nobody holds the FIFO open for writing, so its reader, the VMM, is at the end of file: a second
    // reader sees the same.
    let reader = rustix::fs::open(&fifo, OFlags::RDONLY | OFlags::NONBLOCK, Mode::empty()).unwrap();
    let mut byte = [0];
    assert_eq!(rustix::io::read(&reader, &mut byte), Ok(0));
    harness.kill("e", 9).await.unwrap();
    harness.delete("e").await.unwrap();
    harness.kill("", 9).await.unwrap();
    harness.wait("").await.unwrap();
    harness.delete("").await.unwrap();
    harness.end().await;
}

#[tokio::test]
async fn a_vm_that_does_not_start_says_why_and_leaves_nothing() {
    let refuse = |message: &str| Behaviour {
        refuse_start: Some(message.into()),
        ..Behaviour::default()
    };
    let die = |status| Behaviour {
        die_with: Some(status),
        ..Behaviour::default()
    };
    let silent = Behaviour {
        silent_agent: true,
        ..Behaviour::default()
    };
    for (behaviour, expected, expected_code) in [
        (refuse("no PVH note"), "no PVH note", Code::UNAVAILABLE),
        (die(control_exit::PANIC), "panicked", Code::UNAVAILABLE),
        (
            die(control_exit::GUEST_FAULT),
            "broke a rule",
            Code::UNAVAILABLE,
        ),
        (silent, "agent never answered", Code::DEADLINE_EXCEEDED),
    ] {
        let harness = Harness::new(behaviour).await;
        let created = timeout(LONG, harness.create()).await.expect("create hangs");
        let (got, message) = code(created);
        assert_eq!(got, expected_code, "{message}");
        assert!(message.contains(expected), "{expected}: {message}");
        assert_eq!(code(harness.delete("").await).0, Code::NOT_FOUND);
        assert!(harness.end().await.is_empty(), "{expected}");
    }
}

#[tokio::test]
async fn a_stuck_creation_blocks_nobody_and_can_be_deleted() {
    let behaviour = Behaviour {
        stuck_create: true,
        ..Behaviour::default()
    };
    let harness = Harness::new(behaviour).await;
    let created = harness.creation_under_way().await;
    assert_eq!(harness.status("").await.unwrap(), Status::CREATED);
    assert_eq!(code(harness.kill("", 9).await).0, Code::FAILED_PRECONDITION);
    harness.delete("").await.unwrap();
    assert_eq!(code(created.await.unwrap()).0, Code::FAILED_PRECONDITION);
    harness.end().await;
}

#[tokio::test]
async fn hooks_run_on_the_node_at_their_stages() {
    let harness = Harness::new(Behaviour::default()).await;
    let hook = |stage: &str| {
        format!(
            r#""{stage}":[{{"path":"/bin/sh","args":["sh","-c","echo {stage} >> ran; cat > {stage}"]}}]"#
        )
    };
    let stages = ["prestart", "createRuntime", "poststart", "poststop"].map(hook);
    let spec = SPEC.replacen('{', &format!(r#"{{"hooks":{{{}}},"#, stages.join(",")), 1);
    let pid = harness.create_as("c", &spec).await.unwrap();
    let bundle = harness.dir.path().join("bundle");
    let ran = || std::fs::read_to_string(bundle.join("ran")).unwrap();
    assert_eq!(ran(), "prestart\ncreateRuntime\n");
    let state = std::fs::read_to_string(bundle.join("createRuntime")).unwrap();
    assert!(state.contains(&format!(r#""pid":{pid}"#)), "{state}");
    harness.start("").await.unwrap();
    assert_eq!(ran(), "prestart\ncreateRuntime\npoststart\n");
    harness.kill("", 9).await.unwrap();
    harness.wait("").await.unwrap();
    harness.delete("").await.unwrap();
    assert!(ran().ends_with("poststop\n"), "{}", ran());
    harness.end().await;
}

#[tokio::test]
async fn a_hook_that_fails_ends_the_creation_and_what_it_made_is_undone() {
    let harness = Harness::new(Behaviour::default()).await;
    let hooks = r#"{"hooks":{"createRuntime":[{"path":"/bin/sh","args":["sh","-c","echo no net >&2; exit 1"]}],
        "poststop":[{"path":"/usr/bin/touch","args":["touch","undone"]}]},"#;
    let refused = code(harness.create_as("c", &SPEC.replacen('{', hooks, 1)).await);
    assert!(refused.1.contains("no net"), "{refused:?}");
    assert!(harness.dir.path().join("bundle/undone").exists());
    assert!(!harness.record.has("create c"));
    assert!(harness.record.has("detach .own/c/rootfs"));
    harness.end().await;
}

#[tokio::test]
async fn a_creation_without_an_answer_is_undone_in_the_guest() {
    let behaviour = Behaviour {
        stuck_create: true,
        ..Behaviour::default()
    };
    let harness = Harness::new(behaviour).await;
    assert_eq!(code(harness.create().await).0, Code::DEADLINE_EXCEEDED);
    let record = harness.record.clone();
    assert!(record.in_order("create c", "signal 9 "));
    assert!(record.in_order("signal 9 ", "delete "));
    harness.end().await;
}

#[tokio::test]
async fn what_a_slow_creation_makes_after_its_deletion_is_undone() {
    let behaviour = Behaviour {
        slow_create: Duration::from_millis(300),
        ..Behaviour::default()
    };
    let harness = Harness::new(behaviour).await;
    let created = harness.creation_under_way().await;
    harness.delete("").await.unwrap();
    assert!(created.await.unwrap().is_err());
    let record = harness.record.clone();
    assert!(record.in_order("created c", "signal 9 "));
    assert!(record.in_order("signal 9 ", "delete "));
    assert!(record.in_order("delete ", "detach .own/c/rootfs"));
    harness.end().await;
}

#[tokio::test]
async fn the_death_of_the_vmm_ends_every_process_and_state_stays_readable() {
    let harness = Harness::new(Behaviour::default()).await;
    let pid = harness.create().await.unwrap();
    harness.start("").await.unwrap();
    harness.exec("e").await.unwrap();
    harness.start("e").await.unwrap();
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    assert_eq!(harness.wait("").await.unwrap(), 137);
    assert_eq!(harness.wait("e").await.unwrap(), 137);
    assert_eq!(harness.status("").await.unwrap(), Status::STOPPED);
    harness.delete("e").await.unwrap();
    assert_eq!(harness.delete("").await.unwrap(), 137);
    let topics = harness.end().await;
    let exits = topics
        .iter()
        .filter(|topic| *topic == "/tasks/exit")
        .count();
    assert_eq!(exits, 2, "{topics:?}");
    assert_eq!(topics.last().unwrap(), "/tasks/delete");
}

#[tokio::test]
async fn an_exec_that_cannot_be_started_is_stopped_and_deletable() {
    let behaviour = Behaviour {
        unstartable: Some("e".into()),
        ..Behaviour::default()
    };
    let harness = Harness::new(behaviour).await;
    harness.create().await.unwrap();
    harness.start("").await.unwrap();
    harness.exec("e").await.unwrap();
    let (got, message) = code(harness.start("e").await);
    assert_eq!(
        (got, message.as_str()),
        (Code::INVALID_ARGUMENT, "exec format error")
    );
    assert!(harness.record.has("delete e"), "the agent still has it");
    assert_eq!(harness.status("e").await.unwrap(), Status::STOPPED);
    harness.delete("e").await.unwrap();
    harness.kill("", 9).await.unwrap();
    harness.wait("").await.unwrap();
    harness.delete("").await.unwrap();
    let topics = harness.end().await;
    assert!(
        !topics.contains(&"/tasks/exec-started".to_owned()),
        "{topics:?}"
    );
}

#[tokio::test]
async fn wrong_specs_are_refused_before_anything_is_touched() {
    let harness = Harness::new(Behaviour::default()).await;
    for (spec, expected) in [
        ("{", "not an OCI spec"),
        (
            r#"{"linux":{"namespaces":[{"type":"pid"}]}}"#,
            "host network",
        ),
        (
            r#"{"linux":{"namespaces":[{"type":"network"},{"type":"ipc"}]}}"#,
            "hostPID",
        ),
        (
            r#"{"linux":{"namespaces":[{"type":"network"},{"type":"ipc"},{"type":"pid","path":"/proc/7/ns/pid"}]}}"#,
            "pid namespace /proc/7/ns/pid",
        ),
    ] {
        let request = harness.creation(spec);
        let (got, message) = code(harness.client.create(ctx(), &request).await);
        assert_eq!(got, Code::INVALID_ARGUMENT);
        assert!(message.contains(expected), "{message}");
    }
    assert!(harness.record.all().is_empty());
    harness.end().await;
}

#[tokio::test]
async fn a_missing_mount_source_or_root_is_named_and_undone() {
    let harness = Harness::new(Behaviour::default()).await;
    let spec = r#"{"linux":{"namespaces":[{"type":"network"},{"type":"pid"},{"type":"ipc"}]},"mounts":[
        {"destination":"/a","type":"bind","source":"/etc","options":["ro"]},
        {"destination":"/b","type":"bind","source":"/nonexistent/b"}]}"#;
    let request = harness.creation(spec);
    let (got, message) = code(harness.client.create(ctx(), &request).await);
    assert_eq!(got, Code::INVALID_ARGUMENT);
    assert!(
        message.contains("/b") && message.contains("missing"),
        "{message}"
    );
    // It is found before anything is attached.
    let all = harness.record.all();
    assert!(!all.iter().any(|seen| seen.starts_with("attach .volumes")));
    harness.end().await;

    let harness = Harness::new(Behaviour::default()).await;
    let mut request = harness.creation(SPEC);
    request.rootfs.clear();
    fs::remove_dir(harness.dir.path().join("bundle/rootfs")).unwrap();
    let (_, message) = code(harness.client.create(ctx(), &request).await);
    assert!(message.contains("root file system"), "{message}");
    harness.end().await;
}

#[tokio::test]
async fn shutdown_with_a_container_changes_nothing() {
    let harness = Harness::new(Behaviour::default()).await;
    harness.create().await.unwrap();
    let request = ShutdownRequest::default();
    harness.client.shutdown(ctx(), &request).await.unwrap();
    assert_eq!(harness.status("").await.unwrap(), Status::CREATED);
    harness.delete("").await.unwrap();
    harness.end().await;
}

#[tokio::test]
async fn a_shim_told_to_end_gives_the_processes_their_grace_and_leaves_nothing() {
    let harness = Harness::new(Behaviour::default()).await;
    harness.create().await.unwrap();
    harness.start("").await.unwrap();
    timeout(LONG, harness.pod.terminate()).await.unwrap();
    let all = harness.record.all();
    assert!(
        all.iter().any(|seen| seen == "shutdown after 1000 ms"),
        "{all:?}"
    );
    assert_eq!(harness.wait("").await.unwrap(), 137);
    harness.delete("").await.unwrap();
    harness.end().await;
}

#[tokio::test]
async fn a_guest_whose_clock_is_off_is_told_by_how_much() {
    let behaviour = Behaviour {
        clock_ahead: 3_600,
        ..Behaviour::default()
    };
    let harness = Harness::new(behaviour).await;
    harness.create().await.unwrap();
    // Not -3600 to the nanosecond: the seconds of what is added are rounded towards zero.
    let moved = async {
        loop {
            let all = harness.record.all();
            if let Some(moved) = all.iter().find(|seen| seen.starts_with("clock moved")) {
                return moved.clone();
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let moved = timeout(LONG, moved).await.unwrap();
    assert!(
        ["clock moved -3600 s", "clock moved -3599 s"].contains(&moved.as_str()),
        "{moved}"
    );
    harness.delete("").await.unwrap();
    harness.end().await;
}
