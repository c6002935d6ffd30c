//! Callers that do not wait: whose time is over before the answer, or who hang up. What they asked for is done all the
//! same, and the shim ends when that was asked for.

use containerd_shim_protos::api::{
    CloseIORequest, ConnectRequest, DeleteRequest, KillRequest, PidsRequest, StartRequest,
};
use containerd_shim_protos::sandbox_api::{
    ShutdownSandboxRequest, StartSandboxRequest, StopSandboxRequest,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::time::sleep;
use ttrpc::proto::{MESSAGE_HEADER_LENGTH, MESSAGE_TYPE_REQUEST, MessageHeader};

use super::sandbox::creation;
use super::*;
use crate::guest::fakes::raw::frame;
use crate::node::journal::Ending;

const TASK: &str = "containerd.task.v3.Task";
const SANDBOX: &str = "containerd.runtime.sandbox.v1.Sandbox";

/// How a caller leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Leaves {
    AtItsDeadline,
    HangsUp,
}

/// Calls a method, and does not wait for more than the end of its time.
async fn call(harness: &Harness, leaves: Leaves, name: (&str, &str), message: &impl Message) {
    let mut request = ttrpc::Request::new();
    request.service = name.0.to_owned();
    request.method = name.1.to_owned();
    request.payload = message.write_to_bytes().unwrap();
    if leaves == Leaves::AtItsDeadline {
        request.timeout_nano = 1;
    }
    let bytes = request.write_to_bytes().unwrap();
    let mut stream = UnixStream::connect(harness.dir.path().join("shim"))
        .await
        .unwrap();
    let request = frame(1, MESSAGE_TYPE_REQUEST, &bytes);
    stream.write_all(&request).await.unwrap();
    if leaves == Leaves::HangsUp {
        return;
    }
    let mut header = [0; MESSAGE_HEADER_LENGTH];
    stream.read_exact(&mut header).await.unwrap();
    let header = MessageHeader::from(&header);
    let mut answer = vec![0; usize::try_from(header.length).unwrap()];
    stream.read_exact(&mut answer).await.unwrap();
}

/// Waits until a process is in this state, or is not found.
async fn becomes(harness: &Harness, exec_id: &str, expected: Option<Status>) {
    let reached = async {
        loop {
            let status = harness.status(exec_id).await;
            if status.as_ref().ok() == expected.as_ref() {
                return;
            }
            sleep(Duration::from_millis(5)).await;
        }
    };
    let late = format!("{exec_id:?} is never {expected:?}");
    timeout(LONG, reached).await.expect(&late);
}

async fn is_asked(harness: &Harness, what: &str) {
    let late = format!("{what} is not asked");
    timeout(LONG, harness.record.until(what))
        .await
        .expect(&late);
}

fn slow() -> Behaviour {
    Behaviour {
        slow_launch: Duration::from_millis(50),
        slow_create: Duration::from_millis(50),
        slow_update: Duration::from_millis(50),
        slow_shutdown: Duration::from_millis(300),
        ..Behaviour::default()
    }
}

#[tokio::test]
async fn what_a_task_is_asked_is_done_to_its_end() {
    for leaves in [Leaves::AtItsDeadline, Leaves::HangsUp] {
        let harness = Harness::new(slow()).await;
        let (id, exec) = (|| "c".to_owned(), || "e".to_owned());
        let start = |exec_id: String| StartRequest {
            id: id(),
            exec_id,
            ..StartRequest::default()
        };
        let kill = |exec_id: String| KillRequest {
            id: id(),
            exec_id,
            signal: 9,
            ..KillRequest::default()
        };
        let delete = |exec_id: String| DeleteRequest {
            id: id(),
            exec_id,
            ..DeleteRequest::default()
        };
        call(&harness, leaves, (TASK, "Create"), &harness.creation(SPEC)).await;
        is_asked(&harness, "created c").await;
        let update = UpdateTaskRequest {
            id: id(),
            resources: MessageField::some(Any {
                value: br#"{"pids":{"limit":5}}"#.to_vec(),
                ..Any::default()
            }),
            ..UpdateTaskRequest::default()
        };
        becomes(&harness, "", Some(Status::CREATED)).await;
        call(&harness, leaves, (TASK, "Update"), &update).await;
        is_asked(&harness, r#"update {"pids":{"limit":5}}"#).await;
        call(&harness, leaves, (TASK, "Start"), &start(String::new())).await;
        becomes(&harness, "", Some(Status::RUNNING)).await;
        let pause = PauseRequest {
            id: id(),
            ..PauseRequest::default()
        };
        call(&harness, leaves, (TASK, "Pause"), &pause).await;
        becomes(&harness, "", Some(Status::PAUSED)).await;
        let resume = ResumeRequest {
            id: id(),
            ..ResumeRequest::default()
        };
        call(&harness, leaves, (TASK, "Resume"), &resume).await;
        becomes(&harness, "", Some(Status::RUNNING)).await;

        let asked = ExecProcessRequest {
            id: id(),
            exec_id: exec(),
            spec: MessageField::some(Any {
                value: b"{}".to_vec(),
                ..Any::default()
            }),
            ..ExecProcessRequest::default()
        };
        call(&harness, leaves, (TASK, "Exec"), &asked).await;
        becomes(&harness, "e", Some(Status::CREATED)).await;
        call(&harness, leaves, (TASK, "Start"), &start(exec())).await;
        becomes(&harness, "e", Some(Status::RUNNING)).await;
        call(&harness, leaves, (TASK, "Kill"), &kill(exec())).await;
        becomes(&harness, "e", Some(Status::STOPPED)).await;
        call(&harness, leaves, (TASK, "Delete"), &delete(exec())).await;
        becomes(&harness, "e", None).await;

        call(&harness, leaves, (TASK, "Kill"), &kill(String::new())).await;
        becomes(&harness, "", Some(Status::STOPPED)).await;
        call(&harness, leaves, (TASK, "Delete"), &delete(String::new())).await;
        becomes(&harness, "", None).await;
        let shutdown = ShutdownRequest::default();
        call(&harness, leaves, (TASK, "Shutdown"), &shutdown).await;
        let topics = harness.ended().await;
        assert_eq!(topics.last().unwrap(), "/tasks/delete", "{leaves:?}");
    }
}

#[tokio::test]
async fn what_a_sandbox_is_asked_is_done_to_its_end() {
    for leaves in [Leaves::AtItsDeadline, Leaves::HangsUp] {
        let harness = Harness::new(slow()).await;
        drop(harness.sandbox().await);
        let sandbox_id = || "c".to_owned();
        call(&harness, leaves, (SANDBOX, "CreateSandbox"), &creation()).await;
        is_asked(&harness, "cgroup /pods/c").await;
        let start = StartSandboxRequest {
            sandbox_id: sandbox_id(),
            ..StartSandboxRequest::default()
        };
        call(&harness, leaves, (SANDBOX, "StartSandbox"), &start).await;
        let is = async |ready: bool| {
            let reached = async {
                while harness.pod.sandbox_state().await.unwrap().ready != ready {
                    sleep(Duration::from_millis(5)).await;
                }
            };
            timeout(LONG, reached).await.expect("it is never so");
        };
        is(true).await;
        let stop = StopSandboxRequest {
            sandbox_id: sandbox_id(),
            timeout_secs: 1,
            ..StopSandboxRequest::default()
        };
        call(&harness, leaves, (SANDBOX, "StopSandbox"), &stop).await;
        is(false).await;
        let shutdown = ShutdownSandboxRequest {
            sandbox_id: sandbox_id(),
            ..ShutdownSandboxRequest::default()
        };
        call(&harness, leaves, (SANDBOX, "ShutdownSandbox"), &shutdown).await;
        harness.ended().await;
    }
}

#[tokio::test]
async fn a_sandbox_that_is_shut_down_while_it_lives_ends_with_its_shim() {
    for leaves in [Leaves::AtItsDeadline, Leaves::HangsUp] {
        let harness = Harness::new(slow()).await;
        let client = harness.sandbox().await;
        client.create_sandbox(ctx(), &creation()).await.unwrap();
        drop(client);
        let shutdown = ShutdownSandboxRequest::default();
        call(&harness, leaves, (SANDBOX, "ShutdownSandbox"), &shutdown).await;
        harness.ended().await;
    }
}

#[tokio::test]
async fn the_journal_says_that_a_pod_is_ending_and_whether_containers_are_left() {
    let journal = |harness: &Harness| -> Option<Journal> {
        let bytes = fs::read(harness.state().join("pod.json")).ok()?;
        serde_json::from_slice(&bytes).ok()
    };
    let ending = async |harness: &Harness| {
        let written = async {
            loop {
                if let Some(ending) = journal(harness).and_then(|journal| journal.ending) {
                    return ending;
                }
                sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(LONG, written).await.expect("it is not written")
    };
    let harness = Harness::new(slow()).await;
    harness.create().await.unwrap();
    assert_eq!(journal(&harness).unwrap().ending, None);
    harness.delete("").await.unwrap();
    assert_eq!(ending(&harness).await, Ending::Emptied);
    harness.end().await;

    let harness = Harness::new(slow()).await;
    harness.create().await.unwrap();
    let pod = harness.pod.clone();
    let terminated = tokio::spawn(async move { pod.terminate().await });
    assert_eq!(ending(&harness).await, Ending::Inhabited);
    terminated.await.unwrap();
    harness.ended().await;
}

#[tokio::test]
async fn a_restarted_containerd_finds_a_shim_without_its_task_and_ends_it() {
    let harness = Harness::new(Behaviour::default()).await;
    for created in [false, true] {
        if created {
            harness.create().await.unwrap();
            harness.delete("").await.unwrap();
        }
        let connect = ConnectRequest {
            id: "c".into(),
            ..ConnectRequest::default()
        };
        let connected = harness.client.connect(ctx(), &connect).await.unwrap();
        assert_eq!(
            (connected.shim_pid, connected.task_pid),
            (std::process::id(), 0)
        );
        let pids = PidsRequest {
            id: "c".into(),
            ..PidsRequest::default()
        };
        let pids = harness.client.pids(ctx(), &pids).await;
        assert_eq!(code(pids).0, Code::NOT_FOUND);
        assert_eq!(code(harness.delete("").await).0, Code::NOT_FOUND);
    }
    harness.end().await;
}

#[tokio::test]
async fn what_has_the_shims_names_after_its_end_is_left_alone() {
    let harness = Harness::new(Behaviour::default()).await;
    // Keeps the old server from ending at once.
    let mut open = UnixStream::connect(harness.dir.path().join("shim"))
        .await
        .unwrap();
    let close = CloseIORequest {
        id: "c".into(),
        ..CloseIORequest::default()
    };
    let mut request = ttrpc::Request::new();
    request.service = TASK.to_owned();
    request.method = "CloseIO".to_owned();
    request.payload = close.write_to_bytes().unwrap();
    let bytes = request.write_to_bytes().unwrap();
    let request = frame(1, MESSAGE_TYPE_REQUEST, &bytes);
    open.write_all(&request).await.unwrap();
    open.read_exact(&mut [0; MESSAGE_HEADER_LENGTH])
        .await
        .unwrap();
    harness.create().await.unwrap();
    harness.delete("").await.unwrap();
    let request = ShutdownRequest::default();
    harness.client.shutdown(ctx(), &request).await.unwrap();

    // The answer is there: a new shim of this id begins.
    let socket = harness.dir.path().join("shim");
    let _listener = UnixListener::bind(&socket).expect("the socket's name is not free");
    assert!(!harness.state().exists());
    let state = StateDir::new(&harness.dir.path().join("state"), "ns", "c").unwrap();
    state.create().unwrap();
    let journal = Journal::new(Identity::of(1).unwrap());
    state.write(&journal).unwrap();
    assert!(!harness.server.is_finished());
    drop((open, harness.client));
    let ended = timeout(LONG, harness.server).await;
    ended.expect("the server goes on").unwrap().unwrap();
    assert_eq!(state.read().unwrap(), Some(journal));
    assert!(socket.exists());
}
