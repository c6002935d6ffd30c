//! Interfaces that come late: `ctr run --cni` and its like set the network up after Create, in the
//! network namespace of the pid that Create returned. What is there at Start that was not at the VM's
//! launch is plugged into the running VM.

use brig_agent_protocol::agent::AddNetworkRequest;
use brig_hypervisor::control::RequestBody;
use slog::{Logger, info, warn};
use ttrpc::context;

use super::Vm;
use crate::error::Result;

impl Vm {
    /// Gives the guest the interfaces, and the packet filter, that its network namespace has got since the launch.
    ///
    /// # Errors
    /// What the node, the VMM or the agent says. The pod is then without them and should not start.
    pub async fn plug_networks(&self, logger: &Logger) -> Result<()> {
        let Some(late) = &self.late else {
            return Ok(());
        };
        let (found, guest) = late.find().await?;
        for what in &guest.left_out {
            warn!(logger, "the guest's network is not all of the pod's"; "left_out" => what);
        }
        if found.interfaces.is_empty() && guest.filter.objects.is_empty() {
            return Ok(());
        }
        for interface in found.interfaces {
            let mut fds = Vec::new();
            let mac = interface.mac;
            let device = interface.device(&mut fds);
            let added = self.control.request(RequestBody::AddNet(device), fds).await;
            match added {
                Ok(()) => late.plugged(mac),
                Err(error) => return Err(self.explain(error).await),
            }
        }
        let count = guest.interfaces.len();
        let policy = late.wanted.netfilter;
        let request = AddNetworkRequest {
            interfaces: guest.interfaces,
            routes: guest.routes,
            neighbours: guest.neighbours,
            inherited: guest.sysctls,
            netfilter: guest.filter.request(policy).into(),
            ..AddNetworkRequest::default()
        };
        let answer = self
            .agent
            .add_network(context::Context::default(), &request);
        let answer = self
            .call_within(self.timeouts.setup, "AddNetwork", answer)
            .await?;
        guest
            .filter
            .accept(&answer.netfilter_refused, policy, logger)?;
        if let Some(given) = guest.filter.given() {
            late.filtered(given);
        }
        info!(logger, "the network's later parts were given to the running VM"; "interfaces" => count,
            "netfilter" => guest.filter.objects.len());
        Ok(())
    }
}
