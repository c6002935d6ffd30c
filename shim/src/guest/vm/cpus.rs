//! How many CPUs a running VM has. The VMM gives each a thread, and the guest brings it online; one that is taken away
//! is offline in the guest, and its thread waits in the kernel until it is wanted again.

use std::sync::atomic::Ordering;

use brig_agent_protocol::agent::SetCpusRequest;
use brig_hypervisor::control::RequestBody;
use slog::{Logger, info, warn};
use ttrpc::context;

use super::Vm;
use crate::error::{Error, Kind, Result};

impl Vm {
    /// CPUs that it has.
    #[must_use]
    pub fn cpus(&self) -> u8 {
        self.cpus.now.load(Ordering::Relaxed)
    }

    /// CPUs that it may have.
    #[must_use]
    pub fn most_cpus(&self) -> u8 {
        self.cpus.most
    }

    /// Its handler lets it have more than it was started with.
    #[must_use]
    pub fn has_spare_cpus(&self) -> bool {
        self.cpus.most > self.cpus.built
    }

    /// Gives a guest that has gone on from a template, which has one CPU, those that it would have booted with.
    ///
    /// # Errors
    /// As of [`Self::add_cpus`].
    pub(super) async fn have_built_cpus(&self, logger: &Logger) -> Result<()> {
        self.cpus.now.store(1, Ordering::Relaxed);
        self.add_cpus(self.cpus.built, logger).await
    }

    /// Gives the guest more CPUs, if it has fewer than `count`.
    ///
    /// # Errors
    /// With the numbers: `ResourceExhausted` beyond what it may have; the VMM's, and the guest's. It has as many as
    /// before then.
    pub async fn add_cpus(&self, count: u8, logger: &Logger) -> Result<()> {
        let _changing = self.cpus.changing.lock().await;
        let had = self.cpus();
        if count <= had {
            return Ok(());
        }
        let most = self.cpus.most;
        if count > most {
            return Err(Error::new(
                Kind::ResourceExhausted,
                format!(
                    "the pod's VM needs {count} CPUs for that and may have {most} (the handler's max_vcpus, as it was \
                     when the pod started); it has {had}"
                ),
            ));
        }
        let body = RequestBody::Cpus { count };
        if let Err(error) = self.control.request(body, Vec::new()).await {
            return Err(self.explain(error).await);
        }
        if let Err(error) = self.set_cpus(count).await {
            // Some of them may be there.
            let _ = self.set_cpus(had).await;
            return Err(error);
        }
        self.cpus.now.store(count, Ordering::Relaxed);
        info!(logger, "the VM has more CPUs"; "vcpus" => count, "before" => had);
        Ok(())
    }

    /// Takes CPUs from the guest, down to `count` or what it was started with; one that cannot be had is logged.
    pub async fn take_cpus(&self, count: impl FnOnce() -> u8, logger: &Logger) {
        let _changing = self.cpus.changing.lock().await;
        let had = self.cpus();
        let wanted = count().max(self.cpus.built);
        if wanted >= had {
            return;
        }
        match self.set_cpus(wanted).await {
            Ok(()) => {
                self.cpus.now.store(wanted, Ordering::Relaxed);
                info!(logger, "the VM has fewer CPUs"; "vcpus" => wanted, "before" => had);
            }
            Err(error) => {
                warn!(logger, "no CPU could be taken from the guest"; "wanted" => wanted, "vcpus" => had,
                    "reason" => error.message);
            }
        }
    }

    async fn set_cpus(&self, count: u8) -> Result<()> {
        let request = SetCpusRequest {
            count: count.into(),
            ..SetCpusRequest::default()
        };
        let answer = self.agent.set_cpus(context::Context::default(), &request);
        self.call("SetCpus", answer).await.map(drop)
    }
}
