//! Streams of the host to TCP ports of the sandbox's localhost (port-forward, DESIGN section 8).
//!
//! The host decides which port; a container only ever sees a connection from localhost. The port is
//! dialled before the host opens the stream, so that a refusal reaches its client as one.
use std::{
    net::{Ipv4Addr, Ipv6Addr},
    sync::Arc,
    time::Duration,
};

use tokio::{io::copy_bidirectional, net::TcpStream, sync::Semaphore, time::timeout};

use crate::{
    error::{Error, Result},
    streams::Streams,
};

/// Forwarded connections at a time.
const MAX_CONNECTIONS: usize = 256;
/// How long a full backlog is waited for.
const CONNECT_TIME: Duration = Duration::from_secs(10);

/// Connects streams to ports.
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

impl Forwarder {
    /// Connects to `port` and joins the connection to the stream `number` once the host has opened
    /// it; returns when connected. Bytes and ends pass both ways.
    ///
    /// # Errors
    /// `InvalidArgument` for what is no port, `ResourceExhausted` at the limit of connections,
    /// `FailedPrecondition` when nobody listens.
    pub async fn connect(
        &self,
        port: u32,
        number: u64,
        streams: &Streams,
        logger: &slog::Logger,
    ) -> Result<()> {
        let port = u16::try_from(port)
            .ok()
            .filter(|port| *port != 0)
            .ok_or_else(|| Error::InvalidArgument(format!("{port} is not a TCP port")))?;
        let slot = Arc::clone(&self.slots).try_acquire_owned().map_err(|_| {
            Error::ResourceExhausted(format!(
                "{MAX_CONNECTIONS} connections are forwarded to the pod already"
            ))
        })?;
        let mut connection = match timeout(CONNECT_TIME, dial(port)).await {
            Ok(Ok(connection)) => connection,
            Ok(Err(error)) => {
                return Err(Error::FailedPrecondition(format!(
                    "nobody takes connections to port {port} of the pod's localhost: {error}"
                )));
            }
            Err(_) => {
                return Err(Error::DeadlineExceeded(format!(
                    "port {port} of the pod's localhost took no connection within {} s",
                    CONNECT_TIME.as_secs()
                )));
            }
        };
        let (streams, logger) = (streams.clone(), logger.clone());
        tokio::spawn(async move {
            let _slot = slot;
            match streams.take(number).await {
                // An error is the end of one side; the other notices by the close.
                Ok(mut stream) => drop(copy_bidirectional(&mut stream, &mut connection).await),
                Err(error) => {
                    slog::warn!(logger, "a forwarded port got no stream";
                        "port" => port, "error" => %error);
                }
            }
        });
        Ok(())
    }
}

async fn dial(port: u16) -> std::io::Result<TcpStream> {
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
    use crate::log::LogRing;
    use brig_agent_protocol::stream_header;
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::{TcpListener, UnixListener, UnixStream},
    };

    /// The streams' end of the host, as a Unix socket.
    struct Host {
        streams: Streams,
        logger: slog::Logger,
        dir: tempfile::TempDir,
    }

    impl Host {
        fn new() -> Self {
            let (streams, log) = (Streams::default(), LogRing::new(false));
            let (logger, dir) = (log.logger(), tempfile::tempdir().unwrap());
            let listener = UnixListener::bind(dir.path().join("s")).unwrap();
            tokio::spawn(streams.clone().serve_unix(listener, log, logger.clone()));
            Self {
                streams,
                logger,
                dir,
            }
        }

        async fn open(&self, number: u64) -> UnixStream {
            let mut stream = UnixStream::connect(self.dir.path().join("s"))
                .await
                .unwrap();
            stream.write_all(&stream_header(number)).await.unwrap();
            stream
        }
    }

    #[tokio::test]
    async fn bytes_and_ends_pass_both_ways() {
        let (host, forwarder) = (Host::new(), Forwarder::default());
        for (number, address) in [(20, "127.0.0.1:0"), (21, "[::1]:0"), (22, "0.0.0.0:0")] {
            let listener = TcpListener::bind(address).await.unwrap();
            let port = listener.local_addr().unwrap().port().into();
            forwarder
                .connect(port, number, &host.streams, &host.logger)
                .await
                .unwrap();
            let (mut server, _) = listener.accept().await.unwrap();
            let mut stream = host.open(number).await;
            stream.write_all(b"ping").await.unwrap();
            stream.shutdown().await.unwrap();
            let mut got = String::new();
            server.read_to_string(&mut got).await.unwrap();
            assert_eq!(got, "ping");
            server.write_all(b"pong").await.unwrap();
            drop(server);
            got.clear();
            stream.read_to_string(&mut got).await.unwrap();
            assert_eq!(got, "pong");
        }
    }

    #[tokio::test]
    async fn a_port_without_a_server_and_what_is_no_port_are_refused() {
        let (host, forwarder) = (Host::new(), Forwarder::default());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let closed = listener.local_addr().unwrap().port().into();
        drop(listener);
        let connect = |port| forwarder.connect(port, 20, &host.streams, &host.logger);
        let error = connect(closed).await.unwrap_err();
        assert!(matches!(error, Error::FailedPrecondition(_)), "{error}");
        assert!(error.to_string().contains(&closed.to_string()), "{error}");
        for port in [0, 0x1_0000, u32::MAX] {
            let error = connect(port).await.unwrap_err();
            assert!(matches!(error, Error::InvalidArgument(_)), "{error}");
        }
        // Refusals hold no slot.
        assert_eq!(forwarder.slots.available_permits(), MAX_CONNECTIONS);
    }

    #[tokio::test]
    async fn connections_are_bounded() {
        let (host, forwarder) = (Host::new(), Forwarder::default());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port().into();
        let all = u32::try_from(MAX_CONNECTIONS).unwrap();
        let _taken = forwarder.slots.try_acquire_many(all).unwrap();
        let error = forwarder
            .connect(port, 20, &host.streams, &host.logger)
            .await
            .unwrap_err();
        assert!(matches!(error, Error::ResourceExhausted(_)), "{error}");
    }
}
