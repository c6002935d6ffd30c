//! containerd's streams through the whole server: a ttrpc client opens them on connections of its own, and
//! tasks name them.

use containerd_shim_protos::api::{CloseIORequest, ExecProcessRequest, Status};
use containerd_shim_protos::shim_async::Client;
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;
use tokio::time::timeout;
use ttrpc::Code;
use ttrpc::asynchronous::ClientStream;

use super::LONG;
use super::harness::{Harness, SPEC, code, ctx};
use crate::asked::sandbox_config::tests::{bytes, varint};
use crate::guest::fakes::Behaviour;
use crate::pod::stdio::streaming::wire;

/// One stream, on its own connection.
struct Stream {
    stream: ClientStream<Any, Any>,
    _connection: Client,
}

fn any(name: &str, value: Vec<u8>) -> Any {
    Any {
        type_url: name.to_owned(),
        value,
        ..Any::default()
    }
}

impl Stream {
    async fn open(harness: &Harness, id: &str) -> Self {
        let address = format!("unix://{}", harness.dir.path().join("shim").display());
        let connection = Client::connect(&address).await.unwrap();
        let mut request = ttrpc::Request::new();
        request.service = wire::SERVICE.into();
        request.method = wire::METHOD.into();
        let inner = connection.new_stream(request, true, true).await.unwrap();
        let mut stream: ClientStream<Any, Any> = ClientStream::new(inner);
        let init = any(
            "containerd.services.streaming.v1.StreamInit",
            bytes(1, id.as_bytes()),
        );
        stream.send(&init).await.unwrap();
        let answer = timeout(LONG, stream.recv()).await.expect("no answer");
        assert_eq!(answer.unwrap().type_url, "google.protobuf.Empty");
        Self {
            stream,
            _connection: connection,
        }
    }

    async fn grant(&self, window: i64) {
        let update = any("containerd.types.transfer.WindowUpdate", varint(1, window));
        self.stream.send(&update).await.unwrap();
    }

    async fn receive(&mut self) -> ttrpc::Result<Any> {
        timeout(LONG, self.stream.recv())
            .await
            .expect("nothing comes")
    }
}

fn uri(harness: &Harness, id: &str) -> String {
    let socket = harness.dir.path().join("shim");
    format!("ttrpc+unix://{}?streaming_id={id}", socket.display())
}

async fn create(harness: &Harness) -> ttrpc::Result<u32> {
    let mut request = harness.creation(SPEC);
    request.stdout = uri(harness, "c-stdout");
    request.stderr = uri(harness, "c-stderr");
    Ok(harness.client.create(ctx(), &request).await?.pid)
}

#[tokio::test]
async fn an_exit_is_told_after_the_output() {
    let harness = Harness::new(Behaviour {
        last_words: "bye",
        ..Behaviour::default()
    })
    .await;
    let mut stdout = Stream::open(&harness, "c-stdout").await;
    let stderr = Stream::open(&harness, "c-stderr").await;
    stdout.grant(65536).await;
    stderr.grant(65536).await;
    create(&harness).await.unwrap();
    harness.start("").await.unwrap();
    harness.kill("", 9).await.unwrap();
    let data = stdout.receive().await.unwrap();
    assert_eq!(data.type_url, "containerd.types.transfer.Data");
    assert_eq!(data.value, bytes(1, b"bye"));
    assert!(matches!(stdout.receive().await, Err(ttrpc::Error::Eof)));
    // As long as a client has not taken everything, the container has not ended.
    assert_eq!(harness.status("").await.unwrap(), Status::RUNNING);
    drop((stdout, stderr));
    assert_eq!(harness.wait("").await.unwrap(), 137);
    assert_eq!(harness.status("").await.unwrap(), Status::STOPPED);
    assert_eq!(harness.delete("").await.unwrap(), 137);
    harness.end().await;
}

#[tokio::test]
async fn an_exit_is_told_in_time_even_if_nobody_takes_the_output() {
    let harness = Harness::new(Behaviour {
        last_words: "bye",
        ..Behaviour::default()
    })
    .await;
    create(&harness).await.unwrap();
    harness.start("").await.unwrap();
    harness.kill("", 9).await.unwrap();
    assert_eq!(harness.wait("").await.unwrap(), 137);
    assert_eq!(harness.delete("").await.unwrap(), 137);
    harness.end().await;
}

#[tokio::test]
async fn the_exit_is_kept_when_the_vm_dies_before_the_output_is_taken() {
    let harness = Harness::new(Behaviour {
        exits_at_once: Some(3),
        last_words: "bye",
        ..Behaviour::default()
    })
    .await;
    let pid = create(&harness).await.unwrap();
    harness.start("").await.unwrap();
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    assert_eq!(harness.wait("").await.unwrap(), 3);
    harness.delete("").await.unwrap();
    let topics = harness.end().await;
    let exits = topics.iter().filter(|topic| *topic == "/tasks/exit");
    assert_eq!(exits.count(), 1, "{topics:?}");
}

#[tokio::test]
async fn the_output_of_a_container_whose_vm_dies_is_delivered_before_its_end_is_told() {
    let harness = Harness::new(Behaviour::default()).await;
    create(&harness).await.unwrap();
    harness.start("").await.unwrap();
    // It waits in the pipe, for containerd is away.
    harness.host.crash("all of it");
    // It is dead all the same.
    let dead = async {
        loop {
            match harness.kill("", 15).await {
                Err(ttrpc::Error::RpcStatus(status)) if status.code() == Code::NOT_FOUND => return,
                _ => tokio::time::sleep(std::time::Duration::from_millis(10)).await,
            }
        }
    };
    timeout(LONG, dead).await.expect("it lives");
    assert_eq!(harness.status("").await.unwrap(), Status::RUNNING);
    let mut stdout = Stream::open(&harness, "c-stdout").await;
    stdout.grant(65536).await;
    let data = stdout.receive().await.unwrap();
    assert_eq!(data.value, bytes(1, b"all of it"));
    assert!(matches!(stdout.receive().await, Err(ttrpc::Error::Eof)));
    let mut stderr = Stream::open(&harness, "c-stderr").await;
    stderr.grant(65536).await;
    assert!(stderr.receive().await.is_ok());
    drop((stdout, stderr));
    assert_eq!(harness.wait("").await.unwrap(), 137);
    assert_eq!(harness.delete("").await.unwrap(), 137);
    harness.end().await;
}

#[tokio::test]
async fn an_execs_input_has_leave_and_ends_with_close_io() {
    let harness = Harness::new(Behaviour::default()).await;
    harness.create().await.unwrap();
    harness.start("").await.unwrap();
    let mut stdin = Stream::open(&harness, "e-stdin").await;
    let exec = ExecProcessRequest {
        id: "c".into(),
        exec_id: "e".into(),
        stdin: uri(&harness, "e-stdin"),
        spec: MessageField::some(any("", b"{}".to_vec())),
        ..ExecProcessRequest::default()
    };
    harness.client.exec(ctx(), &exec).await.unwrap();
    harness.start("e").await.unwrap();
    let window = stdin.receive().await.unwrap();
    assert_eq!(window.type_url, "containerd.types.transfer.WindowUpdate");
    assert_eq!(window.value, varint(1, 65536));
    let data = any("containerd.types.transfer.Data", bytes(1, b"hello"));
    stdin.stream.send(&data).await.unwrap();
    stdin.stream.close_send().await.unwrap();
    let close = CloseIORequest {
        id: "c".into(),
        exec_id: "e".into(),
        stdin: true,
        ..CloseIORequest::default()
    };
    harness.client.close_io(ctx(), &close).await.unwrap();
    // The end of input is the end of the stream for its client too.
    assert!(stdin.receive().await.is_err());
    harness.kill("e", 9).await.unwrap();
    harness.wait("e").await.unwrap();
    harness.delete("e").await.unwrap();
    harness.kill("", 9).await.unwrap();
    harness.wait("").await.unwrap();
    harness.delete("").await.unwrap();
    harness.end().await;
}

#[tokio::test]
async fn a_uri_that_names_no_stream_is_refused_by_name() {
    let harness = Harness::new(Behaviour::default()).await;
    let mut request = harness.creation(SPEC);
    request.stdout = "ttrpc+unix:///run/s".into();
    let (got, message) = code(harness.client.create(ctx(), &request).await);
    assert_eq!(got, Code::INVALID_ARGUMENT);
    assert!(message.contains("streaming_id"), "{message}");
    harness.end().await;
}
