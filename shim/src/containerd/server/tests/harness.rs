//! containerd's side of the tests: its event socket and its client.

use std::path::PathBuf;

use async_trait::async_trait;
use containerd_shim_protos::api::{
    CreateTaskRequest, CreateTaskResponse, DeleteRequest, ExecProcessRequest, KillRequest, Mount,
    ShutdownRequest, StartRequest, StateRequest, Status, WaitRequest,
};
use containerd_shim_protos::sandbox_async::SandboxClient;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::shim_async::{Client, Events, TaskClient, create_events};
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::empty::Empty;
use serde_json::Value;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use ttrpc::asynchronous::TtrpcContext;
use ttrpc::{Code, context};

use super::super::*;
use super::LONG;
use crate::guest::fakes::{Behaviour, FakeHost, Record};
use crate::node::remains::Remains;

struct Containerd {
    topics: mpsc::UnboundedSender<String>,
}

#[async_trait]
impl Events for Containerd {
    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        let _ = self.topics.send(request.envelope.unwrap().topic);
        Ok(Empty::default())
    }
}

pub(super) struct Harness {
    pub(super) dir: tempfile::TempDir,
    pub(super) client: TaskClient,
    pub(super) record: Record,
    pub(super) host: Arc<FakeHost>,
    pub(super) pod: PodHandle,
    /// More lines of the handler's configuration.
    pub(super) settings: &'static str,
    topics: mpsc::UnboundedReceiver<String>,
    pub(super) server: JoinHandle<Result<()>>,
    _containerd: Server,
}

pub(super) const SPEC: &str = r#"{"hostname":"h","process":{"args":["true"]},
    "linux":{"namespaces":[{"type":"network"},{"type":"pid"},{"type":"ipc"}],"cgroupsPath":"/ns/c"}}"#;

impl Harness {
    pub(super) async fn new(behaviour: Behaviour) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (topic_sender, topics) = mpsc::unbounded_channel();
        let address = dir.path().join("containerd.sock.ttrpc");
        let mut containerd = Server::new()
            .bind(&format!("unix://{}", address.display()))
            .unwrap()
            .register_service(create_events(Arc::new(Containerd {
                topics: topic_sender,
            })));
        containerd.start().await.unwrap();
        let logger = Logger::root(slog::Discard, slog::o!());
        let log = Arc::new(log::Control::new(false));
        let publisher = Publisher::new(
            address.to_str().map(str::to_owned),
            "ns".into(),
            logger.clone(),
        );
        let state = StateDir::new(&dir.path().join("state"), "ns", "c").unwrap();
        state.create().unwrap();
        let socket = dir.path().join("shim");
        let journal = Journal {
            socket: Some(socket.clone()),
            ..Journal::new(Identity::of(std::process::id()).unwrap())
        };
        let host = FakeHost::new(behaviour);
        let record = host.record.clone();
        let streams = Streams::default();
        let pod = actor::spawn(Setup {
            namespace: "ns".into(),
            id: "c".into(),
            state,
            journal,
            began: SystemTime::now(),
            host: host.clone(),
            events: publisher.events(),
            logger: logger.clone(),
            log: Arc::clone(&log),
            streams: streams.clone(),
            collector: None,
        });
        let listener = UnixListener::bind(&socket).unwrap();
        listener.set_nonblocking(true).unwrap();
        let (path, for_server) = (socket.clone(), pod.clone());
        let server = tokio::spawn(async move {
            let config = path.with_file_name("config.toml");
            let served = Served { listener, streams };
            run(served, Some(config), for_server, publisher, (&logger, log)).await
        });
        let address = format!("unix://{}", socket.display());
        let client = TaskClient::new(Client::connect(&address).await.unwrap());
        Self {
            dir,
            client,
            record,
            host,
            pod,
            settings: "",
            topics,
            server,
            _containerd: containerd,
        }
    }

    /// A client of the Sandbox service, over a connection of its own.
    pub(super) async fn sandbox(&self) -> SandboxClient {
        fs::write(self.dir.path().join("config.toml"), "time_scale = 0.1").unwrap();
        let address = format!("unix://{}", self.dir.path().join("shim").display());
        SandboxClient::new(Client::connect(&address).await.unwrap())
    }

    /// The pod's directory on the node.
    pub(super) fn state(&self) -> PathBuf {
        self.dir.path().join("state/ns/c")
    }

    /// Has the node's operator add this to the handler's configuration.
    pub(super) fn configured(&self, text: &str) {
        let drop_ins = self.dir.path().join("config.d");
        fs::create_dir_all(&drop_ins).unwrap();
        fs::write(drop_ins.join("test.toml"), text).unwrap();
    }

    /// What is kept when the pod has been shut down.
    pub(super) async fn remembered(&self) -> Vec<Value> {
        let request = ShutdownRequest::default();
        self.client.shutdown(super::ctx(), &request).await.unwrap();
        Remains::beside(&self.dir.path().join("state")).all()
    }

    fn bundle(&self, spec: &str) -> PathBuf {
        let bundle = self.dir.path().join("bundle");
        fs::create_dir_all(bundle.join("rootfs")).unwrap();
        fs::write(bundle.join("config.json"), spec).unwrap();
        let config = self.dir.path().join("config.toml");
        fs::write(config, format!("time_scale = 0.1\n{}\n", self.settings)).unwrap();
        bundle
    }

    pub(super) fn creation(&self, spec: &str) -> CreateTaskRequest {
        let path = self.dir.path().join("config.toml");
        let path = path.to_str().unwrap();
        let mut value = vec![0x12, u8::try_from(path.len()).unwrap()];
        value.extend_from_slice(path.as_bytes());
        CreateTaskRequest {
            id: "c".into(),
            bundle: self.bundle(spec).to_str().unwrap().into(),
            rootfs: vec![Mount {
                type_: "overlay".into(),
                ..Mount::default()
            }],
            options: MessageField::some(Any {
                type_url: "runtimeoptions.v1.Options".into(),
                value,
                ..Any::default()
            }),
            ..CreateTaskRequest::default()
        }
    }

    pub(super) async fn create(&self) -> ttrpc::Result<u32> {
        self.create_as("c", SPEC).await
    }

    pub(super) async fn create_as(&self, id: &str, spec: &str) -> ttrpc::Result<u32> {
        let mut request = self.creation(spec);
        request.id = id.into();
        Ok(self.client.create(ctx(), &request).await?.pid)
    }

    /// A creation that the agent has been asked for and has not answered.
    pub(super) async fn creation_under_way(&self) -> JoinHandle<ttrpc::Result<CreateTaskResponse>> {
        let client = self.client.clone();
        let request = self.creation(SPEC);
        let created = tokio::spawn(async move { client.create(ctx(), &request).await });
        timeout(LONG, self.record.until("create c"))
            .await
            .expect("the agent is not asked");
        created
    }

    pub(super) async fn start(&self, exec_id: &str) -> ttrpc::Result<u32> {
        self.start_of("c", exec_id).await
    }

    pub(super) async fn start_of(&self, id: &str, exec_id: &str) -> ttrpc::Result<u32> {
        let request = StartRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            ..StartRequest::default()
        };
        Ok(self.client.start(ctx(), &request).await?.pid)
    }

    pub(super) async fn exec(&self, exec_id: &str) -> ttrpc::Result<()> {
        let request = ExecProcessRequest {
            id: "c".into(),
            exec_id: exec_id.into(),
            spec: MessageField::some(Any {
                value: b"{}".to_vec(),
                ..Any::default()
            }),
            ..ExecProcessRequest::default()
        };
        self.client.exec(ctx(), &request).await.map(drop)
    }

    pub(super) async fn kill(&self, exec_id: &str, signal: u32) -> ttrpc::Result<()> {
        self.kill_of("c", exec_id, signal).await
    }

    pub(super) async fn kill_of(&self, id: &str, exec_id: &str, signal: u32) -> ttrpc::Result<()> {
        let request = KillRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            signal,
            ..KillRequest::default()
        };
        self.client.kill(ctx(), &request).await.map(drop)
    }

    pub(super) async fn wait(&self, exec_id: &str) -> ttrpc::Result<u32> {
        self.wait_of("c", exec_id).await
    }

    pub(super) async fn wait_of(&self, id: &str, exec_id: &str) -> ttrpc::Result<u32> {
        let request = WaitRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            ..WaitRequest::default()
        };
        let answer = timeout(LONG, self.client.wait(ctx(), &request)).await;
        Ok(answer.expect("no exit was told")?.exit_status)
    }

    pub(super) async fn delete(&self, exec_id: &str) -> ttrpc::Result<u32> {
        self.delete_of("c", exec_id).await
    }

    pub(super) async fn delete_of(&self, id: &str, exec_id: &str) -> ttrpc::Result<u32> {
        let request = DeleteRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            ..DeleteRequest::default()
        };
        let answer = timeout(LONG, self.client.delete(ctx(), &request)).await;
        Ok(answer.expect("delete hangs")?.exit_status)
    }

    pub(super) async fn status(&self, exec_id: &str) -> ttrpc::Result<Status> {
        self.status_of("c", exec_id).await
    }

    pub(super) async fn status_of(&self, id: &str, exec_id: &str) -> ttrpc::Result<Status> {
        let request = StateRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            ..StateRequest::default()
        };
        let state = self.client.state(ctx(), &request).await?;
        Ok(state.status.enum_value().unwrap())
    }

    /// Shuts down and checks that nothing is left; returns the topics that were published.
    pub(super) async fn end(self) -> Vec<String> {
        let request = ShutdownRequest::default();
        let _ = self.client.shutdown(ctx(), &request).await;
        self.ended().await
    }

    /// As [`Self::end`] for one that has been shut down.
    pub(super) async fn ended(mut self) -> Vec<String> {
        // As containerd does.
        drop(self.client);
        let ended = timeout(LONG, self.server)
            .await
            .expect("the server goes on");
        ended.unwrap().unwrap();
        assert!(!self.dir.path().join("shim").exists(), "the socket is left");
        assert!(
            !self.dir.path().join("state/ns").exists(),
            "the state is left"
        );
        let mut topics = Vec::new();
        while let Ok(topic) = self.topics.try_recv() {
            topics.push(topic);
        }
        topics
    }
}

pub(super) fn ctx() -> context::Context {
    context::Context::default()
}

pub(super) fn code<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> (Code, String) {
    match result.unwrap_err() {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message),
        other => panic!("not a status: {other}"),
    }
}
