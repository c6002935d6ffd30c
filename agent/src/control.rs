//! What the agent and its `container-init` helper say to each other.
//!
//! The instructions come in a sealed memory file on descriptor 4; messages travel on a
//! SOCK_SEQPACKET pair, the helper's end being descriptor 3. A process whose namespaces are to be joined comes as a pidfd on
//! descriptor 5: its number may be another one's by the time the helper looks. Both ends are this binary, but the helper
//! ends up beside hostile processes, so the agent bounds what it reads and trusts the helper's
//! words for the time before the container's own program runs only.
use std::{
    collections::BTreeMap,
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::PathBuf,
};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize};

use crate::root_disks;
use crate::spec::{Device, IdMapping, Personality, Process, Rlimit, Seccomp, Spec};

/// Descriptor of the helper's end of the message socket.
pub const CONTROL_FD: i32 = 3;
/// Descriptor of the instructions.
pub const INSTRUCTIONS_FD: i32 = 4;
/// Descriptor of the process whose namespaces are joined, if there is one.
pub const JOINED_FD: i32 = 5;
/// Longest message.
const MAX_MESSAGE: usize = 16 * 1024;

/// What a helper is to do.
#[derive(Debug, Deserialize, Serialize)]
pub enum Instructions {
    /// Build a container and become its init process.
    Create(Box<Create>),
    /// Join a container and become one of its processes.
    Exec(Box<Exec>),
    /// Hold a pid namespace that containers share, and reap in it.
    HoldPidNamespace {
        /// Its own cgroup directory.
        cgroup: PathBuf,
    },
}

/// See [`Instructions::Create`]. All paths are the agent's.
#[derive(Debug, Deserialize, Serialize)]
pub struct Create {
    /// The container's id, checked by the agent.
    pub id: String,
    /// The specification, checked by the agent for what is refused.
    pub spec: Spec,
    /// An empty directory of the agent to mount the root file system on.
    pub root_mount: PathBuf,
    /// The share, and the root file system's path in it.
    pub share: PathBuf,
    /// Path of the root file system under the share.
    pub rootfs: String,
    /// The mounts of one that is on disks, the last being the root; else empty.
    pub root: Vec<root_disks::Mount>,
    /// What bind mounts show, by index into `spec.mounts`.
    pub mount_sources: BTreeMap<u32, MountSource>,
    /// Where the sandbox's volumes are.
    pub volumes: PathBuf,
    /// Nodes of devices that the container was given.
    pub given: Vec<Device>,
    /// Names below /dev of the disks that it was given.
    pub disks: Vec<String>,
    /// The sandbox's shared memory file system.
    pub shm: PathBuf,
    /// The container's cgroup directory.
    pub cgroup: PathBuf,
    /// The pid namespace of [`JOINED_FD`] is shared; else there is a new one.
    pub shares_pids: bool,
    /// The mount of the cgroup hierarchy.
    pub cgroup_root: PathBuf,
    /// Resource limits where the specification names none.
    pub limits: Vec<Rlimit>,
    /// Terminal size, if there is a terminal.
    pub terminal: Option<Terminal>,
}

/// What a bind mount shows.
#[derive(Debug, Deserialize, Serialize)]
pub enum MountSource {
    /// What the host shares.
    Share {
        /// A path under the share.
        path: String,
        /// What of it; empty for all.
        inside: String,
        /// The host holds `ro`, not the guest.
        readonly_on_host: bool,
        /// The host has mapped its owners.
        mapped_on_host: bool,
        /// A directory, and so a file system of its own.
        directory: bool,
    },
    /// A volume in the guest's memory.
    Volume {
        /// Its id.
        id: String,
        /// What of it; empty for all.
        path: String,
        /// The host has mapped its owners.
        mapped_on_host: bool,
    },
    /// A character device of the guest, or a disk that was given, by its name below /dev.
    Device(String),
    /// A path in the handler's driver bundle.
    Bundle(String),
}

/// See [`Instructions::Exec`]. The container is that of [`JOINED_FD`], its init process.
#[derive(Debug, Deserialize, Serialize)]
pub struct Exec {
    /// The container, whose session keyring its processes share.
    pub id: String,
    /// What to run.
    pub process: Process,
    /// The container's seccomp profile, which holds for each of its processes.
    pub seccomp: Option<Seccomp>,
    /// The container's, which holds for each of its processes.
    pub personality: Option<Personality>,
    /// The maps of the container's user namespace; empty without one.
    pub uid_mappings: Vec<IdMapping>,
    /// See `uid_mappings`.
    pub gid_mappings: Vec<IdMapping>,
    /// The container has a time namespace of its own.
    pub time_namespace: bool,
    /// The cgroups to try in turn.
    pub cgroups: Vec<PathBuf>,
    /// Resource limits where the process names none.
    pub limits: Vec<Rlimit>,
    /// Terminal size, if there is a terminal.
    pub terminal: Option<Terminal>,
}

/// Terminal size in characters; 0 by 0 leaves the kernel's default.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub struct Terminal {
    /// Lines.
    pub rows: u16,
    /// Characters a line.
    pub columns: u16,
}

/// What the helper tells the agent. After [`Message::Ready`] and the agent's [`GO`] the end of the
/// socket means that the program runs.
#[derive(Debug, Deserialize, Serialize)]
pub enum Message {
    /// The pid, in the agent's pid namespace, of the process that will run the program; its pidfd comes with this message.
    Pid(i32),
    /// The pty master comes with this message.
    Terminal,
    /// The /dev of a privileged container, a tmpfs, comes with this message.
    Devices,
    /// Something was left out, and why.
    Warning(String),
    /// Everything is set up but what changes the process itself; waits for [`GO`].
    Ready,
    /// It failed: one sentence.
    Failed(String),
}

/// The agent's one message: run the program.
pub const GO: &[u8] = b"go";

/// Sends one message, with a descriptor if given.
///
/// # Errors
/// Those of sendmsg(2).
pub fn send(
    socket: BorrowedFd<'_>,
    message: &Message,
    fd: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let mut bytes = serde_json::to_vec(message)?;
    if bytes.len() > MAX_MESSAGE {
        bytes = serde_json::to_vec(&Message::Failed("the helper's message was too long".into()))?;
    }
    match fd {
        // Not sendmsg: the last message may have to pass a seccomp profile, which allows write.
        None => rustix::io::write(socket, &bytes).map(drop)?,
        Some(fd) => send_fd(socket, &bytes, fd)?,
    }
    Ok(())
}

/// Sends bytes, at least one, and a descriptor.
///
/// # Errors
/// Those of sendmsg(2).
pub fn send_fd(socket: BorrowedFd<'_>, bytes: &[u8], fd: BorrowedFd<'_>) -> io::Result<()> {
    let fds = [fd];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&fds));
    sendmsg(
        socket,
        &[IoSlice::new(bytes)],
        &mut control,
        SendFlags::NOSIGNAL,
    )?;
    Ok(())
}

/// Receives one message and the descriptor that came with it; `None` at the end of the socket.
///
/// # Errors
/// Those of recvmsg(2), and `InvalidData` for what is not a message.
pub fn receive(socket: impl AsFd) -> io::Result<Option<(Message, Option<OwnedFd>)>> {
    let (bytes, fd) = receive_fd(socket)?;
    if bytes.is_empty() {
        return Ok(None);
    }
    Ok(Some((serde_json::from_slice(&bytes)?, fd)))
}

/// Receives one packet, at most as long as a message, and the descriptor that came with it. Nothing is the end
/// of the socket.
///
/// # Errors
/// Those of recvmsg(2).
pub fn receive_fd(socket: impl AsFd) -> io::Result<(Vec<u8>, Option<OwnedFd>)> {
    let mut bytes = vec![0; MAX_MESSAGE];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got = recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut bytes)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    bytes.truncate(got.bytes);
    let mut fd = None;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            fd = fds.last();
        }
    }
    Ok((bytes, fd))
}
