//! The container's terminal, from its own devpts, and the ownership of stdio.
use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd},
};

use rustix::fs::{Mode, OFlags, Uid, fchown, fstat, fstatfs, makedev, openat};

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
    // The image decides what is at that path; only the kernel's own file will do, and nothing else is
    // opened: a device of the image may act on being opened.
    let pts = root
        .open("/dev/pts", OFlags::PATH | OFlags::DIRECTORY)
        .during(what)?;
    let is_devpts = |fd: &OwnedFd| fstatfs(fd).map(|found| found.f_type == DEVPTS_MAGIC);
    let foreign = || Failure(format!("{what}: /dev/pts is not a devpts mount"));
    if !is_devpts(&pts).during(what)? {
        return Err(foreign());
    }
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let master = openat(&pts, "ptmx", flags, Mode::empty()).during(what)?;
    let stat = fstat(&master).during(what)?;
    if stat.st_rdev != makedev(5, 2) || !is_devpts(&master).during(what)? {
        return Err(foreign());
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
        let target = root.open_or_make("/dev/console", Missing::File)?;
        attach_on(&tree, target.as_fd()).during("/dev/console")
    }

    /// Makes it this session's terminal and stdio, owned by `uid`, and gives the master away.
    pub fn adopt(self, agent: &Agent, uid: u32) -> Result<()> {
        agent.give_terminal(self.master.as_fd())?;
        fchown(&self.slave, Some(Uid::from_raw(uid)), None).during("terminal owner")?;
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
        let stat = fstat(fd).during("stdio")?;
        if stat.st_mode & libc::S_IFMT == libc::S_IFIFO {
            fchown(fd, Some(Uid::from_raw(uid)), None).during("stdio owner")?;
        }
    }
    Ok(())
}
