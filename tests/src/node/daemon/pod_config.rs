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

impl PodConfig {
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
            stream.write_uint64(2, CONTAINER)
        })?;
        let security = message(|stream| stream.write_bytes(1, &namespaces))?;
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
