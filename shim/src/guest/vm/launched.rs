//! What the node does for a VM and has of it: its launch, its process and the mounts of its share. Behind traits, so that
//! the shim's logic is tested without a node.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use brig_hypervisor::control::VmConfig;
use brig_hypervisor::launch::{VmmExit, VmmProcess};
use brig_hypervisor::share::{Attributes, LaterMount, LeftOut};
use tokio::sync::oneshot;

use super::{Given, Plan};
use crate::error::Result;
use crate::node::cgroup::Cgroup;
use crate::node::network::{GuestNetwork, Kept};
use crate::node::templates::Recipe;

/// What the node does for a VM. Blocking: never called on the async thread.
pub trait Host: Send + Sync + 'static {
    /// Starts a jailed VMM; `executed` is told when it runs, in its namespaces and its cgroup.
    ///
    /// # Errors
    /// One sentence: what is missing on the node and the fix.
    fn launch(&self, plan: &Plan, executed: oneshot::Sender<()>) -> Result<Launched>;

    /// Makes the pod's cgroup.
    ///
    /// # Errors
    /// What the host says.
    fn make_cgroup(&self, path: &str) -> Result<Option<Cgroup>>;
}

/// A mount of a root file system, as containerd's snapshotter described it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RootfsMount {
    /// File system type.
    pub kind: String,
    /// Source.
    pub source: String,
    /// Options as in mount(8).
    pub options: Vec<String>,
}

/// The mounts that a guest sees below its share. Blocking: never called on the async thread.
pub trait Mounts: Send + Sync {
    /// Makes the mounts of a snapshotter appear at `path`.
    ///
    /// # Errors
    /// What the host says.
    fn attach_rootfs(&self, path: &str, mounts: &[RootfsMount]) -> Result<()>;
    /// Makes a host directory or file appear at `path`; tells which mounts below it are not there, because nobody
    /// has said that their file systems hold data.
    ///
    /// # Errors
    /// `InvalidArgument` for a file system that is not shared; what the host says.
    fn attach(&self, path: &str, source: &Path, how: Attributes) -> Result<Vec<LeftOut>>;
    /// Makes a later mount of the node appear below what is at `path`.
    ///
    /// # Errors
    /// `InvalidArgument` for a file system of the node's kernel; what the host says.
    fn attach_below(&self, path: &str, later: &LaterMount<'_>, readonly: bool) -> Result<()>;
    /// Takes that away, whoever uses it.
    ///
    /// # Errors
    /// What the host says.
    fn detach_below(&self, path: &str, below: &Path) -> Result<()>;
    /// Makes it read-only on the host's side, or writable.
    ///
    /// # Errors
    /// What the host says.
    fn set_readonly(&self, path: &str, readonly: bool) -> Result<()>;
    /// Takes it away; nothing may use it any more.
    ///
    /// # Errors
    /// What the host says.
    fn detach(&self, path: &str) -> Result<()>;
}

/// The VMM's process.
pub trait VmProcess: Send + Sync {
    /// Its pid.
    fn pid(&self) -> u32;
    /// Readable at its end.
    fn pidfd(&self) -> BorrowedFd<'_>;
    /// How it ended, if it has; reaps it.
    ///
    /// # Errors
    /// What waitid says.
    fn try_wait(&mut self) -> io::Result<Option<VmmExit>>;
    /// Sends SIGKILL.
    ///
    /// # Errors
    /// What the kernel says.
    fn kill(&self) -> io::Result<()>;
}

impl VmProcess for VmmProcess {
    fn pid(&self) -> u32 {
        VmmProcess::pid(self)
    }
    fn pidfd(&self) -> BorrowedFd<'_> {
        VmmProcess::pidfd(self)
    }
    fn try_wait(&mut self) -> io::Result<Option<VmmExit>> {
        VmmProcess::try_wait(self)
    }
    fn kill(&self) -> io::Result<()> {
        VmmProcess::kill(self)
    }
}

/// A VMM that was started and waits for its machine.
pub struct Launched {
    /// The process.
    pub process: Box<dyn VmProcess>,
    /// Our end of the control socket.
    pub control: OwnedFd,
    /// Our end of the agent's stream.
    pub agent: UnixStream,
    /// What the VMM writes to its standard error.
    pub stderr: OwnedFd,
    /// The mounts of the guest's share.
    pub mounts: Arc<dyn Mounts>,
    /// Where its guest comes from.
    pub origin: GuestOrigin,
    /// The machine, and the descriptors it names.
    pub machine: (VmConfig, Vec<OwnedFd>),
    /// What the guest is told about its network.
    pub network: GuestNetwork,
    /// What of its network the shim keeps.
    pub kept: Kept,
    /// Where more interfaces may appear before the container is started.
    pub netns: Option<PathBuf>,
    /// The devices of the node that the machine has.
    pub given: Option<Given>,
}

/// Where a guest comes from.
#[derive(Debug, Clone)]
pub enum GuestOrigin {
    /// It boots.
    Boot,
    /// It boots, and a template for the next ones should be made.
    BootFirst(Box<Recipe>),
    /// It goes on from a template.
    Template(Box<Recipe>),
}
