//! The control protocol between the shim and brig-vmm: one message a datagram on a
//! `SOCK_SEQPACKET` socketpair, JSON, with file descriptors beside it as `SCM_RIGHTS`.
//!
//! The VMM opens nothing (DESIGN section 2.1): every kernel, tap, disk, FIFO or socket arrives
//! here. A message names a descriptor by its index in the datagram's ancillary data ([`FdIndex`]).
//! The VMM trusts the shim. The shim does not trust the VMM, which faces the guest: it bounds sizes
//! and ignores unknown ids. When the socket closes, the VMM exits.

use std::os::fd::RawFd;

use serde::{Deserialize, Serialize};

mod debug;
mod machine;
mod socket;

pub use debug::{DebugRequest, MAX_BREAKPOINTS, Registers, Stopped};
pub use machine::{
    DeviceConfig, DiskConfig, DiskPiece, NetConfig, PIECE_ALIGNMENT, PMEM_START, PmemConfig,
    SpaceConfig, StreamConfig, VfioConfig, VmConfig,
};
pub use socket::{receive, receive_from_vmm, send};

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
