//! Later changes of the packet filter of the pod's network namespace. The guest's is replaced by what is there now, as one
//! transaction, as long as nobody in the guest has changed it: from then on it is the containers'.
//!
//! Nothing is asked for without a reason: the node's kernel says when there is a change.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use brig_agent_protocol::agent::AddNetworkRequest;
use slog::{Logger, info, warn};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::sleep;
use ttrpc::context;

use super::Vm;
use crate::asked::config::Netfilter;
use crate::error::{Error, Kind, Result};
use crate::node::network::{UNTOUCHED_FILTER, heard_of_filter};
use crate::node::watched::watched;

/// A program changes rules by several transactions, which are one change.
const SETTLE: Duration = Duration::from_millis(100);
/// Between two changes: who makes them all the time does not keep the shim busy.
const PAUSE: Duration = Duration::from_secs(1);

impl Vm {
    /// Gives the guest the packet filter that its network namespace has by now and, from the first call on, each later
    /// one.
    ///
    /// # Errors
    /// Of what has changed until now: the node's or the agent's, or what of it cannot be taken. The pod is then without
    /// it and should not start.
    pub async fn follow_filter(self: &Arc<Self>, logger: &Logger) -> Result<()> {
        let Some(late) = &self.late else {
            return Ok(());
        };
        let policy = late.wanted.netfilter;
        if policy == Netfilter::Ignore || late.follow(true) {
            return Ok(());
        }
        let begun = async {
            // First, so that nothing is missed.
            let Some((socket, changed)) = late.watch_filter().await? else {
                return Ok(());
            };
            let changes = watched(socket, Interest::READABLE)
                .map_err(|error| Error::io("the packet filter cannot be watched", &error))?;
            if changed {
                self.renew_filter(logger).await?;
            }
            tokio::spawn(follow(Arc::clone(self), changes, logger.clone()));
            Ok(())
        };
        let begun = begun.await;
        if let Err(error) = begun {
            late.follow(false);
            if policy == Netfilter::Require {
                return Err(error);
            }
            warn!(logger, "the pod's packet filter is not followed"; "reason" => error.message);
        }
        Ok(())
    }

    /// Brings the guest's packet filter up to date.
    async fn renew_filter(&self, logger: &Logger) -> Result<()> {
        let Some(late) = &self.late else {
            return Ok(());
        };
        let Some((filter, left_out)) = late.changed_filter().await? else {
            return Ok(());
        };
        let (policy, guest) = (late.wanted.netfilter, late.guest_filter());
        if filter.objects.is_empty() && guest == UNTOUCHED_FILTER {
            late.filtered(filter.generation);
            return Ok(());
        }
        for what in left_out {
            warn!(logger, "the guest's network is not all of the pod's"; "left_out" => what);
        }
        let request = AddNetworkRequest {
            netfilter: Some(filter.replacement(policy, guest)).into(),
            ..AddNetworkRequest::default()
        };
        let answer = self
            .agent
            .add_network(context::Context::default(), &request);
        let answer = self
            .call_within(self.timeouts.setup, "AddNetwork", answer)
            .await?;
        filter.accept(&answer.netfilter_refused, policy, logger)?;
        late.filtered(filter.generation);
        late.loaded(answer.netfilter_generation);
        info!(logger, "the guest has the packet filter that the pod's network namespace has now"; "netfilter" => filter.objects.len());
        Ok(())
    }
}

/// Runs until the VM ends, or until the guest's packet filter is the containers'.
async fn follow(vm: Arc<Vm>, changes: AsyncFd<OwnedFd>, logger: Logger) {
    loop {
        let change = tokio::select! {
            change = changed(&changes) => change,
            _ = vm.ended() => return,
        };
        if let Err(error) = change {
            warn!(logger, "the pod's packet filter is followed no more"; "error" => %error);
            return;
        }
        match vm.renew_filter(&logger).await {
            Ok(()) => {}
            Err(error) if error.kind == Kind::FailedPrecondition => {
                warn!(logger, "the pod's packet filter is followed no more: a container has changed the guest's, which stays as it is";
                    "reason" => error.message);
                return;
            }
            Err(error) => {
                warn!(logger, "the pod's packet filter has changed, and the guest keeps the one that it had"; "reason" => error.message);
            }
        }
        sleep(PAUSE).await;
    }
}

/// Waits for the end of a change.
async fn changed(changes: &AsyncFd<OwnedFd>) -> std::io::Result<()> {
    loop {
        let mut ready = changes.readable().await?;
        let heard = heard_of_filter(changes.get_ref())?;
        ready.clear_ready();
        if heard {
            break;
        }
    }
    sleep(SETTLE).await;
    heard_of_filter(changes.get_ref()).map(drop)
}
