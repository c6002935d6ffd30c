//! Serves the agent's protocol on one connected stream until it ends or the host asks for an end.
use std::{
    io,
    os::fd::OwnedFd,
    pin::Pin,
    sync::Arc,
    task::{Context as TaskContext, Poll},
    time::Duration,
};

use brig_agent_protocol::agent_ttrpc::create_agent;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::{mpsc, oneshot},
    time::timeout,
};
use ttrpc::r#async::{Server, transport::Listener};

use crate::{
    context::Context,
    log::LogRing,
    page_reporting::{self, Parameters},
    places::Places,
    reaper::Reaper,
    sandbox,
    server::Service,
    streams::Streams,
};

/// How long the connection may take to send what it holds at the end.
const GOODBYE_TIME: Duration = Duration::from_millis(500);

/// The agent, ready to be spoken to.
pub struct Parts {
    /// Where the host's streams arrive.
    pub streams: Streams,
    /// The log.
    pub logger: slog::Logger,
    context: Arc<Context>,
}

impl Parts {
    /// Starts the reaper and makes the sandbox. Inside a runtime.
    ///
    /// # Errors
    /// When signals, directories or cgroups are not to be had.
    pub fn new(places: Places, binary: OwnedFd, log: LogRing) -> io::Result<Self> {
        let children = Reaper::listen()?;
        let reaper = Reaper::default();
        tokio::spawn(reaper.clone().run(children));
        let streams = Streams::default();
        let logger = log.logger();
        let context = Arc::new(Context::new(
            places,
            binary,
            reaper,
            streams.clone(),
            logger.clone(),
        )?);
        if context.places.owns_machine {
            let (parameters, busy) = (Parameters::of_kernel(), page_reporting::busy());
            let reporting = context.page_reporting.clone();
            let cgroups = context.places.cgroup_root.clone();
            tokio::spawn(reporting.run(parameters, cgroups, busy, logger.clone()));
        }
        Ok(Self {
            streams,
            logger,
            context,
        })
    }
}

/// Serves on `connection` and returns when it has ended, or after `Shutdown`, when all containers
/// are dead.
///
/// # Errors
/// When the server cannot be started.
pub async fn serve<S>(parts: Parts, connection: S) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + Sync + 'static,
{
    let (shutdown, mut shut_down) = mpsc::unbounded_channel();
    let (ended, end) = oneshot::channel();
    let service = Service::new(Arc::clone(&parts.context), shutdown);
    let connection = Watched {
        inner: connection,
        _ended: ended,
    };
    // One connection and then nothing, for ever: the host dials nobody else.
    let incoming = futures::stream::iter([Ok(connection)]);
    let mut server = Server::new()
        .add_listener(Listener::new(incoming))
        .register_service(create_agent(Arc::new(service)));
    server.start().await.map_err(io::Error::other)?;
    tokio::select! {
        // The sender was dropped with the connection.
        _ = end => {
            slog::info!(parts.logger, "the host hung up");
            sandbox::end_all(&parts.context).await;
        }
        _ = shut_down.recv() => {
            // The answer to Shutdown leaves with the connection's own writer, which ends with the last request.
            let _ = timeout(GOODBYE_TIME, server.disconnect()).await;
        }
    }
    Ok(())
}

/// A stream that tells by its drop that the server is done with it.
struct Watched<S> {
    inner: S,
    _ended: oneshot::Sender<()>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut TaskContext<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut TaskContext<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().inner).poll_write(cx, buf)
    }
    fn poll_flush(self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_flush(cx)
    }
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_shutdown(cx)
    }
}
