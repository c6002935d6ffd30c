//! A debugger's session: the node's root has the VM's CPUs stopped, looks at them and lets them go on.
//!
//! It lasts as long as it is asked for: a debugger that is killed leaves no guest that stands still for ever. While it
//! lasts nobody takes the agent's silence amiss.

use std::sync::Arc;

use brig_hypervisor::control::{DebugRequest, Stopped};
use tokio::time::{Instant, sleep_until};

use super::Vm;
use crate::error::Result;

impl Vm {
    /// Has the CPUs stopped, looked at or going on; what is in them, if they stand. They go on by themselves when
    /// nobody has asked for as long as an orderly stop may take.
    ///
    /// # Errors
    /// The VMM's: `FailedPrecondition` for a VM that was not started to be debugged.
    pub async fn debug(self: &Arc<Self>, request: DebugRequest) -> Result<Option<Stopped>> {
        let begins = self.debugged.renew(Instant::now() + self.timeouts.stop);
        if begins {
            let vm = Arc::downgrade(self);
            tokio::spawn(async move {
                while let Some(held) = vm.upgrade() {
                    let Some(until) = held.debugged.end(Instant::now()) else {
                        let go = DebugRequest::Go {
                            only: None,
                            step: false,
                            breakpoints: Vec::new(),
                        };
                        let _ = held.control.debug(go).await;
                        return;
                    };
                    drop(held);
                    sleep_until(until).await;
                }
            });
        }
        match self.control.debug(request).await {
            Ok(stopped) => Ok(stopped),
            Err(error) => Err(self.explain(error).await),
        }
    }

    /// Whether a debugger has it.
    #[must_use]
    pub fn is_debugged(&self) -> bool {
        self.debugged.lasts()
    }
}
