//! Fuzz targets: what containerd, a pod's author, the node and an agent send, as functions of bytes, for
//! `fuzz/`. The inputs that it kept (`fuzz/corpus`) are replayed by the tests of this crate.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a broken assumption is a finding, and a target says by its name what it feeds"
)]

pub mod agent_frames;
pub mod assignment;

use std::path::Path;

use containerd_shim_protos::protobuf::well_known_types::any::Any;

use crate::asked::config::Config;
use crate::asked::sandbox_config::PodConfig;
use crate::asked::spec::Spec;
use crate::containerd::bootstrap::options;
use crate::pod::stdio::streaming::uri;
use crate::pod::stdio::streaming::wire::{self, Message, Opening};
use crate::pod::volume::mountinfo::MountTable;

/// A target by the name of its corpus.
pub type Target = (&'static str, fn(&[u8]));

/// All of this crate.
pub const TARGETS: &[Target] = &[
    ("oci_spec", oci_spec),
    ("sandbox_config", sandbox_config),
    ("configuration_file", configuration_file),
    ("pod_annotations", pod_annotations),
    ("mountinfo", mountinfo),
    ("stream_frames", stream_frames),
    ("stream_uri", stream_uri),
    ("runtime_options", runtime_options),
    ("agent_frames", agent_frames::agent_frames),
    ("kubelet_answer", assignment::kubelet_answer),
    ("cdi_file", assignment::cdi_file),
];

/// containerd's `config.json`.
pub fn oci_spec(data: &[u8]) {
    let Ok(spec) = Spec::parse(data) else {
        return;
    };
    let _ = (
        spec.role(),
        spec.network(),
        spec.check_sandbox(),
        spec.check_alone(),
        spec.check_ids(),
    );
    let _ = (spec.sandbox_shm(), spec.sysctls(), spec.hostname());
    let _ = (spec.sandbox_memory(), spec.sandbox_cpu_millis());
    let _ = (spec.limits(), spec.oom_score_adj());
    let _ = (spec.pid_namespace_of(), spec.cgroups_path(), spec.hooks());
    let root = spec.root_path(Path::new("/bundle"));
    assert!(root.is_absolute());
    if let Ok(mounts) = spec.bind_mounts() {
        for pair in mounts.windows(2) {
            assert!(pair[0].index < pair[1].index);
        }
    }
    let mut config = Config::defaults(Path::new("/opt/brig/bin"));
    let _ = config.annotate(spec.annotations());
}

/// CRI's sandbox configuration, as the options of a sandbox.
pub fn sandbox_config(data: &[u8]) {
    let options = Any {
        type_url: "runtime.v1.PodSandboxConfig".to_owned(),
        value: data.to_vec(),
        ..Any::default()
    };
    if let Ok(config) = PodConfig::parse(Some(&options)) {
        let _ = config.check();
        let path = config.cgroups_path("k8s.io", "pod");
        assert!(path.is_empty() || path.contains("pod"));
        // What the pod says is there beside what containerd says for every pod.
        if let Ok(all) = config.sysctls() {
            assert!(config.sysctls.keys().all(|name| all.contains_key(name)));
        }
    }
}

/// An operator's file, over the defaults and over itself: what is accepted once stays so.
pub fn configuration_file(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let mut config = Config::defaults(Path::new("/opt/brig/bin"));
    let path = Path::new("/etc/brig/config.toml");
    match config.apply(path, text) {
        Ok(()) => {
            within_bounds(&config);
            config.apply(path, text).unwrap();
        }
        Err(error) => {
            let sentence = error.to_string();
            assert!(sentence.contains("/etc/brig/config.toml"), "{sentence}");
        }
    }
}

fn within_bounds(config: &Config) {
    assert!((1..=64).contains(&config.vcpus));
    assert!(config.memory >= 64 << 20);
    assert!((0.1..=100.0).contains(&config.time_scale));
    assert!(config.max_files >= 8192);
    for path in [
        &config.kernel,
        &config.initramfs,
        &config.vmm,
        &config.kvm,
        &config.state_dir,
    ] {
        assert!(path.is_absolute());
    }
}

/// A pod's annotations, a line each, for a handler that allows all keys and for one that allows none.
pub fn pod_annotations(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let pairs: Vec<(&str, &str)> = text
        .lines()
        .filter_map(|line| line.split_once('='))
        .collect();
    let mut open = Config::defaults(Path::new("/opt/brig/bin"));
    let all = r#"pod_annotations = ["vcpus", "memory", "debug_console", "max_files"]"#;
    open.apply(Path::new("/c"), all).unwrap();
    let operators = open.clone();
    let accepted = open.annotate(pairs.iter().copied());
    within_bounds(&open);
    assert_eq!(open.kernel, operators.kernel);
    assert_eq!(open.state_dir, operators.state_dir);
    let ours = pairs.iter().any(|(name, _)| name.starts_with("io.brig."));
    assert!(ours || accepted.is_ok());
    let mut closed = Config::defaults(Path::new("/opt/brig/bin"));
    assert_eq!(closed.annotate(pairs.iter().copied()).is_ok(), !ours);
}

/// A table of mounts, whose paths any program of the node may have chosen.
pub fn mountinfo(data: &[u8]) {
    let table = MountTable::parse(data);
    for path in ["/", "/var/lib/kubelet/pods/a", "/a b"] {
        let path = Path::new(path);
        if let Some(mounted) = table.of(path) {
            assert!(path.starts_with(&mounted.point));
        }
        for mounted in table.below(path) {
            assert!(mounted.point.starts_with(path));
            let _ = table.tops(mounted.device).count();
        }
        let _ = table.seen_from(path);
        if let Some((mounted, place)) = table.place(path) {
            assert_eq!(Some(mounted), table.of(path));
            assert!(!place.is_absolute());
        }
    }
}

/// A connection to the shim's socket, from its first byte.
pub fn stream_frames(data: &[u8]) {
    let (stream, used) = match wire::opening(data) {
        Opening::Stream(stream, used, payload) => {
            let _ = wire::decode(&payload);
            (stream, used)
        }
        // Frames of a stream that was opened before.
        _ => (1, 0),
    };
    let mut buffer = data[used..].to_vec();
    let mut before = buffer.len();
    while let Ok(Some(frame)) = wire::take_frame(&mut buffer, stream) {
        assert!(frame.payload.len() <= wire::MAX_PAYLOAD);
        assert!(buffer.len() < before, "nothing was taken");
        before = buffer.len();
        if let Ok(Message::Data(bytes)) = wire::decode(&frame.payload)
            && bytes.len() < wire::MAX_PAYLOAD / 2
        {
            let mut sent = wire::data(stream, &bytes);
            let frame = wire::take_frame(&mut sent, stream).unwrap().unwrap();
            assert_eq!(wire::decode(&frame.payload).unwrap(), Message::Data(bytes));
        }
    }
}

/// The URI of a stdio stream.
pub fn stream_uri(data: &[u8]) {
    if let Ok(text) = std::str::from_utf8(data)
        && let Ok(id) = uri::stream_id(text)
    {
        assert!(!id.is_empty() && id.len() <= uri::MAX_ID);
    }
}

/// Runtime options on the standard input of `start`.
pub fn runtime_options(data: &[u8]) {
    if let Ok(Some(any)) = options::read_any(data) {
        let _ = options::config_path(Some(&any));
    }
    for type_url in ["containerd.runc.v1.Options", "runtimeoptions.v1.Options"] {
        let any = Any {
            type_url: type_url.to_owned(),
            value: data.to_vec(),
            ..Any::default()
        };
        if let Ok(Some(path)) = options::config_path(Some(&any)) {
            assert!(!path.as_os_str().is_empty());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_input_that_a_fuzzer_kept_is_survived() {
        brig_fixtures::corpus::replay(TARGETS).unwrap();
    }
}
