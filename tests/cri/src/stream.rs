//! Streams of containerd's streaming server, as kubectl uses them: exec, attach and port-forward over
//! WebSocket (`v4.channel.k8s.io`: the first byte of each message is its channel).
//!
//! This protocol cannot close one direction alone; what needs that is not tested here.

use std::net::TcpStream;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use brig_tests::node::check::clip;
use brig_tests::node::clock;
use k8s_cri::v1::{AttachRequest, ExecRequest, PortForwardRequest};
use tungstenite::client::ClientRequestBuilder;
use tungstenite::http::Uri;
use tungstenite::{Error, Message, WebSocket};

use crate::container::Container;
use crate::pod::Pod;

const PROTOCOL: &str = "v4.channel.k8s.io";
/// Channels of exec and attach.
const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const STATUS: u8 = 3;
const RESIZE: u8 = 4;
/// Channels of a forwarded port: data, and the reason why there is none.
const DATA: u8 = 0;
const REASON: u8 = 1;

/// One connection, its channels apart.
struct Channels {
    socket: WebSocket<TcpStream>,
    received: [Vec<u8>; 5],
    ended: bool,
}

impl Channels {
    fn open(url: &str) -> Result<Self> {
        let uri: Uri = url
            .replacen("http://", "ws://", 1)
            .parse()
            .with_context(|| format!("containerd gave the address '{url}'"))?;
        let authority = uri.authority().context("an address without a host")?;
        let stream = TcpStream::connect(authority.as_str())
            .with_context(|| format!("cannot connect to {authority}"))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(clock::seconds(6)))?;
        let request = ClientRequestBuilder::new(uri).with_sub_protocol(PROTOCOL);
        let (socket, _) = tungstenite::client(request, stream)
            .map_err(|error| anyhow::anyhow!("the streaming server: {error}"))?;
        Ok(Self {
            socket,
            received: Default::default(),
            ended: false,
        })
    }

    fn send(&mut self, channel: u8, data: &[u8]) -> Result<()> {
        // Small messages: containerd's side reads each into a buffer.
        for part in data.chunks(8 << 10) {
            let mut message = vec![channel];
            message.extend_from_slice(part);
            self.socket.send(Message::Binary(message.into()))?;
        }
        Ok(())
    }

    /// Takes one message in; false at the end.
    fn receive(&mut self) -> Result<bool> {
        if self.ended {
            return Ok(false);
        }
        let data = match self.socket.read() {
            Ok(Message::Binary(data)) => data.to_vec(),
            Ok(Message::Text(text)) => text.as_bytes().to_vec(),
            Ok(Message::Close(_)) | Err(Error::ConnectionClosed | Error::Protocol(_)) => {
                self.ended = true;
                return Ok(false);
            }
            Ok(_) => return Ok(true),
            Err(Error::Io(error)) if error.kind() == std::io::ErrorKind::ConnectionReset => {
                self.ended = true;
                return Ok(false);
            }
            Err(error) => return Err(error).context("nothing more came on the stream"),
        };
        let (channel, text) = data.split_first().context("an empty message")?;
        self.received
            .get_mut(usize::from(*channel))
            .with_context(|| format!("a message on channel {channel}"))?
            .extend_from_slice(text);
        Ok(true)
    }

    fn text(&self, channel: u8) -> String {
        let data = &self.received[usize::from(channel)];
        String::from_utf8_lossy(data).into_owned()
    }
}

/// How a command on a stream ended.
#[derive(Debug)]
pub struct Finished {
    /// Its exit status.
    pub code: i64,
    /// What it wrote to stdout, or to its terminal.
    pub stdout: Vec<u8>,
    /// What it wrote to stderr.
    pub stderr: String,
}

/// An exec or an attach.
pub struct Session(Channels);

impl Session {
    /// `kubectl exec -i`, with `-t` if `terminal`.
    ///
    /// # Errors
    /// With containerd's answer.
    pub fn exec(container: &Container, args: &[&str], terminal: bool) -> Result<Self> {
        let request = ExecRequest {
            container_id: container.id.clone(),
            cmd: args.iter().map(|arg| (*arg).to_owned()).collect(),
            tty: terminal,
            stdin: true,
            stdout: true,
            stderr: !terminal,
        };
        let url = container
            .cri()
            .call(
                "Exec",
                |mut client| async move { client.exec(request).await },
            )?
            .url;
        Ok(Self(Channels::open(&url)?))
    }

    /// `kubectl attach -i`, with `-t` if `terminal`.
    ///
    /// # Errors
    /// With containerd's answer.
    pub fn attach(container: &Container, terminal: bool) -> Result<Self> {
        let request = AttachRequest {
            container_id: container.id.clone(),
            tty: terminal,
            stdin: true,
            stdout: true,
            stderr: !terminal,
        };
        let url = container
            .cri()
            .call("Attach", |mut client| async move {
                client.attach(request).await
            })?
            .url;
        Ok(Self(Channels::open(&url)?))
    }

    /// Types.
    ///
    /// # Errors
    /// If the stream is gone.
    pub fn send(&mut self, data: &[u8]) -> Result<()> {
        self.0.send(STDIN, data)
    }

    /// Changes the terminal's size.
    ///
    /// # Errors
    /// If the stream is gone.
    pub fn resize(&mut self, columns: u16, rows: u16) -> Result<()> {
        let size = format!("{{\"Width\":{columns},\"Height\":{rows}}}");
        self.0.send(RESIZE, size.as_bytes())
    }

    /// Waits until stdout holds `text`.
    ///
    /// # Errors
    /// If it ends or falls silent before, with what is there.
    pub fn wait_for(&mut self, text: &str) -> Result<()> {
        let begin = Instant::now();
        while !self.0.text(STDOUT).contains(text) {
            let more = self.0.receive();
            if !matches!(more, Ok(true)) || begin.elapsed() > clock::seconds(12) {
                bail!(
                    "'{text}' did not come ({more:?}); stdout: '{}', stderr: '{}', status: '{}'",
                    clip(&self.0.text(STDOUT)),
                    clip(&self.0.text(STDERR)),
                    clip(&self.0.text(STATUS))
                );
            }
        }
        Ok(())
    }

    /// Reads to the end.
    ///
    /// # Errors
    /// If it falls silent, or ends without a status.
    pub fn finish(mut self) -> Result<Finished> {
        while self.0.receive()? {}
        let said = self.0.text(STATUS);
        let status: serde_json::Value = serde_json::from_str(said.trim())
            .with_context(|| format!("the stream ended with the status '{said}'"))?;
        let code = match status["status"].as_str() {
            Some("Success") => 0,
            _ => status["details"]["causes"][0]["message"]
                .as_str()
                .and_then(|text| text.parse().ok())
                .with_context(|| format!("no exit status in '{said}'"))?,
        };
        Ok(Finished {
            code,
            stdout: self.0.received[usize::from(STDOUT)].clone(),
            stderr: self.0.text(STDERR),
        })
    }
}

/// A connection to a port of a pod.
pub struct Forwarded(Channels);

impl Forwarded {
    /// `kubectl port-forward`, and one connection through it.
    ///
    /// # Errors
    /// With containerd's answer.
    pub fn open(pod: &Pod, port: u16) -> Result<Self> {
        let request = PortForwardRequest {
            pod_sandbox_id: pod.id.clone(),
            port: vec![i32::from(port)],
        };
        let url = pod
            .cri
            .call("PortForward", |mut client| async move {
                client.port_forward(request).await
            })?
            .url;
        let mut channels = Channels::open(&format!("{url}?port={port}"))?;
        // Each channel begins with the port's number.
        while channels.received[usize::from(DATA)].len() < 2
            || channels.received[usize::from(REASON)].len() < 2
        {
            ensure!(
                channels.receive()?,
                "the stream ended before it said its port"
            );
        }
        for channel in [DATA, REASON] {
            let number: Vec<u8> = channels.received[usize::from(channel)].drain(..2).collect();
            ensure!(
                number == port.to_le_bytes(),
                "channel {channel} is for another port: {number:?}"
            );
        }
        Ok(Self(channels))
    }

    /// Sends to the port.
    ///
    /// # Errors
    /// If the stream is gone.
    pub fn send(&mut self, data: &[u8]) -> Result<()> {
        self.0.send(DATA, data)
    }

    /// Reads until the pod closes; returns the data and the reason, if there was one.
    ///
    /// # Errors
    /// If it falls silent.
    pub fn finish(mut self) -> Result<(Vec<u8>, String)> {
        while self.0.receive()? {}
        Ok((
            self.0.received[usize::from(DATA)].clone(),
            self.0.text(REASON),
        ))
    }
}
