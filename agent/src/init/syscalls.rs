//! System calls by name and their numbers in each of this machine's ABIs, sorted (the kernel's syscall_64.tbl and
//! syscall_32.tbl of Linux 6.12, and the few since).
//!
//! seccomp profiles name system calls; the filter compiler keeps its own table private, and knows x86_64 alone.

/// What a system call is in an ABI that has it not.
const NO: u16 = u16::MAX;

/// The numbers of a system call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Numbers {
    /// Of 64-bit programs.
    pub x86_64: Option<u16>,
    /// Of 32-bit programs.
    pub i386: Option<u16>,
    /// Of x32 programs, without the bit that marks them.
    pub x32: Option<u16>,
}

/// The numbers of a system call that some ABI of this machine has.
pub fn numbers(name: &str) -> Option<Numbers> {
    let index = TABLE.binary_search_by_key(&name, |row| row.0).ok()?;
    let row = TABLE.get(index)?;
    let number = |number| (number != NO).then_some(number);
    Some(Numbers {
        x86_64: number(row.1),
        i386: number(row.2),
        x32: number(row.3),
    })
}

/// Name, x86_64, i386, x32.
#[rustfmt::skip]
const TABLE: &[(&str, u16, u16, u16)] = &[
    ("_llseek", NO, 140, NO), ("_newselect", NO, 142, NO), ("_sysctl", 156, 149, NO), ("accept", 43, NO, 43),
    ("accept4", 288, 364, 288), ("access", 21, 33, 21), ("acct", 163, 51, 163), ("add_key", 248, 286, 248),
    ("adjtimex", 159, 124, 159), ("afs_syscall", 183, 137, 183), ("alarm", 37, 27, 37),
    ("arch_prctl", 158, 384, 158), ("bdflush", NO, 134, NO), ("bind", 49, 361, 49), ("bpf", 321, 357, 321),
    ("break", NO, 17, NO), ("brk", 12, 45, 12), ("cachestat", 451, 451, 451), ("capget", 125, 184, 125),
    ("capset", 126, 185, 126), ("chdir", 80, 12, 80), ("chmod", 90, 15, 90), ("chown", 92, 182, 92),
    ("chown32", NO, 212, NO), ("chroot", 161, 61, 161), ("clock_adjtime", 305, 343, 305),
    ("clock_adjtime64", NO, 405, NO), ("clock_getres", 229, 266, 229), ("clock_getres_time64", NO, 406, NO),
    ("clock_gettime", 228, 265, 228), ("clock_gettime64", NO, 403, NO), ("clock_nanosleep", 230, 267, 230),
    ("clock_nanosleep_time64", NO, 407, NO), ("clock_settime", 227, 264, 227), ("clock_settime64", NO, 404, NO),
    ("clone", 56, 120, 56), ("clone3", 435, 435, 435), ("close", 3, 6, 3), ("close_range", 436, 436, 436),
    ("connect", 42, 362, 42), ("copy_file_range", 326, 377, 326), ("creat", 85, 8, 85),
    ("create_module", 174, 127, NO), ("delete_module", 176, 129, 176), ("dup", 32, 41, 32),
    ("dup2", 33, 63, 33), ("dup3", 292, 330, 292), ("epoll_create", 213, 254, 213),
    ("epoll_create1", 291, 329, 291), ("epoll_ctl", 233, 255, 233), ("epoll_ctl_old", 214, NO, NO),
    ("epoll_pwait", 281, 319, 281), ("epoll_pwait2", 441, 441, 441), ("epoll_wait", 232, 256, 232),
    ("epoll_wait_old", 215, NO, NO), ("eventfd", 284, 323, 284), ("eventfd2", 290, 328, 290),
    ("execve", 59, 11, 520), ("execveat", 322, 358, 545), ("exit", 60, 1, 60), ("exit_group", 231, 252, 231),
    ("faccessat", 269, 307, 269), ("faccessat2", 439, 439, 439), ("fadvise64", 221, 250, 221),
    ("fadvise64_64", NO, 272, NO), ("fallocate", 285, 324, 285), ("fanotify_init", 300, 338, 300),
    ("fanotify_mark", 301, 339, 301), ("fchdir", 81, 133, 81), ("fchmod", 91, 94, 91),
    ("fchmodat", 268, 306, 268), ("fchmodat2", 452, 452, 452), ("fchown", 93, 95, 93),
    ("fchown32", NO, 207, NO), ("fchownat", 260, 298, 260), ("fcntl", 72, 55, 72), ("fcntl64", NO, 221, NO),
    ("fdatasync", 75, 148, 75), ("fgetxattr", 193, 231, 193), ("finit_module", 313, 350, 313),
    ("flistxattr", 196, 234, 196), ("flock", 73, 143, 73), ("fork", 57, 2, 57), ("fremovexattr", 199, 237, 199),
    ("fsconfig", 431, 431, 431), ("fsetxattr", 190, 228, 190), ("fsmount", 432, 432, 432),
    ("fsopen", 430, 430, 430), ("fspick", 433, 433, 433), ("fstat", 5, 108, 5), ("fstat64", NO, 197, NO),
    ("fstatat64", NO, 300, NO), ("fstatfs", 138, 100, 138), ("fstatfs64", NO, 269, NO), ("fsync", 74, 118, 74),
    ("ftime", NO, 35, NO), ("ftruncate", 77, 93, 77), ("ftruncate64", NO, 194, NO), ("futex", 202, 240, 202),
    ("futex_requeue", 456, 456, 456), ("futex_time64", NO, 422, NO), ("futex_wait", 455, 455, 455),
    ("futex_waitv", 449, 449, 449), ("futex_wake", 454, 454, 454), ("futimesat", 261, 299, 261),
    ("get_kernel_syms", 177, 130, NO), ("get_mempolicy", 239, 275, 239), ("get_robust_list", 274, 312, 531),
    ("get_thread_area", 211, 244, NO), ("getcpu", 309, 318, 309), ("getcwd", 79, 183, 79),
    ("getdents", 78, 141, 78), ("getdents64", 217, 220, 217), ("getegid", 108, 50, 108),
    ("getegid32", NO, 202, NO), ("geteuid", 107, 49, 107), ("geteuid32", NO, 201, NO), ("getgid", 104, 47, 104),
    ("getgid32", NO, 200, NO), ("getgroups", 115, 80, 115), ("getgroups32", NO, 205, NO),
    ("getitimer", 36, 105, 36), ("getpeername", 52, 368, 52), ("getpgid", 121, 132, 121),
    ("getpgrp", 111, 65, 111), ("getpid", 39, 20, 39), ("getpmsg", 181, 188, 181), ("getppid", 110, 64, 110),
    ("getpriority", 140, 96, 140), ("getrandom", 318, 355, 318), ("getresgid", 120, 171, 120),
    ("getresgid32", NO, 211, NO), ("getresuid", 118, 165, 118), ("getresuid32", NO, 209, NO),
    ("getrlimit", 97, 76, 97), ("getrusage", 98, 77, 98), ("getsid", 124, 147, 124),
    ("getsockname", 51, 367, 51), ("getsockopt", 55, 365, 542), ("gettid", 186, 224, 186),
    ("gettimeofday", 96, 78, 96), ("getuid", 102, 24, 102), ("getuid32", NO, 199, NO),
    ("getxattr", 191, 229, 191), ("getxattrat", 464, 464, 464), ("gtty", NO, 32, NO), ("idle", NO, 112, NO),
    ("init_module", 175, 128, 175), ("inotify_add_watch", 254, 292, 254), ("inotify_init", 253, 291, 253),
    ("inotify_init1", 294, 332, 294), ("inotify_rm_watch", 255, 293, 255), ("io_cancel", 210, 249, 210),
    ("io_destroy", 207, 246, 207), ("io_getevents", 208, 247, 208), ("io_pgetevents", 333, 385, 333),
    ("io_pgetevents_time64", NO, 416, NO), ("io_setup", 206, 245, 543), ("io_submit", 209, 248, 544),
    ("io_uring_enter", 426, 426, 426), ("io_uring_register", 427, 427, 427), ("io_uring_setup", 425, 425, 425),
    ("ioctl", 16, 54, 514), ("ioperm", 173, 101, 173), ("iopl", 172, 110, 172), ("ioprio_get", 252, 290, 252),
    ("ioprio_set", 251, 289, 251), ("ipc", NO, 117, NO), ("kcmp", 312, 349, 312),
    ("kexec_file_load", 320, NO, 320), ("kexec_load", 246, 283, 528), ("keyctl", 250, 288, 250),
    ("kill", 62, 37, 62), ("landlock_add_rule", 445, 445, 445), ("landlock_create_ruleset", 444, 444, 444),
    ("landlock_restrict_self", 446, 446, 446), ("lchown", 94, 16, 94), ("lchown32", NO, 198, NO),
    ("lgetxattr", 192, 230, 192), ("link", 86, 9, 86), ("linkat", 265, 303, 265), ("listen", 50, 363, 50),
    ("listmount", 458, 458, 458), ("listxattr", 194, 232, 194), ("listxattrat", 465, 465, 465),
    ("llistxattr", 195, 233, 195), ("lock", NO, 53, NO), ("lookup_dcookie", 212, 253, 212),
    ("lremovexattr", 198, 236, 198), ("lseek", 8, 19, 8), ("lsetxattr", 189, 227, 189),
    ("lsm_get_self_attr", 459, 459, 459), ("lsm_list_modules", 461, 461, 461),
    ("lsm_set_self_attr", 460, 460, 460), ("lstat", 6, 107, 6), ("lstat64", NO, 196, NO),
    ("madvise", 28, 219, 28), ("map_shadow_stack", 453, 453, 453), ("mbind", 237, 274, 237),
    ("membarrier", 324, 375, 324), ("memfd_create", 319, 356, 319), ("memfd_secret", 447, 447, 447),
    ("migrate_pages", 256, 294, 256), ("mincore", 27, 218, 27), ("mkdir", 83, 39, 83),
    ("mkdirat", 258, 296, 258), ("mknod", 133, 14, 133), ("mknodat", 259, 297, 259), ("mlock", 149, 150, 149),
    ("mlock2", 325, 376, 325), ("mlockall", 151, 152, 151), ("mmap", 9, 90, 9), ("mmap2", NO, 192, NO),
    ("modify_ldt", 154, 123, 154), ("mount", 165, 21, 165), ("mount_setattr", 442, 442, 442),
    ("move_mount", 429, 429, 429), ("move_pages", 279, 317, 533), ("mprotect", 10, 125, 10),
    ("mpx", NO, 56, NO), ("mq_getsetattr", 245, 282, 245), ("mq_notify", 244, 281, 527),
    ("mq_open", 240, 277, 240), ("mq_timedreceive", 243, 280, 243), ("mq_timedreceive_time64", NO, 419, NO),
    ("mq_timedsend", 242, 279, 242), ("mq_timedsend_time64", NO, 418, NO), ("mq_unlink", 241, 278, 241),
    ("mremap", 25, 163, 25), ("mseal", 462, 462, 462), ("msgctl", 71, 402, 71), ("msgget", 68, 399, 68),
    ("msgrcv", 70, 401, 70), ("msgsnd", 69, 400, 69), ("msync", 26, 144, 26), ("munlock", 150, 151, 150),
    ("munlockall", 152, 153, 152), ("munmap", 11, 91, 11), ("name_to_handle_at", 303, 341, 303),
    ("nanosleep", 35, 162, 35), ("newfstatat", 262, NO, 262), ("nfsservctl", 180, 169, NO),
    ("nice", NO, 34, NO), ("oldfstat", NO, 28, NO), ("oldlstat", NO, 84, NO), ("oldolduname", NO, 59, NO),
    ("oldstat", NO, 18, NO), ("olduname", NO, 109, NO), ("open", 2, 5, 2), ("open_by_handle_at", 304, 342, 304),
    ("open_tree", 428, 428, 428), ("open_tree_attr", 467, 467, 467), ("openat", 257, 295, 257),
    ("openat2", 437, 437, 437), ("pause", 34, 29, 34), ("perf_event_open", 298, 336, 298),
    ("personality", 135, 136, 135), ("pidfd_getfd", 438, 438, 438), ("pidfd_open", 434, 434, 434),
    ("pidfd_send_signal", 424, 424, 424), ("pipe", 22, 42, 22), ("pipe2", 293, 331, 293),
    ("pivot_root", 155, 217, 155), ("pkey_alloc", 330, 381, 330), ("pkey_free", 331, 382, 331),
    ("pkey_mprotect", 329, 380, 329), ("poll", 7, 168, 7), ("ppoll", 271, 309, 271),
    ("ppoll_time64", NO, 414, NO), ("prctl", 157, 172, 157), ("pread64", 17, 180, 17),
    ("preadv", 295, 333, 534), ("preadv2", 327, 378, 546), ("prlimit64", 302, 340, 302),
    ("process_madvise", 440, 440, 440), ("process_mrelease", 448, 448, 448),
    ("process_vm_readv", 310, 347, 539), ("process_vm_writev", 311, 348, 540), ("prof", NO, 44, NO),
    ("profil", NO, 98, NO), ("pselect6", 270, 308, 270), ("pselect6_time64", NO, 413, NO),
    ("ptrace", 101, 26, 521), ("putpmsg", 182, 189, 182), ("pwrite64", 18, 181, 18), ("pwritev", 296, 334, 535),
    ("pwritev2", 328, 379, 547), ("query_module", 178, 167, NO), ("quotactl", 179, 131, 179),
    ("quotactl_fd", 443, 443, 443), ("read", 0, 3, 0), ("readahead", 187, 225, 187), ("readdir", NO, 89, NO),
    ("readlink", 89, 85, 89), ("readlinkat", 267, 305, 267), ("readv", 19, 145, 515), ("reboot", 169, 88, 169),
    ("recvfrom", 45, 371, 517), ("recvmmsg", 299, 337, 537), ("recvmmsg_time64", NO, 417, NO),
    ("recvmsg", 47, 372, 519), ("remap_file_pages", 216, 257, 216), ("removexattr", 197, 235, 197),
    ("removexattrat", 466, 466, 466), ("rename", 82, 38, 82), ("renameat", 264, 302, 264),
    ("renameat2", 316, 353, 316), ("request_key", 249, 287, 249), ("restart_syscall", 219, 0, 219),
    ("rmdir", 84, 40, 84), ("rseq", 334, 386, 334), ("rt_sigaction", 13, 174, 512),
    ("rt_sigpending", 127, 176, 522), ("rt_sigprocmask", 14, 175, 14), ("rt_sigqueueinfo", 129, 178, 524),
    ("rt_sigreturn", 15, 173, 513), ("rt_sigsuspend", 130, 179, 130), ("rt_sigtimedwait", 128, 177, 523),
    ("rt_sigtimedwait_time64", NO, 421, NO), ("rt_tgsigqueueinfo", 297, 335, 536),
    ("sched_get_priority_max", 146, 159, 146), ("sched_get_priority_min", 147, 160, 147),
    ("sched_getaffinity", 204, 242, 204), ("sched_getattr", 315, 352, 315), ("sched_getparam", 143, 155, 143),
    ("sched_getscheduler", 145, 157, 145), ("sched_rr_get_interval", 148, 161, 148),
    ("sched_rr_get_interval_time64", NO, 423, NO), ("sched_setaffinity", 203, 241, 203),
    ("sched_setattr", 314, 351, 314), ("sched_setparam", 142, 154, 142), ("sched_setscheduler", 144, 156, 144),
    ("sched_yield", 24, 158, 24), ("seccomp", 317, 354, 317), ("security", 185, NO, 185),
    ("select", 23, 82, 23), ("semctl", 66, 394, 66), ("semget", 64, 393, 64), ("semop", 65, NO, 65),
    ("semtimedop", 220, NO, 220), ("semtimedop_time64", NO, 420, NO), ("sendfile", 40, 187, 40),
    ("sendfile64", NO, 239, NO), ("sendmmsg", 307, 345, 538), ("sendmsg", 46, 370, 518),
    ("sendto", 44, 369, 44), ("set_mempolicy", 238, 276, 238), ("set_mempolicy_home_node", 450, 450, 450),
    ("set_robust_list", 273, 311, 530), ("set_thread_area", 205, 243, NO), ("set_tid_address", 218, 258, 218),
    ("setdomainname", 171, 121, 171), ("setfsgid", 123, 139, 123), ("setfsgid32", NO, 216, NO),
    ("setfsuid", 122, 138, 122), ("setfsuid32", NO, 215, NO), ("setgid", 106, 46, 106),
    ("setgid32", NO, 214, NO), ("setgroups", 116, 81, 116), ("setgroups32", NO, 206, NO),
    ("sethostname", 170, 74, 170), ("setitimer", 38, 104, 38), ("setns", 308, 346, 308),
    ("setpgid", 109, 57, 109), ("setpriority", 141, 97, 141), ("setregid", 114, 71, 114),
    ("setregid32", NO, 204, NO), ("setresgid", 119, 170, 119), ("setresgid32", NO, 210, NO),
    ("setresuid", 117, 164, 117), ("setresuid32", NO, 208, NO), ("setreuid", 113, 70, 113),
    ("setreuid32", NO, 203, NO), ("setrlimit", 160, 75, 160), ("setsid", 112, 66, 112),
    ("setsockopt", 54, 366, 541), ("settimeofday", 164, 79, 164), ("setuid", 105, 23, 105),
    ("setuid32", NO, 213, NO), ("setxattr", 188, 226, 188), ("setxattrat", 463, 463, 463),
    ("sgetmask", NO, 68, NO), ("shmat", 30, 397, 30), ("shmctl", 31, 396, 31), ("shmdt", 67, 398, 67),
    ("shmget", 29, 395, 29), ("shutdown", 48, 373, 48), ("sigaction", NO, 67, NO),
    ("sigaltstack", 131, 186, 525), ("signal", NO, 48, NO), ("signalfd", 282, 321, 282),
    ("signalfd4", 289, 327, 289), ("sigpending", NO, 73, NO), ("sigprocmask", NO, 126, NO),
    ("sigreturn", NO, 119, NO), ("sigsuspend", NO, 72, NO), ("socket", 41, 359, 41),
    ("socketcall", NO, 102, NO), ("socketpair", 53, 360, 53), ("splice", 275, 313, 275),
    ("ssetmask", NO, 69, NO), ("stat", 4, 106, 4), ("stat64", NO, 195, NO), ("statfs", 137, 99, 137),
    ("statfs64", NO, 268, NO), ("statmount", 457, 457, 457), ("statx", 332, 383, 332), ("stime", NO, 25, NO),
    ("stty", NO, 31, NO), ("swapoff", 168, 115, 168), ("swapon", 167, 87, 167), ("symlink", 88, 83, 88),
    ("symlinkat", 266, 304, 266), ("sync", 162, 36, 162), ("sync_file_range", 277, 314, 277),
    ("syncfs", 306, 344, 306), ("sysfs", 139, 135, 139), ("sysinfo", 99, 116, 99), ("syslog", 103, 103, 103),
    ("tee", 276, 315, 276), ("tgkill", 234, 270, 234), ("time", 201, 13, 201), ("timer_create", 222, 259, 526),
    ("timer_delete", 226, 263, 226), ("timer_getoverrun", 225, 262, 225), ("timer_gettime", 224, 261, 224),
    ("timer_gettime64", NO, 408, NO), ("timer_settime", 223, 260, 223), ("timer_settime64", NO, 409, NO),
    ("timerfd_create", 283, 322, 283), ("timerfd_gettime", 287, 326, 287), ("timerfd_gettime64", NO, 410, NO),
    ("timerfd_settime", 286, 325, 286), ("timerfd_settime64", NO, 411, NO), ("times", 100, 43, 100),
    ("tkill", 200, 238, 200), ("truncate", 76, 92, 76), ("truncate64", NO, 193, NO), ("tuxcall", 184, NO, 184),
    ("ugetrlimit", NO, 191, NO), ("ulimit", NO, 58, NO), ("umask", 95, 60, 95), ("umount", NO, 22, NO),
    ("umount2", 166, 52, 166), ("uname", 63, 122, 63), ("unlink", 87, 10, 87), ("unlinkat", 263, 301, 263),
    ("unshare", 272, 310, 272), ("uretprobe", 335, NO, 335), ("uselib", 134, 86, NO),
    ("userfaultfd", 323, 374, 323), ("ustat", 136, 62, 136), ("utime", 132, 30, 132),
    ("utimensat", 280, 320, 280), ("utimensat_time64", NO, 412, NO), ("utimes", 235, 271, 235),
    ("vfork", 58, 190, 58), ("vhangup", 153, 111, 153), ("vm86", NO, 166, NO), ("vm86old", NO, 113, NO),
    ("vmsplice", 278, 316, 532), ("vserver", 236, 273, NO), ("wait4", 61, 114, 61), ("waitid", 247, 284, 529),
    ("waitpid", NO, 7, NO), ("write", 1, 4, 1), ("writev", 20, 146, 516),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_sorted_and_agrees_with_libc() {
        assert!(TABLE.is_sorted_by_key(|row| row.0));
        let x86_64 = |name| numbers(name).unwrap().x86_64.map(libc::c_long::from);
        assert_eq!(x86_64("read"), Some(libc::SYS_read));
        assert_eq!(x86_64("clone3"), Some(libc::SYS_clone3));
        assert_eq!(x86_64("process_madvise"), Some(libc::SYS_process_madvise));
        assert_eq!(x86_64("socketcall"), None);
        assert_eq!(numbers("from_the_future"), None);
    }

    /// Debian's headers (linux-libc-dev), which every machine with a C compiler has.
    #[test]
    fn the_table_agrees_with_the_headers_of_each_abi() {
        type Column = fn(Numbers) -> Option<u16>;
        let columns: [(&str, Column); 3] = [
            ("64", |numbers| numbers.x86_64),
            ("32", |numbers| numbers.i386),
            ("x32", |numbers| numbers.x32),
        ];
        for (header, column) in columns {
            let path = format!("/usr/include/x86_64-linux-gnu/asm/unistd_{header}.h");
            let text = std::fs::read_to_string(&path).unwrap();
            let mut seen = 0;
            for line in text.lines() {
                let Some((name, number)) = line
                    .strip_prefix("#define __NR_")
                    .and_then(|rest| rest.split_once(' '))
                else {
                    continue;
                };
                let number = number.trim_start_matches("(__X32_SYSCALL_BIT + ");
                let number: u16 = number.trim_end_matches(')').parse().unwrap();
                assert_eq!(
                    numbers(name).and_then(column),
                    Some(number),
                    "{header}: {name}"
                );
                seen += 1;
            }
            assert!(seen > 300, "{path}: {seen}");
        }
    }
}
