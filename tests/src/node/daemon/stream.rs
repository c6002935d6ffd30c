//! A stream of a handler with `io_type = "streaming"`, from containerd's side: one connection to the shim for
//! each of a process's streams (`containerd.services.streaming.v1`), bytes and windows in it
//! (`containerd.types.transfer`).
//!
//! Frames are written and read here, because ttrpc's synchronous client has no streams.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use protobuf::well_known_types::any::Any;
use protobuf::{CodedInputStream, Message as _};
use ttrpc::proto::{
    FLAG_NO_DATA, FLAG_REMOTE_CLOSED, FLAG_REMOTE_OPEN, MESSAGE_HEADER_LENGTH, MESSAGE_TYPE_DATA,
    MESSAGE_TYPE_REQUEST, MessageHeader, Request,
};

use super::pod_config::message;

/// What containerd takes before it says so again, in bytes.
const WINDOW: usize = 64 << 10;
/// The most it sends at once.
const CHUNK: usize = 32 << 10;
/// ttrpc's number of a connection's first stream.
const NUMBER: u32 = 1;

const INIT: &str = "containerd.services.streaming.v1.StreamInit";
const DATA: &str = "containerd.types.transfer.Data";
const UPDATE: &str = "containerd.types.transfer.WindowUpdate";

/// One message of a stream.
#[derive(Debug, PartialEq, Eq)]
enum Frame {
    Data(Vec<u8>),
    Window(usize),
    Other(String),
    End,
}

/// A stream.
pub struct Stream {
    socket: UnixStream,
}

impl Stream {
    /// Dials the shim and says which stream this is; the shim has then acknowledged it.
    ///
    /// # Errors
    /// If it does not.
    pub fn open(address: &str, id: &str, within: Duration) -> Result<Self> {
        let path = address.strip_prefix("unix://").context("no socket path")?;
        let socket = UnixStream::connect(path).with_context(|| path.to_owned())?;
        socket.set_read_timeout(Some(within))?;
        socket.set_write_timeout(Some(within))?;
        let mut stream = Self { socket };
        let mut request = Request::new();
        "containerd.services.streaming.v1.Streaming".clone_into(&mut request.service);
        "Stream".clone_into(&mut request.method);
        stream.frame(
            MESSAGE_TYPE_REQUEST,
            FLAG_REMOTE_OPEN,
            &request.write_to_bytes()?,
        )?;
        stream.send(INIT, message(|bytes| bytes.write_string(1, id))?)?;
        match stream.receive()? {
            Frame::Other(name) if name.ends_with("google.protobuf.Empty") => Ok(stream),
            other => bail!("stream {id}: expected an acknowledgement, got {other:?}"),
        }
    }

    fn frame(&mut self, kind: u8, flags: u8, payload: &[u8]) -> Result<()> {
        let header = MessageHeader {
            length: u32::try_from(payload.len())?,
            stream_id: NUMBER,
            type_: kind,
            flags,
        };
        let mut bytes = Vec::from(header);
        bytes.extend_from_slice(payload);
        Ok(self.socket.write_all(&bytes)?)
    }

    fn send(&mut self, name: &str, value: Vec<u8>) -> Result<()> {
        let any = Any {
            type_url: name.to_owned(),
            value,
            ..Any::default()
        };
        self.frame(MESSAGE_TYPE_DATA, 0, &any.write_to_bytes()?)
    }

    fn receive(&mut self) -> Result<Frame> {
        let mut header = [0; MESSAGE_HEADER_LENGTH];
        self.socket
            .read_exact(&mut header)
            .context("a stream's next frame")?;
        let header = MessageHeader::from(header);
        let mut payload = vec![0; usize::try_from(header.length)?];
        self.socket.read_exact(&mut payload)?;
        if header.type_ != MESSAGE_TYPE_DATA {
            return Ok(Frame::End);
        }
        ensure!(header.stream_id == NUMBER, "a frame of another stream");
        if payload.is_empty() && header.flags & FLAG_REMOTE_CLOSED != 0 {
            return Ok(Frame::End);
        }
        let any = Any::parse_from_bytes(&payload)?;
        let mut input = CodedInputStream::from_bytes(&any.value);
        // Each message has one field, of number 1.
        let tag = input.read_raw_tag_or_eof()?;
        Ok(match any.type_url.rsplit('/').next() {
            Some(DATA) if tag.is_some() => Frame::Data(input.read_bytes()?),
            Some(DATA) => Frame::Data(Vec::new()),
            Some(UPDATE) => Frame::Window(usize::try_from(input.read_int32()?)?),
            _ => Frame::Other(any.type_url),
        })
    }

    fn grant(&mut self, bytes: usize) -> Result<()> {
        let bytes = i32::try_from(bytes)?;
        self.send(UPDATE, message(|value| value.write_int32(1, bytes))?)
    }

    /// Reads an output: `expected` bytes of it, or all.
    ///
    /// # Errors
    /// If its end comes before, or more is sent than was allowed.
    pub fn read(&mut self, expected: Option<usize>) -> Result<Vec<u8>> {
        let mut read = Vec::new();
        let mut window = WINDOW;
        self.grant(window)?;
        while expected.is_none_or(|expected| read.len() < expected) {
            match self.receive()? {
                Frame::Data(bytes) => {
                    window = window
                        .checked_sub(bytes.len())
                        .context("more was sent than the window allows")?;
                    self.grant(bytes.len())?;
                    window += bytes.len();
                    read.extend_from_slice(&bytes);
                }
                Frame::End if expected.is_none() => break,
                other => bail!("after {} bytes: {other:?}", read.len()),
            }
        }
        Ok(read)
    }

    /// Writes standard input, as far and as fast as the shim takes it.
    ///
    /// # Errors
    /// If it does not take all.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let mut rest = bytes;
        let mut window = 0;
        while !rest.is_empty() {
            while window == 0 {
                match self.receive()? {
                    Frame::Window(more) => window += more,
                    other => bail!("with {} bytes to write: {other:?}", rest.len()),
                }
            }
            let (now, later) = rest.split_at(rest.len().min(window).min(CHUNK));
            self.send(DATA, message(|value| value.write_bytes(1, now))?)?;
            window -= now.len();
            rest = later;
        }
        Ok(())
    }

    /// Says that no more standard input comes.
    ///
    /// # Errors
    /// If the connection has ended.
    pub fn finish(mut self) -> Result<()> {
        self.frame(MESSAGE_TYPE_DATA, FLAG_REMOTE_CLOSED | FLAG_NO_DATA, &[])
    }
}
