//! Streams against a client that speaks as containerd does, and a "VMM" that is the other end of the pipe.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::time::Duration;

use proptest::prelude::*;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::wire::{self, Message};
use super::*;
use crate::error::Kind;

const LONG: Duration = Duration::from_secs(10);
const NUMBER: u32 = 1;
/// As containerd's.
const WINDOW: u32 = 64 << 10;

struct Client {
    stream: UnixStream,
    buffer: Vec<u8>,
}

impl Client {
    /// Dials and says the id; the answer is not waited for.
    async fn dial(streams: &Streams, id: &str) -> Self {
        let (mut stream, shim) = UnixStream::pair().unwrap();
        streams.admit(Connection::new(shim, NUMBER, Vec::new()));
        stream.write_all(&wire::init(NUMBER, id)).await.unwrap();
        let buffer = Vec::new();
        Self { stream, buffer }
    }

    async fn connect(streams: &Streams, id: &str) -> Self {
        let mut client = Self::dial(streams, id).await;
        let answer = client.frame().await.expect("no answer");
        assert!(!answer.last && !answer.payload.is_empty());
        client
    }

    async fn write(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
    }

    /// The next frame, or none when the connection ends.
    async fn frame(&mut self) -> Option<wire::Frame> {
        timeout(LONG, async {
            loop {
                if let Some(frame) = wire::take_frame(&mut self.buffer, NUMBER).unwrap() {
                    return Some(frame);
                }
                let read = self.stream.read_buf(&mut self.buffer).await;
                if !matches!(read, Ok(1..)) {
                    return None;
                }
            }
        })
        .await
        .expect("nothing comes")
    }

    async fn data(&mut self) -> Vec<u8> {
        let frame = self.frame().await.expect("the connection has ended");
        match wire::decode(&frame.payload).unwrap() {
            Message::Data(bytes) => bytes,
            other => panic!("{other:?}"),
        }
    }

    async fn granted(&mut self) -> u32 {
        let frame = self.frame().await.expect("the connection has ended");
        match wire::decode(&frame.payload).unwrap() {
            Message::WindowUpdate(more) => more,
            other => panic!("{other:?}"),
        }
    }

    async fn at_end(&mut self) {
        assert!(self.frame().await.expect("no end").last);
    }

    async fn silent(&mut self) {
        let quiet = timeout(Duration::from_millis(100), self.stream.readable()).await;
        assert!(quiet.is_err() && self.buffer.is_empty(), "something came");
    }
}

fn output(streams: &Streams) -> (Output, OwnedFd, tokio::task::JoinHandle<()>) {
    Output::start(streams.claim("c-stdout").unwrap()).unwrap()
}

/// As much as the pipe takes.
fn fill(pipe: &mut File) -> usize {
    let mut written = 0;
    while let Ok(length) = pipe.write(&[7; 4096]) {
        written += length;
    }
    written
}

#[tokio::test]
async fn a_client_of_a_stream_that_has_ended_is_told_the_end() {
    let streams = Streams::default();
    let (pump, given, done) = output(&streams);
    drop(given);
    done.await.unwrap();
    // Whether its process is still there or not.
    for _ in 0..2 {
        let mut client = Client::connect(&streams, "c-stdout").await;
        client.at_end().await;
    }
    drop(pump);
    let mut client = Client::connect(&streams, "c-stdout").await;
    client.at_end().await;
    // A new process of that name is another matter.
    let (_pump, given, _done) = output(&streams);
    let mut client = Client::connect(&streams, "c-stdout").await;
    client.write(&wire::window_update(NUMBER, WINDOW)).await;
    File::from(given).write_all(b"again").unwrap();
    assert_eq!(client.data().await, b"again");
}

#[test]
fn the_streams_that_are_remembered_are_bounded() {
    let streams = Streams::default();
    for number in 0..2 * MAX_ENDED {
        drop(streams.claim(&number.to_string()).unwrap());
        // As a container that is started again under its name.
        drop(streams.claim("again").unwrap());
    }
    assert_eq!(streams.table().ended.len(), MAX_ENDED);
    assert!(streams.table().slots.is_empty());
}

#[tokio::test]
async fn output_waits_for_a_client_and_for_its_window() {
    let streams = Streams::default();
    let (_pump, given, _done) = output(&streams);
    let mut vmm = File::from(given);
    let mut written = fill(&mut vmm);
    let mut client = Client::connect(&streams, "c-stdout").await;
    client.silent().await;
    client.write(&wire::window_update(NUMBER, WINDOW)).await;
    let mut got = 0;
    while got < WINDOW as usize {
        let bytes = client.data().await;
        assert!(bytes.len() <= 32 << 10);
        got += bytes.len();
        written += fill(&mut vmm);
    }
    assert_eq!(got, WINDOW as usize);
    client.silent().await;
    // What nobody takes stays in the pipe and one chunk: the container is held back.
    written += fill(&mut vmm);
    assert!(written - got <= (64 << 10) + (32 << 10), "{written} {got}");
    client.write(&wire::window_update(NUMBER, 1)).await;
    assert_eq!(client.data().await.len(), 1);
}

#[tokio::test]
async fn a_client_that_comes_back_gets_what_was_not_sent() {
    let streams = Streams::default();
    let (_pump, given, done) = output(&streams);
    let mut vmm = File::from(given);
    let mut first = Client::connect(&streams, "c-stdout").await;
    first.write(&wire::window_update(NUMBER, 3)).await;
    vmm.write_all(b"onetwo").unwrap();
    assert_eq!(first.data().await, b"one");
    drop(first);
    vmm.write_all(b"three").unwrap();
    drop(vmm);
    assert!(!done.is_finished());
    let mut second = Client::connect(&streams, "c-stdout").await;
    second.write(&wire::window_update(NUMBER, WINDOW)).await;
    assert_eq!(second.data().await, b"two");
    assert_eq!(second.data().await, b"three");
    second.at_end().await;
}

#[tokio::test]
async fn output_is_delivered_when_the_client_has_closed_after_the_end() {
    let streams = Streams::default();
    let (_pump, given, done) = output(&streams);
    File::from(given).write_all(b"last").unwrap();
    let mut client = Client::connect(&streams, "c-stdout").await;
    client.write(&wire::window_update(NUMBER, WINDOW)).await;
    assert_eq!(client.data().await, b"last");
    client.at_end().await;
    assert!(!done.is_finished());
    drop(client);
    timeout(LONG, done).await.expect("not delivered").unwrap();
    assert!(streams.table().slots.is_empty());
}

#[tokio::test]
async fn output_without_a_client_ends_when_nothing_is_left_of_it() {
    let streams = Streams::default();
    let (_pump, given, done) = output(&streams);
    drop(given);
    timeout(LONG, done).await.expect("not delivered").unwrap();
}

#[tokio::test]
async fn an_output_that_is_stopped_ends_its_client() {
    let streams = Streams::default();
    let (pump, _given, done) = output(&streams);
    let mut client = Client::connect(&streams, "c-stdout").await;
    drop(pump);
    client.at_end().await;
    timeout(LONG, done).await.expect("goes on").unwrap();
}

fn input(streams: &Streams) -> (Input, File) {
    let (pump, given) = Input::start(streams.claim("c-stdin").unwrap()).unwrap();
    (pump, File::from(given))
}

async fn read(vmm: &mut File, length: usize) -> Vec<u8> {
    let mut got = Vec::new();
    while got.len() < length {
        let mut buffer = vec![0; length - got.len()];
        match vmm.read(&mut buffer) {
            Ok(0) => panic!("end of file after {} bytes", got.len()),
            Ok(read) => got.extend_from_slice(&buffer[..read]),
            Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
        }
    }
    got
}

async fn end_of_file(vmm: &mut File) {
    timeout(LONG, async {
        while !matches!(vmm.read(&mut [0]), Ok(0)) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .expect("no end of file");
}

#[tokio::test]
async fn input_is_given_leave_as_the_guest_takes_it() {
    let streams = Streams::default();
    let (_pump, mut vmm) = input(&streams);
    let mut client = Client::connect(&streams, "c-stdin").await;
    assert_eq!(client.granted().await, WINDOW);
    let chunk = vec![7; 32 << 10];
    // The pipe takes 64 KiB, for which there is new leave; then the guest must read.
    for _ in 0..2 {
        client.write(&wire::data(NUMBER, &chunk)).await;
        assert_eq!(client.granted().await, 32 << 10);
    }
    for _ in 0..2 {
        client.write(&wire::data(NUMBER, &chunk)).await;
    }
    client.silent().await;
    assert_eq!(read(&mut vmm, 4 * chunk.len()).await.len(), 4 * chunk.len());
    let mut more = client.granted().await;
    while more < WINDOW {
        more += client.granted().await;
    }
    assert_eq!(more, WINDOW);
}

#[tokio::test]
async fn a_client_that_sends_without_leave_is_cut_off() {
    let streams = Streams::default();
    let (_pump, mut vmm) = input(&streams);
    let mut client = Client::connect(&streams, "c-stdin").await;
    assert_eq!(client.granted().await, WINDOW);
    client.write(&wire::data(NUMBER, &vec![7; 65 << 10])).await;
    assert!(client.frame().await.is_none());
    assert!(vmm.read(&mut [0]).is_err(), "it got through");
}

#[tokio::test]
async fn input_ends_with_close_io_and_not_with_its_client() {
    let streams = Streams::default();
    let (pump, mut vmm) = input(&streams);
    let mut first = Client::connect(&streams, "c-stdin").await;
    first.granted().await;
    first.write(&wire::data(NUMBER, b"one")).await;
    drop(first);
    let mut second = Client::connect(&streams, "c-stdin").await;
    second.granted().await;
    second.write(&wire::data(NUMBER, b"two")).await;
    assert_eq!(read(&mut vmm, 6).await, b"onetwo");
    pump.close();
    // Its side is still open.
    second.write(&wire::data(NUMBER, b"three")).await;
    assert_eq!(read(&mut vmm, 5).await, b"three");
    second.write(&wire::data(NUMBER, b"four")).await;
    second.write(&wire::end(NUMBER)).await;
    assert_eq!(read(&mut vmm, 4).await, b"four");
    end_of_file(&mut vmm).await;
}

#[tokio::test]
async fn close_io_without_a_client_ends_input() {
    let streams = Streams::default();
    let (pump, mut vmm) = input(&streams);
    pump.close();
    end_of_file(&mut vmm).await;
}

#[tokio::test]
async fn input_that_the_process_does_not_want_is_thrown_away() {
    let streams = Streams::default();
    let (pump, vmm) = input(&streams);
    drop(vmm);
    let mut client = Client::connect(&streams, "c-stdin").await;
    assert_eq!(client.granted().await, WINDOW);
    let chunk = vec![7; 32 << 10];
    for _ in 0..8 {
        client.write(&wire::data(NUMBER, &chunk)).await;
        assert_eq!(client.granted().await, 32 << 10);
    }
    drop(pump);
    client.at_end().await;
}

#[tokio::test]
async fn a_client_may_come_before_its_process() {
    let streams = Streams::default();
    let mut client = Client::connect(&streams, "c-stdout").await;
    client.write(&wire::window_update(NUMBER, WINDOW)).await;
    let (_pump, given, _done) = output(&streams);
    File::from(given).write_all(b"hello").unwrap();
    assert_eq!(client.data().await, b"hello");
}

#[tokio::test]
async fn a_client_that_goes_before_its_process_comes_leaves_nothing() {
    let streams = Streams::default();
    let client = Client::connect(&streams, "c-stdout").await;
    let mut replaced = Client::connect(&streams, "c-stderr").await;
    let second = Client::connect(&streams, "c-stderr").await;
    assert!(replaced.frame().await.is_none());
    assert_eq!(streams.table().slots.len(), 2);
    drop((client, second));
    timeout(LONG, async {
        while !streams.table().slots.is_empty() {
            tokio::task::yield_now().await;
        }
    })
    .await
    .expect("a slot is left");
}

#[tokio::test]
async fn clients_that_wait_are_bounded_and_the_next_is_told_so() {
    let streams = Streams::default();
    let mut waiting = Vec::new();
    for number in 0..MAX_WAITING {
        waiting.push(Client::connect(&streams, &format!("c{number}")).await);
    }
    let mut refused = Client::dial(&streams, "one more").await;
    let mut read = Vec::new();
    let got = refused.stream.read_buf(&mut read);
    timeout(LONG, got).await.expect("no answer").unwrap();
    assert_eq!(read[8], ttrpc::proto::MESSAGE_TYPE_RESPONSE);
    assert!(String::from_utf8_lossy(&read).contains("wait already"));
    waiting.pop();
    timeout(LONG, async {
        while streams.table().slots.len() == MAX_WAITING {
            tokio::task::yield_now().await;
        }
    })
    .await
    .expect("a slot is left");
    Client::connect(&streams, "one more").await;
}

#[tokio::test]
async fn a_stream_belongs_to_one_process() {
    let streams = Streams::default();
    let claim = streams.claim("c-stdout").unwrap();
    let error = streams.claim("c-stdout").unwrap_err();
    assert_eq!(error.kind, Kind::AlreadyExists);
    drop(claim);
    streams.claim("c-stdout").unwrap();
}

#[tokio::test]
async fn a_stream_that_does_not_begin_right_is_refused() {
    let streams = Streams::default();
    let (mut stream, shim) = UnixStream::pair().unwrap();
    streams.admit(Connection::new(shim, NUMBER, Vec::new()));
    stream.write_all(&wire::data(NUMBER, b"x")).await.unwrap();
    let mut read = Vec::new();
    let got = stream.read_buf(&mut read);
    timeout(LONG, got).await.expect("no answer").unwrap();
    assert!(String::from_utf8_lossy(&read).contains("StreamInit"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    /// Clients come and go, each with any window that it uses up: the bytes are whole and in order.
    #[test]
    fn output_is_whole_whoever_takes_it(windows in proptest::collection::vec((1u32..90_000, any::<bool>()), 1..12)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let got = runtime.block_on(async {
            let streams = Streams::default();
            let (_pump, given, _done) = output(&streams);
            let mut vmm = tokio::net::unix::pipe::Sender::from_owned_fd(given).unwrap();
            let writer = tokio::spawn(async move {
                for first in (0u32..).step_by(256) {
                    let block: Vec<u8> = (first..first + 256).flat_map(u32::to_be_bytes).collect();
                    if vmm.write_all(&block).await.is_err() {
                        break;
                    }
                }
            });
            let mut got: Vec<u8> = Vec::new();
            let mut client = Client::connect(&streams, "c-stdout").await;
            for (window, stays) in windows {
                client.write(&wire::window_update(NUMBER, window)).await;
                let until = got.len() + window as usize;
                while got.len() < until {
                    got.extend(client.data().await);
                }
                assert_eq!(got.len(), until, "more than the window");
                if !stays {
                    client = Client::connect(&streams, "c-stdout").await;
                }
            }
            writer.abort();
            got
        });
        for (number, bytes) in (0u32..).zip(got.chunks_exact(4)) {
            prop_assert_eq!(bytes, number.to_be_bytes());
        }
    }
}
