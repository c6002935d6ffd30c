//! What of a process is asked before it runs, and what ends it at its start.

use containerd_shim_protos::api::{CloseIORequest, ExecProcessRequest, ResizePtyRequest, Status};
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;
use tokio::time::timeout;
use ttrpc::Code;

use super::LONG;
use super::harness::{Harness, SPEC, code, ctx};
use crate::guest::fakes::Behaviour;

async fn resize(harness: &Harness, exec_id: &str, height: u32, width: u32) -> ttrpc::Result<()> {
    let request = ResizePtyRequest {
        id: "c".into(),
        exec_id: exec_id.into(),
        height,
        width,
        ..ResizePtyRequest::default()
    };
    harness.client.resize_pty(ctx(), &request).await.map(drop)
}

fn exec(exec_id: &str, terminal: bool) -> ExecProcessRequest {
    ExecProcessRequest {
        id: "c".into(),
        exec_id: exec_id.into(),
        terminal,
        spec: MessageField::some(Any {
            value: b"{}".to_vec(),
            ..Any::default()
        }),
        ..ExecProcessRequest::default()
    }
}

/// As nerdctl does it: Exec, ResizePty, Start.
#[tokio::test]
async fn the_size_of_a_terminal_that_comes_before_the_start_is_kept_for_it() {
    let harness = Harness::new(Behaviour::default()).await;
    harness.create().await.unwrap();
    harness.start("").await.unwrap();
    harness.client.exec(ctx(), &exec("e", true)).await.unwrap();
    resize(&harness, "e", 20, 70).await.unwrap();
    resize(&harness, "e", 31, 101).await.unwrap();
    harness.start("e").await.unwrap();
    let asked = harness.record.all();
    assert!(harness.record.has("sized 31x101"), "{asked:?}");
    assert!(
        !asked.iter().any(|seen| seen.starts_with("resize")),
        "{asked:?}"
    );
    resize(&harness, "e", 40, 120).await.unwrap();
    assert!(harness.record.has("resize 40x120"));
    // Without a terminal there is nothing to be sized, and it is no error.
    resize(&harness, "", 40, 121).await.unwrap();
    assert!(!harness.record.has("resize 40x121"));
    assert_eq!(
        code(resize(&harness, "none", 1, 1).await).0,
        Code::NOT_FOUND
    );
    harness.kill("e", 9).await.unwrap();
    harness.wait("e").await.unwrap();
    assert_eq!(code(resize(&harness, "e", 1, 1).await).0, Code::NOT_FOUND);
    harness.delete("e").await.unwrap();
    harness.kill("", 9).await.unwrap();
    harness.wait("").await.unwrap();
    harness.delete("").await.unwrap();
    harness.end().await;
}

#[tokio::test]
async fn the_agent_hears_of_a_terminals_closed_input_and_of_no_others() {
    let harness = Harness::new(Behaviour::default()).await;
    harness.create().await.unwrap();
    harness.start("").await.unwrap();
    let close = |exec_id: &str| CloseIORequest {
        id: "c".into(),
        exec_id: exec_id.into(),
        stdin: true,
        ..CloseIORequest::default()
    };
    for (exec_id, terminal) in [("early", true), ("pipe", false), ("late", true)] {
        harness
            .client
            .exec(ctx(), &exec(exec_id, terminal))
            .await
            .unwrap();
        if exec_id != "late" {
            harness
                .client
                .close_io(ctx(), &close(exec_id))
                .await
                .unwrap();
        }
        harness.start(exec_id).await.unwrap();
    }
    timeout(LONG, harness.record.until("close stdin of early"))
        .await
        .unwrap();
    assert!(!harness.record.has("close stdin of late"));
    harness
        .client
        .close_io(ctx(), &close("late"))
        .await
        .unwrap();
    timeout(LONG, harness.record.until("close stdin of late"))
        .await
        .unwrap();
    assert!(!harness.record.has("close stdin of pipe"));
    harness.kill("", 9).await.unwrap();
    harness.wait("").await.unwrap();
    harness.delete("").await.unwrap();
    harness.end().await;
}

#[tokio::test]
async fn an_exec_runs_in_a_container_that_was_created_and_goes_with_it() {
    let harness = Harness::new(Behaviour::default()).await;
    let pid = harness.create().await.unwrap();
    for exec in ["e", "left"] {
        harness.exec(exec).await.unwrap();
        assert_eq!(harness.start(exec).await.unwrap(), pid);
        assert_eq!(harness.status(exec).await.unwrap(), Status::RUNNING);
    }
    assert_eq!(harness.status("").await.unwrap(), Status::CREATED);
    harness.kill("e", 9).await.unwrap();
    assert_eq!(harness.wait("e").await.unwrap(), 137);
    harness.delete("e").await.unwrap();
    harness.delete("").await.unwrap();
    let record = harness.record.clone();
    assert!(record.in_order("signal 9 left", "delete left"));
    assert!(record.in_order("delete left", "delete "));
    assert!(!record.has("start "));
    harness.end().await;
}

#[tokio::test]
async fn a_poststart_hook_that_fails_ends_the_container_and_its_start() {
    let harness = Harness::new(Behaviour::default()).await;
    let hooks = r#"{"hooks":{"poststart":[{"path":"/bin/false"},
        {"path":"/usr/bin/touch","args":["touch","second"]}],
        "poststop":[{"path":"/usr/bin/touch","args":["touch","undone"]}]},"#;
    harness
        .create_as("c", &SPEC.replacen('{', hooks, 1))
        .await
        .unwrap();
    let (got, message) = code(harness.start("").await);
    assert_eq!(got, Code::FAILED_PRECONDITION);
    assert!(message.contains("hook /bin/false"), "{message}");
    assert_eq!(harness.status("").await.unwrap(), Status::STOPPED);
    assert_eq!(harness.wait("").await.unwrap(), 137);
    assert!(harness.record.in_order("start ", "signal 9 "));
    let made = |name: &str| harness.dir.path().join("bundle").join(name).exists();
    assert!(!made("second") && !made("undone"));
    assert_eq!(harness.delete("").await.unwrap(), 137);
    assert!(made("undone"));
    // As with runc's shim an end is told, and no start.
    let expected = ["/tasks/create", "/tasks/exit", "/tasks/delete"];
    assert_eq!(harness.end().await, expected);
}
