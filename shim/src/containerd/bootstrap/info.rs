//! `-info`: RuntimeInfo with the OCI features, which CRI reads (read-only recursive mounts, user
//! namespaces, seccomp). Only what the agent applies is advertised.
//!
//! The options on standard input are the handler's (containerd's RuntimeRequest). They are checked and sent
//! back, and change nothing of what is advertised.

use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use serde_json::json;

use super::{options, root_mounts};
use crate::error::{Error, Result};

/// The type containerd registers for the features document.
const FEATURES_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// The features document (runtime-spec features.md).
#[must_use]
pub fn features() -> serde_json::Value {
    json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.2.0",
        "mountOptions": [
            "atime", "bind", "defaults", "dev", "diratime", "exec", "idmap",
            "noatime", "nodev", "nodiratime", "noexec", "nostrictatime", "nosuid",
            "nosymfollow", "private", "ratime", "rbind", "rdev", "rdiratime", "relatime", "rexec", "ridmap",
            "rnoatime", "rnodev", "rnodiratime", "rnoexec", "rnosuid", "rnosymfollow", "ro",
            "rprivate", "rrelatime", "rro", "rrw", "rslave", "rstrictatime", "rsuid", "rsymfollow",
            "runbindable", "rw", "slave", "strictatime", "suid", "symfollow", "unbindable"
        ],
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "time", "user", "uts"],
            "cgroup": { "v1": false, "v2": true, "systemd": true, "systemdUser": false },
            "seccomp": {
                "enabled": true,
                "actions": [
                    "SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_ACT_KILL", "SCMP_ACT_KILL_PROCESS",
                    "SCMP_ACT_KILL_THREAD", "SCMP_ACT_LOG", "SCMP_ACT_TRACE", "SCMP_ACT_TRAP"
                ],
                "operators": [
                    "SCMP_CMP_EQ", "SCMP_CMP_GE", "SCMP_CMP_GT", "SCMP_CMP_LE", "SCMP_CMP_LT",
                    "SCMP_CMP_MASKED_EQ", "SCMP_CMP_NE"
                ],
                "archs": ["SCMP_ARCH_X32", "SCMP_ARCH_X86", "SCMP_ARCH_X86_64"],
                "knownFlags": [
                    "SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW", "SECCOMP_FILTER_FLAG_TSYNC"
                ],
                "supportedFlags": [
                    "SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW", "SECCOMP_FILTER_FLAG_TSYNC"
                ]
            },
            "apparmor": { "enabled": false },
            "selinux": { "enabled": false },
            "mountExtensions": { "idmap": { "enabled": true } }
        },
        "annotations": { "brig.version": env!("CARGO_PKG_VERSION") }
    })
}

/// The bytes that `-info` prints for the options that came on standard input.
///
/// # Errors
/// `InvalidArgument` for options that cannot be read.
pub fn encode(stdin: &[u8]) -> Result<Vec<u8>> {
    let options = options::read_any(stdin)?;
    // A handler whose options no container could use should not look usable.
    options::config_path(options.as_ref())?;
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
        // Such mounts of a root file system reach Create as they are: a guest makes them.
        annotations: [(
            root_mounts::ANNOTATION.to_owned(),
            root_mounts::annotation(),
        )]
        .into(),
        options: options.into(),
        ..RuntimeInfo::default()
    }
    .write_to_bytes()
    .map_err(|error| Error::internal(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn info_is_a_runtime_info_with_a_features_document() {
        let info = RuntimeInfo::parse_from_bytes(&encode(&[]).unwrap()).unwrap();
        assert_eq!(info.name, "io.containerd.brig.v2");
        let features: serde_json::Value = serde_json::from_slice(&info.features.value).unwrap();
        assert_eq!(features["linux"]["cgroup"]["v2"], true);
        // containerd 2.x asks it before it gives a volume to a user namespace.
        assert_eq!(
            features["linux"]["mountExtensions"]["idmap"]["enabled"],
            true
        );
        assert_eq!(info.features.type_url, FEATURES_TYPE);
        assert!(info.options.is_none());
    }

    #[test]
    fn the_handlers_options_come_back_and_unreadable_ones_are_refused() {
        let options = Any {
            type_url: "types.containerd.io/runtimeoptions.v1.Options".into(),
            value: b"\x12\x02/c".to_vec(),
            ..Any::default()
        };
        let stdin = options.write_to_bytes().unwrap();
        let info = RuntimeInfo::parse_from_bytes(&encode(&stdin).unwrap()).unwrap();
        assert_eq!(info.options.as_ref(), Some(&options));
        for garbage in [&b"\xff\xff"[..], b"options"] {
            assert!(encode(garbage).is_err());
        }
    }
}
