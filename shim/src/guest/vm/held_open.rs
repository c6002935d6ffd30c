//! Descriptors that are open for as long as a VM lives.

use std::os::fd::OwnedFd;

use super::Vm;

impl Vm {
    /// Keeps a descriptor open until the VM has ended, and no longer: it may hold the pod's namespace.
    pub(super) fn keep_open(&self, descriptor: Option<OwnedFd>) {
        let Some(descriptor) = descriptor else {
            return;
        };
        let mut death = self.death.clone();
        tokio::spawn(async move {
            let _ = death.wait_for(Option::is_some).await;
            drop(descriptor);
        });
    }
}
