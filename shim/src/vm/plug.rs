//! Interfaces that come late: `ctr run --cni` and its like set the network up after Create, in the
//! network namespace of the pid that Create returned. What is there at Start that was not at the VM's
//! launch is plugged into the running VM.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use brig_agent_protocol::agent::AddNetworkRequest;
use brig_hypervisor::control::RequestBody;
use slog::{Logger, info, warn};
use ttrpc::context;

use super::Vm;
use crate::error::{Error, Result};
use crate::network::{self, PodNetwork};

/// Where interfaces may appear, and which the guest has.
#[derive(Debug)]
pub(super) struct Late {
    netns: PathBuf,
    /// Queue pairs of an interface.
    queues: usize,
    known: Mutex<Vec<[u8; 6]>>,
}

impl Late {
    /// The VM has the interfaces of these addresses from its launch.
    pub(super) fn new(netns: PathBuf, queues: usize, known: Vec<[u8; 6]>) -> Self {
        Self {
            netns,
            queues,
            known: Mutex::new(known),
        }
    }

    fn known(&self) -> std::sync::MutexGuard<'_, Vec<[u8; 6]>> {
        // A list of addresses is whole whatever its holder did.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn find(&self) -> Result<PodNetwork> {
        let (netns, queues) = (self.netns.clone(), self.queues);
        let known = self.known().clone();
        let found = tokio::task::spawn_blocking(move || network::find_new(&netns, queues, &known));
        let worker = |error| Error::internal(format!("the network worker ended: {error}"));
        Ok(found.await.map_err(worker)??)
    }
}

impl Vm {
    /// Gives the guest the interfaces that its network namespace has got since the launch.
    ///
    /// # Errors
    /// What the node, the VMM or the agent says. The pod is then without them and should not start.
    pub async fn plug_networks(&self, logger: &Logger) -> Result<()> {
        let Some(late) = &self.late else {
            return Ok(());
        };
        let found = late.find().await?;
        if found.interfaces.is_empty() {
            return Ok(());
        }
        let guest = found.guest();
        for what in &guest.left_out {
            warn!(logger, "the guest's network is not all of the pod's"; "left_out" => what);
        }
        for interface in found.interfaces {
            let mut fds = Vec::new();
            let mac = interface.mac;
            let device = interface.device(&mut fds);
            let added = self.control.request(RequestBody::AddNet(device), fds).await;
            match added {
                Ok(()) => late.known().push(mac),
                Err(error) => return Err(self.explain(error).await),
            }
        }
        let count = guest.interfaces.len();
        let request = AddNetworkRequest {
            interfaces: guest.interfaces,
            routes: guest.routes,
            neighbours: guest.neighbours,
            ..AddNetworkRequest::default()
        };
        let answer = self
            .agent
            .add_network(context::Context::default(), &request);
        self.call_within(self.timeouts.setup, "AddNetwork", answer)
            .await?;
        info!(logger, "interfaces were plugged into the running VM"; "interfaces" => count);
        Ok(())
    }
}
