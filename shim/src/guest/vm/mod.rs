//! One VM as the shim holds it: the jailed process, its control socket, the agent's connection, and
//! the one sentence that says why it ended.
//!
//! The VMM and the agent are not trusted: every call is bounded in time.

mod books;
pub mod boot;
pub mod capture;
mod clock;
pub mod control;
mod cpus;
pub mod death;
mod debug_session;
mod debugger;
mod disks;
mod filter;
pub(crate) mod frames;
mod given;
mod groups;
mod held_disks;
mod held_open;
pub mod host;
mod kill;
mod late;
mod launched;
mod lines;
mod look;
mod memory;
mod passthrough;
pub mod patience;
mod plan;
mod plug;
mod root_disks;
mod root_given;
mod share;
mod shown;
mod size;
#[cfg(test)]
mod tests;
mod volume_disks;
pub mod watch;
mod written_back;

use std::fmt;
use std::future::Future;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use brig_agent_protocol::agent::{ShutdownRequest, SignalRequest};
use brig_agent_protocol::agent_ttrpc::AgentClient;
use brig_agent_protocol::{FIRST_PROCESS_STREAM, OWN_DIRECTORY, STREAM_PORT, stream_header};
use brig_hypervisor::control::{RequestBody, StreamConfig};
pub use brig_hypervisor::share::{Attributes, LaterMount, LeftOut};
use tokio::sync::{Notify, Semaphore, oneshot, watch as watch_channel};
use tokio::time::timeout;
use ttrpc::context;

use crate::asked::spec::Moved;
use crate::error::{Error, Kind, Result};
use crate::node::cgroup::Cgroup;
use control::{Control, ControlError, StreamEnd};
use death::Death;
use frames::Ahead;
pub use given::Given;
pub use groups::{GroupShown, Holder};
pub use held_disks::{DiskShown, DiskVolume, VolumeShown};
use kill::Kill;
pub use late::Interface;
pub use launched::{GuestOrigin, Host, Launched, Mounts, RootfsMount, VmProcess};
use patience::Patience;
pub use plan::{Plan, Timeouts};
pub use root_given::RootGiven;

/// Signals that may wait for a guest that does not take them.
const MAX_SIGNALS: usize = 64;

/// A VM with a process, from its launch to its end.
pub struct Vm {
    /// For what goes on when its caller has given up.
    me: Weak<Vm>,
    pid: u32,
    control: Control,
    agent: AgentClient,
    mounts: Arc<dyn Mounts>,
    death: watch_channel::Receiver<Option<Death>>,
    kill: Arc<Kill>,
    next_stream: AtomicU64,
    timeouts: Timeouts,
    late: Option<late::Late>,
    ahead: Arc<Ahead>,
    figures: Patience,
    signals: Patience,
    sending: Arc<Semaphore>,
    /// The agent has let the last call of a process's removal go without an answer.
    deaf: AtomicBool,
    /// Held for reading by whoever has the guest look at its bus, and for writing from when it takes a device off until the VMM
    /// has: a look in between would find that device again, and a driver would have it when it goes.
    bus: Arc<tokio::sync::RwLock<()>>,
    /// Devices of the node. Held across calls: they come and go one after another.
    passthrough: Arc<shown::Shown<groups::Groups>>,
    /// Block devices of the node, likewise.
    disks: Arc<shown::Shown<held_disks::Disks>>,
    /// All that the VMM may have of these, and of others.
    books: books::Books,
    /// The layers of images are memory of the guest, as long as it takes them so.
    maps_layers: bool,
    memory: size::Memory,
    cpus: size::Cpus,
    /// The pod's.
    cgroup: Option<Cgroup>,
    /// The guest's kernel, as the agent has told.
    kernel_release: OnceLock<String>,
    /// The key of the template that the guest goes on from, once it does.
    template: OnceLock<String>,
    debugged: debug_session::Session,
}

impl fmt::Debug for Vm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vm").field("pid", &self.pid).finish()
    }
}

impl Vm {
    /// The VMM's pid: live, and in the pod's network namespace.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// The control socket.
    #[must_use]
    pub fn control(&self) -> &Control {
        &self.control
    }

    /// The agent; use it through [`Self::call`].
    #[must_use]
    pub fn agent(&self) -> &AgentClient {
        &self.agent
    }

    /// Its time-outs.
    #[must_use]
    pub fn timeouts(&self) -> Timeouts {
        self.timeouts
    }

    /// Why it ended, if it has.
    #[must_use]
    pub fn death(&self) -> Option<Death> {
        self.death.borrow().clone()
    }

    /// Waits for its end.
    pub async fn ended(&self) -> Death {
        let mut death = self.death.clone();
        match death.wait_for(Option::is_some).await {
            Ok(death) => death.clone().unwrap_or_else(Death::unknown),
            Err(_) => Death::unknown(),
        }
    }

    /// The release of the guest's kernel, as its agent tells it: one line of the guest's.
    #[must_use]
    pub fn kernel_release(&self) -> Option<String> {
        self.kernel_release.get().cloned()
    }

    /// The key of the template that the guest has gone on from, if it did not boot.
    #[must_use]
    pub fn template(&self) -> Option<&str> {
        self.template.get().map(String::as_str)
    }

    /// Its interfaces, if it has its network from a namespace.
    #[must_use]
    pub fn interfaces(&self) -> Vec<Interface> {
        let late = self.late.as_ref();
        late.map_or_else(Vec::new, late::Late::interfaces)
    }

    /// Devices of the node that the VM has. Like the others below, it waits for nothing: of a change that is under way nothing
    /// is seen yet, but by [`Self::unsettled`].
    #[must_use]
    pub fn devices(&self) -> Vec<GroupShown> {
        self.passthrough.seen()
    }

    /// The PCI addresses of the devices that a container has, on the node and in the guest.
    #[must_use]
    pub fn addresses(&self, container: &str) -> Vec<Moved> {
        let mut groups = self.passthrough.seen();
        groups.retain(|group| match &group.holder {
            Holder::Pod => true,
            Holder::Container(id) => id == container,
            Holder::Nobody => false,
        });
        groups
            .into_iter()
            .flat_map(|group| group.addresses)
            .collect()
    }

    /// Block devices of the node that the VM has as disks.
    #[must_use]
    pub fn disks(&self) -> Vec<DiskShown> {
        self.disks.seen().devices
    }

    /// Volumes that the guest mounts from disks.
    #[must_use]
    pub fn volumes(&self) -> Vec<VolumeShown> {
        self.disks.seen().volumes
    }

    /// What the VMM was asked to plug or to give back and has not answered, a sentence each.
    #[must_use]
    pub fn unsettled(&self) -> Vec<String> {
        self.books.unsettled()
    }

    /// How long containerd waits for figures of this VM.
    #[must_use]
    pub fn figures(&self) -> &Patience {
        &self.figures
    }

    /// Sends a signal. One that the agent has not acknowledged in the time that containerd may be kept waiting
    /// is on its way.
    ///
    /// # Errors
    /// The agent's; `ResourceExhausted` when too many signals are on their way.
    pub async fn signal(self: &Arc<Self>, request: SignalRequest) -> Result<()> {
        let Ok(place) = Arc::clone(&self.sending).try_acquire_owned() else {
            return Err(Error::new(
                Kind::ResourceExhausted,
                format!(
                    "{MAX_SIGNALS} signals wait for the guest's agent, which does not take them"
                ),
            ));
        };
        let (told, answer) = oneshot::channel();
        let vm = Arc::clone(self);
        tokio::spawn(async move {
            let answer = vm
                .agent
                .signal_process(context::Context::default(), &request);
            let result = vm.call("SignalProcess", answer).await.map(drop);
            if !matches!(&result, Err(error) if error.kind == Kind::DeadlineExceeded) {
                vm.signals.answered();
            }
            drop(place);
            let _ = told.send(result);
        });
        match self.signals.wait(answer).await {
            Some(Ok(result)) => result,
            Some(Err(_)) | None => Ok(()),
        }
    }

    /// As [`Self::call`], for the removal of a process: an agent that did not answer the last one is not waited
    /// for that long again.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub async fn clear<T>(
        &self,
        what: &str,
        answer: impl Future<Output = ttrpc::Result<T>>,
    ) -> Result<T> {
        let limit = if self.deaf.load(Ordering::Relaxed) {
            self.timeouts.word
        } else {
            self.timeouts.call
        };
        let result = self.call_within(limit, what, answer).await;
        let deaf = matches!(&result, Err(error) if error.kind == Kind::DeadlineExceeded);
        self.deaf.store(deaf, Ordering::Relaxed);
        result
    }

    /// Waits for the agent's answer, for the VM's end, or for the time-out.
    ///
    /// # Errors
    /// The agent's, `Unavailable` with the reason of the VM's end, or `DeadlineExceeded`.
    pub async fn call<T>(
        &self,
        what: &str,
        answer: impl Future<Output = ttrpc::Result<T>>,
    ) -> Result<T> {
        self.call_within(self.timeouts.call, what, answer).await
    }

    /// As [`Self::call`], with a time-out of its own.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub async fn call_within<T>(
        &self,
        limit: Duration,
        what: &str,
        answer: impl Future<Output = ttrpc::Result<T>>,
    ) -> Result<T> {
        let answered = tokio::select! {
            biased;
            answered = timeout(limit, answer) => answered,
            death = self.ended() => return Err(death.error()),
        };
        match answered {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error @ ttrpc::Error::RpcStatus(_))) => Err(Error::from_agent(error)),
            // A broken connection is most often a dying VM, which is the better reason.
            Ok(Err(error)) => match timeout(Duration::from_secs(1), self.ended()).await {
                Ok(death) => Err(death.error()),
                Err(_) => Err(Error::from_agent(error)),
            },
            Err(_) => Err(Error::new(
                Kind::DeadlineExceeded,
                format!(
                    "the guest's agent did not answer {what} within {:.0} s",
                    limit.as_secs_f64()
                ),
            )),
        }
    }

    /// Opens a stream to the agent between these descriptors; returns its number and its end.
    ///
    /// # Errors
    /// The VMM's, or `Unavailable` with the reason of the VM's end.
    pub async fn open_stream(
        &self,
        input: Option<OwnedFd>,
        output: Option<OwnedFd>,
    ) -> Result<(u64, StreamEnd)> {
        let number = self.stream_number();
        let end = self.open_numbered(number, input, output).await?;
        Ok((number, end))
    }

    /// A number for a stream, never given out again.
    #[must_use]
    pub fn stream_number(&self) -> u64 {
        self.next_stream.fetch_add(1, Ordering::Relaxed)
    }

    /// Opens the stream of this number.
    ///
    /// # Errors
    /// As [`Self::open_stream`].
    pub async fn open_numbered(
        &self,
        stream: u64,
        input: Option<OwnedFd>,
        output: Option<OwnedFd>,
    ) -> Result<StreamEnd> {
        let mut fds = Vec::new();
        let mut index = |fd: Option<OwnedFd>| {
            fd.map(|fd| {
                fds.push(fd);
                fds.len() - 1
            })
        };
        let config = StreamConfig {
            stream,
            port: STREAM_PORT,
            header: stream_header(stream).to_vec(),
            input: index(input),
            output: index(output),
        };
        match self.control.open_stream(config, fds).await {
            Ok(end) => Ok(end),
            Err(error) => Err(self.explain(error).await),
        }
    }

    /// Turns an error of the control socket into one for containerd; a VMM that has ended is asked why.
    pub async fn explain(&self, error: ControlError) -> Error {
        match error {
            ControlError::Refused(reply) => reply.into(),
            ControlError::Confused => Error::internal(error.to_string()),
            ControlError::Silent { .. } => Error::new(Kind::DeadlineExceeded, error.to_string()),
            ControlError::Ended => match timeout(Duration::from_secs(3), self.ended()).await {
                Ok(death) => death.error(),
                Err(_) => Error::unavailable(error.to_string()),
            },
        }
    }

    /// Resets a stream; one that has ended is no error.
    pub async fn close_stream(&self, stream: u64) {
        let body = RequestBody::CloseStream { stream };
        let _ = self.control.request(body, Vec::new()).await;
    }

    /// Runs something blocking on the guest's share.
    ///
    /// # Errors
    /// What `work` returns.
    pub async fn with_mounts<T: Send + 'static>(
        &self,
        work: impl FnOnce(&dyn Mounts) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let mounts = Arc::clone(&self.mounts);
        tokio::task::spawn_blocking(move || work(&*mounts)).await?
    }

    /// Tells the VMM that what is at this path of the share, or will be, may never answer.
    ///
    /// # Errors
    /// The VMM's.
    pub async fn expect_remote(&self, path: &str) -> Result<()> {
        let body = RequestBody::RemoteShare {
            path: path.to_owned(),
        };
        match self.control.request(body, Vec::new()).await {
            Ok(()) => Ok(()),
            Err(error) => Err(self.explain(error).await),
        }
    }

    /// Takes mounts of the share away again, after the guest has let go of them: the last attached
    /// first. Returns the first error, after having tried all.
    ///
    /// # Errors
    /// The VMM's or the host's.
    pub async fn detach(&self, paths: &[String]) -> Result<()> {
        let mut first = Ok(());
        for path in paths.iter().rev() {
            let forget = RequestBody::ForgetShare { path: path.clone() };
            let forgotten = match self.control.request(forget, Vec::new()).await {
                Ok(()) => Ok(()),
                Err(error) => Err(self.explain(error).await),
            };
            let path = path.clone();
            let detached = self.with_mounts(move |mounts| mounts.detach(&path)).await;
            for result in [forgotten, detached] {
                if first.is_ok() {
                    first = result;
                }
            }
        }
        first
    }

    /// Kills the VM at once; its end is to be waited for.
    pub fn kill(&self) {
        self.kill.wish(None);
    }

    /// Kills the VM for what its guest does or leaves undone, which becomes the reason of its end.
    pub fn end(&self, reason: String) {
        self.kill.wish(Some(reason));
    }

    /// Powers the guest off, or kills it when it does not, and waits until the VMM is reaped. Its processes
    /// get SIGTERM and `grace` before that, unless it is zero; `hurry` cuts that short.
    pub async fn stop(&self, grace: Duration, hurry: &Notify) -> Death {
        if !grace.is_zero() {
            let gently = timeout(self.timeouts.stop + grace, self.shutdown(grace));
            tokio::select! {
                biased;
                // What a guest does not do in its grace it has the usual time for.
                death = gently => if let Ok(death) = death { return death },
                () = hurry.notified() => {}
            }
        }
        let at_once = self.shutdown(Duration::ZERO);
        if let Ok(death) = timeout(self.timeouts.stop, at_once).await {
            return death;
        }
        let limit = self.timeouts.stop.as_secs_f64();
        self.end(format!("the guest did not power off within {limit:.0} s"));
        self.ended().await
    }

    async fn shutdown(&self, grace: Duration) -> Death {
        let request = ShutdownRequest {
            grace_ms: u64::try_from(grace.as_millis()).unwrap_or(u64::MAX),
            ..ShutdownRequest::default()
        };
        let asked = self.agent.shutdown(context::Context::default(), &request);
        let _ = asked.await;
        self.ended().await
    }
}

/// The first number of a process's stream.
const fn first_stream() -> AtomicU64 {
    AtomicU64::new(FIRST_PROCESS_STREAM)
}

/// Where a container's root file system lies below the share.
#[must_use]
pub fn rootfs_path(container: &str) -> String {
    format!("{OWN_DIRECTORY}/{container}/rootfs")
}

/// A path on the node, for messages.
pub(crate) fn shown(path: &Path) -> String {
    PathBuf::from(path).display().to_string()
}
