//! Which pod is debugged, and what of it is asked of its shim. Trusted: the shim's word.

use std::path::{Path, PathBuf};

use brig_shim::asked::config::MIB;
use brig_shim::containerd::debug_service::Method;
use brig_shim::error::{Error, Result};
use serde_json::Value;

use crate::{cli, look, pods, shims};

/// A pod whose guest may be debugged.
pub(super) struct Pod {
    pub(super) namespace: String,
    pub(super) id: String,
    /// Its shim's.
    pub(super) socket: PathBuf,
    pub(super) vmm: u32,
    /// Bytes of memory that it started with.
    pub(super) first: u64,
    /// It goes on from a template.
    pub(super) template: bool,
    /// Where the guest's kernel is.
    pub(super) kernel: PathBuf,
}

impl Pod {
    /// The pod that is meant.
    ///
    /// # Errors
    /// `FailedPrecondition` if its handler has no `debug`, or it has no VM.
    pub(super) fn find(base: &Path, pod: &cli::Pod) -> Result<Self> {
        let row = pods::find(base, pod)?;
        let socket = look::socket_of(&row)?;
        let told = shims::ask_json(&socket, Method::Inspect, &Value::Null)?;
        if told["config"]["debug"]["value"] != true {
            return Err(Error::state(
                "a guest is debugged where the handler has debug = true in its configuration, for pods that start from then on",
            ));
        }
        let no_vm = || Error::state(format!("pod {} has no VM", row.id));
        let vmm = row.processes().find(|(name, _)| *name == "vmm");
        let (_, vmm) = vmm.ok_or_else(no_vm)?;
        let first = told["size"]["startedWithMiB"].as_u64().ok_or_else(no_vm)?;
        let kernel = told["config"]["kernel"]["value"].as_str().unwrap_or("");
        Ok(Self {
            socket,
            vmm,
            first: first * MIB,
            template: !told["template"].is_null(),
            kernel: PathBuf::from(kernel),
            namespace: row.namespace,
            id: row.id,
        })
    }
}
