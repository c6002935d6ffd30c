//! What CRI says of a pod when there is no sandbox container to carry it: `runtime.v1.PodSandboxConfig`
//! (CRI api.proto), the options of CreateSandbox.
//!
//! The message is not among the generated ones and few of its fields concern the shim, so they are read from
//! the wire. Trusted like the rest of what containerd sends, but strings are the users': numbers of entries
//! are bounded, and the agent judges sysctls.

use std::collections::BTreeMap;
use std::path::Path;

use protobuf::well_known_types::any::Any;
use protobuf::{CodedInputStream, rt::WireType};

use crate::error::{Error, Result};

/// The message's name in a type URL.
const TYPE: &str = "runtime.v1.PodSandboxConfig";
/// The most entries of a list or map; CRI has no limit of its own.
const MAX_ENTRIES: usize = 1024;
/// `NamespaceMode.NODE`.
const NODE: u64 = 2;

/// The pod's configuration, as far as the shim acts on it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PodConfig {
    /// The pod's host name.
    pub hostname: String,
    /// `/etc/resolv.conf` of the pod's containers.
    pub dns: Dns,
    /// The parent of the pod's cgroup, as a path or a systemd slice.
    pub cgroup_parent: String,
    /// Kernel parameters, by name.
    pub sysctls: BTreeMap<String, String>,
    /// Sum of the containers' memory limits in bytes, if they have any.
    pub memory: Option<u64>,
    /// The CPUs their limits amount to, rounded up.
    pub cpus: Option<u64>,
    /// Of the pod.
    pub annotations: BTreeMap<String, String>,
    namespaces: Namespaces,
}

/// What a resolver needs to know.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Dns {
    /// Addresses of name servers.
    pub servers: Vec<String>,
    /// Domains to search.
    pub searches: Vec<String>,
    /// Options such as `ndots:5`.
    pub options: Vec<String>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Namespaces {
    network: u64,
    pid: u64,
    ipc: u64,
}

impl PodConfig {
    /// Reads the options of CreateSandbox. Without any, or with some of another kind, everything is the
    /// default.
    ///
    /// # Errors
    /// `InvalidArgument` for a message of this kind that cannot be read.
    pub fn parse(options: Option<&Any>) -> Result<Self> {
        let Some(options) = options else {
            return Ok(Self::default());
        };
        if options.type_url.rsplit('/').next() != Some(TYPE) {
            return Ok(Self::default());
        }
        Self::read(&options.value)
            .map_err(|error| Error::invalid(format!("the pod's sandbox config: {error}")))
    }

    /// Refuses what a pod with a kernel of its own cannot share with the node.
    ///
    /// # Errors
    /// `InvalidArgument` that names the field of the pod.
    pub fn check(&self) -> Result<()> {
        for (mode, field, what) in [
            (
                self.namespaces.network,
                "hostNetwork",
                "share the node's network",
            ),
            (self.namespaces.pid, "hostPID", "see the node's processes"),
            (
                self.namespaces.ipc,
                "hostIPC",
                "share the node's IPC objects",
            ),
        ] {
            if mode == NODE {
                return Err(Error::invalid(format!(
                    "{field} is not supported: a pod in a VM cannot {what}; drop {field}"
                )));
            }
        }
        Ok(())
    }

    /// Where the pod's own cgroup is, named as CRI names that of a sandbox container.
    #[must_use]
    pub fn cgroups_path(&self, namespace: &str, id: &str) -> String {
        let parent = Path::new(&self.cgroup_parent);
        if self.cgroup_parent.is_empty() {
            return format!("/{namespace}/{id}");
        }
        match parent.file_name().and_then(|name| name.to_str()) {
            Some(slice) if slice.ends_with(".slice") => format!("{slice}:cri-containerd:{id}"),
            _ => parent.join(id).display().to_string(),
        }
    }

    fn read(bytes: &[u8]) -> protobuf::Result<Self> {
        let mut config = Self::default();
        let (mut quota, mut period, mut memory) = (0, 0, 0);
        each_field(bytes, |number, value| {
            match (number, value) {
                (2, Value::Bytes(hostname)) => config.hostname = text(hostname)?,
                (4, Value::Bytes(dns)) => config.dns = Dns::read(dns)?,
                (7, Value::Bytes(entry)) => insert(&mut config.annotations, entry)?,
                (8, Value::Bytes(linux)) => each_field(linux, |number, value| {
                    match (number, value) {
                        (1, Value::Bytes(parent)) => config.cgroup_parent = text(parent)?,
                        (2, Value::Bytes(context)) => {
                            each_field(context, |number, value| {
                                if let (1, Value::Bytes(options)) = (number, value) {
                                    config.namespaces = Namespaces::read(options)?;
                                }
                                Ok(())
                            })?;
                        }
                        (3, Value::Bytes(entry)) => insert(&mut config.sysctls, entry)?,
                        (5, Value::Bytes(resources)) => each_field(resources, |number, value| {
                            match (number, value) {
                                (1, Value::Number(value)) => period = positive(value),
                                (2, Value::Number(value)) => quota = positive(value),
                                (4, Value::Number(value)) => memory = positive(value),
                                _ => {}
                            }
                            Ok(())
                        })?,
                        _ => {}
                    }
                    Ok(())
                })?,
                _ => {}
            }
            Ok(())
        })?;
        config.memory = (memory > 0).then_some(memory);
        config.cpus = (quota > 0 && period > 0).then(|| quota.div_ceil(period));
        Ok(config)
    }
}

impl Dns {
    /// Whether there is nothing to know.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    fn read(bytes: &[u8]) -> protobuf::Result<Self> {
        let mut dns = Self::default();
        each_field(bytes, |number, value| {
            let list = match number {
                1 => &mut dns.servers,
                2 => &mut dns.searches,
                3 => &mut dns.options,
                _ => return Ok(()),
            };
            if let Value::Bytes(entry) = value
                && list.len() < MAX_ENTRIES
            {
                list.push(text(entry)?);
            }
            Ok(())
        })?;
        Ok(dns)
    }
}

impl Namespaces {
    fn read(bytes: &[u8]) -> protobuf::Result<Self> {
        let mut modes = Self::default();
        each_field(bytes, |number, value| {
            match (number, value) {
                (1, Value::Number(mode)) => modes.network = mode,
                (2, Value::Number(mode)) => modes.pid = mode,
                (3, Value::Number(mode)) => modes.ipc = mode,
                _ => {}
            }
            Ok(())
        })?;
        Ok(modes)
    }
}

/// A field's value, of the wire types that these messages use.
enum Value<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

/// Calls `each` for every field; those of other wire types are left out.
fn each_field(
    bytes: &[u8],
    mut each: impl FnMut(u32, Value<'_>) -> protobuf::Result<()>,
) -> protobuf::Result<()> {
    let mut input = CodedInputStream::from_bytes(bytes);
    while let Some(tag) = input.read_raw_tag_or_eof()? {
        let number = tag >> 3;
        match tag & 7 {
            0 => each(number, Value::Number(input.read_uint64()?))?,
            2 => each(number, Value::Bytes(&input.read_bytes()?))?,
            1 => input.skip_field(WireType::Fixed64)?,
            3 => input.skip_field(WireType::StartGroup)?,
            4 => input.skip_field(WireType::EndGroup)?,
            _ => input.skip_field(WireType::Fixed32)?,
        }
    }
    Ok(())
}

fn insert(map: &mut BTreeMap<String, String>, entry: &[u8]) -> protobuf::Result<()> {
    let (mut key, mut value) = (String::new(), String::new());
    each_field(entry, |number, field| {
        match (number, field) {
            (1, Value::Bytes(bytes)) => key = text(bytes)?,
            (2, Value::Bytes(bytes)) => value = text(bytes)?,
            _ => {}
        }
        Ok(())
    })?;
    if map.len() < MAX_ENTRIES {
        map.insert(key, value);
    }
    Ok(())
}

fn text(bytes: &[u8]) -> protobuf::Result<String> {
    String::from_utf8(bytes.to_vec())
        .map_err(|error| std::io::Error::new(std::io::ErrorKind::InvalidData, error).into())
}

/// An `int64` field; negative ones mean that there is no limit.
fn positive(value: u64) -> u64 {
    if i64::try_from(value).is_ok() {
        value
    } else {
        0
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::error::Kind;
    use proptest::prelude::*;

    /// Fields as a client would encode them.
    pub(crate) fn bytes(number: u32, value: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        let mut stream = protobuf::CodedOutputStream::vec(&mut out);
        stream.write_bytes(number, value).unwrap();
        stream.flush().unwrap();
        drop(stream);
        out
    }

    pub(crate) fn varint(number: u32, value: i64) -> Vec<u8> {
        let mut out = Vec::new();
        let mut stream = protobuf::CodedOutputStream::vec(&mut out);
        stream.write_int64(number, value).unwrap();
        stream.flush().unwrap();
        drop(stream);
        out
    }

    pub(crate) fn options(value: Vec<u8>) -> Any {
        Any {
            type_url: format!("types.googleapis.com/{TYPE}"),
            value,
            ..Any::default()
        }
    }

    fn parse(fields: &[Vec<u8>]) -> Result<PodConfig> {
        PodConfig::parse(Some(&options(fields.concat())))
    }

    #[test]
    fn a_pods_configuration_is_read() {
        let resources = [varint(1, 100_000), varint(2, 250_000), varint(4, 1 << 30)].concat();
        let sysctl = [bytes(1, b"kernel.shm_rmid_forced"), bytes(2, b"1")].concat();
        let linux = [
            bytes(1, b"/kubepods/pod1"),
            bytes(2, &bytes(1, &varint(2, 1))),
            bytes(3, &sysctl),
            bytes(5, &resources),
        ];
        let dns = [
            bytes(1, b"10.0.0.10"),
            bytes(2, b"a.b"),
            bytes(3, b"ndots:5"),
        ];
        let config = parse(&[
            bytes(1, &bytes(1, b"name")),
            bytes(2, b"host"),
            bytes(4, &dns.concat()),
            bytes(7, &[bytes(1, b"a"), bytes(2, b"1")].concat()),
            bytes(8, &linux.concat()),
        ])
        .unwrap();
        assert_eq!(config.hostname, "host");
        assert_eq!((config.cpus, config.memory), (Some(3), Some(1 << 30)));
        assert_eq!(config.sysctls["kernel.shm_rmid_forced"], "1");
        assert_eq!(config.cgroups_path("k8s.io", "s"), "/kubepods/pod1/s");
        assert_eq!(config.annotations["a"], "1");
        assert_eq!(config.dns.servers, ["10.0.0.10"]);
        assert_eq!(config.dns.searches, ["a.b"]);
        assert_eq!(config.dns.options, ["ndots:5"]);
        config.check().unwrap();
    }

    #[test]
    fn what_belongs_to_the_node_is_refused_by_name() {
        for (field, name) in [(1, "hostNetwork"), (2, "hostPID"), (3, "hostIPC")] {
            let linux = bytes(2, &bytes(1, &varint(field, 2)));
            let error = parse(&[bytes(8, &linux)]).unwrap().check().unwrap_err();
            assert_eq!(error.kind, Kind::InvalidArgument);
            assert!(error.message.contains(name), "{error}");
        }
    }

    #[test]
    fn no_options_others_and_no_limits_mean_the_default() {
        assert_eq!(PodConfig::parse(None).unwrap(), PodConfig::default());
        let mut other = options(bytes(2, b"host"));
        other.type_url = "something.Else".into();
        assert_eq!(
            PodConfig::parse(Some(&other)).unwrap(),
            PodConfig::default()
        );
        let unlimited = [varint(1, 100_000), varint(2, -1), varint(4, -1)].concat();
        let config = parse(&[bytes(8, &bytes(5, &unlimited))]).unwrap();
        assert_eq!((config.cpus, config.memory), (None, None));
    }

    #[test]
    fn a_cgroup_is_named_as_cri_names_it() {
        let path = |parent: &str| {
            let config = PodConfig {
                cgroup_parent: parent.to_owned(),
                ..PodConfig::default()
            };
            config.cgroups_path("k8s.io", "s")
        };
        assert_eq!(path(""), "/k8s.io/s");
        assert_eq!(
            path("/kubepods/burstable/pod1"),
            "/kubepods/burstable/pod1/s"
        );
        assert_eq!(
            path("/kubepods.slice/kubepods-pod1.slice"),
            "kubepods-pod1.slice:cri-containerd:s"
        );
    }

    #[test]
    fn broken_text_is_refused() {
        let error = parse(&[bytes(2, &[0xff, 0xfe])]).unwrap_err();
        assert_eq!(error.kind, Kind::InvalidArgument);
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(value in proptest::collection::vec(any::<u8>(), 0..256)) {
            if let Ok(config) = PodConfig::parse(Some(&options(value))) {
                let _ = config.check();
                let _ = config.cgroups_path("n", "i");
            }
        }
    }
}
