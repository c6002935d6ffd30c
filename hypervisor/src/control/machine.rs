//! The machine that the shim has built, and what is plugged into it.

use serde::{Deserialize, Serialize};

use super::FdIndex;

/// A machine: everything brig-vmm needs to build it.
#[derive(Debug, Serialize, Deserialize)]
pub struct VmConfig {
    /// Online CPUs at boot, 1 to 64.
    pub vcpus: u8,
    /// As many as it may ever have; no more than `vcpus`: none is added.
    pub max_vcpus: u8,
    /// Guest RAM in bytes; rounded up to 2 MiB.
    pub memory_bytes: u64,
    /// As much as it may ever have; no more than that: it never changes.
    pub max_memory_bytes: u64,
    /// `/dev/kvm`.
    pub kvm: FdIndex,
    /// vmlinux, an ELF with a PVH entry note.
    pub kernel: FdIndex,
    /// The initramfs, an uncompressed or compressed cpio.
    pub initramfs: FdIndex,
    /// Appended to the built-in kernel command line.
    pub cmdline: String,
    /// A template to go on from instead of booting ([`crate::template`]). If it is of no use the guest boots after all, and
    /// [`ReplyBody::Started`](super::ReplyBody::Started) says why.
    pub template: Option<FdIndex>,
    /// An empty file: the guest is captured into it when it says that it is ready ([`brig_agent_protocol::BootMark::Still`]), and the VM
    /// ends with [`exit::CAPTURED`](super::exit::CAPTURED).
    pub capture: Option<FdIndex>,
    /// A connected stream socket: the VMM's end of the agent's ttrpc connection.
    pub agent: FdIndex,
    /// Network interfaces, in PCI slot order.
    pub nets: Vec<NetConfig>,
    /// Block devices, in PCI slot order.
    pub disks: Vec<DiskConfig>,
    /// Serve `/shared` of the VMM's mount namespace as a virtio-fs device with this tag.
    pub share_tag: Option<String>,
    /// Copy early kernel messages to the log, not only a panic's.
    pub debug_console: bool,
    /// Its CPUs may be stopped and looked at.
    pub debugger: bool,
    /// Start although `/dev/kvm` emulates instead of virtualising.
    pub allow_slow_kvm: bool,
    /// The VM may be given devices of the node while it runs: the control loop may start a thread that makes VFIO's
    /// calls.
    pub passthrough: bool,
    /// Interfaces may be served by the node's vhost-net: the thread that they are on may make its calls.
    pub vhost: bool,
    /// Devices of the node that are there when the guest boots. Its memory is pinned before it runs.
    pub devices: Vec<VfioConfig>,
}

/// A device that is plugged into the running machine.
#[derive(Debug, Serialize, Deserialize)]
pub enum DeviceConfig {
    /// A network interface.
    Net(NetConfig),
    /// A disk.
    Disk(DiskConfig),
    /// A disk that is guest memory.
    Pmem(PmemConfig),
    /// A device of the node.
    Vfio(VfioConfig),
}

/// A PCI function of the node, opened by way of VFIO.
#[derive(Debug, Serialize, Deserialize)]
pub struct VfioConfig {
    /// The device, which uses the address space that the VM's devices share.
    pub device: FdIndex,
    /// With the first device that the VM has: that address space.
    pub space: Option<SpaceConfig>,
    /// Where it is on the node, for messages: `0000:3b:00.0`.
    pub name: String,
}

/// Guest memory as the devices of the node see it: nothing is mapped in it yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum SpaceConfig {
    /// A container of VFIO groups, its IOMMU set to type 1.
    Container(FdIndex),
    /// An I/O address space.
    Ioas {
        /// Whose it is: `/dev/iommu`.
        iommufd: FdIndex,
        /// Its number there.
        id: u32,
    },
}

/// A virtio-net interface on a tap.
#[derive(Debug, Serialize, Deserialize)]
pub struct NetConfig {
    /// One tap descriptor per queue pair, opened with `IFF_VNET_HDR | IFF_NO_PI`.
    pub taps: Vec<FdIndex>,
    /// One descriptor of `/dev/vhost-net` for each tap, which then moves the frames; none: the VMM does. Only in a VM with
    /// [`VmConfig::vhost`].
    pub vhosts: Vec<FdIndex>,
    /// MAC address of the guest's interface.
    pub mac: [u8; 6],
    /// MTU in bytes offered to the guest.
    pub mtu: u16,
}

impl NetConfig {
    /// Whether the node's vhost-net moves the frames.
    #[must_use]
    pub fn by_vhost(&self) -> bool {
        !self.vhosts.is_empty()
    }
}

/// A virtio-blk device over raw files or a block device.
#[derive(Debug, Serialize, Deserialize)]
pub struct DiskConfig {
    /// What it is made of, one behind the other. A single one without a length may grow; more of them are read-only.
    pub pieces: Vec<DiskPiece>,
    /// Refuse writes.
    pub readonly: bool,
    /// At most 20 bytes; the guest finds the disk by it.
    pub serial: String,
    /// Bytes of a logical block: a power of two from 512 to 4096, that of a device of the node.
    pub block_size: u32,
}

/// A virtio-pmem device over files, to be read alone: the guest has them where the node has them in memory. The first
/// begins at [`PMEM_START`], each at the end of the one before, and what lies around them reads as zeros.
#[derive(Debug, Serialize, Deserialize)]
pub struct PmemConfig {
    /// The files, each with its length.
    pub pieces: Vec<DiskPiece>,
}

/// Where the first file of a disk that is guest memory begins, in bytes. What Linux takes for a table of partitions
/// (below 4 KiB) or for a label of persistent memory (from 4 KiB on) is then nothing that an image holds.
pub const PMEM_START: u64 = 8192;

/// A file or block device that a disk is made of.
#[derive(Debug, Serialize, Deserialize)]
pub struct DiskPiece {
    /// The file or block device.
    pub file: FdIndex,
    /// Bytes that it has on the disk: its own, filled up with zeros to a multiple of [`PIECE_ALIGNMENT`]. None: whole
    /// sectors of what it has.
    pub length: Option<u64>,
}

impl DiskPiece {
    /// All of a file or device, as it is and will be.
    #[must_use]
    pub fn whole(file: FdIndex) -> Self {
        Self { file, length: None }
    }
}

/// In bytes.
pub const PIECE_ALIGNMENT: u64 = 4096;

/// One host-initiated vsock stream.
#[derive(Debug, Serialize, Deserialize)]
pub struct StreamConfig {
    /// Chosen by the shim, unique for the life of the VM; also the header the guest receives.
    pub stream: u64,
    /// Guest port.
    pub port: u32,
    /// Bytes sent before any input.
    pub header: Vec<u8>,
    /// Read until end of file and sent to the guest. None: the sending side is shut down at once.
    pub input: Option<FdIndex>,
    /// Receives what the guest sends. None: it is discarded.
    pub output: Option<FdIndex>,
}
