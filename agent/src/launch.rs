//! Starts `container-init` helpers and follows them until their program runs.
use std::{
    fs::File,
    io::{self, Write as _},
    os::{
        fd::{AsFd as _, AsRawFd, OwnedFd},
        unix::process::CommandExt as _,
    },
    process::Command,
    time::Duration,
};

use nix::unistd::Pid;
use rustix::{
    fs::{MemfdFlags, SealFlags},
    net::{AddressFamily, SendFlags, SocketFlags, SocketType},
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    time::timeout,
};

use crate::{
    control::{self, CONTROL_FD, GO, INSTRUCTIONS_FD, Instructions, JOINED_FD, Message},
    error::{Error, Result},
    readiness,
    reaper::{Exit, Reaper},
    stdio::ChildEnds,
};

/// How long a helper may take for its part: a mount from a slow share is the longest of it.
const SETUP_TIME: Duration = Duration::from_secs(60);

/// Messages of one helper: pid, terminal, readiness and some warnings.
const MAX_MESSAGES: usize = 200;

/// Above every descriptor that a helper is given.
const FIRST_FREE_FD: i32 = 10;

/// Starts helpers. One for the agent's life.
pub struct Launcher {
    /// The agent's own binary behind a read-only mount that is attached nowhere: a container that
    /// meets a helper's /proc/self/exe cannot write through it (CVE-2019-5736).
    binary: OwnedFd,
    reaper: Reaper,
    logger: slog::Logger,
}

/// A helper that has set everything up and waits for [`Prepared::go`].
pub struct Prepared {
    /// Pid, in the agent's namespace, of the process that will run the program.
    pub pid: Pid,
    /// Refers to that process for as long as it is held, even after it was reaped.
    pub pidfd: OwnedFd,
    /// The pty master, if a terminal was asked for.
    pub terminal: Option<OwnedFd>,
    /// The /dev of a privileged container, whose nodes are to follow the guest's.
    pub devices: Option<OwnedFd>,
    control: AsyncFd<OwnedFd>,
}

impl Launcher {
    /// `binary` is executed for each helper; see [`open_binary`].
    pub fn new(binary: OwnedFd, reaper: Reaper, logger: slog::Logger) -> Self {
        Self {
            binary,
            reaper,
            logger,
        }
    }

    /// Starts a helper with `ends` as its stdio and waits until it is ready. It joins namespaces of the process `joined`, if
    /// its instructions say so. `on_exit` is called when the process that runs the program ends, also when that is before it
    /// was ready.
    ///
    /// # Errors
    /// The helper's own sentence as `InvalidArgument` or `Internal`, or why there is none.
    pub async fn prepare(
        &self,
        instructions: &Instructions,
        joined: Option<&OwnedFd>,
        ends: ChildEnds,
        on_exit: impl FnOnce(Exit) + Send + 'static,
    ) -> Result<Prepared> {
        let launch = self.reaper.launch();
        let control = self
            .spawn(instructions, joined, ends)
            .map_err(|e| Error::io("cannot start the container helper", e))?;
        let control = readiness::register(control, Interest::READABLE)
            .map_err(|e| Error::io("helper socket", e))?;
        let mut process = None;
        let prepared = timeout(SETUP_TIME, async {
            let mut on_exit = Some(on_exit);
            let (mut terminal, mut devices) = (None, None);
            let mut ready = false;
            let mut messages = 0;
            // The pid and the readiness come from two processes, in either order.
            while !ready || process.is_none() {
                messages += 1;
                match next(&control).await? {
                    // The second process may by now stand beside hostile ones: what it says is
                    // bounded, and it cannot name another pid.
                    _ if messages > MAX_MESSAGES => {
                        return Err(Error::Internal(
                            "the container helper talks too much".into(),
                        ));
                    }
                    (Message::Pid(_), _) if process.is_some() => {
                        return Err(Error::Internal(
                            "the container helper named two pids".into(),
                        ));
                    }
                    (Message::Pid(raw), fd) => {
                        let pid = Pid::from_raw(raw);
                        if let Some(on_exit) = on_exit.take() {
                            self.reaper.watch(&launch, pid, on_exit);
                        }
                        // Not by its number: it may have ended, been reaped, and left that to another one.
                        let fd = fd.ok_or_else(|| {
                            Error::Internal("the container helper gave no pidfd".into())
                        })?;
                        process = Some((pid, fd));
                    }
                    (Message::Terminal, fd) => terminal = fd,
                    (Message::Devices, fd) => devices = fd,
                    (Message::Warning(text), _) => {
                        slog::info!(self.logger, "container helper"; "note" => text)
                    }
                    (Message::Failed(text), _) => return Err(Error::InvalidArgument(text)),
                    (Message::Ready, _) => ready = true,
                }
            }
            Ok((terminal, devices))
        })
        .await;
        let (error, started) = match (prepared, process) {
            (Ok(Ok((terminal, devices))), Some((pid, pidfd))) => {
                return Ok(Prepared {
                    pid,
                    pidfd,
                    terminal,
                    devices,
                    control,
                });
            }
            (Ok(Ok(_)), None) => {
                return Err(Error::Internal("the container helper gave no pid".into()));
            }
            (Ok(Err(error)), started) => (error, started),
            (Err(_), started) => (
                Error::DeadlineExceeded(format!(
                    "setting up the process took longer than {} s",
                    SETUP_TIME.as_secs()
                )),
                started,
            ),
        };
        if let Some((_, pidfd)) = started {
            let _ = rustix::process::pidfd_send_signal(&pidfd, rustix::process::Signal::KILL);
        }
        Err(error)
    }

    fn spawn(
        &self,
        instructions: &Instructions,
        joined: Option<&OwnedFd>,
        ends: ChildEnds,
    ) -> io::Result<OwnedFd> {
        let (ours, theirs) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        rustix::io::ioctl_fionbio(&ours, true)?;
        let memory = instructions_file(instructions)?;
        let mut command = Command::new(format!("/proc/self/fd/{}", self.binary.as_raw_fd()));
        command
            .arg0("brig-agent")
            .arg("container-init")
            .env_clear()
            .current_dir("/");
        command
            .stdin(ends.stdin)
            .stdout(ends.stdout)
            .stderr(ends.stderr);
        // One that there is not is a descriptor that the helper does not look at.
        let joined = joined.map_or(memory.as_raw_fd(), AsRawFd::as_raw_fd);
        let given = [
            (theirs.as_raw_fd(), CONTROL_FD),
            (memory.as_raw_fd(), INSTRUCTIONS_FD),
            (joined, JOINED_FD),
        ];
        // SAFETY: between fork and exec only async-signal-safe calls are made (fcntl, dup2), on
        // descriptors that are open in the parent. All are first moved out of the way, so that
        // no dup2 overwrites another's source.
        unsafe {
            command.pre_exec(move || {
                let mut high = given;
                for (fd, _) in &mut high {
                    *fd = libc::fcntl(*fd, libc::F_DUPFD_CLOEXEC, FIRST_FREE_FD);
                    if *fd < 0 {
                        return Err(io::Error::last_os_error());
                    }
                }
                for (fd, place) in high {
                    if libc::dup2(fd, place) < 0 {
                        return Err(io::Error::last_os_error());
                    }
                }
                Ok(())
            });
        }
        command.spawn()?;
        Ok(ours)
    }
}

impl Prepared {
    /// Lets the program run and waits until it does.
    ///
    /// # Errors
    /// `InvalidArgument` with the helper's sentence when the program cannot be executed.
    pub async fn go(&self) -> Result<()> {
        rustix::net::send(self.control.get_ref(), GO, SendFlags::NOSIGNAL).map_err(|e| {
            Error::FailedPrecondition(format!("the process ended before its start: {e}"))
        })?;
        let outcome = timeout(SETUP_TIME, async {
            loop {
                match receive(&self.control).await? {
                    None => return Ok(()),
                    Some((Message::Failed(text), _)) => return Err(Error::InvalidArgument(text)),
                    Some(_) => {}
                }
            }
        });
        outcome.await.unwrap_or_else(|_| {
            Err(Error::DeadlineExceeded(
                "the program did not start in time".into(),
            ))
        })
    }
}

async fn receive(control: &AsyncFd<OwnedFd>) -> Result<Option<(Message, Option<OwnedFd>)>> {
    let received = control
        .async_io(Interest::READABLE, |fd| control::receive(fd.as_fd()))
        .await;
    received.map_err(|e| Error::io("container helper", e))
}

async fn next(control: &AsyncFd<OwnedFd>) -> Result<(Message, Option<OwnedFd>)> {
    receive(control).await?.ok_or_else(|| {
        Error::Internal(
            "the container helper ended without a word; was it killed for memory?".into(),
        )
    })
}

fn instructions_file(instructions: &Instructions) -> io::Result<OwnedFd> {
    let fd = rustix::fs::memfd_create(
        "instructions",
        MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
    )?;
    let mut file = File::from(fd);
    file.write_all(&serde_json::to_vec(instructions)?)?;
    rustix::fs::fcntl_add_seals(
        &file,
        SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL,
    )?;
    Ok(file.into())
}

/// The agent's binary at `path`, through a detached read-only mount of that one file.
///
/// # Errors
/// Those of open_tree(2) and mount_setattr(2).
pub fn open_binary(path: &str) -> io::Result<OwnedFd> {
    use rustix::mount::{OpenTreeFlags, open_tree};
    let tree = open_tree(
        rustix::fs::CWD,
        path,
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC,
    )?;
    let change = crate::mount_attr::Change {
        set: libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID,
        ..Default::default()
    };
    crate::mount_attr::apply(tree.as_fd(), &change, false)?;
    // Out of the way of the descriptors that a helper gets.
    Ok(rustix::io::fcntl_dupfd_cloexec(&tree, FIRST_FREE_FD)?)
}
