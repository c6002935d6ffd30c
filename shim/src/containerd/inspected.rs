//! What `brig inspect` is told of a pod, as it is on the wire: nothing of environments, arguments or values of annotations.
//! Made without waiting for anything that the VMM or the guest is asked meanwhile.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Serialize;
use serde_json::Value;

use crate::asked::config::{MIB, keys};
use crate::asked::pod_name::PodName;
use crate::guest::vm::{DiskShown, GroupShown, Holder, Interface, Vm, VolumeShown};
use crate::log::rfc3339;
use crate::pod::actor::Inspection;

/// A pod.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Inspected {
    namespace: String,
    id: String,
    pod: Option<PodName>,
    state: &'static str,
    state_since: String,
    failure: Option<String>,
    version: &'static str,
    /// The guest's word.
    kernel_release: Option<String>,
    size: Option<Size>,
    /// The key of the template that the guest goes on from.
    template: Option<String>,
    log_level: &'static str,
    /// Every key with its value, and where that is from.
    config: Option<Value>,
    netns: Option<PathBuf>,
    interfaces: Vec<Network>,
    cgroup: Option<Vec<PathBuf>>,
    devices: Vec<Group>,
    disks: Vec<Disk>,
    volumes: Vec<Volume>,
    /// What the VMM was asked to plug or to give back and has not answered yet, a sentence each.
    unsettled_devices: Vec<String>,
    containers: Vec<Container>,
}

/// A VM's size.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Size {
    #[serde(rename = "startedWithMiB")]
    started_with: u64,
    #[serde(rename = "memoryMiB")]
    memory: u64,
    #[serde(rename = "maxMemoryMiB")]
    max_memory: u64,
    vcpus: u8,
    max_vcpus: u8,
}

/// An interface of the guest.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Network {
    mac: String,
    /// Who moves its frames.
    frames_by: &'static str,
}

/// An IOMMU group.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Group {
    iommu_group: u32,
    /// Device and function on the guest's bus.
    guest_functions: Vec<String>,
    /// PCI addresses of its devices in the guest, by those on the node.
    guest_addresses: BTreeMap<String, String>,
    /// Whose it is; all containers' without one.
    container: Option<String>,
    /// Kubelet has assigned it, and its container has not asked yet.
    waits_for_its_container: bool,
}

/// A block device of the node.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Disk {
    /// Its numbers on the node.
    device: String,
    writable: bool,
    /// The guest's word.
    guest_name: String,
    containers: Vec<String>,
}

/// A volume on a disk.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Volume {
    id: String,
    path: PathBuf,
    device: PathBuf,
    file_system: String,
    writable: bool,
}

/// A container.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Container {
    pub(super) id: String,
    pub(super) bundle: String,
    pub(super) state: &'static str,
    /// Of one that has stopped.
    pub(super) exit_status: Option<u32>,
    /// On the node.
    pub(super) pid: u32,
}

impl Inspected {
    /// What is known of a pod, with its containers as they say.
    pub(super) fn of(pod: Inspection, log_level: &'static str, containers: Vec<Container>) -> Self {
        let vm = pod.vm.as_deref();
        Self {
            namespace: pod.namespace,
            id: pod.id,
            pod: pod.pod,
            state: pod.state,
            state_since: rfc3339(pod.since),
            failure: pod.failure.map(|error| error.message),
            version: env!("CARGO_PKG_VERSION"),
            kernel_release: vm.and_then(Vm::kernel_release),
            size: vm.map(Size::of),
            template: vm.and_then(Vm::template).map(str::to_owned),
            log_level,
            config: pod.config.as_ref().map(keys::in_force),
            netns: pod.netns,
            interfaces: every(vm, Vm::interfaces, Network::of),
            cgroup: pod.cgroup.map(|cgroup| cgroup.dirs().to_vec()),
            devices: every(vm, Vm::devices, Group::of),
            disks: every(vm, Vm::disks, Disk::of),
            volumes: every(vm, Vm::volumes, Volume::of),
            unsettled_devices: vm.map_or_else(Vec::new, Vm::unsettled),
            containers,
        }
    }
}

fn every<T, S>(vm: Option<&Vm>, of: fn(&Vm) -> Vec<T>, shown: fn(T) -> S) -> Vec<S> {
    let all = vm.map_or_else(Vec::new, of);
    all.into_iter().map(shown).collect()
}

impl Size {
    fn of(vm: &Vm) -> Self {
        Self {
            started_with: vm.first_memory() / MIB,
            memory: vm.memory() / MIB,
            max_memory: vm.most_memory() / MIB,
            vcpus: vm.cpus(),
            max_vcpus: vm.most_cpus(),
        }
    }
}

impl Network {
    fn of(interface: Interface) -> Self {
        let octets = interface.mac.map(|octet| format!("{octet:02x}"));
        Self {
            mac: octets.join(":"),
            frames_by: if interface.by_vhost {
                "vhost-net"
            } else {
                "brig-vmm"
            },
        }
    }
}

impl Group {
    fn of(group: GroupShown) -> Self {
        let places = group.functions.iter().map(|function| {
            let (device, function) = (function >> 3, function & 7);
            format!("{device:02x}.{function}")
        });
        let (container, waits_for_its_container) = match group.holder {
            Holder::Container(id) => (Some(id), false),
            Holder::Pod => (None, false),
            Holder::Nobody => (None, true),
        };
        Self {
            iommu_group: group.number,
            guest_functions: places.collect(),
            guest_addresses: group.addresses.into_iter().collect(),
            container,
            waits_for_its_container,
        }
    }
}

impl Disk {
    fn of(disk: DiskShown) -> Self {
        let (major, minor) = disk.numbers;
        Self {
            device: format!("{major}:{minor}"),
            writable: disk.writable,
            guest_name: disk.name,
            containers: disk.containers,
        }
    }
}

impl Volume {
    fn of(volume: VolumeShown) -> Self {
        Self {
            id: volume.id,
            path: volume.path,
            device: volume.device,
            file_system: volume.file_system,
            writable: !volume.readonly,
        }
    }
}
