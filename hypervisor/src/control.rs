//! The control protocol between the shim and brig-vmm: one message a datagram on a
//! `SOCK_SEQPACKET` socketpair, JSON, with file descriptors beside it as `SCM_RIGHTS`.
//!
//! The VMM opens nothing (DESIGN section 2.1): every kernel, tap, disk, FIFO or socket arrives
//! here. A message names a descriptor by its index in the datagram's ancillary data ([`FdIndex`]).
//! The VMM trusts the shim. The shim does not trust the VMM, which faces the guest: it bounds sizes
//! and ignores unknown ids. When the socket closes, the VMM exits.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::cmsg_space;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The descriptor number at which brig-vmm finds its end of the control socket.
pub const CONTROL_FD: RawFd = 3;
/// The largest message in bytes; a longer one is an error on the sending side.
pub const MAX_MESSAGE: usize = 64 * 1024;
/// The most descriptors one message may carry (`SCM_MAX_FD` is 253).
pub const MAX_FDS: usize = 253;

/// Index into the descriptors that came with a message.
pub type FdIndex = usize;

/// What the shim sends. Each request gets exactly one [`Reply`] with the same id.
#[derive(Debug, Serialize, Deserialize)]
pub struct Request {
    /// Chosen by the shim, unique among requests in flight.
    pub id: u64,
    /// What is asked.
    pub body: RequestBody,
}

/// The requests of the control protocol.
#[derive(Debug, Serialize, Deserialize)]
pub enum RequestBody {
    /// Builds the machine and starts its CPUs. Once.
    Start(Box<VmConfig>),
    /// Opens a vsock stream to a guest port and copies between it and the given descriptors until
    /// both directions have ended; then [`Event::StreamClosed`] follows.
    OpenStream(StreamConfig),
    /// Resets a stream at once.
    CloseStream {
        /// The stream's number.
        stream: u64,
    },
    /// Drops every inode that the file server holds below this path of the share, so that the
    /// mount there can be released.
    ForgetShare {
        /// Relative to the share's root.
        path: String,
    },
    /// Says that what is at this path of the share, or will be, or what is mounted below it, has its answers from elsewhere
    /// (NFS, FUSE), and may never answer: the file server's own thread asks it nothing, not even at the first look.
    RemoteShare {
        /// Relative to the share's root. Until it is forgotten.
        path: String,
    },
    /// Adds a device to the running machine. The guest sees it once it has scanned the PCI bus again. The reply is
    /// [`ReplyBody::Plugged`].
    Plug(DeviceConfig),
    /// Takes a device away that was plugged. The guest should have removed it: else its accesses go nowhere from now
    /// on. The reply comes when I/O in flight has ended and the VMM holds nothing of the device any more.
    Unplug {
        /// As [`ReplyBody::Plugged`] told it.
        function: u8,
    },
    /// Looks at the size of the file or device behind a disk that was plugged; the guest is told of another one.
    Resize {
        /// As [`ReplyBody::Plugged`] told it.
        function: u8,
    },
    /// Says how much memory the guest is to have. It is asked for more, or to give back; it takes its time, and may not
    /// do it. The reply, [`ReplyBody::Memory`], comes at once.
    Memory {
        /// All of its memory in bytes, not less than it was started with; rounded up to 2 MiB.
        bytes: u64,
    },
    /// Lets the guest bring so many CPUs online, if there are fewer; a CPU is never taken back, but waits where the
    /// guest puts it offline.
    Cpus {
        /// No more than it was started for.
        count: u8,
    },
    /// Asks for boot marks and exit counters.
    Counters,
    /// Stops the CPUs of a VM that was started with [`VmConfig::debugger`], looks at them and lets them go on. The reply is
    /// [`ReplyBody::Debug`].
    Debug(DebugRequest),
    /// Ends the VM at once. The reply precedes the exit.
    Stop,
}

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
    /// [`ReplyBody::Started`] says why.
    pub template: Option<FdIndex>,
    /// An empty file: the guest is captured into it when it says that it is ready ([`brig_agent_protocol::BootMark::Still`]), and the VM
    /// ends with [`exit::CAPTURED`].
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

/// The most breakpoints at a time: an x86 CPU has no more.
pub const MAX_BREAKPOINTS: usize = 4;

/// What a debugger wants of the CPUs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DebugRequest {
    /// They are to stop.
    Stop,
    /// They are to go on.
    Go {
        /// This one alone; the others stay where they are.
        only: Option<u8>,
        /// By one instruction.
        step: bool,
        /// Addresses of instructions at which a CPU stops, and all others with it; at most [`MAX_BREAKPOINTS`].
        breakpoints: Vec<u64>,
    },
    /// Whether they have stopped.
    State,
}

/// CPUs that stand still.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stopped {
    /// The one that has met a breakpoint or made its step.
    pub cpu: Option<u8>,
    /// What is in each.
    pub cpus: Vec<Registers>,
}

/// Registers of a CPU (Intel SDM, volume 1, section 3.4).
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names that the architecture gives them")]
pub struct Registers {
    pub rax: u64,
    pub rbx: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub rbp: u64,
    pub rsp: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
    pub rip: u64,
    pub rflags: u64,
    pub cs: u16,
    pub ss: u16,
    pub ds: u16,
    pub es: u16,
    pub fs: u16,
    pub gs: u16,
    pub fs_base: u64,
    pub gs_base: u64,
    pub cr0: u64,
    pub cr3: u64,
    pub cr4: u64,
}

/// A device that is plugged into the running machine.
#[derive(Debug, Serialize, Deserialize)]
pub enum DeviceConfig {
    /// A network interface.
    Net(NetConfig),
    /// A disk.
    Disk(DiskConfig),
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

/// What the VMM sends: replies to requests, and events.
#[derive(Debug, Serialize, Deserialize)]
pub enum FromVmm {
    /// The answer to one request.
    Reply(Reply),
    /// Something happened.
    Event(Event),
}

/// The answer to the request of the same id.
#[derive(Debug, Serialize, Deserialize)]
pub struct Reply {
    /// The request's id.
    pub id: u64,
    /// Its outcome.
    pub result: Result<ReplyBody, ErrorReply>,
}

/// Successful answers.
#[derive(Debug, Serialize, Deserialize)]
pub enum ReplyBody {
    /// Nothing to tell.
    Done,
    /// Answer to [`RequestBody::Start`].
    Started {
        /// Where on the guest's bus 0 its devices of the node are, in the order of [`VmConfig::devices`].
        functions: Vec<u8>,
        /// Whether the guest goes on from the template.
        cloned: bool,
        /// Why not, if there was one.
        refused: Option<String>,
    },
    /// Answer to [`RequestBody::Plug`].
    Plugged {
        /// Where on the guest's bus 0: its device number (five bits) and function number (three).
        function: u8,
    },
    /// Answer to [`RequestBody::Memory`].
    Memory {
        /// The function of the device by which memory comes and goes, once there has been need of one.
        function: Option<u8>,
        /// All that the guest has now, in bytes.
        bytes: u64,
    },
    /// Answer to [`RequestBody::Counters`].
    Counters(Counters),
    /// Answer to [`RequestBody::Debug`]: the CPUs, if all of them stand.
    Debug(Option<Stopped>),
}

/// Why a request failed, for an operator to read.
#[derive(Debug, Clone, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct ErrorReply {
    /// The class of the error; decides the containerd code.
    pub kind: ErrorKind,
    /// One sentence naming the thing and the fix.
    pub message: String,
}

/// Classes of errors, each of which is one containerd code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ErrorKind {
    /// The request itself is wrong (InvalidArgument).
    Invalid,
    /// It does not fit the VM's state (FailedPrecondition).
    State,
    /// The host lacks something (Unavailable).
    Host,
    /// A limit was met (ResourceExhausted).
    Limit,
    /// Ours (Internal).
    Internal,
}

/// What the VMM reports by itself.
#[derive(Debug, Serialize, Deserialize)]
pub enum Event {
    /// The guest wrote a boot mark.
    BootMark {
        /// The byte.
        mark: u8,
        /// Microseconds since brig-vmm was executed.
        micros: u64,
    },
    /// The agent's stream is open.
    AgentConnected {
        /// Microseconds since brig-vmm was executed.
        micros: u64,
    },
    /// A stream has ended in both directions and its descriptors are closed.
    StreamClosed {
        /// Its number.
        stream: u64,
        /// It ended by a reset: refused by the guest, a limit, or CloseStream.
        reset: bool,
    },
    /// The guest's cached inodes take most of the descriptors the file server may have: its kernel
    /// should drop what it does not use. Repeated now and then while that lasts.
    SharePressure,
    /// Something has become of a device of the node that the VM has.
    Device {
        /// As [`ReplyBody::Plugged`] told it.
        function: u8,
        /// What.
        word: DeviceWord,
    },
    /// The VM is at its end; the process exits with this code next. Not sent if it dies by a signal.
    Ended {
        /// One of [`exit`].
        code: i32,
        /// Why, in one sentence.
        reason: String,
    },
    /// A line of the guest's console: early messages with `debug_console`, else a panic's. Bounded
    /// in rate and total.
    Console {
        /// The line without its end.
        line: String,
    },
}

/// What the node's kernel says of a device that it has lent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceWord {
    /// The node wants it back: somebody unbinds or removes it there, and waits. Repeated while that lasts.
    Wanted,
    /// It has reported an error that it does not recover from by itself.
    Failed,
}

/// Counters of one VM since it started.
#[derive(Debug, Default, Clone, Serialize, Deserialize)]
pub struct Counters {
    /// VM exits by reason.
    pub exits: std::collections::BTreeMap<String, u64>,
    /// (mark, microseconds since exec) in order; marks above 0xff are the VMM's own.
    pub marks: Vec<(u16, u64)>,
    /// Requests of the guest to its file server; 0 without a share.
    pub file_requests: u64,
    /// What each virtio device has done.
    pub devices: Vec<DeviceCounters>,
    /// Bytes of memory that the guest did not need and that went back to the node: pages that it reported free or put
    /// into the balloon, and memory that it gave back. A page may go more than once.
    pub given_up_bytes: u64,
}

/// What a virtio device has done since it was put on the bus.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceCounters {
    /// Its kind: "vsock", "fs"…
    pub device: String,
    /// Where on the guest's bus 0.
    pub function: u8,
    /// Events that woke its thread: kicks of the guest, frames for it, ends of I/O.
    pub wakeups: u64,
    /// Of each queue the chains that were given back, and the interrupts for them.
    pub queues: Vec<(u64, u64)>,
}

/// The VMM's own boot marks, beside the guest's bytes.
pub mod mark {
    /// brig-vmm's main was entered.
    pub const VMM_MAIN: u16 = 0x100;
    /// The jail is closed.
    pub const JAILED: u16 = 0x101;
    /// Start was received.
    pub const START: u16 = 0x102;
    /// Guest memory, kernel and devices are ready.
    pub const BUILT: u16 = 0x103;
    /// The first CPU is about to run: kernel entry.
    pub const KERNEL_ENTRY: u16 = 0x104;
    /// The same of a clone, which goes on where its template stood.
    pub const RESUMED: u16 = 0x106;
    /// The agent's stream is open.
    pub const AGENT_CONNECTED: u16 = 0x105;
}

/// Exit codes of brig-vmm.
pub mod exit {
    /// The guest powered off.
    pub const POWER_OFF: i32 = 0;
    /// The guest rebooted (it was not asked to).
    pub const REBOOT: i32 = 10;
    /// The guest kernel panicked.
    pub const PANIC: i32 = 11;
    /// The VMM met an error of its own or of the host.
    pub const INTERNAL: i32 = 12;
    /// The guest broke a device's or the machine's rules beyond repair (e.g. an emulation failure).
    pub const GUEST_FAULT: i32 = 13;
    /// The control socket closed, or Stop.
    pub const STOPPED: i32 = 14;
    /// The jail could not be built.
    pub const JAIL: i32 = 15;
    /// The guest was captured, as asked.
    pub const CAPTURED: i32 = 16;
}

/// Sends one message with its descriptors. `EAGAIN` is returned as such on a non-blocking socket.
///
/// # Errors
/// `InvalidInput` for a message over [`MAX_MESSAGE`] or with more than [`MAX_FDS`] descriptors,
/// else what `sendmsg` says.
pub fn send<T: Serialize>(
    socket: BorrowedFd<'_>,
    message: &T,
    fds: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let bytes = serde_json::to_vec(message).map_err(io::Error::other)?;
    if bytes.len() > MAX_MESSAGE || fds.len() > MAX_FDS {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!(
                "control message of {} bytes and {} descriptors is over the limit of {MAX_MESSAGE} and {MAX_FDS}",
                bytes.len(),
                fds.len()
            ),
        ));
    }
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
    sendmsg::<()>(
        socket.as_raw_fd(),
        &[IoSlice::new(&bytes)],
        control,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    Ok(())
}

/// Receives one message with its descriptors (close-on-exec); `None` when the peer has closed. Descriptors that
/// the receiver had no room for are missing at the end.
///
/// # Errors
/// `InvalidData` for a message that is truncated or not of this protocol, else what `recvmsg` says.
pub fn receive<T: DeserializeOwned>(
    socket: BorrowedFd<'_>,
) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    receive_with(socket, Some(cmsg_space!([RawFd; MAX_FDS])))
}

/// Receives one message of the VMM, which is not trusted: no descriptor of it ever becomes one of this process.
///
/// # Errors
/// As [`receive`]; a message with a descriptor is a truncated one.
pub fn receive_from_vmm(socket: BorrowedFd<'_>) -> io::Result<Option<FromVmm>> {
    Ok(receive_with(socket, None)?.map(|(message, _)| message))
}

fn receive_with<T: DeserializeOwned>(
    socket: BorrowedFd<'_>,
    mut control: Option<Vec<u8>>,
) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let mut bytes = vec![0u8; MAX_MESSAGE];
    let mut slices = [IoSliceMut::new(&mut bytes)];
    // Who takes no descriptors has no room for any.
    let refused = if control.is_some() {
        MsgFlags::MSG_TRUNC
    } else {
        MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC
    };
    let received = recvmsg::<()>(
        socket.as_raw_fd(),
        &mut slices,
        control.as_deref_mut(),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    if received.flags.intersects(refused) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "control message was truncated",
        ));
    }
    let mut fds = Vec::new();
    for message in received.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = message {
            for fd in raw {
                // SAFETY: the kernel has just installed this descriptor for us alone.
                fds.push(unsafe { OwnedFd::from_raw_fd(fd) });
            }
        }
    }
    let length = received.bytes;
    if length == 0 {
        return Ok(None);
    }
    let message = serde_json::from_slice(&bytes[..length])
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    Ok(Some((message, fds)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    use std::os::fd::AsFd;

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )
        .unwrap()
    }

    #[test]
    fn a_descriptor_of_the_vmm_never_becomes_one_of_the_shims() {
        let (ours, theirs) = pair();
        let event = || {
            FromVmm::Reply(Reply {
                id: 7,
                result: Ok(ReplyBody::Done),
            })
        };
        let (reader, writer) = nix::unistd::pipe().unwrap();
        send(theirs.as_fd(), &event(), &[writer.as_fd()]).unwrap();
        drop(writer);
        let error = receive_from_vmm(ours.as_fd()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        // With nobody left to write, the end is there.
        assert_eq!(nix::unistd::read(&reader, &mut [0]).unwrap(), 0);
        send(theirs.as_fd(), &event(), &[]).unwrap();
        let received = receive_from_vmm(ours.as_fd()).unwrap();
        assert!(matches!(
            received,
            Some(FromVmm::Reply(Reply { id: 7, .. }))
        ));
    }

    #[test]
    fn a_message_arrives_with_its_descriptors_in_order() {
        let (a, b) = pair();
        let (r, w) = nix::unistd::pipe().unwrap();
        let request = Request {
            id: 7,
            body: RequestBody::CloseStream { stream: 9 },
        };
        send(a.as_fd(), &request, &[r.as_fd(), w.as_fd()]).unwrap();
        let (got, fds) = receive::<Request>(b.as_fd()).unwrap().unwrap();
        assert_eq!(got.id, 7);
        assert_eq!(fds.len(), 2);
        nix::unistd::write(&fds[1], b"x").unwrap();
        let mut buffer = [0u8; 1];
        assert_eq!(nix::unistd::read(&r, &mut buffer).unwrap(), 1);
    }

    #[test]
    fn a_closed_peer_is_told_from_an_empty_message() {
        let (a, b) = pair();
        drop(a);
        assert!(receive::<Request>(b.as_fd()).unwrap().is_none());
    }

    #[test]
    fn a_message_over_the_limit_is_refused_before_it_is_sent() {
        let (a, _b) = pair();
        let request = Request {
            id: 1,
            body: RequestBody::ForgetShare {
                path: "x".repeat(MAX_MESSAGE),
            },
        };
        let error = send(a.as_fd(), &request, &[]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }
}
