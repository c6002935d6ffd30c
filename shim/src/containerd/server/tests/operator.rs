//! What the operator's command is told by a pod's shim, and what is kept of a pod that failed.

use std::sync::Barrier;

use brig_agent_protocol::agent::VolumeDisk;
use serde_json::{Value, json};
use ttrpc::Code;
use ttrpc::asynchronous::Client;

use super::*;
use crate::containerd::debug_service::{Method, NAME};
use crate::guest::vm::DiskVolume;
use crate::node::remains::Remains;
use crate::pod::starts::Starts;

async fn ask(harness: &Harness, method: Method, request: Value) -> ttrpc::Result<Vec<u8>> {
    let address = format!("unix://{}", harness.dir.path().join("shim").display());
    let client = Client::connect(&address).await.unwrap();
    let mut message = ttrpc::Request::new();
    message.service = NAME.to_owned();
    message.method = method.name().to_owned();
    message.payload = request.to_string().into_bytes();
    message.timeout_nano = 20_000_000_000;
    Ok(client.request(message).await?.payload)
}

async fn ask_json(harness: &Harness, method: Method, request: Value) -> Value {
    serde_json::from_slice(&ask(harness, method, request).await.unwrap()).unwrap()
}

#[tokio::test]
async fn a_guest_is_looked_into_only_where_its_handler_allows_it() {
    let harness = Harness::new(Behaviour::default()).await;
    let look = |words: Value| json!({ "words": words });
    let error = ask(&harness, Method::Look, look(json!(["dmesg"]))).await;
    assert_eq!(code(error).0, Code::FAILED_PRECONDITION, "there is no VM");
    harness.create().await.unwrap();
    for open in ["dmesg", "free", "ip"] {
        let answer = ask(&harness, Method::Look, look(json!([open])))
            .await
            .unwrap();
        assert_eq!(answer, format!("{open}\u{1b}[2J").into_bytes());
    }
    for closed in ["ps", "ls", "cat", "mounts", "anything"] {
        let error = ask(&harness, Method::Look, look(json!([closed])))
            .await
            .unwrap_err();
        assert!(error.to_string().contains("debug = true"), "{error}");
    }
    for wrong in [json!([]), json!("dmesg"), json!([1]), Value::Null] {
        let error = ask(&harness, Method::Look, look(wrong)).await;
        assert_eq!(code(error).0, Code::INVALID_ARGUMENT);
    }
    harness.kill("", 9).await.unwrap();
    harness.delete("").await.unwrap();
    harness.end().await;
}

#[tokio::test]
async fn a_guest_is_debugged_only_where_its_handler_allows_it_and_goes_on_when_nobody_asks_any_more()
 {
    let harness = Harness::new(Behaviour::default()).await;
    harness.create().await.unwrap();
    let error = ask(&harness, Method::Debug, json!("Stop"))
        .await
        .unwrap_err();
    assert!(error.to_string().contains("debug = true"), "{error}");
    harness.kill("", 9).await.unwrap();
    harness.delete("").await.unwrap();
    harness.end().await;

    let harness = Harness::new(Behaviour::default()).await;
    harness.configured("debug = true");
    harness.create().await.unwrap();
    for wrong in [json!("Stand"), json!({}), Value::Null] {
        let error = ask(&harness, Method::Debug, wrong).await;
        assert_eq!(code(error).0, Code::INVALID_ARGUMENT);
    }
    let stopped = ask_json(&harness, Method::Debug, json!("Stop")).await;
    assert_eq!(stopped["cpus"][0]["rip"], 7);
    // The debugger is gone: a tenth of ten seconds later the CPUs are let go.
    let gone = "debug Go { only: None, step: false, breakpoints: [] }";
    harness.record.until(gone).await;
    harness.kill("", 9).await.unwrap();
    harness.delete("").await.unwrap();
    harness.end().await;
}

#[tokio::test]
async fn an_answer_of_the_guest_without_end_is_cut_off() {
    let harness = Harness::new(Behaviour::default()).await;
    harness.configured("debug = true");
    harness.create().await.unwrap();
    let request = json!({ "words": ["ps"] });
    assert!(
        ask(&harness, Method::Look, request)
            .await
            .unwrap()
            .starts_with(b"ps")
    );
    let request = json!({ "words": ["cat", "/proc/1/maps"] });
    let error = ask(&harness, Method::Look, request).await;
    assert_eq!(code(error).0, Code::RESOURCE_EXHAUSTED);
    harness.kill("", 9).await.unwrap();
    harness.delete("").await.unwrap();
    harness.end().await;
}

#[tokio::test]
async fn a_pod_is_told_with_where_its_configuration_is_from_and_without_what_is_secret() {
    let harness = Harness::new(Behaviour::default()).await;
    harness.configured("vcpus = 2\npod_annotations = [\"memory\"]\nlog_level = \"warning\"");
    let spec = r#"{"process":{"args":["a-secret"],"env":["P=a-secret"]},"root":{"path":"rootfs"},"linux":
        {"cgroupsPath":"/ns/c","namespaces":[{"type":"network"},{"type":"pid"},{"type":"ipc"}]},"annotations":{"io.brig.memory":"300MiB","x":"a-secret",
        "io.kubernetes.cri.sandbox-name":"web-0","io.kubernetes.cri.sandbox-namespace":"shop"}}"#;
    harness.create_as("c", spec).await.unwrap();
    let told = ask_json(&harness, Method::Inspect, Value::Null).await;
    assert_eq!(told["pod"]["name"], "web-0");
    assert_eq!(
        (&told["state"], &told["logLevel"]),
        (&"ready".into(), &"warning".into())
    );
    let config = &told["config"];
    assert_eq!(
        config["memory"],
        json!({ "value": "300MiB", "from": "the pod's annotation" })
    );
    let drop_in = harness.dir.path().join("config.d/test.toml");
    assert_eq!(config["vcpus"], json!({ "value": 2, "from": drop_in }));
    assert_eq!(config["kernel"]["from"], "default");
    let container = &told["containers"][0];
    assert_eq!(
        (&container["id"], &container["state"]),
        (&"c".into(), &"created".into())
    );
    assert!(!told.to_string().contains("secret"), "{told}");
    let level = |level: &str| json!({ "level": level });
    let changed = ask_json(&harness, Method::Level, level("debug")).await;
    assert_eq!(changed, json!({ "level": "debug", "was": "warning" }));
    let error = ask(&harness, Method::Level, level("loud"))
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains("error, warning, info, debug"),
        "{error}"
    );
    harness.kill("", 9).await.unwrap();
    harness.delete("").await.unwrap();
    assert!(harness.remembered().await.is_empty());
    harness.end().await;
}

#[tokio::test]
async fn of_a_pod_whose_vm_ended_by_itself_an_account_is_kept() {
    let harness = Harness::new(Behaviour::default()).await;
    harness.create().await.unwrap();
    harness.start("").await.unwrap();
    harness.host.crash("");
    harness.wait("").await.unwrap();
    harness.delete("").await.unwrap();
    let accounts = harness.remembered().await;
    assert_eq!(accounts.len(), 1);
    let account = &accounts[0];
    assert_eq!(
        (&account["id"], &account["code"]),
        (&"c".into(), &"unavailable".into())
    );
    assert!(
        account["reason"]
            .as_str()
            .unwrap()
            .contains("the VM has ended"),
        "{account}"
    );
    assert!(account["timeline"]["marks"].as_array().unwrap().len() > 3);
    assert_eq!(account["config"]["time_scale"]["value"], 0.1);
    harness.end().await;
}

/// How many starts the node has counted.
fn starts(harness: &Harness) -> u64 {
    let remains = Remains::beside(&harness.dir.path().join("state"));
    let starts = Starts::of(&remains).unwrap();
    let total = starts.stages().find(|(stage, _)| *stage == "total");
    total.unwrap().1.count()
}

#[tokio::test]
async fn a_start_is_counted_once_when_a_container_runs_or_else_at_the_end() {
    for runs in [true, false] {
        let harness = Harness::new(Behaviour::default()).await;
        harness.create().await.unwrap();
        assert_eq!(starts(&harness), 0);
        if runs {
            harness.start("").await.unwrap();
            while starts(&harness) == 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
        harness.kill("", 9).await.unwrap();
        harness.delete("").await.unwrap();
        assert!(harness.remembered().await.is_empty());
        assert_eq!(starts(&harness), 1, "{runs}");
        harness.end().await;
    }
}

#[tokio::test]
async fn a_pod_that_did_not_start_is_no_start() {
    let harness = Harness::new(Behaviour::default()).await;
    assert!(harness.start("").await.is_err());
    assert!(harness.remembered().await.is_empty());
    assert_eq!(starts(&harness), 0);
    harness.end().await;
}

#[tokio::test]
async fn a_pod_is_told_while_the_vmm_does_not_answer_a_plug() {
    let answered = Arc::new(Barrier::new(2));
    let harness = Harness::new(Behaviour {
        slow_plug: Some(Arc::clone(&answered)),
        ..Behaviour::default()
    })
    .await;
    harness.create().await.unwrap();
    let vm = harness.pod.vm().await.unwrap();
    let image = harness.dir.path().join("image");
    fs::write(&image, [0; 4096]).unwrap();
    let volume = DiskVolume {
        id: "v".to_owned(),
        path: "/v".into(),
        device: image,
        readonly: true,
        file_system: VolumeDisk::default(),
    };
    let giving = tokio::spawn(async move {
        let logger = Logger::root(slog::Discard, slog::o!());
        vm.give_volume(&volume, &logger).await
    });
    harness.record.until("plug disk v").await;
    let told = ask_json(&harness, Method::Inspect, Value::Null).await;
    assert_eq!(told["containers"][0]["state"], "created");
    assert_eq!(told["volumes"], json!([]));
    let unsettled = told["unsettledDevices"][0].as_str().unwrap();
    assert!(
        unsettled.contains("was asked to plug the volume on"),
        "{told}"
    );
    tokio::task::spawn_blocking(move || answered.wait())
        .await
        .unwrap();
    giving.await.unwrap().unwrap();
    let told = ask_json(&harness, Method::Inspect, Value::Null).await;
    assert_eq!(told["unsettledDevices"], json!([]));
    harness.kill("", 9).await.unwrap();
    harness.delete("").await.unwrap();
    harness.end().await;
}
