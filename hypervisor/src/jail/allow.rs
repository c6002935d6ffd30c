//! The checked-in list of what the living VMM may have and do: capabilities, descriptors, mounts,
//! system calls by kind of thread. `tests/jail` compares it with a running process.
//!
//! To widen it, add a line here with its reason. Denied by not being here, whatever the arguments:
//! mounts, `setns`, `unshare` of anything but a umask, new processes, `socket`, `execve`, `io_uring_setup`, `ptrace`, `process_vm_*`,
//! `bpf`, `keyctl`, `open_by_handle_at`, `userfaultfd`, `perf_event_open`, `memfd_create`, and
//! executable memory.

use caps::Capability;

#[cfg(any(test, feature = "jail-probe"))]
pub(super) use super::thread_kind::KINDS;
pub use super::thread_kind::ThreadKind;
use crate::vfio::{kernel, space};

/// Capabilities in the VMM's user namespace, for the file server alone: what a container's root may do
/// to the files of its volumes. Never `SYS_ADMIN`: with it a read-only mount could be made writable.
pub const CAPABILITIES: &[Capability] = &[
    Capability::CAP_CHOWN,
    Capability::CAP_DAC_OVERRIDE,
    Capability::CAP_FOWNER,
    Capability::CAP_FSETID,
    Capability::CAP_SETUID,
    Capability::CAP_SETGID,
    Capability::CAP_SETFCAP,
];

/// (mount point, file system, must be read-only) right after [`super::enter`]. Later ones are below
/// `/shared` only.
pub const MOUNTS: &[(&str, &str, bool)] = &[
    ("/", "tmpfs", true),
    ("/proc", "proc", true),
    ("/shared", "tmpfs", true),
];

/// Flags of every mount of the jail and of every mount attached to it.
pub const MOUNT_FLAGS: &[&str] = &["nosuid", "nodev", "noexec"];

/// What `/proc/PID/fd/*` may point at: exactly, or by prefix where the entry ends in `*`.
pub const DESCRIPTORS: &[&str] = &[
    // A file by itself on a detached read-only mount, see `open_sealed`: /dev/null (0 and 1), /dev/kvm,
    // /dev/net/tun, the kernel, the initramfs, disks, FIFOs of container streams.
    "/",
    // What a guest is captured into: memory of the template's maker, of no file system.
    "/memfd:brig-capture (deleted)",
    // The log, output that the shim copies into files and streams.
    "pipe:*",
    // The control socket, the agent's stream, streams of port-forward.
    "socket:*",
    "anon_inode:[eventfd]",
    "anon_inode:[eventpoll]",
    "anon_inode:kvm-vm",
    "anon_inode:kvm-vcpu:*",
    "anon_inode:kvm-vcpu-stats:*",
    "anon_inode:kvm-vm-stats",
    // By which KVM is told of the VM's devices of the node.
    "anon_inode:kvm-vfio",
    // A device of the node. Its container is one file by itself, as above.
    "anon_inode:[vfio-device]",
    // The file server's, of the jail's own procfs and of the share.
    "/proc/1/fd",
    "/shared*",
];

/// Whether a descriptor's link target is on the list.
#[must_use]
pub fn descriptor(target: &str) -> bool {
    DESCRIPTORS
        .iter()
        .any(|entry| match entry.strip_suffix('*') {
            Some(prefix) => target.starts_with(prefix),
            None => target == *entry,
        })
}

/// When a system call is allowed.
#[derive(Debug, Clone, Copy)]
pub enum When {
    /// With any arguments.
    Always,
    /// If the argument (from 0, its low 32 bits) is one of these.
    OneOf(u8, &'static [u32]),
    /// If the argument (from 0) has none of these bits.
    Without(u8, u32),
}

/// One allowed system call.
#[derive(Debug, Clone, Copy)]
pub struct Allowed {
    /// Its number.
    pub number: libc::c_long,
    /// libc's name of the number, for messages.
    pub name: &'static str,
    /// The condition.
    pub when: When,
}

macro_rules! allow {
    ($($call:ident $($condition:ident ( $argument:literal, $value:expr ))? ,)*) => {
        &[$(Allowed {
            number: libc::$call,
            name: stringify!($call),
            when: allow!(@when $($condition $argument, $value)?),
        }),*]
    };
    (@when) => { When::Always };
    (@when one_of $argument:literal, $value:expr) => { When::OneOf($argument, $value) };
    (@when without $argument:literal, $value:expr) => { When::Without($argument, $value) };
}

const EXECUTABLE: u32 = libc::PROT_EXEC.cast_unsigned();

/// Every thread: the allocator, locks, clocks, pipes and eventfds, an orderly end.
const EVERY: &[Allowed] = allow![
    SYS_read,
    SYS_write,
    SYS_readv,
    SYS_writev,
    SYS_close,
    SYS_futex,
    SYS_mmap without(2, EXECUTABLE),
    SYS_mprotect without(2, EXECUTABLE),
    SYS_munmap,
    SYS_mremap,
    SYS_madvise,
    SYS_brk,
    SYS_rt_sigreturn,
    SYS_rt_sigprocmask,
    SYS_sigaltstack,
    SYS_restart_syscall,
    SYS_sched_yield,
    SYS_gettid,
    SYS_getpid,
    // Kicks CPU threads; in the jail's pid namespace there is no other process.
    SYS_tgkill,
    // Usually the vDSO's; the system call is its fallback on an unstable clock.
    SYS_clock_gettime,
    SYS_clock_nanosleep,
    SYS_getrandom,
    // A condition the standard library checks once a thread, for thread ends.
    SYS_set_robust_list,
    SYS_rseq,
    SYS_exit,
    SYS_exit_group,
];

/// Waiting for descriptors.
const EPOLL: &[Allowed] = allow![
    SYS_epoll_wait,
    SYS_epoll_pwait,
    SYS_epoll_ctl,
    SYS_poll,
    SYS_ppoll,
    SYS_eventfd2,
    SYS_fcntl one_of(1, &FCNTL),
];

/// The real ids stay: they are whose account the kernel's counters are on.
const UNCHANGED: [u32; 1] = [u32::MAX];

const FCNTL: [u32; 5] = [
    libc::F_GETFD.cast_unsigned(),
    libc::F_SETFD.cast_unsigned(),
    libc::F_GETFL.cast_unsigned(),
    libc::F_SETFL.cast_unsigned(),
    libc::F_DUPFD_CLOEXEC.cast_unsigned(),
];

/// What the guest's moving of BARs and MSI-X vectors asks of KVM; `linux/kvm.h`.
const KVM_VM: [u32; 6] = [
    0x4020_ae46, // KVM_SET_USER_MEMORY_REGION
    0x4008_ae6a, // KVM_SET_GSI_ROUTING
    0x4020_ae76, // KVM_IRQFD
    0x4040_ae79, // KVM_IOEVENTFD
    0x4020_aea5, // KVM_SIGNAL_MSI
    0x4048_ae49, // KVM_SET_USER_MEMORY_REGION2
];

/// And running a CPU.
const KVM_VCPU: [u32; 13] = [
    KVM_VM[0],
    KVM_VM[1],
    KVM_VM[2],
    KVM_VM[3],
    KVM_VM[4],
    KVM_VM[5],
    0x0000_ae80, // KVM_RUN
    0x8090_ae81, // KVM_GET_REGS, for the report of a failed emulation
    0x8138_ae83, // KVM_GET_SREGS, likewise
    0x8040_ae9f, // KVM_GET_VCPU_EVENTS, likewise
    0x8004_ae98, // KVM_GET_MP_STATE
    0x4004_ae99, // KVM_SET_MP_STATE
    0x0000_aead, // KVM_KVMCLOCK_CTRL
];

const MAIN: &[Allowed] = allow![
    SYS_recvmsg,
    SYS_sendmsg,
    SYS_sendto,
    SYS_recvfrom,
    SYS_shutdown,
    SYS_ioctl one_of(1, &MAIN_IOCTL),
    // A thread for a device that is plugged into the running machine inherits this list and takes its own besides, so
    // all of WORKER is on it too.
    SYS_epoll_create1,
    SYS_prctl one_of(0, &NO_NEW_PRIVS),
    SYS_seccomp one_of(0, &SET_FILTER),
];

/// Another thread: a thread and nothing else, as the C libraries start one.
const THREADS: &[Allowed] = allow![
    SYS_clone one_of(0, &NEW_THREAD),
    // Its arguments cannot be looked at; see `WITHOUT_CLONE3`.
    SYS_clone3,
    SYS_sched_getaffinity,
    SYS_prctl one_of(0, &SET_NAME),
];

/// Answered with `ENOSYS` where it is allowed, so that the C library takes `clone`, whose flags are in an argument.
pub const WITHOUT_CLONE3: libc::c_long = libc::SYS_clone3;

/// The flags of a thread: those of glibc, and those of musl, which adds `CLONE_DETACHED`.
const NEW_THREAD: [u32; 2] = [THREAD_FLAGS, THREAD_FLAGS | 0x0040_0000];

const THREAD_FLAGS: u32 = (libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM
    | libc::CLONE_SETTLS
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_CLEARTID)
    .cast_unsigned();

const SET_NAME: [u32; 1] = [libc::PR_SET_NAME.cast_unsigned()];

/// What its own filter asks for.
const NO_NEW_PRIVS: [u32; 1] = [libc::PR_SET_NO_NEW_PRIVS.cast_unsigned()];

const SET_FILTER: [u32; 1] = [libc::SECCOMP_SET_MODE_FILTER];

/// Function by function, and the tap of an interface that is plugged later.
const MAIN_IOCTL: [u32; 8] = [
    KVM_VM[0],
    KVM_VM[1],
    KVM_VM[2],
    KVM_VM[3],
    KVM_VM[4],
    KVM_VM[5],
    0x4004_54d0, // TUNSETOFFLOAD
    0x4004_54d8, // TUNSETVNETHDRSZ
];

const VCPU: &[Allowed] = allow![
    SYS_ioctl one_of(1, &KVM_VCPU),
    SYS_ppoll,
    // The guest unmasks a pending vector (its irqfd) or sets DRIVER_OK (a copy of each queue's event).
    SYS_eventfd2,
    SYS_fcntl one_of(1, &FCNTL),
];

/// What KVM keeps of it, and of its VM's clock. That registers of the model can be set is tried by setting them.
const CAPTURE: &[Allowed] = allow![SYS_ioctl one_of(1, &CAPTURE_IOCTL),];

const CAPTURE_IOCTL: [u32; 8] = [
    0x8030_ae7c, // KVM_GET_CLOCK
    0xc008_ae88, // KVM_GET_MSRS
    0x4008_ae89, // KVM_SET_MSRS
    0x8400_ae8e, // KVM_GET_LAPIC
    0x8080_aea1, // KVM_GET_DEBUGREGS
    0x9000_aea4, // KVM_GET_XSAVE
    0x8188_aea6, // KVM_GET_XCRS
    0x8004_ae98, // KVM_GET_MP_STATE
];

/// Breakpoints and steps of a guest that may be debugged.
const DEBUG: &[Allowed] = allow![SYS_ioctl one_of(1, &DEBUG_IOCTL),];

const DEBUG_IOCTL: [u32; 1] = [
    0x4048_ae9b, // KVM_SET_GUEST_DEBUG
];

/// A CPU that is made while the machine runs, before its thread is started, which inherits all of [`VCPU`].
const NEW_VCPU: &[Allowed] = allow![SYS_ioctl one_of(1, &NEW_VCPU_IOCTL),];

const NEW_VCPU_IOCTL: [u32; 5] = [
    0x0000_ae41, // KVM_CREATE_VCPU
    0x4008_ae90, // KVM_SET_CPUID2
    0x8138_ae83, // KVM_GET_SREGS
    0x4138_ae84, // KVM_SET_SREGS
    0x4008_ae89, // KVM_SET_MSRS
];

const WORKER: &[Allowed] = allow![
    // Streams.
    SYS_recvmsg,
    SYS_sendmsg,
    SYS_sendto,
    SYS_recvfrom,
    SYS_shutdown,
    // Disks.
    SYS_pread64,
    SYS_pwrite64,
    SYS_preadv,
    // What can be read without waiting.
    SYS_preadv2,
    SYS_pwritev,
    SYS_fdatasync,
    SYS_fsync,
    SYS_fallocate,
    SYS_lseek,
    SYS_fstat,
    SYS_newfstatat,
    // Taps, interrupts and discard.
    SYS_ioctl one_of(1, &WORKER_IOCTL),
];

const WORKER_IOCTL: [u32; 8] = [
    // A function's vectors are routed when it first interrupts.
    KVM_VM[1],
    KVM_VM[2],
    0x4004_54d0, // TUNSETOFFLOAD
    0x4004_54d8, // TUNSETVNETHDRSZ
    0x0000_5421, // FIONBIO
    0x0000_541b, // FIONREAD
    0x0000_1277, // BLKDISCARD
    0x0000_127f, // BLKZEROOUT
];

/// The rings of an interface and guest memory, for the node's kernel to serve, and which of a tap's queues get frames.
const VHOST: &[Allowed] = allow![SYS_ioctl one_of(1, &VHOST_IOCTL),];

const VHOST_IOCTL: [u32; 11] = [
    0x4008_af00, // VHOST_SET_FEATURES
    0x0000_af01, // VHOST_SET_OWNER
    0x4008_af03, // VHOST_SET_MEM_TABLE
    0x4008_af10, // VHOST_SET_VRING_NUM
    0x4028_af11, // VHOST_SET_VRING_ADDR
    0x4008_af12, // VHOST_SET_VRING_BASE
    0x4008_af20, // VHOST_SET_VRING_KICK
    0x4008_af21, // VHOST_SET_VRING_CALL
    0x4008_af22, // VHOST_SET_VRING_ERR
    0x4008_af30, // VHOST_NET_SET_BACKEND
    0x4004_54d9, // TUNSETQUEUE
];

/// A device of the node, and guest memory for it. Its interrupts' events and its BARs' memory slots are made and
/// taken by whichever thread the guest's write came to.
const VFIO: &[Allowed] = allow![
    SYS_pread64,
    SYS_pwrite64,
    SYS_ioctl one_of(1, &VFIO_IOCTL),
];

const VFIO_IOCTL: [u32; 13] = [
    kernel::REQUESTS[0],
    kernel::REQUESTS[1],
    kernel::REQUESTS[2],
    kernel::REQUESTS[3],
    space::REQUESTS[0],
    space::REQUESTS[1],
    space::REQUESTS[2],
    space::REQUESTS[3],
    KVM_VM[0],
    KVM_VM[1],
    KVM_VM[2],
    // KVM is told of the device, by the control loop's part of KVM for the VM's first one.
    0xc00c_aee0, // KVM_CREATE_DEVICE
    0x4018_aee1, // KVM_SET_DEVICE_ATTR
];

/// Files below `/shared`. Landlock and the empty root decide which; this decides what.
const FS: &[Allowed] = allow![
    SYS_openat,
    SYS_newfstatat,
    SYS_fstat,
    SYS_statx,
    SYS_name_to_handle_at one_of(4, &HANDLE_OF_DESCRIPTOR),
    SYS_fstatfs,
    SYS_getdents64,
    SYS_lseek,
    SYS_readlinkat,
    SYS_pread64,
    SYS_pwrite64,
    SYS_preadv,
    // What can be read without waiting.
    SYS_preadv2,
    SYS_pwritev,
    SYS_ftruncate,
    SYS_fallocate,
    SYS_fsync,
    SYS_fdatasync,
    // A guest's sync(2): of the file systems it can write to.
    SYS_syncfs,
    SYS_dup,
    SYS_mkdirat,
    SYS_mknodat,
    SYS_symlinkat,
    SYS_linkat,
    SYS_unlinkat,
    SYS_renameat2,
    SYS_fchmod,
    SYS_fchmodat,
    SYS_fchownat,
    SYS_utimensat,
    SYS_setxattr,
    SYS_getxattr,
    SYS_listxattr,
    SYS_removexattr,
    SYS_umask,
    // A helper's umask becomes its own, and nothing else.
    SYS_unshare one_of(0, &OWN_UMASK),
    // The guest's user owns what it creates.
    SYS_setresuid one_of(0, &UNCHANGED),
    SYS_setresgid one_of(0, &UNCHANGED),
    // Interrupts, and the flags of files.
    SYS_ioctl one_of(1, &FS_IOCTL),
];

/// Tells a server's files apart: `AT_EMPTY_PATH` with `AT_HANDLE_FID`, and without it before Linux 6.5.
const HANDLE_OF_DESCRIPTOR: [u32; 2] = [0x1200, 0x1000];

const OWN_UMASK: [u32; 1] = [libc::CLONE_FS.cast_unsigned()];

const FS_IOCTL: [u32; 6] = [
    KVM_VM[1],
    KVM_VM[2],
    0x8008_6601, // FS_IOC_GETFLAGS
    0x4008_6602, // FS_IOC_SETFLAGS
    0x801c_581f, // FS_IOC_FSGETXATTR
    0x401c_5820, // FS_IOC_FSSETXATTR
];

/// What a kind of thread may call.
pub fn system_calls(kind: ThreadKind) -> impl Iterator<Item = &'static Allowed> {
    let own: [&'static [Allowed]; 8] = match kind {
        ThreadKind::Main => [EPOLL, MAIN, THREADS, WORKER, &[], &[], &[], &[]],
        ThreadKind::MainWithDevices => [EPOLL, MAIN, THREADS, WORKER, VFIO, &[], &[], &[]],
        ThreadKind::MainWithCpus => [EPOLL, MAIN, THREADS, WORKER, VCPU, NEW_VCPU, &[], &[]],
        ThreadKind::MainWithBoth => [EPOLL, MAIN, THREADS, WORKER, VCPU, NEW_VCPU, VFIO, &[]],
        ThreadKind::MainWithDebugger => [EPOLL, MAIN, THREADS, WORKER, VCPU, NEW_VCPU, VFIO, DEBUG],
        ThreadKind::Vfio => [VFIO, &[], &[], &[], &[], &[], &[], &[]],
        ThreadKind::Vcpu => [VCPU, &[], &[], &[], &[], &[], &[], &[]],
        ThreadKind::CapturedVcpu => [VCPU, CAPTURE, &[], &[], &[], &[], &[], &[]],
        ThreadKind::DebuggedVcpu => [VCPU, DEBUG, &[], &[], &[], &[], &[], &[]],
        ThreadKind::Worker => [EPOLL, WORKER, &[], &[], &[], &[], &[], &[]],
        ThreadKind::VhostWorker => [EPOLL, WORKER, VHOST, &[], &[], &[], &[], &[]],
        ThreadKind::Disk => [EPOLL, WORKER, THREADS, &[], &[], &[], &[], &[]],
        ThreadKind::Fs => [EPOLL, FS, THREADS, &[], &[], &[], &[], &[]],
    };
    EVERY.iter().chain(own.into_iter().flatten())
}

#[cfg(test)]
mod tests;
