//! An agent that speaks ttrpc frames itself, so that it can break every rule: it answers as an honest one does,
//! but for the methods it is silent about, and attacks once its container has been started.

use std::sync::Arc;

use brig_agent_protocol::agent::{AdjustClockResponse, Event, ProcessExited, event};
use protobuf::{Message, MessageField};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::Mutex;
use ttrpc::proto::{
    MESSAGE_HEADER_LENGTH, MESSAGE_TYPE_DATA, MESSAGE_TYPE_RESPONSE, MessageHeader,
};

use super::Record;

/// Makes the bytes that are sent after the start of the container, by the numbers of the call for events and of
/// the start.
pub(crate) type Bytes = fn(u32, u32) -> Vec<u8>;

/// How an agent misbehaves.
#[derive(Clone, Copy, Default)]
pub(crate) struct RawAgent {
    /// Methods that are never answered.
    pub(crate) silent: &'static [&'static str],
    /// What is sent.
    pub(crate) attack: Option<Bytes>,
    /// The attack goes on until the connection breaks.
    pub(crate) endless: bool,
    /// Nothing is read any more after the start.
    pub(crate) deaf: bool,
}

/// A frame.
pub(crate) fn frame(number: u32, kind: u8, payload: &[u8]) -> Vec<u8> {
    let header = MessageHeader {
        length: u32::try_from(payload.len()).unwrap(),
        stream_id: number,
        type_: kind,
        flags: 0,
    };
    [Vec::from(header), payload.to_vec()].concat()
}

/// A good answer.
pub(crate) fn answer(number: u32, payload: Vec<u8>) -> Vec<u8> {
    let mut response = ttrpc::Response::new();
    response.set_status(ttrpc::get_status(ttrpc::Code::OK, ""));
    response.payload = payload;
    let payload = response.write_to_bytes().unwrap();
    frame(number, MESSAGE_TYPE_RESPONSE, &payload)
}

fn event(number: u32, kind: event::Kind) -> Vec<u8> {
    let event = Event {
        kind: Some(kind),
        ..Event::default()
    };
    frame(number, MESSAGE_TYPE_DATA, &event.write_to_bytes().unwrap())
}

/// An end of a process of the container `id`.
pub(crate) fn exit(number: u32, id: &str, exec_id: &str, status: u32) -> Vec<u8> {
    let exit = event::Exit {
        id: id.to_owned(),
        exec_id: exec_id.to_owned(),
        exit: MessageField::some(ProcessExited {
            status,
            exited_at_unix_ns: u64::MAX,
            ..ProcessExited::default()
        }),
        ..event::Exit::default()
    };
    event(number, event::Kind::Exit(exit))
}

/// A kill for memory in the container `id`.
pub(crate) fn oom(number: u32, id: &str) -> Vec<u8> {
    let oom = event::Oom {
        id: id.to_owned(),
        ..event::Oom::default()
    };
    event(number, event::Kind::Oom(oom))
}

/// So many bytes of fields that nobody knows, each with a number of its own.
pub(crate) fn unknown_fields(bytes: usize) -> Vec<u8> {
    let mut fields = Vec::with_capacity(bytes + 8);
    let mut number = 1000_u32;
    while fields.len() < bytes {
        // Field numbers as varints, wire type 0, value 1.
        let mut key = number << 3;
        while key >= 0x80 {
            fields.push(u8::try_from(key & 0x7f).unwrap() | 0x80);
            key >>= 7;
        }
        fields.extend([u8::try_from(key).unwrap(), 1]);
        number += 1;
    }
    fields
}

struct Call {
    number: u32,
    method: String,
}

async fn next(stream: &mut OwnedReadHalf) -> Option<Call> {
    let mut header = [0; MESSAGE_HEADER_LENGTH];
    stream.read_exact(&mut header).await.ok()?;
    let header = MessageHeader::from(header);
    let mut payload = vec![0; usize::try_from(header.length).ok()?];
    stream.read_exact(&mut payload).await.ok()?;
    let request = ttrpc::Request::parse_from_bytes(&payload).ok()?;
    Some(Call {
        number: header.stream_id,
        method: request.method,
    })
}

impl RawAgent {
    /// Serves until the connection breaks. What was asked is recorded as `raw METHOD`.
    pub(super) async fn serve(self, stream: UnixStream, record: Record) {
        let (mut read, write) = stream.into_split();
        let write = Arc::new(Mutex::new(write));
        let mut events = 0;
        while let Some(call) = next(&mut read).await {
            record.add(format!("raw {}", call.method));
            if self.silent.contains(&call.method.as_str()) {
                continue;
            }
            let payload = match call.method.as_str() {
                "Events" => {
                    events = call.number;
                    continue;
                }
                "AdjustClock" => {
                    let now = std::time::SystemTime::now();
                    let since = now.duration_since(std::time::UNIX_EPOCH).unwrap();
                    let response = AdjustClockResponse {
                        unix_time_ns: u64::try_from(since.as_nanos()).unwrap(),
                        ..AdjustClockResponse::default()
                    };
                    response.write_to_bytes().unwrap()
                }
                // Every other message is good without fields.
                _ => Vec::new(),
            };
            let started = call.method == "StartProcess";
            if write
                .lock()
                .await
                .write_all(&answer(call.number, payload))
                .await
                .is_err()
            {
                return;
            }
            if let (true, Some(attack)) = (started, self.attack) {
                let bytes = attack(events, call.number);
                tokio::spawn(self.attack(bytes, Arc::clone(&write), record.clone()));
            }
            if started && self.deaf {
                std::future::pending::<()>().await;
            }
        }
    }

    async fn attack(self, bytes: Vec<u8>, write: Arc<Mutex<OwnedWriteHalf>>, record: Record) {
        loop {
            // Answers may come in between.
            let sent = write.lock().await.write_all(&bytes).await;
            if sent.is_err() || !self.endless {
                break;
            }
        }
        record.add("attacked");
        // The connection stays open.
        std::future::pending::<()>().await;
    }
}
