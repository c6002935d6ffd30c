//! A session with the CPUs of a pod's VM, by way of its shim. It is kept up as long as this lives; the guest goes on
//! when it ends, at the latest some seconds after this process was killed.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use brig_hypervisor::control::{DebugRequest, Stopped};
use brig_shim::containerd::debug_service::Method;
use brig_shim::error::{Error, Result};
use serde_json::json;

use crate::shims;

/// Between two words to the shim that the session goes on. It waits for ten seconds.
const WORD: Duration = Duration::from_secs(2);

/// A session.
pub struct Session {
    socket: PathBuf,
    keeper: Option<(Sender<()>, JoinHandle<()>)>,
}

fn ask(socket: &Path, request: &DebugRequest) -> Result<Option<Stopped>> {
    let told = shims::ask_json(socket, Method::Debug, &json!(request))?;
    serde_json::from_value(told)
        .map_err(|error| Error::internal(format!("the shim's answer is none: {error}")))
}

impl Session {
    /// Stops all CPUs; what is in them.
    ///
    /// # Errors
    /// The shim's: `FailedPrecondition` for a VM that is not to be debugged, `Unimplemented` for a pod of a version
    /// of Brig that cannot do it.
    pub fn begin(socket: &Path) -> Result<(Self, Stopped)> {
        let stopped = ask(socket, &DebugRequest::Stop)?;
        let stopped = stopped.ok_or_else(|| Error::state("the CPUs do not stop"))?;
        let (end, ended) = channel();
        let kept = socket.to_owned();
        let keeper = std::thread::spawn(move || {
            while ended.recv_timeout(WORD) == Err(RecvTimeoutError::Timeout) {
                // A VM that is gone is noticed by who asks for something.
                let _ = ask(&kept, &DebugRequest::State);
            }
        });
        let session = Self {
            socket: socket.to_owned(),
            keeper: Some((end, keeper)),
        };
        Ok((session, stopped))
    }

    /// Has the CPUs stopped, looked at or going on; what is in them, if all stand.
    ///
    /// # Errors
    /// As those of [`Self::begin`].
    pub fn ask(&self, request: &DebugRequest) -> Result<Option<Stopped>> {
        ask(&self.socket, request)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if let Some((end, keeper)) = self.keeper.take() {
            drop(end);
            let _ = keeper.join();
        }
        // If this fails, the shim lets them go soon.
        let _ = self.ask(&DebugRequest::Go {
            only: None,
            step: false,
            breakpoints: Vec::new(),
        });
    }
}
