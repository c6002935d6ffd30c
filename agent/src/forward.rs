//! Streams of the host to TCP ports of the sandbox's localhost (port-forward, DESIGN section 8).
//!
//! The host decides which port; a container only ever sees a connection from localhost.
use std::{
    net::{Ipv4Addr, Ipv6Addr},
    sync::Arc,
    time::Duration,
};

use brig_agent_protocol::FORWARD_STREAM;
use tokio::{io::copy_bidirectional, net::TcpStream, sync::Semaphore, time::timeout};

use crate::streams::Stream;

/// Forwarded connections at a time.
const MAX_CONNECTIONS: usize = 256;
/// How long a full backlog is waited for.
const CONNECT_TIME: Duration = Duration::from_secs(10);

/// Connects streams to ports. Cheap to clone.
#[derive(Clone)]
pub struct Forwarder {
    slots: Arc<Semaphore>,
}

impl Default for Forwarder {
    fn default() -> Self {
        Self {
            slots: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
        }
    }
}

/// The port that a stream's number asks for, if it is that kind of stream.
pub fn port_of(number: u64) -> Option<u16> {
    let rest = number.checked_sub(FORWARD_STREAM)?;
    u16::try_from(rest).ok().filter(|port| *port != 0)
}

impl Forwarder {
    /// Copies both ways until both sides have ended. Ends the stream when nobody listens.
    pub async fn forward(&self, port: u16, mut stream: Stream, logger: &slog::Logger) {
        let Ok(_slot) = self.slots.try_acquire() else {
            slog::warn!(logger, "port-forward refused: too many connections"; "port" => port);
            return;
        };
        match timeout(CONNECT_TIME, connect(port)).await {
            Ok(Ok(mut connection)) => {
                // An error is the end of one side; the other notices by the close.
                let _ = copy_bidirectional(&mut stream, &mut connection).await;
            }
            Ok(Err(error)) => {
                slog::info!(logger, "port-forward failed"; "port" => port, "error" => %error);
            }
            Err(_) => slog::info!(logger, "port-forward timed out"; "port" => port),
        }
    }
}

async fn connect(port: u16) -> std::io::Result<TcpStream> {
    match TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await {
        Ok(connection) => Ok(connection),
        // The error that counts is that of the address most servers listen on.
        Err(error) => TcpStream::connect((Ipv6Addr::LOCALHOST, port))
            .await
            .map_err(|_| error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use brig_agent_protocol::forward_stream;
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::{TcpListener, UnixStream},
    };

    #[test]
    fn only_numbers_of_the_kind_name_a_port() {
        assert_eq!(port_of(forward_stream(8080)), Some(8080));
        assert_eq!(port_of(8080), None);
        assert_eq!(port_of(forward_stream(0)), None);
        assert_eq!(port_of(FORWARD_STREAM | 0x1_0000), None);
        assert_eq!(port_of(u64::MAX), None);
    }

    #[tokio::test]
    async fn bytes_and_ends_pass_both_ways_and_a_closed_port_ends_the_stream() {
        let logger = slog::Logger::root(slog::Discard, slog::o!());
        let forwarder = Forwarder::default();
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(address).await.unwrap();
            let port = listener.local_addr().unwrap().port();
            let (mut host, guest) = UnixStream::pair().unwrap();
            let (task, logger) = (forwarder.clone(), logger.clone());
            tokio::spawn(async move { task.forward(port, Stream::Unix(guest), &logger).await });
            let (mut server, _) = listener.accept().await.unwrap();
            host.write_all(b"ping").await.unwrap();
            host.shutdown().await.unwrap();
            let mut got = String::new();
            server.read_to_string(&mut got).await.unwrap();
            assert_eq!(got, "ping");
            server.write_all(b"pong").await.unwrap();
            drop(server);
            got.clear();
            host.read_to_string(&mut got).await.unwrap();
            assert_eq!(got, "pong");
        }
        let closed = TcpListener::bind("127.0.0.1:0")
            .await
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let (mut host, guest) = UnixStream::pair().unwrap();
        forwarder
            .forward(closed, Stream::Unix(guest), &logger)
            .await;
        assert_eq!(host.read(&mut [0]).await.unwrap(), 0);
    }
}
