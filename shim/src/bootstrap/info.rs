//! `-info`: RuntimeInfo with the OCI features, which CRI reads (read-only recursive mounts, user
//! namespaces, seccomp). Only what the agent applies is advertised.

use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use serde_json::json;

/// The type containerd registers for the features document.
const FEATURES_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// The features document (runtime-spec features.md).
#[must_use]
pub fn features() -> serde_json::Value {
    json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.2.0",
        "mountOptions": [
            "atime", "bind", "defaults", "dev", "diratime", "exec",
            "noatime", "nodev", "nodiratime", "noexec", "nostrictatime", "nosuid",
            "nosymfollow", "private", "ratime", "rbind", "rdev", "rdiratime", "relatime", "rexec",
            "rnoatime", "rnodev", "rnodiratime", "rnoexec", "rnosuid", "rnosymfollow", "ro",
            "rprivate", "rrelatime", "rro", "rrw", "rslave", "rstrictatime", "rsuid", "rsymfollow",
            "runbindable", "rw", "slave", "strictatime", "suid", "symfollow", "unbindable"
        ],
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "time", "user", "uts"],
            "cgroup": { "v1": false, "v2": true, "systemd": true, "systemdUser": false },
            "seccomp": { "enabled": true },
            "apparmor": { "enabled": false },
            "selinux": { "enabled": false }
        },
        "annotations": { "brig.version": env!("CARGO_PKG_VERSION") }
    })
}

/// The bytes that `-info` prints.
///
/// # Errors
/// None in practice: protobuf cannot encode.
pub fn encode() -> Result<Vec<u8>, protobuf::Error> {
    RuntimeInfo {
        name: "io.containerd.brig.v2".to_owned(),
        version: MessageField::some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..RuntimeVersion::default()
        }),
        features: MessageField::some(Any {
            type_url: FEATURES_TYPE.to_owned(),
            value: features().to_string().into_bytes(),
            ..Any::default()
        }),
        ..RuntimeInfo::default()
    }
    .write_to_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn info_is_a_runtime_info_with_a_features_document() {
        let info = RuntimeInfo::parse_from_bytes(&encode().unwrap()).unwrap();
        assert_eq!(info.name, "io.containerd.brig.v2");
        let features: serde_json::Value = serde_json::from_slice(&info.features.value).unwrap();
        assert_eq!(features["linux"]["cgroup"]["v2"], true);
        assert_eq!(info.features.type_url, FEATURES_TYPE);
    }
}
