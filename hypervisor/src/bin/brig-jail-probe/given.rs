//! What can be done with descriptors of a living VMM beyond their bytes: those that were given, and some that the
//! probe opens below `/shared`. Each attempt is made in children as in [`super::escapes`].

use std::os::fd::{AsRawFd, OwnedFd};

use brig_hypervisor::control::CONTROL_FD;

use super::escapes::{call, outcome, text};

/// `struct timespec[2]`, the year 2001.
static TIMES: [i64; 4] = [1_000_000_000, 0, 1_000_000_000, 0];

/// Requests of ioctl(2) that change what they are made on, by name. Those in `jail/allow.rs` are for the device
/// they are named after; here every one meets every descriptor.
const IOCTLS: [(&str, usize); 64] = [
    ("TUNSETIFF", 0x4004_54ca),
    ("TUNSETPERSIST", 0x4004_54cb),
    ("TUNSETOWNER", 0x4004_54cc),
    ("TUNSETLINK", 0x4004_54cd),
    ("TUNSETGROUP", 0x4004_54ce),
    ("TUNSETOFFLOAD", 0x4004_54d0),
    ("TUNSETTXFILTER", 0x4004_54d1),
    ("TUNSETSNDBUF", 0x4004_54d4),
    ("TUNATTACHFILTER", 0x4010_54d5),
    ("TUNSETVNETHDRSZ", 0x4004_54d8),
    ("TUNSETQUEUE", 0x4004_54d9),
    ("TUNSETIFINDEX", 0x4004_54da),
    ("TUNSETSTEERINGEBPF", 0x8004_54e0),
    ("TUNSETFILTEREBPF", 0x8004_54e1),
    ("TUNSETCARRIER", 0x4004_54e2),
    ("TUNGETDEVNETNS", 0x54e3),
    ("SIOCSIFHWADDR", 0x8924),
    ("SIOCSIFFLAGS", 0x8914),
    ("SIOCSIFNAME", 0x8923),
    ("SIOCGSKNS", 0x894c),
    ("FIOASYNC", 0x5452),
    ("FIOSETOWN", 0x8901),
    ("TIOCSTI", 0x5412),
    ("TIOCSCTTY", 0x540e),
    ("BLKROSET", 0x125d),
    ("BLKRRPART", 0x125f),
    ("BLKFLSBUF", 0x1261),
    ("BLKRASET", 0x1262),
    ("BLKPG", 0x1269),
    ("BLKDISCARD", 0x1277),
    ("BLKSECDISCARD", 0x127d),
    ("BLKZEROOUT", 0x127f),
    ("SG_IO", 0x2285),
    ("CDROMEJECT", 0x5309),
    ("LOOP_SET_FD", 0x4c00),
    ("LOOP_CLR_FD", 0x4c01),
    ("LOOP_SET_STATUS64", 0x4c04),
    ("LOOP_CHANGE_FD", 0x4c06),
    ("LOOP_SET_CAPACITY", 0x4c07),
    ("LOOP_CTL_REMOVE", 0x4c81),
    ("FS_IOC_SETFLAGS", 0x4008_6602),
    ("FS_IOC_FSSETXATTR", 0x401c_5820),
    ("FS_IOC_SETVERSION", 0x4008_7602),
    ("FIFREEZE", 0xc004_5877),
    ("FITRIM", 0xc018_5879),
    ("FICLONE", 0x4004_9409),
    ("KVM_CREATE_VM", 0xae01),
    ("KVM_CREATE_VCPU", 0xae41),
    ("KVM_CREATE_DEVICE", 0xc00c_aee0),
    ("KVM_MEMORY_ENCRYPT_OP", 0xc008_aeba),
    ("KVM_SET_USER_MEMORY_REGION", 0x4020_ae46),
    ("KVM_SIGNAL_MSI", 0x4020_aea5),
    ("VHOST_SET_FEATURES", 0x4008_af00),
    ("VHOST_SET_OWNER", 0xaf01),
    ("VHOST_RESET_OWNER", 0xaf02),
    ("VHOST_SET_MEM_TABLE", 0x4008_af03),
    ("VHOST_SET_LOG_BASE", 0x4008_af04),
    ("VHOST_SET_LOG_FD", 0x4004_af07),
    ("VHOST_NEW_WORKER", 0x8004_af08),
    ("VHOST_SET_VRING_ENDIAN", 0x4008_af13),
    ("VHOST_ATTACH_VRING_WORKER", 0x4008_af15),
    ("VHOST_SET_VRING_BUSYLOOP_TIMEOUT", 0x4008_af23),
    ("VHOST_SET_BACKEND_FEATURES", 0x4008_af25),
    ("VHOST_NET_SET_BACKEND", 0x4008_af30),
];

/// Commands of fcntl(2) that reach beyond the number: whom it signals, leases, sizes, seals, locks.
const FCNTLS: [(&str, i32); 8] = [
    ("F_SETOWN", libc::F_SETOWN),
    ("F_SETSIG", 10),
    ("F_SETLEASE", libc::F_SETLEASE),
    ("F_NOTIFY", libc::F_NOTIFY),
    ("F_SETPIPE_SZ", libc::F_SETPIPE_SZ),
    ("F_ADD_SEALS", libc::F_ADD_SEALS),
    ("F_SETLK", libc::F_SETLK),
    ("F_SET_FILE_RW_HINT", 1038),
];

/// What a request is about: for most of them zeroes to read and write, long enough for any.
fn argument(name: &str) -> usize {
    let mut words = Box::new([0_u64; 512]);
    match name {
        // By value: none of them.
        "TUNSETOFFLOAD" => return 0,
        "TUNSETVNETHDRSZ" => words[0] = 12,
        // Start and length.
        name if name.starts_with("BLK") => words[1] = 4096,
        _ => {}
    }
    Box::leak(words).as_ptr().addr()
}

/// One line an attempt on one descriptor: its place, the attempt, the outcome without seccomp and under the union
/// of the filters. Where the filters alone are the wall, there is none without: it could do harm.
pub fn table(given: &[OwnedFd]) -> String {
    let mut lines = String::new();
    for (place, fd) in given.iter().enumerate() {
        let number = usize::try_from(fd.as_raw_fd()).unwrap_or(usize::MAX);
        for (name, attempt) in on_files(number) {
            let (bare, filtered) = (outcome(&attempt, false), outcome(&attempt, true));
            lines.push_str(&format!("{place}\t{name}\t{bare}\t{filtered}\n"));
        }
        for (name, request) in IOCTLS {
            let arguments = [number, request, argument(name)];
            let filtered = outcome(|| call(libc::SYS_ioctl, &arguments), true);
            lines.push_str(&format!("{place}\t{name}\t-\t{filtered}\n"));
        }
        for (name, command) in FCNTLS {
            let arguments = [number, command.unsigned_abs() as usize, 1];
            let filtered = outcome(|| call(libc::SYS_fcntl, &arguments), true);
            lines.push_str(&format!("{place}\t{name}\t-\t{filtered}\n"));
        }
    }
    lines
}

/// Sends each descriptor over the control socket, beside a message that is in order, under the union of the
/// filters; how often that could be done.
pub fn hand_back(given: &[OwnedFd]) -> String {
    let message = br#"{"Reply":{"id":18446744073709551615,"result":{"Ok":"Done"}}}"#;
    let sent = given.iter().filter(|fd| {
        let number = fd.as_raw_fd();
        let send = || {
            let rights = [nix::sys::socket::ControlMessage::ScmRights(
                std::slice::from_ref(&number),
            )];
            let bytes = [std::io::IoSlice::new(message)];
            let flags = nix::sys::socket::MsgFlags::empty();
            match nix::sys::socket::sendmsg::<()>(CONTROL_FD, &bytes, &rights, flags, None) {
                Ok(_) => 0,
                Err(errno) => -i64::from(errno as i32),
            }
        };
        outcome(send, true) == "allowed"
    });
    sent.count().to_string()
}

type Attempt = (&'static str, Box<dyn Fn() -> i64>);

fn on_files(number: usize) -> Vec<Attempt> {
    let link: &'static str = Box::leak(format!("/proc/self/fd/{number}\0").into_boxed_str());
    let up: &'static str = Box::leak(format!("/proc/self/fd/{number}/../../..\0").into_boxed_str());
    let (path, up) = (link.as_ptr().addr(), up.as_ptr().addr());
    let here = (libc::AT_FDCWD as isize).cast_unsigned();
    let reopen = move |flags: libc::c_int| {
        let flags = (flags | libc::O_NONBLOCK).unsigned_abs() as usize;
        call(libc::SYS_openat, &[here, path, flags])
    };
    vec![
        (
            "mode",
            Box::new(move || call(libc::SYS_fchmod, &[number, 0o4755])),
        ),
        (
            "mode by its link",
            Box::new(move || call(libc::SYS_fchmodat, &[here, path, 0o4755])),
        ),
        (
            "owner",
            Box::new(move || call(libc::SYS_fchown, &[number, 1, 1])),
        ),
        (
            "owner by its link",
            Box::new(move || call(libc::SYS_fchownat, &[here, path, 1, 1, 0])),
        ),
        (
            "size",
            Box::new(move || call(libc::SYS_ftruncate, &[number, 0])),
        ),
        (
            "size by its link",
            Box::new(move || call(libc::SYS_truncate, &[path, 0])),
        ),
        (
            "room",
            Box::new(move || call(libc::SYS_fallocate, &[number, 0, 0, 1 << 20])),
        ),
        (
            "attribute",
            Box::new(move || {
                let arguments = [number, text(c"user.x"), text(c"x"), 1, 0];
                call(libc::SYS_fsetxattr, &arguments)
            }),
        ),
        (
            "attribute by its link",
            Box::new(move || {
                let arguments = [path, text(c"user.x"), text(c"x"), 1, 0];
                call(libc::SYS_setxattr, &arguments)
            }),
        ),
        (
            "capability",
            Box::new(move || {
                let arguments = [path, text(c"security.capability"), text(c"x"), 1, 0];
                call(libc::SYS_setxattr, &arguments)
            }),
        ),
        (
            "times",
            Box::new(move || call(libc::SYS_utimensat, &[number, 0, TIMES.as_ptr().addr(), 0])),
        ),
        (
            "a name",
            Box::new(move || {
                let arguments = [here, path, here, text(c"/shared/v/name"), 0x400];
                call(libc::SYS_linkat, &arguments)
            }),
        ),
        ("open for writing", Box::new(move || reopen(libc::O_WRONLY))),
        (
            "open for reading and writing",
            Box::new(move || reopen(libc::O_RDWR)),
        ),
        (
            "map, and make that writable",
            Box::new(move || {
                let mapped = call(libc::SYS_mmap, &[0, 4096, 1, 1, number, 0]);
                match usize::try_from(mapped) {
                    Ok(address) => call(libc::SYS_mprotect, &[address, 4096, 3]),
                    Err(_) => mapped,
                }
            }),
        ),
        (
            "climb",
            Box::new(move || call(libc::SYS_openat, &[here, up, 0])),
        ),
    ]
}
