//! What can be done with a descriptor that was given, beyond its bytes: each attempt in children as in
//! [`super::escapes`].

use std::os::fd::{AsRawFd, OwnedFd};

use super::escapes::{call, outcome, text};

/// `struct timespec[2]`, the year 2001.
static TIMES: [i64; 4] = [1_000_000_000, 0, 1_000_000_000, 0];

/// One line an attempt on one descriptor: its place, the attempt, the outcome without and with the filter.
pub fn table(given: &[OwnedFd]) -> String {
    let mut lines = String::new();
    for (place, fd) in given.iter().enumerate() {
        let number = usize::try_from(fd.as_raw_fd()).unwrap_or(usize::MAX);
        let link = format!("/proc/self/fd/{number}\0");
        let path = link.as_ptr().addr();
        let here = (libc::AT_FDCWD as isize).cast_unsigned();
        let attempts: [(&str, &dyn Fn() -> i64); 10] = [
            ("mode", &|| call(libc::SYS_fchmod, &[number, 0o4755])),
            ("mode by its link", &|| {
                call(libc::SYS_fchmodat, &[here, path, 0o4755])
            }),
            ("owner", &|| call(libc::SYS_fchown, &[number, 1, 1])),
            ("owner by its link", &|| {
                call(libc::SYS_fchownat, &[here, path, 1, 1, 0])
            }),
            ("size", &|| call(libc::SYS_ftruncate, &[number, 0])),
            ("size by its link", &|| call(libc::SYS_truncate, &[path, 0])),
            ("attribute", &|| {
                call(
                    libc::SYS_fsetxattr,
                    &[number, text(c"user.x"), text(c"x"), 1, 0],
                )
            }),
            ("capability", &|| {
                call(
                    libc::SYS_setxattr,
                    &[path, text(c"security.capability"), text(c"x"), 1, 0],
                )
            }),
            ("times", &|| {
                call(libc::SYS_utimensat, &[number, 0, TIMES.as_ptr().addr(), 0])
            }),
            ("open for writing", &|| {
                let flags = (libc::O_WRONLY | libc::O_NONBLOCK).unsigned_abs() as usize;
                call(libc::SYS_openat, &[here, path, flags])
            }),
        ];
        for (name, attempt) in attempts {
            let (bare, filtered) = (outcome(attempt, false), outcome(attempt, true));
            lines.push_str(&format!("{place}\t{name}\t{bare}\t{filtered}\n"));
        }
    }
    lines
}
