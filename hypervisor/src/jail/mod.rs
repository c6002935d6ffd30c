//! The jail of brig-vmm (DESIGN section 5): what the process gives up before it hears of a guest.
//!
//! [`crate::launch`] starts the VMM in its own user, mount, pid, ipc and uts namespaces; [`enter`] is
//! its first act there, while it has one thread: an empty root with `/shared` and the procfs of its own
//! pid namespace, seven capabilities for the file server, no new privileges, and a Landlock domain of
//! `/shared`. [`seccomp::apply`] closes each thread when it begins its work. What remains is the
//! checked-in list in [`allow`], which a test compares with the living process.
//!
//! No thread is started by guest activity: the core starts every worker and CPU thread before the
//! guest runs, and only the control loop, which no guest reaches, may start another, for a device that is
//! plugged later. Such a thread inherits the loop's filter and takes its own besides, never a wider one.
//!
//! Trusted: the shim and the kernel. Assumed hostile after [`enter`]: this very process.

pub mod allow;
pub mod audit;
mod error;
mod landlock;
mod privileges;
mod root;
pub mod seccomp;
mod thread_kind;

use std::fs::File;
use std::io::Write;
use std::os::fd::{FromRawFd, OwnedFd};

use crate::launch::JAIL_REPORT_FD;

pub use error::JailError;
pub use landlock::Landlock;
pub use root::SHARED;

/// The oldest Linux that can make a jail, as major and minor number: the share and the empty root want `mount_setattr(2)`,
/// the rest is older (`close_range(2)` with a flag 5.11, procfs of processes alone 5.8, `clone3(2)` into a cgroup 5.7).
pub const OLDEST_LINUX: (u32, u32) = (5, 12);

/// Closes the jail around the calling process, and tells the shim on [`JAIL_REPORT_FD`].
///
/// To be called once, first thing in `main`, before any other thread exists. Afterwards the
/// descriptors 0 to 3 are open and no other. seccomp is each thread's own affair.
///
/// # Errors
/// The step that failed. The caller must exit with [`crate::control::exit::JAIL`]: the process is then
/// neither in nor out.
pub fn enter() -> Result<Landlock, JailError> {
    // SAFETY: the launcher put the report pipe at this number for us; nothing else has run yet that
    // could own it.
    let report = unsafe { OwnedFd::from_raw_fd(JAIL_REPORT_FD) };
    let outcome = close();
    let mut report = File::from(report);
    // If the shim has gone, the control socket will say so.
    let _ = match &outcome {
        Ok(_) => report.write_all(&[0]),
        Err(error) => report.write_all(error.to_string().as_bytes()),
    };
    outcome
}

fn close() -> Result<Landlock, JailError> {
    seccomp::prepare();
    privileges::close_other_descriptors(JAIL_REPORT_FD + 1)?;
    privileges::forbid_namespaces()?;
    root::replace()?;
    privileges::neutral_identity()?;
    privileges::own_counters()?;
    privileges::drop_all()?;
    landlock::restrict(SHARED)
}
