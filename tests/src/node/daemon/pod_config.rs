//! CRI's `runtime.v1.PodSandboxConfig`, the options of CreateSandbox, as containerd's CRI plugin packs it.

use anyhow::Result;
use protobuf::CodedOutputStream;
use protobuf::well_known_types::any::Any;

/// `NamespaceMode.CONTAINER`.
const CONTAINER: u64 = 1;
/// `NamespaceMode.NODE`.
const NODE: u64 = 2;

/// What of a pod the cases look at.
#[derive(Clone, Debug, Default)]
pub struct PodConfig {
    /// The pod's host name.
    pub hostname: String,
    /// The parent of its cgroup.
    pub cgroup_parent: String,
    /// Kernel parameters.
    pub sysctls: Vec<(String, String)>,
    /// The pod asks for the node's network.
    pub host_network: bool,
    /// Its user namespace: a `NamespaceMode`, and lines of container id, host id, length for users and groups.
    pub user_namespace: Option<(u64, Vec<[u32; 3]>)>,
    /// The level of its SELinux options.
    pub selinux_level: String,
    /// Its user and group.
    pub run_as: (Option<i64>, Option<i64>),
    /// Its supplemental groups.
    pub groups: Vec<i64>,
    /// Its seccomp profile: a `ProfileType`, and the path of one on the node.
    pub seccomp: Option<(u64, String)>,
}

/// A message written field by field.
pub(super) fn message(
    write: impl FnOnce(&mut CodedOutputStream<'_>) -> protobuf::Result<()>,
) -> protobuf::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut stream = CodedOutputStream::vec(&mut bytes);
    write(&mut stream)?;
    stream.flush()?;
    drop(stream);
    Ok(bytes)
}

fn entry(key: &str, value: &str) -> protobuf::Result<Vec<u8>> {
    message(|stream| {
        stream.write_string(1, key)?;
        stream.write_string(2, value)
    })
}

fn user_namespace(mode: u64, map: &[[u32; 3]]) -> protobuf::Result<Vec<u8>> {
    message(|stream| {
        stream.write_uint64(1, mode)?;
        for field in [2, 3] {
            for [container, host, length] in map {
                let line = message(|stream| {
                    stream.write_uint32(1, *host)?;
                    stream.write_uint32(2, *container)?;
                    stream.write_uint32(3, *length)
                })?;
                stream.write_bytes(field, &line)?;
            }
        }
        Ok(())
    })
}

impl PodConfig {
    /// The lines of its user namespace's map; none of one that shares the node's.
    pub(super) fn map(&self) -> &[[u32; 3]] {
        self.user_namespace.as_ref().map_or(&[], |(_, map)| map)
    }

    fn security(&self, namespaces: &[u8]) -> protobuf::Result<Vec<u8>> {
        message(|stream| {
            stream.write_bytes(1, namespaces)?;
            let level = message(|stream| stream.write_string(4, &self.selinux_level))?;
            stream.write_bytes(2, &level)?;
            let (user, group) = self.run_as;
            for (field, id) in [(3, user), (8, group)] {
                if let Some(id) = id {
                    stream.write_bytes(field, &message(|stream| stream.write_int64(1, id))?)?;
                }
            }
            for group in &self.groups {
                stream.write_int64(5, *group)?;
            }
            if let Some((kind, path)) = &self.seccomp {
                let profile = message(|stream| {
                    stream.write_uint64(1, *kind)?;
                    stream.write_string(2, path)
                })?;
                stream.write_bytes(9, &profile)?;
            }
            Ok(())
        })
    }

    /// As options of CreateSandbox.
    ///
    /// # Errors
    /// None in practice: protobuf cannot encode.
    pub fn options(&self) -> Result<Any> {
        let metadata = message(|stream| {
            stream.write_string(1, "daemon")?;
            stream.write_string(2, "0c4e6cd4-uid")?;
            stream.write_string(3, "default")
        })?;
        let namespaces = message(|stream| {
            if self.host_network {
                stream.write_uint64(1, NODE)?;
            }
            stream.write_uint64(2, CONTAINER)?;
            match &self.user_namespace {
                Some((mode, map)) => stream.write_bytes(5, &user_namespace(*mode, map)?),
                None => Ok(()),
            }
        })?;
        let security = self.security(&namespaces)?;
        let linux = message(|stream| {
            stream.write_string(1, &self.cgroup_parent)?;
            stream.write_bytes(2, &security)?;
            for (key, value) in &self.sysctls {
                stream.write_bytes(3, &entry(key, value)?)?;
            }
            Ok(())
        })?;
        let value = message(|stream| {
            stream.write_bytes(1, &metadata)?;
            stream.write_string(2, &self.hostname)?;
            stream.write_string(3, "/var/log/pods/daemon")?;
            stream.write_bytes(8, &linux)
        })?;
        Ok(Any {
            type_url: "runtime.v1.PodSandboxConfig".to_owned(),
            value,
            ..Any::default()
        })
    }
}
