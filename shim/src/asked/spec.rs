//! What the shim reads from a container's `config.json`; the agent gets the bytes as they are.
//!
//! Only the fields the shim acts on are parsed, once. So an unknown capability or a field of a newer
//! runtime-spec is the agent's to judge and never makes the host side fail.

mod device;
pub mod hooks;
mod id_map;
mod identity;
mod on_node;
mod pci_addresses;
mod resources;
mod throttles;

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use brig_hypervisor::share::IdMap;
use serde::Deserialize;

use crate::asked::ping_groups;
use crate::error::{Error, Result};
pub use device::Device;
use hooks::Hooks;
pub use identity::check_process;
pub use on_node::{NumberList, OnNode};
pub use pci_addresses::{Moved, with_guest_addresses};
pub use resources::Access;
use resources::Resources;
pub use resources::{CpuMillis, Limits};
pub use throttles::{Throttled, Throttles};

/// The largest `config.json` in bytes: what fits a ttrpc message with room for the rest.
pub const MAX_SPEC: u64 = 3 << 20;
/// What containerd's CRI says a container is.
const CONTAINER_TYPE: &str = "io.kubernetes.cri.container-type";
/// The pod of a container, by its sandbox container's id.
const SANDBOX_ID: &str = "io.kubernetes.cri.sandbox-id";
/// Memory limits of the pod's containers, summed, in bytes; on the sandbox container.
const SANDBOX_MEMORY: &str = "io.kubernetes.cri.sandbox-memory";
/// CPU time of the pod in microseconds for each [`SANDBOX_CPU_PERIOD`].
const SANDBOX_CPU_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
/// In microseconds.
const SANDBOX_CPU_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";
/// The pod's share of CPU time.
const SANDBOX_CPU_SHARES: &str = "io.kubernetes.cri.sandbox-cpu-shares";

/// The longest host name that Linux takes, in bytes (uname(2)).
const MAX_HOSTNAME: usize = 64;

/// Refuses a host name that Linux would.
///
/// # Errors
/// `InvalidArgument`.
pub fn check_hostname(name: &str) -> Result<()> {
    if name.len() <= MAX_HOSTNAME {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "the host name {name:?} has {} bytes, Linux takes at most {MAX_HOSTNAME}",
        name.len()
    )))
}

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
    hooks: Option<Hooks>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Root {
    path: String,
    readonly: bool,
}

/// A mount of the spec.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Mount {
    /// Where it appears in the container.
    pub destination: String,
    /// File system type.
    #[serde(rename = "type")]
    pub kind: Option<String>,
    /// A host path for a bind mount.
    pub source: Option<String>,
    options: Option<Vec<String>>,
    uid_mappings: Option<Vec<id_map::Mapping>>,
    gid_mappings: Option<Vec<id_map::Mapping>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Process {
    oom_score_adj: Option<i32>,
    user: Option<identity::User>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Linux {
    cgroups_path: Option<String>,
    namespaces: Option<Vec<Namespace>>,
    resources: Option<Resources>,
    sysctl: Option<BTreeMap<String, String>>,
    uid_mappings: Option<Vec<id_map::Mapping>>,
    gid_mappings: Option<Vec<id_map::Mapping>>,
    devices: Option<Vec<Device>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Namespace {
    #[serde(rename = "type")]
    kind: String,
    path: Option<String>,
}

/// What a container is to its pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// A pod of its own, as `ctr run` makes one.
    Single,
    /// CRI's sandbox container: it stands for the pod and runs nothing.
    Sandbox,
    /// A container in the pod of this sandbox.
    Member(String),
}

/// Reads the bytes of a `config.json`. Blocking.
///
/// # Errors
/// `NotFound` and what else the host says; `InvalidArgument` when it is too large.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    let failed = |error| Error::io(path.display(), &error);
    let size = std::fs::metadata(path).map_err(failed)?.len();
    if size > MAX_SPEC {
        return Err(Error::invalid(format!(
            "{} has {size} bytes, more than the {MAX_SPEC} that are allowed",
            path.display()
        )));
    }
    std::fs::read(path).map_err(failed)
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
    /// Also for the mounts below (`rro`).
    pub readonly_below: bool,
    /// With the mounts below the source (`rbind`).
    pub recursive: bool,
    /// What happens with mounts that are made later.
    pub propagation: Propagation,
    /// How its owners are seen, if not as they are.
    pub id_map: Option<IdMap>,
}

#[cfg(test)]
impl BindMount {
    /// A source at `/v`, with the mounts below it, writable.
    pub(crate) fn plain(source: &std::path::Path) -> Self {
        Self {
            index: 0,
            source: source.to_owned(),
            destination: "/v".into(),
            readonly: false,
            readonly_below: false,
            recursive: true,
            propagation: Propagation::Private,
            id_map: None,
        }
    }
}

/// Whether mounts made later below a bind mount's source are seen on the other side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Propagation {
    /// Neither side sees the other's.
    #[default]
    Private,
    /// The container sees the node's (`rslave`).
    HostToContainer,
    /// Each sees the other's (`rshared`).
    Bidirectional,
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

    /// The device nodes that the specification names: for a privileged container every device of the node as well.
    #[must_use]
    pub fn devices(&self) -> &[Device] {
        let linux = self.linux.as_ref();
        linux
            .and_then(|linux| linux.devices.as_deref())
            .unwrap_or_default()
    }

    /// Whether every device is allowed, which is how containerd says that a container is privileged.
    #[must_use]
    pub fn is_privileged(&self) -> bool {
        self.resources().is_some_and(Resources::allow_all_devices)
    }

    /// What the device rules let the container do with a block device of the node.
    #[must_use]
    pub fn block_access(&self, numbers: (u32, u32)) -> Access {
        let resources = self.resources();
        resources.map_or(Access::default(), |own| own.block_access(numbers))
    }

    /// What the container asks for on the node.
    ///
    /// # Errors
    /// `InvalidArgument` for a device number that is none, and for what is no list of CPUs or of NUMA nodes.
    pub fn on_node(&self) -> Result<OnNode> {
        let resources = self.resources();
        resources.map_or(Ok(OnNode::default()), OnNode::of)
    }

    fn resources(&self) -> Option<&Resources> {
        self.linux.as_ref()?.resources.as_ref()
    }

    /// What the container is to its pod.
    ///
    /// # Errors
    /// `InvalidArgument` for a container of a pod that does not say which.
    pub fn role(&self) -> Result<Role> {
        match self.annotation(CONTAINER_TYPE) {
            None => Ok(Role::Single),
            Some("sandbox") => Ok(Role::Sandbox),
            Some("container") => match self.annotation(SANDBOX_ID) {
                Some(id) if !id.is_empty() => Ok(Role::Member(id.to_owned())),
                _ => Err(Error::invalid(format!(
                    "the annotation {SANDBOX_ID} of a pod's container is missing"
                ))),
            },
            Some(other) => Err(Error::invalid(format!(
                "the annotation {CONTAINER_TYPE} is {other:?}, neither sandbox nor container"
            ))),
        }
    }

    /// Refuses users and groups that there are not, of the process, of devices and of id maps.
    ///
    /// # Errors
    /// `InvalidArgument` that names the field.
    pub fn check_ids(&self) -> Result<()> {
        let process = self.process.as_ref();
        if let Some(user) = process.and_then(|process| process.user.as_ref()) {
            user.check()?;
        }
        self.devices().iter().try_for_each(Device::check_owner)?;
        let linux = self.linux.iter();
        let maps =
            linux.map(|linux| ("linux".to_owned(), &linux.uid_mappings, &linux.gid_mappings));
        let mounts = self.mounts.iter().flatten();
        let of_mounts = mounts.map(|mount| {
            let name = format!("mount on {}", mount.destination);
            (name, &mount.uid_mappings, &mount.gid_mappings)
        });
        for (owner, users, groups) in maps.chain(of_mounts) {
            id_map::check(&format!("{owner}: uidMappings"), users.as_deref())?;
            id_map::check(&format!("{owner}: gidMappings"), groups.as_deref())?;
        }
        Ok(())
    }

    /// Refuses what a pod with a kernel of its own cannot share with the node.
    fn check_apart(&self) -> Result<()> {
        self.network()?;
        for (kind, field, what) in [
            ("pid", "hostPID", "see the node's processes"),
            ("ipc", "hostIPC", "share the node's IPC objects"),
        ] {
            if self.namespace(kind).is_none() {
                return Err(Error::invalid(format!(
                    "{field} is not supported: a pod in a VM cannot {what}; drop {field} (nerdctl: --{kind}=host)"
                )));
            }
        }
        Ok(())
    }

    /// Refuses what a container that is a pod by itself cannot share with the node or with a container of another
    /// VM. The node's uts namespace is no such thing: its name is the guest's, and a change of it stays in the guest.
    ///
    /// # Errors
    /// `InvalidArgument` that names the namespace.
    pub fn check_alone(&self) -> Result<()> {
        self.check_apart()?;
        for kind in ["pid", "ipc", "uts"] {
            let namespace = self.namespace(kind);
            let path = namespace.and_then(|namespace| namespace.path.as_deref());
            if let Some(path) = path.filter(|path| !path.is_empty()) {
                return Err(Error::invalid(format!(
                    "the {kind} namespace {path} cannot be joined: a container with a VM of its own is apart from \
                     those of others; drop it (nerdctl: --{kind}=container:…, ctr: --with-ns {kind}:…)"
                )));
            }
        }
        Ok(())
    }

    /// Refuses what a pod cannot share with the node, and what runc would refuse of the pause container, which nobody
    /// runs here, by the sandbox container's spec.
    ///
    /// # Errors
    /// `InvalidArgument` that names the field of the pod.
    pub fn check_sandbox(&self) -> Result<()> {
        self.check_apart()?;
        let linux = self.linux.as_ref();
        for (field, map) in [
            (
                "uidMappings",
                linux.and_then(|it| it.uid_mappings.as_deref()),
            ),
            (
                "gidMappings",
                linux.and_then(|it| it.gid_mappings.as_deref()),
            ),
        ] {
            if !id_map::has_root(map.unwrap_or_default()) {
                return Err(Error::invalid(format!(
                    "user namespace of the pod: container id 0 must be mapped, and linux.{field} does not map it"
                )));
            }
        }
        Ok(())
    }

    /// The node's directory that CRI made for the pod's shared memory: its size is the guest's.
    #[must_use]
    pub fn sandbox_shm(&self) -> Option<&Path> {
        let mounts = self.mounts.iter().flatten();
        let shm = mounts
            .into_iter()
            .find(|mount| self.is_sandbox_shm(mount))?;
        Some(Path::new(shm.source.as_deref()?))
    }

    /// Whether this is the pod's `/dev/shm`, which CRI mounts as `…/sandboxes/<id>/shm`.
    fn is_sandbox_shm(&self, mount: &Mount) -> bool {
        let (Some(id), Some(source)) = (self.annotation(SANDBOX_ID), mount.source.as_deref())
        else {
            return false;
        };
        mount.destination.trim_end_matches('/') == "/dev/shm"
            && Path::new(source).ends_with(Path::new("sandboxes").join(id).join("shm"))
    }

    fn namespace(&self, kind: &str) -> Option<&Namespace> {
        self.linux
            .as_ref()?
            .namespaces
            .iter()
            .flatten()
            .find(|namespace| namespace.kind == kind)
    }

    /// Kernel parameters, by name, as the guest's root is to write them.
    ///
    /// # Errors
    /// `InvalidArgument` for one that names what the pod's user namespace does not have.
    pub fn sysctls(&self) -> Result<BTreeMap<String, String>> {
        let Some(linux) = &self.linux else {
            return Ok(BTreeMap::new());
        };
        let mut sysctls = linux.sysctl.clone().unwrap_or_default();
        if let Some(groups) = linux.gid_mappings.as_deref().filter(|map| !map.is_empty()) {
            ping_groups::translate(&mut sysctls, |id| id_map::outside(groups, id))?;
        }
        Ok(sysctls)
    }

    /// The sum of the memory limits of a pod's containers in bytes, as CRI notes it on the sandbox
    /// container; `None` without limits.
    #[must_use]
    pub fn sandbox_memory(&self) -> Option<u64> {
        let limit = self.annotation(SANDBOX_MEMORY)?.parse().ok();
        limit.filter(|&limit| limit > 0)
    }

    /// The CPUs that a pod's limits and requests amount to.
    #[must_use]
    pub fn sandbox_cpu_millis(&self) -> CpuMillis {
        let figure = |key| self.annotation(key)?.parse::<i64>().ok();
        let positive = |key| u64::try_from(figure(key)?).ok();
        CpuMillis::of_pod(
            figure(SANDBOX_CPU_QUOTA).unwrap_or(0),
            positive(SANDBOX_CPU_PERIOD).unwrap_or(0),
            positive(SANDBOX_CPU_SHARES).unwrap_or(0),
        )
    }

    /// The network namespace.
    ///
    /// # Errors
    /// `InvalidArgument` when the container wants the host's network.
    pub fn network(&self) -> Result<Network> {
        match self.namespace("network") {
            None => Err(Error::invalid(
                "host network is not supported: a container in a VM cannot share the node's network; \
                 drop hostNetwork (ctr: --net-host)",
            )),
            Some(namespace) => Ok(match namespace.path.as_deref() {
                None | Some("") => Network::New,
                Some(path) => Network::Path(path.into()),
            }),
        }
    }

    /// The pid in the path of the pid namespace to join (`/proc/PID/ns/pid`), as CRI writes it.
    #[must_use]
    pub fn pid_namespace_of(&self) -> Option<u32> {
        let path = self.namespace("pid")?.path.as_deref()?;
        let pid = path.strip_prefix("/proc/")?.strip_suffix("/ns/pid")?;
        pid.parse().ok()
    }

    /// `linux.cgroupsPath`, if it is set.
    #[must_use]
    pub fn cgroups_path(&self) -> Option<&str> {
        let path = self.linux.as_ref()?.cgroups_path.as_deref()?;
        (!path.is_empty()).then_some(path)
    }

    /// What the container may use.
    #[must_use]
    pub fn limits(&self) -> Limits {
        self.resources()
            .map_or_else(Limits::default, Resources::limits)
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

    /// The hooks that run on the node.
    #[must_use]
    pub fn hooks(&self) -> Option<&Hooks> {
        self.hooks.as_ref()
    }

    /// All annotations.
    pub fn annotations(&self) -> impl Iterator<Item = (&str, &str)> {
        let all = self.annotations.iter().flatten();
        all.map(|(name, value)| (name.as_str(), value.as_str()))
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

    fn id_map_of(&self, mount: &Mount) -> Result<Option<IdMap>> {
        let linux = self.linux.as_ref();
        let users = linux.and_then(|linux| linux.uid_mappings.as_deref());
        let groups = linux.and_then(|linux| linux.gid_mappings.as_deref());
        id_map::of_mount(
            &mount.destination,
            mount.options.as_deref().unwrap_or_default(),
            (
                mount.uid_mappings.as_deref().unwrap_or_default(),
                mount.gid_mappings.as_deref().unwrap_or_default(),
            ),
            (users.unwrap_or_default(), groups.unwrap_or_default()),
        )
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
            // The agent puts the pod's own shared memory there.
            if self.is_sandbox_shm(mount) {
                continue;
            }
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
                readonly_below: has("rro"),
                recursive,
                propagation: if has("rshared") || has("shared") {
                    Propagation::Bidirectional
                } else if has("rslave") || has("slave") {
                    Propagation::HostToContainer
                } else {
                    Propagation::Private
                },
                id_map: self.id_map_of(mount)?,
            });
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests;
