//! What CRI says of a pod when there is no sandbox container to carry it: `runtime.v1.PodSandboxConfig`
//! (CRI api.proto), the options of CreateSandbox.
//!
//! The message is not among the generated ones and few of its fields concern the shim, so they are read from
//! the wire. Trusted like the rest of what containerd sends, but strings are the users', and the agent judges
//! sysctls. What containerd's own sandbox controller refuses, [`PodConfig::check`] refuses.

mod security;
mod user_namespace;

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use protobuf::well_known_types::any::Any;

use crate::asked::ping_groups;
use crate::asked::pod_name::PodName;
use crate::asked::spec::CpuMillis;
use crate::asked::spec::check_hostname;
use crate::asked::wire::{Value, each_field, insert, positive, text};
use crate::error::{Error, Result};
use security::Security;

/// The message's name in a type URL.
const TYPE: &str = "runtime.v1.PodSandboxConfig";
/// What containerd 2.x sets for a pod with a network of its own unless its operator or the pod says otherwise
/// (`enable_unprivileged_ports`, `enable_unprivileged_icmp`): ports below 1024 and ping need no privilege.
const UNPRIVILEGED_PORTS: (&str, &str) = ("net.ipv4.ip_unprivileged_port_start", "0");
const UNPRIVILEGED_PING: (&str, &str) = ("net.ipv4.ping_group_range", "0 2147483647");

/// The pod's configuration, as far as the shim acts on it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PodConfig {
    /// The pod's name.
    pub name: Option<PodName>,
    /// The pod's host name.
    pub hostname: String,
    /// `/etc/resolv.conf` of the pod's containers; without one they have the node's.
    pub dns: Option<Dns>,
    /// The parent of the pod's cgroup, as a path or a systemd slice.
    pub cgroup_parent: String,
    /// Kernel parameters, by name.
    pub sysctls: BTreeMap<String, String>,
    /// Sum of the containers' memory limits in bytes, if they have any.
    pub memory: Option<u64>,
    /// The CPUs that their limits and requests amount to.
    pub cpu_millis: CpuMillis,
    /// Of the pod.
    pub annotations: BTreeMap<String, String>,
    security: Security,
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

    /// Refuses what cannot be had, as containerd's own sandbox controller does and runc for it. Blocking: a
    /// seccomp profile is read.
    ///
    /// # Errors
    /// `InvalidArgument` that names the field of the pod and the fix.
    pub fn check(&self) -> Result<()> {
        check_hostname(&self.hostname)?;
        self.security.check()
    }

    /// The pod's kernel parameters with those that containerd sets for every pod, as the guest's root is to write them.
    ///
    /// # Errors
    /// `InvalidArgument` for one that names what the pod's user namespace does not have.
    pub fn sysctls(&self) -> Result<BTreeMap<String, String>> {
        let mut all = self.sysctls.clone();
        if self.security.has_user_namespace() {
            ping_groups::translate(&mut all, |id| self.security.group_outside(id))?;
        }
        // The ids of the range are not the namespace's.
        let ping = (!self.security.has_user_namespace()).then_some(UNPRIVILEGED_PING);
        for (name, value) in [UNPRIVILEGED_PORTS].into_iter().chain(ping) {
            all.entry(name.to_owned())
                .or_insert_with(|| value.to_owned());
        }
        Ok(all)
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
            _ => clean(&parent.join(id)).display().to_string(),
        }
    }

    fn read(bytes: &[u8]) -> protobuf::Result<Self> {
        let mut config = Self::default();
        let (mut quota, mut period, mut shares, mut memory) = (0, 0, 0, 0);
        each_field(bytes, |number, value| {
            match (number, value) {
                (1, Value::Bytes(metadata)) => config.name = name(metadata)?,
                (2, Value::Bytes(hostname)) => config.hostname = text(hostname)?,
                (4, Value::Bytes(dns)) => config.dns = Some(Dns::read(dns)?),
                (7, Value::Bytes(entry)) => insert(&mut config.annotations, entry)?,
                (8, Value::Bytes(linux)) => each_field(linux, |number, value| {
                    match (number, value) {
                        (1, Value::Bytes(parent)) => config.cgroup_parent = text(parent)?,
                        (2, Value::Bytes(context)) => config.security = Security::read(context)?,
                        (3, Value::Bytes(entry)) => insert(&mut config.sysctls, entry)?,
                        (5, Value::Bytes(resources)) => each_field(resources, |number, value| {
                            match (number, value) {
                                (1, Value::Number(value)) => period = positive(value),
                                (2, Value::Number(value)) => quota = positive(value),
                                (3, Value::Number(value)) => shares = positive(value),
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
        let quota = i64::try_from(quota).unwrap_or(i64::MAX);
        config.cpu_millis = CpuMillis::of_pod(quota, period, shares);
        Ok(config)
    }
}

impl Dns {
    fn read(bytes: &[u8]) -> protobuf::Result<Self> {
        let mut dns = Self::default();
        each_field(bytes, |number, value| {
            let list = match number {
                1 => &mut dns.servers,
                2 => &mut dns.searches,
                3 => &mut dns.options,
                _ => return Ok(()),
            };
            if let Value::Bytes(entry) = value {
                list.push(text(entry)?);
            }
            Ok(())
        })?;
        Ok(dns)
    }
}

/// `PodSandboxMetadata`.
fn name(bytes: &[u8]) -> protobuf::Result<Option<PodName>> {
    let (mut name, mut uid, mut namespace) = (String::new(), String::new(), String::new());
    each_field(bytes, |number, value| {
        match (number, value) {
            (1, Value::Bytes(bytes)) => name = text(bytes)?,
            (2, Value::Bytes(bytes)) => uid = text(bytes)?,
            (3, Value::Bytes(bytes)) => namespace = text(bytes)?,
            _ => {}
        }
        Ok(())
    })?;
    Ok(PodName::of_metadata(&namespace, &name, &uid))
}

/// A path without `.`, `..` and doubled slashes, by its text alone: containerd writes cgroups so.
fn clean(path: &Path) -> PathBuf {
    let mut clean = PathBuf::new();
    for part in path.components() {
        let last = clean.components().next_back();
        match part {
            Component::CurDir => {}
            Component::ParentDir if matches!(last, Some(Component::Normal(_))) => {
                clean.pop();
            }
            Component::ParentDir if matches!(last, Some(Component::RootDir)) => {}
            other => clean.push(other),
        }
    }
    clean
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
            bytes(
                1,
                &[bytes(1, b"name"), bytes(2, b"u"), bytes(3, b"shop")].concat(),
            ),
            bytes(2, b"host"),
            bytes(4, &dns.concat()),
            bytes(7, &[bytes(1, b"a"), bytes(2, b"1")].concat()),
            bytes(8, &linux.concat()),
        ])
        .unwrap();
        assert_eq!(config.hostname, "host");
        let name = config.name.as_ref().unwrap();
        assert_eq!(
            (name.full().as_str(), name.uid.as_str()),
            ("shop/name", "u")
        );
        assert_eq!(
            (config.cpu_millis.limit, config.memory),
            (Some(2500), Some(1 << 30))
        );
        assert_eq!(config.sysctls["kernel.shm_rmid_forced"], "1");
        assert_eq!(config.cgroups_path("k8s.io", "s"), "/kubepods/pod1/s");
        assert_eq!(config.annotations["a"], "1");
        let dns = config.dns.as_ref().unwrap();
        assert_eq!(dns.servers, ["10.0.0.10"]);
        assert_eq!(dns.searches, ["a.b"]);
        assert_eq!(dns.options, ["ndots:5"]);
        config.check().unwrap();
    }

    #[test]
    fn a_host_name_is_as_long_as_linux_takes_it() {
        let named = |length: usize| parse(&[bytes(2, &vec![b'a'; length])]).unwrap();
        named(64).check().unwrap();
        let error = named(65).check().unwrap_err();
        assert_eq!(error.kind, Kind::InvalidArgument);
        assert!(error.message.contains("65 bytes"), "{error}");
    }

    #[test]
    fn what_the_security_context_may_not_ask_is_refused() {
        let linux = bytes(2, &bytes(1, &varint(1, 2)));
        let error = parse(&[bytes(8, &linux)]).unwrap().check().unwrap_err();
        assert_eq!(error.kind, Kind::InvalidArgument);
        assert!(error.message.contains("hostNetwork"), "{error}");
    }

    #[test]
    fn ports_and_ping_need_no_privilege_unless_the_pod_says_otherwise() {
        let sysctls = |linux: &[Vec<u8>]| {
            let config = parse(&[bytes(8, &linux.concat())]).unwrap();
            config.sysctls().unwrap()
        };
        let (ports, ping) = (
            "net.ipv4.ip_unprivileged_port_start",
            "net.ipv4.ping_group_range",
        );
        let all = sysctls(&[]);
        assert_eq!(
            (all[ports].as_str(), all[ping].as_str()),
            ("0", "0 2147483647")
        );
        let own = [(ports, "500"), (ping, "1 1000"), ("net.a", "b")].map(|(key, value)| {
            bytes(
                3,
                &[bytes(1, key.as_bytes()), bytes(2, value.as_bytes())].concat(),
            )
        });
        let all = sysctls(&own);
        assert_eq!((all[ports].as_str(), all[ping].as_str()), ("500", "1 1000"));
        assert_eq!(all.len(), 3);
        let namespace = bytes(2, &bytes(1, &bytes(5, &varint(1, 0))));
        assert!(!sysctls(&[namespace]).contains_key(ping));
        let of_node = bytes(2, &bytes(1, &bytes(5, &varint(1, 2))));
        assert!(sysctls(&[of_node]).contains_key(ping));
    }

    #[test]
    fn a_resolver_that_knows_nothing_is_not_the_nodes() {
        assert_eq!(parse(&[]).unwrap().dns, None);
        assert_eq!(parse(&[bytes(4, &[])]).unwrap().dns, Some(Dns::default()));
    }

    #[test]
    fn none_of_many_entries_is_lost() {
        let entry = |n: u32| {
            bytes(
                7,
                &[bytes(1, n.to_string().as_bytes()), bytes(2, b"x")].concat(),
            )
        };
        let all: Vec<_> = (0..5000).map(entry).collect();
        assert_eq!(parse(&all).unwrap().annotations.len(), 5000);
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
        assert_eq!((config.cpu_millis.wanted(), config.memory), (None, None));
        // As of a pod with CPUs of its own.
        let exclusive = [varint(1, 100_000), varint(2, -1), varint(3, 4096)].concat();
        let config = parse(&[bytes(8, &bytes(5, &exclusive))]).unwrap();
        assert_eq!(config.cpu_millis.wanted(), Some(4000));
        // As of one in which a container has a limit, and another has none and asks for more.
        let mixed = [varint(1, 100_000), varint(2, 50_000), varint(3, 4198)].concat();
        let config = parse(&[bytes(8, &bytes(5, &mixed))]).unwrap();
        assert_eq!(config.cpu_millis.wanted(), Some(4100));
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
        assert_eq!(path("kubepods//a/./b/../c/"), "kubepods/a/c/s");
        assert_eq!(path("/kubepods/../../x"), "/x/s");
        // Which is no cgroup path, and refused as one.
        assert_eq!(path("../x"), "../x/s");
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
