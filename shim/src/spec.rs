//! What the shim reads from a container's `config.json`; the agent gets the bytes as they are.
//!
//! Only the fields the shim acts on are parsed, once. So an unknown capability or a field of a newer
//! runtime-spec is the agent's to judge and never makes the host side fail.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;

use crate::error::{Error, Result};

/// The largest `config.json` in bytes: what fits a ttrpc message with room for the rest.
pub const MAX_SPEC: u64 = 3 << 20;

/// The shim's view of a `config.json`.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Spec {
    hostname: Option<String>,
    root: Option<Root>,
    mounts: Option<Vec<Mount>>,
    annotations: Option<BTreeMap<String, String>>,
    process: Option<Process>,
    linux: Option<Linux>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Root {
    path: String,
    readonly: bool,
}

/// A mount of the spec.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Mount {
    /// Where it appears in the container.
    pub destination: String,
    /// File system type.
    #[serde(rename = "type")]
    pub kind: Option<String>,
    /// A host path for a bind mount.
    pub source: Option<String>,
    options: Option<Vec<String>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Process {
    oom_score_adj: Option<i32>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Linux {
    cgroups_path: Option<String>,
    namespaces: Option<Vec<Namespace>>,
    resources: Option<Resources>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Namespace {
    #[serde(rename = "type")]
    kind: String,
    path: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Resources {
    memory: Option<Memory>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Memory {
    limit: Option<i64>,
}

/// The network namespace a spec asks for.
#[derive(Debug, PartialEq, Eq)]
pub enum Network {
    /// A new one, with nothing in it.
    New,
    /// The one at this path.
    Path(PathBuf),
}

/// A bind mount whose source is on the host.
#[derive(Debug, PartialEq, Eq)]
pub struct BindMount {
    /// Index into the spec's mounts.
    pub index: usize,
    /// Host path.
    pub source: PathBuf,
    /// Where it appears in the container.
    pub destination: String,
    /// Enforced on the host side.
    pub readonly: bool,
    /// With the mounts below the source (`rbind`).
    pub recursive: bool,
}

impl Spec {
    /// Parses the bytes of a `config.json`.
    ///
    /// # Errors
    /// `InvalidArgument` when they are no such thing.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        serde_json::from_slice(bytes)
            .map_err(|error| Error::invalid(format!("config.json is not an OCI spec: {error}")))
    }

    /// The network namespace.
    ///
    /// # Errors
    /// `InvalidArgument` when the container wants the host's network.
    pub fn network(&self) -> Result<Network> {
        let namespaces = self
            .linux
            .as_ref()
            .and_then(|linux| linux.namespaces.as_ref());
        let network = namespaces
            .into_iter()
            .flatten()
            .find(|namespace| namespace.kind == "network");
        match network {
            None => Err(Error::invalid(
                "host network is not supported: a container in a VM cannot share the node's network; \
                 drop --net-host (hostNetwork)",
            )),
            Some(namespace) => Ok(match namespace.path.as_deref() {
                None | Some("") => Network::New,
                Some(path) => Network::Path(path.into()),
            }),
        }
    }

    /// `linux.cgroupsPath`, if it is set.
    #[must_use]
    pub fn cgroups_path(&self) -> Option<&str> {
        let path = self.linux.as_ref()?.cgroups_path.as_deref()?;
        (!path.is_empty()).then_some(path)
    }

    /// The container's memory limit in bytes, if it has one.
    #[must_use]
    pub fn memory_limit(&self) -> Option<u64> {
        let limit = self
            .linux
            .as_ref()?
            .resources
            .as_ref()?
            .memory
            .as_ref()?
            .limit?;
        u64::try_from(limit).ok().filter(|&limit| limit > 0)
    }

    /// The OOM score adjustment of the container's process.
    #[must_use]
    pub fn oom_score_adj(&self) -> Option<i32> {
        self.process.as_ref()?.oom_score_adj
    }

    /// The host name, else empty.
    #[must_use]
    pub fn hostname(&self) -> &str {
        self.hostname.as_deref().unwrap_or("")
    }

    /// An annotation.
    #[must_use]
    pub fn annotation(&self, key: &str) -> Option<&str> {
        Some(self.annotations.as_ref()?.get(key)?.as_str())
    }

    /// Whether the root file system is read-only for the container.
    #[must_use]
    pub fn root_readonly(&self) -> bool {
        self.root.as_ref().is_some_and(|root| root.readonly)
    }

    /// The root file system's directory; relative to the bundle unless absolute.
    #[must_use]
    pub fn root_path(&self, bundle: &Path) -> PathBuf {
        let path = self.root.as_ref().map_or("", |root| root.path.as_str());
        bundle.join(if path.is_empty() { "rootfs" } else { path })
    }

    /// The mounts whose source is a path of the host; everything else is the agent's.
    ///
    /// # Errors
    /// `InvalidArgument` for a bind mount without an absolute source free of `..`.
    pub fn bind_mounts(&self) -> Result<Vec<BindMount>> {
        let mut found = Vec::new();
        for (index, mount) in self.mounts.iter().flatten().enumerate() {
            let has = |name: &str| mount.options.iter().flatten().any(|option| option == name);
            let recursive = has("rbind");
            if mount.kind.as_deref() != Some("bind") && !recursive && !has("bind") {
                continue;
            }
            let source = PathBuf::from(mount.source.as_deref().unwrap_or(""));
            if !source.is_absolute() || source.components().any(|c| c == Component::ParentDir) {
                return Err(Error::invalid(format!(
                    "the source of the bind mount on {} must be an absolute path without \"..\"",
                    mount.destination
                )));
            }
            found.push(BindMount {
                index,
                source,
                destination: mount.destination.clone(),
                readonly: has("ro") || has("rro"),
                recursive,
            });
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;
    use proptest::prelude::*;

    fn parse(text: &str) -> Spec {
        Spec::parse(text.as_bytes()).unwrap()
    }

    #[test]
    fn unknown_capabilities_and_fields_do_not_matter_here() {
        let spec = parse(
            r#"{"ociVersion":"9.9","process":{"capabilities":{"bounding":["CAP_OF_TOMORROW"]},
            "oomScoreAdj":-7},"novel":{"x":[1]},"linux":null,"mounts":null}"#,
        );
        assert_eq!(spec.oom_score_adj(), Some(-7));
        assert_eq!(spec.bind_mounts().unwrap(), Vec::new());
    }

    #[test]
    fn the_hosts_network_is_refused_and_others_are_told_apart() {
        let error = parse(r#"{"linux":{"namespaces":[{"type":"pid"}]}}"#)
            .network()
            .unwrap_err();
        assert_eq!(error.kind, Kind::InvalidArgument);
        assert!(error.message.contains("host network"), "{error}");
        let new = parse(r#"{"linux":{"namespaces":[{"type":"network"}]}}"#);
        assert_eq!(new.network().unwrap(), Network::New);
        let given = parse(r#"{"linux":{"namespaces":[{"type":"network","path":"/run/netns/a"}]}}"#);
        assert_eq!(
            given.network().unwrap(),
            Network::Path("/run/netns/a".into())
        );
    }

    #[test]
    fn only_bind_mounts_are_taken_from_the_host() {
        let spec = parse(
            r#"{"mounts":[{"destination":"/proc","type":"proc","source":"proc"},
            {"destination":"/a","type":"bind","source":"/srv/a","options":["rbind","ro"]},
            {"destination":"/dev/shm","type":"tmpfs","source":"shm"},
            {"destination":"/b","source":"/srv/b","options":["bind"]}]}"#,
        );
        let mounts = spec.bind_mounts().unwrap();
        assert_eq!(mounts.len(), 2);
        assert_eq!((mounts[0].index, mounts[1].index), (1, 3));
        assert!(mounts[0].readonly && mounts[0].recursive);
        assert!(!mounts[1].readonly && !mounts[1].recursive);
    }

    #[test]
    fn a_bind_source_that_climbs_or_is_relative_is_refused() {
        for source in ["srv/a", "/srv/../etc", ""] {
            let spec = parse(&format!(
                r#"{{"mounts":[{{"destination":"/a","type":"bind","source":"{source}"}}]}}"#
            ));
            assert!(spec.bind_mounts().is_err(), "{source}");
        }
    }

    #[test]
    fn the_root_is_relative_to_the_bundle_unless_absolute() {
        let bundle = Path::new("/run/bundle");
        assert_eq!(
            parse("{}").root_path(bundle),
            Path::new("/run/bundle/rootfs")
        );
        let absolute = parse(r#"{"root":{"path":"/srv/root","readonly":true}}"#);
        assert_eq!(absolute.root_path(bundle), Path::new("/srv/root"));
        assert!(absolute.root_readonly());
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..256)) {
            if let Ok(spec) = Spec::parse(&bytes) {
                let _ = spec.network();
                let _ = spec.bind_mounts();
            }
        }
    }
}
