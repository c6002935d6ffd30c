//! Fuzz targets: what arrives at the agent, as functions of bytes, for `fuzz/`. The inputs that it kept
//! (`fuzz/corpus`) are replayed by the tests of this crate.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a broken assumption is a finding, and a target says by its name what it feeds"
)]

use brig_agent_protocol::agent::{
    CreateContainerRequest, CreateExecRequest, MountSource, StartSandboxRequest, UpdateRequest,
    UpdateVolumeRequest,
};
use protobuf::Message;

use crate::{
    cgroup::{device, resources},
    control, init, names, network,
    spec::{self, Process, Resources, Spec},
    validate,
};

pub use crate::volume::fuzzing::config_map_tree;

/// A target by the name of its corpus.
pub type Target = (&'static str, fn(&[u8]));

/// All of this crate.
pub const TARGETS: &[Target] = &[
    ("agent_request", agent_request),
    ("runtime_spec", runtime_spec),
    ("config_map_tree", config_map_tree),
];

/// A request by its first byte, then its bytes as ttrpc hands them over.
pub fn agent_request(data: &[u8]) {
    let Some((kind, bytes)) = data.split_first() else {
        return;
    };
    match kind % 5 {
        0 => {
            if let Ok(request) = CreateContainerRequest::parse_from_bytes(bytes) {
                create(&request);
            }
        }
        1 => {
            if let Ok(request) = CreateExecRequest::parse_from_bytes(bytes)
                && let Ok(process) = spec::parse::<Process>(&request.process)
            {
                let _ = validate::process(&process);
            }
        }
        2 => {
            if let Ok(request) = UpdateRequest::parse_from_bytes(bytes)
                && let Ok(wanted) = spec::parse::<Resources>(&request.resources)
            {
                limits(&wanted);
            }
        }
        3 => {
            if let Ok(request) = UpdateVolumeRequest::parse_from_bytes(bytes) {
                crate::volume::fuzzing::entries(request.entries);
            }
        }
        _ => {
            if let Ok(request) = StartSandboxRequest::parse_from_bytes(bytes) {
                network::read_all(&request);
            }
        }
    }
}

fn create(request: &CreateContainerRequest) {
    let id = names::id(&request.id);
    if id.is_ok() {
        let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        assert!(request.id.chars().all(plain) && request.id.len() <= 128);
    }
    let Ok(wanted) = spec::parse::<Spec>(&request.spec) else {
        return;
    };
    let Ok(sources) = validate::mount_sources(&wanted, &request.mount_sources) else {
        return;
    };
    for (index, source) in sources {
        assert!(usize::try_from(index).unwrap() < wanted.mounts.len());
        let path = match &source {
            control::MountSource::Share { path, .. }
            | control::MountSource::Volume { path, .. } => path,
            control::MountSource::Device(name) | control::MountSource::Bundle(name) => name,
        };
        let climbs = path.starts_with('/') || path.split('/').any(|part| part == "..");
        assert!(!climbs, "{path:?} leaves the share");
    }
    checked(&wanted);
}

/// The specification's JSON as containerd writes it.
pub fn runtime_spec(data: &[u8]) {
    if let Ok(wanted) = spec::parse::<Spec>(data) {
        checked(&wanted);
        // Written for the helper that becomes the container, which reads it again.
        let text = serde_json::to_vec(&wanted).unwrap();
        let again: Spec = serde_json::from_slice(&text).unwrap();
        assert_eq!(serde_json::to_vec(&again).unwrap(), text);
        let source = MountSource {
            share_path: "a".to_owned(),
            ..MountSource::default()
        };
        let named = validate::mount_sources(&wanted, &[source]);
        assert_eq!(named.is_ok(), !wanted.mounts.is_empty());
    }
}

fn checked(wanted: &Spec) {
    let accepted = validate::spec(wanted);
    limits(&wanted.linux.resources.clone().unwrap_or_default());
    for mount in &wanted.mounts {
        init::read_options(&mount.options);
        if accepted.is_ok() {
            assert!(mount.destination.starts_with('/'));
        }
    }
    if let Some(process) = &wanted.process {
        init::environment(process);
    }
}

/// What an agent would write for these limits, and the device filter that it would load.
fn limits(wanted: &Resources) {
    if let Ok(writes) = resources::plan(wanted, &|_| None) {
        let text = format!("{writes:?}");
        assert!(!text.contains('\0'));
    }
    device::build(&wanted.devices);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_input_that_a_fuzzer_kept_is_survived() {
        brig_fixtures::corpus::replay(TARGETS).unwrap();
    }
}
