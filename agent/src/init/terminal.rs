//! The container's terminal, from its own devpts, and the ownership of stdio.
use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd},
};

use rustix::fs::{OFlags, Uid};

use super::{
    agent::Agent,
    failure::{Context as _, Failure, Result},
    root::{Missing, Root},
};
use crate::{
    control,
    detached::{attach_on, clone_mount},
    stdio,
};

/// statfs(2) f_type of devpts.
const DEVPTS_MAGIC: i64 = 0x1cd1;

/// Both ends of a new pty.
pub struct Terminal {
    master: OwnedFd,
    slave: OwnedFd,
}

/// Opens a pty of the container's /dev/pts.
pub fn open(root: &Root, size: control::Terminal) -> Result<Terminal> {
    let what = "opening a terminal of the container's /dev/pts";
    let master = root
        .open("/dev/pts/ptmx", OFlags::RDWR | OFlags::NOCTTY)
        .during(what)?;
    // The image decides what is at that path; only the kernel's own file will do.
    let stat = rustix::fs::fstat(&master).during(what)?;
    let file_system = rustix::fs::fstatfs(&master).during(what)?;
    if stat.st_rdev != rustix::fs::makedev(5, 2) || file_system.f_type != DEVPTS_MAGIC {
        return Err(Failure(format!("{what}: /dev/pts is not a devpts mount")));
    }
    let unlock: libc::c_int = 0;
    // SAFETY: TIOCSPTLCK reads one int from the pointer given (tty_ioctl(4)).
    if unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw const unlock) } != 0 {
        return Err(io::Error::last_os_error()).during(what);
    }
    // By ioctl and not by path: the peer is the one of this master, whatever is mounted where.
    // SAFETY: TIOCGPTPEER takes open flags and gives a new descriptor.
    let slave = unsafe {
        libc::ioctl(
            master.as_raw_fd(),
            libc::TIOCGPTPEER,
            libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC,
        )
    };
    if slave < 0 {
        return Err(io::Error::last_os_error()).during(what);
    }
    // SAFETY: the descriptor was just made and is owned by nobody else.
    let slave = unsafe { OwnedFd::from_raw_fd(slave) };
    if size.rows != 0 || size.columns != 0 {
        stdio::set_window_size(&master, size.rows, size.columns).during("terminal size")?;
    }
    Ok(Terminal { master, slave })
}

impl Terminal {
    /// Shows the terminal as the container's /dev/console.
    pub fn bind_console(&self, root: &Root) -> Result<()> {
        let tree = clone_mount(self.slave.as_fd(), false).during("/dev/console")?;
        let (target, _) = root.open_or_make("/dev/console", Missing::File)?;
        attach_on(&tree, target.as_fd()).during("/dev/console")
    }

    /// Makes it this session's terminal and stdio, owned by `uid`, and gives the master away.
    pub fn adopt(self, agent: &Agent, uid: u32) -> Result<()> {
        agent.give_terminal(self.master.as_fd())?;
        rustix::fs::fchown(&self.slave, Some(Uid::from_raw(uid)), None).during("terminal owner")?;
        rustix::process::ioctl_tiocsctty(&self.slave).during("controlling terminal")?;
        rustix::stdio::dup2_stdin(&self.slave).during("terminal")?;
        rustix::stdio::dup2_stdout(&self.slave).during("terminal")?;
        rustix::stdio::dup2_stderr(&self.slave).during("terminal")?;
        Ok(())
    }
}

/// Pipes belong to the process's user, so that it may open /dev/stdout. Devices (/dev/null) stay
/// root's.
pub fn give_stdio_to(uid: u32) -> Result<()> {
    for fd in [
        rustix::stdio::stdin(),
        rustix::stdio::stdout(),
        rustix::stdio::stderr(),
    ] {
        let stat = rustix::fs::fstat(fd).during("stdio")?;
        if stat.st_mode & libc::S_IFMT == libc::S_IFIFO {
            rustix::fs::fchown(fd, Some(Uid::from_raw(uid)), None).during("stdio owner")?;
        }
    }
    Ok(())
}
