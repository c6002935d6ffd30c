//! The escapes the probe tries: each in two children of its own, without seccomp (what the namespaces,
//! mounts, capabilities and Landlock hold by themselves) and under the union of all threads' filters.

use std::ffi::CStr;
use std::io;

use brig_hypervisor::jail::seccomp;
use nix::errno::Errno;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};

/// An attempt returns what its decisive system call returned, or a negative errno.
type Attempt = (&'static str, fn() -> i64);

/// One line an attempt: its name, the outcome without and with the filter.
pub fn table() -> String {
    let mut lines = String::new();
    for (name, attempt) in ATTEMPTS {
        let bare = outcome(attempt, false);
        let filtered = outcome(attempt, true);
        lines.push_str(&format!("{name}\t{bare}\t{filtered}\n"));
    }
    lines
}

pub(super) fn outcome(attempt: impl Fn() -> i64, filtered: bool) -> String {
    // SAFETY: the probe has one thread; the child makes system calls and ends.
    match unsafe { fork() } {
        Err(errno) => format!("no child: {errno}"),
        Ok(ForkResult::Child) => {
            let ready = !filtered || seccomp::apply_union().is_ok();
            let result = if ready { attempt() } else { -250 };
            let code = i32::try_from(-result.min(0)).unwrap_or(251);
            // SAFETY: ends the child without the parent's exit handlers.
            unsafe { libc::_exit(code) }
        }
        Ok(ForkResult::Parent { child }) => match waitpid(child, None) {
            Ok(WaitStatus::Exited(_, 0)) => "allowed".into(),
            // What the handler of debug builds exits with.
            Ok(WaitStatus::Exited(_, code)) if code == 128 + libc::SIGSYS => "SIGSYS".into(),
            Ok(WaitStatus::Exited(_, code)) => format!("{:?}", Errno::from_raw(code)),
            Ok(WaitStatus::Signaled(_, signal, _)) => signal.as_str().into(),
            other => format!("{other:?}"),
        },
    }
}

pub(super) fn call(number: libc::c_long, arguments: &[usize]) -> i64 {
    let mut all = [0usize; 6];
    for (place, value) in all.iter_mut().zip(arguments) {
        *place = *value;
    }
    // SAFETY: pointers among the arguments are to statics or null; each attempt sees to that.
    let result = unsafe { libc::syscall(number, all[0], all[1], all[2], all[3], all[4], all[5]) };
    if result < 0 {
        -i64::from(io::Error::last_os_error().raw_os_error().unwrap_or(0))
    } else {
        result
    }
}

pub(super) fn text(text: &'static CStr) -> usize {
    text.as_ptr().addr()
}

const CWD: usize = (libc::AT_FDCWD as isize).cast_unsigned();

fn open(path: &'static CStr, flags: libc::c_int) -> i64 {
    call(
        libc::SYS_openat,
        &[CWD, text(path), flags.unsigned_abs() as usize],
    )
}

fn fd(result: i64) -> usize {
    usize::try_from(result).unwrap_or(usize::MAX)
}

/// Zeroes long enough for any attribute structure used here.
static ZEROES: [u64; 32] = [0; 32];

fn zeroes() -> usize {
    ZEROES.as_ptr().addr()
}

/// Writable memory.
fn room() -> usize {
    Box::leak(Box::new([0u64; 64])).as_ptr().addr()
}

/// `struct mount_attr` that clears read-only.
static CLEAR_RDONLY: [u64; 4] = [0, 1, 0, 0];
/// `struct rlimit` beyond the hard limit.
static MORE: [u64; 2] = [1 << 20, 1 << 20];
/// capset's header (version 3, this thread) and data asking for everything.
static CAPABILITY_HEADER: [u32; 2] = [0x2008_0522, 0];
static EVERYTHING: [u32; 6] = [u32::MAX; 6];
/// `struct sched_param`, priority 1.
static REAL_TIME: [u32; 4] = [1; 4];
/// `struct file_handle` of 8 bytes.
static HANDLE: [u32; 4] = [8, 1, 2, 0];

const ATTEMPTS: &[Attempt] = &[
    ("open /etc/passwd", || open(c"/etc/passwd", libc::O_RDONLY)),
    ("open /var/lib/containerd", || {
        open(c"/var/lib/containerd", libc::O_PATH)
    }),
    ("open /run/brig (other pods)", || {
        open(c"/run/brig", libc::O_PATH)
    }),
    ("open /dev/kvm", || open(c"/dev/kvm", libc::O_RDWR)),
    ("write core_pattern", || {
        open(c"/proc/sys/kernel/core_pattern", libc::O_WRONLY)
    }),
    ("write core_pattern by ..", || {
        let procfs = open(c"/proc/self/fd", libc::O_PATH);
        call(
            libc::SYS_openat,
            &[fd(procfs), text(c"../../sys/kernel/core_pattern"), 1],
        )
    }),
    ("climb from the share by ..", || {
        let share = open(c"/shared/v", libc::O_PATH);
        call(
            libc::SYS_openat,
            &[fd(share), text(c"../../../../etc/passwd"), 0],
        )
    }),
    ("open another process's root", || {
        open(c"/proc/1/root/shared/../../etc/passwd", libc::O_RDONLY)
    }),
    ("overwrite /proc/self/exe", || {
        open(c"/proc/self/exe", libc::O_WRONLY)
    }),
    ("read /proc/self/exe", || {
        open(c"/proc/self/exe", libc::O_RDONLY)
    }),
    ("change the mode of /proc/self/exe", || {
        call(libc::SYS_fchmodat, &[CWD, text(c"/proc/self/exe"), 0o4777])
    }),
    ("change the owner of /proc/self/exe", || {
        call(libc::SYS_fchownat, &[CWD, text(c"/proc/self/exe"), 1, 1, 0])
    }),
    ("give /proc/self/exe an attribute", || {
        call(
            libc::SYS_setxattr,
            &[text(c"/proc/self/exe"), text(c"user.x"), text(c"x"), 1, 0],
        )
    }),
    ("change the mode of /dev/null", || {
        call(libc::SYS_fchmod, &[0, 0o600])
    }),
    ("read another process's memory file", || {
        open(c"/proc/1/mem", libc::O_RDWR)
    }),
    ("write a read-only share", || {
        open(c"/shared/ro/new", libc::O_WRONLY | libc::O_CREAT)
    }),
    ("write the share's root", || {
        open(c"/shared/new", libc::O_WRONLY | libc::O_CREAT)
    }),
    ("open a device node of a volume", || {
        open(c"/shared/v/device", libc::O_RDWR)
    }),
    ("make a device node", || {
        call(
            libc::SYS_mknodat,
            &[CWD, text(c"/shared/v/disk"), 0o60600, 0x0800],
        )
    }),
    ("follow a volume's link to the host", || {
        open(c"/shared/v/link", libc::O_RDONLY)
    }),
    ("mount a tmpfs", || {
        call(
            libc::SYS_mount,
            &[text(c"x"), text(c"/shared"), text(c"tmpfs"), 0, 0],
        )
    }),
    ("remount a read-only share writable", || {
        let flags = libc::MS_REMOUNT | libc::MS_BIND;
        call(
            libc::SYS_mount,
            &[
                0,
                text(c"/shared/ro"),
                0,
                usize::try_from(flags).unwrap_or(0),
                0,
            ],
        )
    }),
    ("mount_setattr a read-only share writable", || {
        call(
            libc::SYS_mount_setattr,
            &[
                CWD,
                text(c"/shared/ro"),
                0,
                CLEAR_RDONLY.as_ptr().addr(),
                32,
            ],
        )
    }),
    ("unmount a share", || {
        call(libc::SYS_umount2, &[text(c"/shared/ro"), 0])
    }),
    ("fsopen proc", || {
        call(libc::SYS_fsopen, &[text(c"proc"), 0])
    }),
    ("clone a mount", || {
        call(libc::SYS_open_tree, &[CWD, text(c"/shared/v"), 1])
    }),
    ("pivot_root", || {
        call(libc::SYS_pivot_root, &[text(c"/shared"), text(c"/shared")])
    }),
    ("chroot", || call(libc::SYS_chroot, &[text(c"/shared/v")])),
    ("setns to the network namespace", || {
        let namespace = open(c"/proc/self/ns/net", libc::O_RDONLY);
        call(libc::SYS_setns, &[fd(namespace), 0])
    }),
    ("setns to pid 1's mounts", || {
        let pidfd = call(libc::SYS_pidfd_open, &[1, 0]);
        call(libc::SYS_setns, &[fd(pidfd), 0x0002_0000])
    }),
    ("unshare a user namespace", || {
        call(libc::SYS_unshare, &[0x1000_0000])
    }),
    ("unshare a mount namespace", || {
        call(libc::SYS_unshare, &[0x0002_0000])
    }),
    ("clone into a user namespace", || {
        let result = call(libc::SYS_clone, &[0x1000_0000 | 17, 0, 0, 0, 0]);
        if result == 0 {
            // SAFETY: the grandchild ends at once.
            unsafe { libc::_exit(0) }
        }
        result
    }),
    ("fork", || {
        let result = call(libc::SYS_clone, &[17, 0, 0, 0, 0]);
        if result == 0 {
            // SAFETY: the grandchild ends at once.
            unsafe { libc::_exit(0) }
        }
        result
    }),
    ("execute a file of a volume", || {
        call(libc::SYS_execve, &[text(c"/shared/v/program"), 0, 0])
    }),
    ("map a file of a volume executable", || {
        let program = open(c"/shared/v/program", libc::O_RDONLY);
        call(libc::SYS_mmap, &[0, 4096, 5, 2, fd(program), 0])
    }),
    ("map executable memory", || {
        call(libc::SYS_mmap, &[0, 4096, 7, 0x22, usize::MAX, 0])
    }),
    ("memfd_create", || {
        call(libc::SYS_memfd_create, &[text(c"x"), 0])
    }),
    ("socket unix", || call(libc::SYS_socket, &[1, 1, 0])),
    ("socket packet", || call(libc::SYS_socket, &[17, 3, 0])),
    ("socket netlink", || call(libc::SYS_socket, &[16, 3, 0])),
    ("io_uring_setup", || {
        call(libc::SYS_io_uring_setup, &[8, room()])
    }),
    ("ptrace pid 1", || call(libc::SYS_ptrace, &[16, 1, 0, 0])),
    ("process_vm_readv pid 1", || {
        // A struct iovec of 8 bytes, at the same address here and there.
        let vector: &[usize; 2] = Box::leak(Box::new([room(), 8]));
        let vector = vector.as_ptr().addr();
        call(libc::SYS_process_vm_readv, &[1, vector, 1, vector, 1, 0])
    }),
    ("steal a descriptor of pid 1", || {
        let pidfd = call(libc::SYS_pidfd_open, &[1, 0]);
        call(libc::SYS_pidfd_getfd, &[fd(pidfd), 3, 0])
    }),
    ("signal a process of the node", || {
        call(libc::SYS_kill, &[30_000, 9])
    }),
    ("bpf program", || call(libc::SYS_bpf, &[5, zeroes(), 128])),
    ("add a key", || {
        call(
            libc::SYS_add_key,
            &[text(c"user"), text(c"x"), text(c"y"), 1, usize::MAX - 2],
        )
    }),
    ("keyctl: join the node's session", || {
        call(libc::SYS_keyctl, &[0, usize::MAX - 2, 1])
    }),
    ("open_by_handle_at", || {
        let share = open(c"/shared/v", libc::O_RDONLY | libc::O_DIRECTORY);
        call(
            libc::SYS_open_by_handle_at,
            &[fd(share), HANDLE.as_ptr().addr(), 0],
        )
    }),
    ("userfaultfd for kernel faults", || {
        call(libc::SYS_userfaultfd, &[0])
    }),
    ("perf_event_open of all CPUs", || {
        call(
            libc::SYS_perf_event_open,
            &[zeroes(), usize::MAX, 0, usize::MAX, 0],
        )
    }),
    ("raise RLIMIT_NOFILE", || {
        call(libc::SYS_prlimit64, &[0, 7, MORE.as_ptr().addr(), 0])
    }),
    ("take every capability", || {
        call(
            libc::SYS_capset,
            &[
                CAPABILITY_HEADER.as_ptr().addr(),
                EVERYTHING.as_ptr().addr(),
            ],
        )
    }),
    ("raise an ambient capability", || {
        call(libc::SYS_prctl, &[47, 2, 1, 0, 0])
    }),
    ("clear the securebits", || {
        call(libc::SYS_prctl, &[28, 0, 0, 0, 0])
    }),
    ("allow new privileges", || {
        call(libc::SYS_prctl, &[38, 0, 0, 0, 0])
    }),
    ("become dumpable", || {
        call(libc::SYS_prctl, &[4, 1, 0, 0, 0])
    }),
    ("set the host name", || {
        call(libc::SYS_sethostname, &[text(c"node"), 4])
    }),
    ("set the clock", || {
        call(libc::SYS_clock_settime, &[0, zeroes()])
    }),
    ("load a module", || {
        call(libc::SYS_init_module, &[zeroes(), 8, text(c"")])
    }),
    ("kexec", || call(libc::SYS_kexec_load, &[0, 0, 0, 0])),
    ("reboot the node", || {
        call(
            libc::SYS_reboot,
            &[0xfee1_dead, 672_274_793, 0x89ab_cdef, 0],
        )
    }),
    ("read the node's kernel log", || {
        call(libc::SYS_syslog, &[3, zeroes(), 0])
    }),
    ("use I/O ports", || call(libc::SYS_iopl, &[3])),
    ("become a real-time process", || {
        call(
            libc::SYS_sched_setscheduler,
            &[0, 1, REAL_TIME.as_ptr().addr()],
        )
    }),
];
