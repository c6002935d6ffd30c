//! The shim's Task service, spoken to directly for what `ctr` has no command for: update.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use containerd_shim_protos::api::UpdateTaskRequest;
use protobuf::Message as _;
use protobuf::well_known_types::any::Any;
use serde_json::Value;
use ttrpc::proto::Request;

use super::clock;

const RESOURCES_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";

/// The bundle of a task, whichever containerd made it.
///
/// # Errors
/// If there is none.
pub fn bundle(namespace: &str, id: &str) -> Result<PathBuf> {
    let mut roots = vec![PathBuf::from("/run/containerd")];
    roots.extend(
        fs::read_dir("/run/containerd")?
            .flatten()
            .map(|entry| entry.path()),
    );
    roots
        .into_iter()
        .map(|root| {
            root.join("io.containerd.runtime.v2.task")
                .join(namespace)
                .join(id)
        })
        .find(|path| path.is_dir())
        .with_context(|| format!("task {id} has no bundle under /run/containerd"))
}

/// The address of the shim that serves a task.
///
/// # Errors
/// If its bundle names none.
pub fn address(namespace: &str, id: &str) -> Result<String> {
    let bundle = bundle(namespace, id)?;
    if let Ok(text) = fs::read_to_string(bundle.join("bootstrap.json")) {
        let bootstrap: Value = serde_json::from_str(&text)?;
        if let Some(address) = bootstrap["address"].as_str() {
            return Ok(address.to_owned());
        }
    }
    Ok(fs::read_to_string(bundle.join("address"))
        .with_context(|| format!("{} names no shim address", bundle.display()))?
        .trim()
        .to_owned())
}

/// Changes the resources of a running task; `resources` is OCI LinuxResources.
///
/// # Errors
/// What the shim answers.
pub fn update(namespace: &str, id: &str, resources: &Value) -> Result<()> {
    let client = ttrpc::Client::connect(&address(namespace, id)?)
        .map_err(|error| anyhow::anyhow!("cannot reach the shim: {error}"))?;
    let mut body = UpdateTaskRequest::new();
    body.id = id.to_owned();
    body.resources = Some(Any {
        type_url: RESOURCES_TYPE.to_owned(),
        value: serde_json::to_vec(resources)?,
        ..Any::default()
    })
    .into();
    let payload = body.write_to_bytes()?;
    let timeout = i64::try_from(clock::seconds(6).as_nanos())?;
    // Shims of containerd 2 may serve version 3 alone.
    let mut last = None;
    for service in ["containerd.task.v2.Task", "containerd.task.v3.Task"] {
        let mut request = Request::new();
        request.service = service.to_owned();
        request.method = "Update".to_owned();
        request.timeout_nano = timeout;
        request.payload.clone_from(&payload);
        match client.request(request) {
            Ok(_) => return Ok(()),
            Err(error) => last = Some(error),
        }
    }
    bail!(
        "update of {id}: {}",
        last.map(|e| e.to_string()).unwrap_or_default()
    )
}
