//! The CRI client: one connection to containerd's socket, one blocking call at a time, each with a
//! deadline.

use std::cell::RefCell;
use std::future::Future;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use brig_tests::node::clock;
use hyper_util::rt::TokioIo;
use k8s_cri::v1::StatusRequest;
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use tokio::net::UnixStream;
use tokio::runtime::{Builder, Runtime};
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Response, Status};

use crate::container::eventually;

const SOCKET: &str = "/run/containerd/containerd.sock";
/// Base time-out in seconds of one call; RunPodSandbox boots a VM.
const CALL_SECONDS: u32 = 15;

/// The generated client of the runtime service.
pub type RuntimeClient = RuntimeServiceClient<Channel>;

/// A connection to containerd.
pub struct Cri {
    runtime: Runtime,
    channel: RefCell<Channel>,
}

impl Cri {
    /// Connects.
    ///
    /// # Errors
    /// If containerd does not listen.
    pub fn connect() -> Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let channel = runtime.block_on(open())?;
        Ok(Self {
            runtime,
            channel: RefCell::new(channel),
        })
    }

    /// Connects anew: containerd was restarted.
    ///
    /// # Errors
    /// If containerd does not listen, or its CRI does not take calls in time: that it does a moment after it
    /// has begun to listen.
    pub fn reconnect(&self) -> Result<()> {
        *self.channel.borrow_mut() = self.runtime.block_on(open())?;
        eventually("containerd's CRI takes calls", clock::seconds(10), || {
            let status = self.call("Status", |mut client| async move {
                client.status(StatusRequest::default()).await
            });
            Ok(status.is_ok().then_some(()))
        })
    }

    /// Makes one call of the runtime service, within the usual time.
    ///
    /// # Errors
    /// With the method's name and what containerd says.
    pub fn call<T, F>(&self, what: &str, call: impl FnOnce(RuntimeClient) -> F) -> Result<T>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        self.call_within(what, clock::seconds(CALL_SECONDS), call)
    }

    /// As [`Self::call`], within a time of its own.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn call_within<T, F>(
        &self,
        what: &str,
        within: Duration,
        call: impl FnOnce(RuntimeClient) -> F,
    ) -> Result<T>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let channel = self.channel.borrow().clone();
        // Statistics of many pods and the output of an exec (16 MiB) exceed the default.
        let client = RuntimeServiceClient::new(channel).max_decoding_message_size(32 << 20);
        let future = call(client);
        self.wait(what, within, future)
    }

    fn wait<T>(
        &self,
        what: &str,
        within: Duration,
        future: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T> {
        self.wait_for(what, within, future)
            .map(Response::into_inner)
    }

    /// Waits for more of an answer that is a stream.
    ///
    /// # Errors
    /// With the status that ends the stream, or if nothing comes.
    pub fn wait_for<T>(
        &self,
        what: &str,
        within: Duration,
        future: impl Future<Output = Result<T, Status>>,
    ) -> Result<T> {
        let outcome = self
            .runtime
            .block_on(async { tokio::time::timeout(within, future).await });
        match outcome {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(status)) => bail!("{what}: {:?}: {}", status.code(), status.message()),
            Err(_) => bail!("{what}: no answer within {} s", within.as_secs()),
        }
    }
}

async fn open() -> Result<Channel> {
    // The address is not used, but gRPC needs one.
    Endpoint::from_static("http://containerd")
        .connect_with_connector(tower::service_fn(|_: Uri| async {
            Ok::<_, std::io::Error>(TokioIo::new(UnixStream::connect(SOCKET).await?))
        }))
        .await
        .with_context(|| format!("cannot connect to {SOCKET}"))
}
