//! One client of one stream: containerd, on a connection of its own. Frames are read only when somebody
//! wants one, so that a client that sends without leave fills its socket and not our memory.
//!
//! The ttrpc crate's server is not used for these: it does not tell a stream's handler that the connection
//! has ended, and it queues what comes in.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::time::timeout;
use ttrpc::Code;

use super::wire::{self, Message};

/// Bytes read at once.
const READ: usize = 8 << 10;

/// A client's connection, after its request.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    /// Read and not yet looked at.
    buffer: Vec<u8>,
    /// ttrpc's number of the stream.
    number: u32,
    /// The client sends nothing more.
    ended: bool,
    /// Bytes of output that the client still takes.
    window: u32,
}

/// What came from the client.
#[derive(Debug, PartialEq)]
pub enum Received {
    /// Bytes of standard input.
    Data(Vec<u8>),
    /// It takes more output.
    Window,
    /// It has closed its side or the connection, or broken the protocol.
    End,
}

impl Connection {
    /// The connection whose request has been read, with what was read after it.
    #[must_use]
    pub fn new(stream: UnixStream, number: u32, rest: Vec<u8>) -> Self {
        Self {
            stream,
            buffer: rest,
            number,
            ended: false,
            window: 0,
        }
    }

    /// Bytes of output that the client takes now.
    #[must_use]
    pub fn window(&self) -> u32 {
        self.window
    }

    /// The id of the stream, which the client says first; `None` when it does not.
    pub async fn init(&mut self) -> Option<String> {
        match self.message().await? {
            Message::Init(id) => Some(id),
            Message::Data(_) | Message::WindowUpdate(_) => None,
        }
    }

    /// The next thing from the client. May be dropped while it waits; nothing is lost.
    pub async fn receive(&mut self) -> Received {
        match self.message().await {
            Some(Message::Data(bytes)) => Received::Data(bytes),
            Some(Message::WindowUpdate(more)) => {
                self.window = self.window.saturating_add(more);
                Received::Window
            }
            Some(Message::Init(_)) | None => Received::End,
        }
    }

    async fn message(&mut self) -> Option<Message> {
        loop {
            if self.ended {
                return None;
            }
            match wire::take_frame(&mut self.buffer, self.number) {
                Ok(Some(frame)) => {
                    self.ended = frame.last;
                    if frame.payload.is_empty() {
                        continue;
                    }
                    let message = wire::decode(&frame.payload).ok();
                    self.ended |= message.is_none();
                    return message;
                }
                Ok(None) => {}
                Err(wire::Malformed) => self.ended = true,
            }
            if !self.ended {
                if self.buffer.is_empty() {
                    // Idle streams cost nothing.
                    self.buffer = Vec::new();
                    let _ = self.stream.readable().await;
                }
                self.buffer.reserve(READ);
                self.ended = !matches!(self.stream.read_buf(&mut self.buffer).await, Ok(1..));
            }
        }
    }

    /// Answers the first message.
    ///
    /// # Errors
    /// The client is gone.
    pub async fn acknowledge(&mut self) -> io::Result<()> {
        let bytes = wire::acknowledgement(self.number);
        self.stream.write_all(&bytes).await
    }

    /// Sends output, which must fit the window.
    ///
    /// # Errors
    /// The client is gone.
    pub async fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        let length = u32::try_from(bytes.len()).map_err(io::Error::other)?;
        self.stream
            .write_all(&wire::data(self.number, bytes))
            .await?;
        self.window = self.window.saturating_sub(length);
        Ok(())
    }

    /// Lets the client send so many more bytes of input.
    ///
    /// # Errors
    /// The client is gone.
    pub async fn grant(&mut self, bytes: u32) -> io::Result<()> {
        let update = wire::window_update(self.number, bytes);
        self.stream.write_all(&update).await
    }

    /// Ends the stream with an error.
    pub async fn refuse(mut self, code: Code, sentence: &str) {
        let bytes = wire::refusal(self.number, code, sentence);
        let _ = self.stream.write_all(&bytes).await;
        // The client closes; closing first could destroy what it has not read yet.
        let _ = timeout(Duration::from_secs(1), self.closed()).await;
    }

    /// Tells the client that nothing comes any more, without waiting.
    pub fn end_now(self) {
        let _ = self.stream.try_write(&wire::end(self.number));
    }

    /// Tells the client that nothing comes any more and waits until it has closed its side: that it does
    /// once it has taken everything.
    pub async fn end(mut self, limit: Duration) {
        if self.stream.write_all(&wire::end(self.number)).await.is_ok() {
            let _ = timeout(limit, self.closed()).await;
        }
    }

    async fn closed(&mut self) {
        while self.receive().await != Received::End {}
    }
}
