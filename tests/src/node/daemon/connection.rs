//! One ttrpc connection to a shim, as containerd holds one for the sandbox and one for each task.

use std::fmt;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use containerd_shim_protos::api::{
    ConnectRequest, ConnectResponse, DeleteRequest, DeleteResponse, KillRequest, PidsRequest,
    PidsResponse, ShutdownRequest, StartRequest, StartResponse, StateRequest, StateResponse,
    WaitRequest, WaitResponse,
};
use protobuf::Message;
use protobuf::well_known_types::empty::Empty;
use ttrpc::proto::Request;

use super::generation::Endpoint;
use crate::node::clock;

/// The Sandbox service.
const SANDBOX: &str = "containerd.runtime.sandbox.v1.Sandbox";

/// An error the shim answered with.
#[derive(Debug)]
pub struct Refused {
    /// Its code.
    pub code: ttrpc::Code,
    /// Its sentence.
    pub message: String,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.code, self.message)
    }
}

impl std::error::Error for Refused {}

/// Fails unless the shim refused with this code; returns its sentence.
///
/// # Errors
/// Says what came instead.
pub fn refused<T>(what: &str, code: ttrpc::Code, answer: Result<T>) -> Result<String> {
    let Err(error) = answer else {
        bail!("{what}: expected {code:?}, and it succeeded");
    };
    match error.downcast_ref::<Refused>() {
        Some(refused) if refused.code == code => Ok(refused.message.clone()),
        _ => bail!("{what}: expected {code:?}, got {error:#}"),
    }
}

/// A connection; clones share it.
#[derive(Clone)]
pub struct Connection {
    client: ttrpc::Client,
    task: &'static str,
}

impl Connection {
    /// Dials what `start` answered.
    ///
    /// # Errors
    /// If nobody listens there, or the answer is none that containerd dials.
    pub fn open(endpoint: &Endpoint) -> Result<Self> {
        if endpoint.protocol != "ttrpc" || !endpoint.address.starts_with("unix:///") {
            bail!("containerd cannot dial {endpoint:?}");
        }
        let client = ttrpc::Client::connect(&endpoint.address)
            .with_context(|| format!("cannot connect to {}", endpoint.address))?;
        let task = match endpoint.version {
            2 => "containerd.task.v2.Task",
            3 => "containerd.task.v3.Task",
            other => bail!("there is no Task service of version {other}"),
        };
        Ok(Self { client, task })
    }

    /// Calls a method of any service.
    ///
    /// # Errors
    /// [`Refused`] for what the shim answers, else what the connection says.
    pub fn call<A: Message, B: Message>(
        &self,
        service: &str,
        method: &str,
        request: &A,
        within: Duration,
    ) -> Result<B> {
        let mut call = Request::new();
        service.clone_into(&mut call.service);
        method.clone_into(&mut call.method);
        call.timeout_nano = i64::try_from(within.as_nanos())?;
        call.payload = request.write_to_bytes()?;
        match self.client.request(call) {
            Ok(response) => Ok(B::parse_from_bytes(&response.payload)?),
            Err(ttrpc::Error::RpcStatus(status)) => {
                let code = status.code();
                let message = status.message;
                Err(Refused { code, message }).with_context(|| method.to_owned())
            }
            Err(error) => bail!("{method}: {error}"),
        }
    }

    /// Calls a method of the Task service, of the version that was agreed on.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn task<A: Message, B: Message>(&self, method: &str, request: &A) -> Result<B> {
        self.call(self.task, method, request, clock::seconds(20))
    }

    /// Calls a method of the Sandbox service.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn sandbox<A: Message, B: Message>(&self, method: &str, request: &A) -> Result<B> {
        self.call(SANDBOX, method, request, clock::seconds(20))
    }

    /// Task.Connect, containerd's first question after a restart.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn connect(&self, id: &str) -> Result<ConnectResponse> {
        let request = ConnectRequest {
            id: id.to_owned(),
            ..ConnectRequest::default()
        };
        self.task("Connect", &request)
    }

    /// Task.Start.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn start(&self, id: &str) -> Result<StartResponse> {
        let request = StartRequest {
            id: id.to_owned(),
            ..StartRequest::default()
        };
        self.task("Start", &request)
    }

    /// Task.State.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn state(&self, id: &str) -> Result<StateResponse> {
        let request = StateRequest {
            id: id.to_owned(),
            ..StateRequest::default()
        };
        self.task("State", &request)
    }

    /// Task.Pids.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn pids(&self, id: &str) -> Result<PidsResponse> {
        let request = PidsRequest {
            id: id.to_owned(),
            ..PidsRequest::default()
        };
        self.task("Pids", &request)
    }

    /// Task.Wait.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn wait(&self, id: &str) -> Result<WaitResponse> {
        let request = WaitRequest {
            id: id.to_owned(),
            ..WaitRequest::default()
        };
        self.task("Wait", &request)
    }

    /// Task.Kill of a container's first process.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn kill(&self, id: &str, signal: u32) -> Result<()> {
        let request = KillRequest {
            id: id.to_owned(),
            signal,
            ..KillRequest::default()
        };
        self.task("Kill", &request).map(|_: Empty| ())
    }

    /// Task.Delete.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn delete(&self, id: &str) -> Result<DeleteResponse> {
        let request = DeleteRequest {
            id: id.to_owned(),
            ..DeleteRequest::default()
        };
        self.task("Delete", &request)
    }

    /// Task.Shutdown, which containerd gives three seconds.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn shutdown(&self, id: &str) -> Result<()> {
        let request = ShutdownRequest {
            id: id.to_owned(),
            ..ShutdownRequest::default()
        };
        let within = clock::seconds(3);
        match self.call(self.task, "Shutdown", &request, within) {
            // The process that was to end has hung up before its answer was read: containerd takes that for one.
            Err(error) if error.to_string().contains("socket disconnected") => Ok(()),
            answered => answered.map(|_: Empty| ()),
        }
    }
}
