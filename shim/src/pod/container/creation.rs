//! A container before it is there: what containerd asked for, and what was made for it.

use std::path::PathBuf;
use std::sync::Arc;

use containerd_shim_protos::api::Mount;

use crate::asked::spec::{Role, Spec};
use crate::guest::vm::Vm;
use crate::node::stand_in::StandIn;
use crate::pod::process::Io;
use crate::pod::stdio::Stdio;
use crate::pod::volume::Leases;

/// What containerd asked to be created.
#[derive(Debug)]
pub struct Creation {
    /// Container id.
    pub id: String,
    /// Its bundle.
    pub bundle: PathBuf,
    /// The root file system's mounts; empty when it is a directory.
    pub rootfs: Vec<Mount>,
    /// Stdio of the init process.
    pub io: Io,
    /// `config.json` as it is.
    pub spec_bytes: Vec<u8>,
    /// And as far as the shim reads it.
    pub spec: Spec,
    /// What it is to its pod.
    pub role: Role,
    /// Its pid on the node, where that is not the VMM's.
    pub stand_in: Option<StandIn>,
    /// The container whose pid namespace it joins.
    pub pid_namespace_of: Option<String>,
}

/// What was made on the host and in the guest for a container.
pub(super) struct Made {
    pub(super) vm: Arc<Vm>,
    pub(super) stdio: Stdio,
    /// Paths of the share, in the order of their attachment.
    pub(super) attached: Vec<String>,
    /// Its volumes in the guest's memory.
    pub(super) leases: Leases,
}
