//! What a template is made from.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::kind::Machine;

/// What a template is made from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Its kind, which must still be that of the files when it is made.
    pub key: String,
    /// The guest's vmlinux.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initramfs: PathBuf,
    /// brig-vmm.
    pub vmm: PathBuf,
    /// The KVM device.
    pub kvm: PathBuf,
    /// Of the guest.
    pub machine: Machine,
    /// On a KVM that emulates, too.
    pub allow_slow_kvm: bool,
    /// Descriptors that the VMM may have.
    pub max_files: u64,
    /// What the boot may take in milliseconds.
    pub boot_ms: u64,
    /// Where the pods of this node have their state.
    pub state_dir: PathBuf,
}
