//! Waits for changes of cgroup event files: the kernel raises inotify events on them.
use std::{fs, io, os::fd::OwnedFd, path::Path, time::Duration};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::{
    io::{Interest, unix::AsyncFd},
    time::timeout,
};

use crate::readiness;

/// A file whose changes can be waited for.
pub struct Watch {
    inotify: AsyncFd<OwnedFd>,
}

impl Watch {
    /// Watches `file`.
    ///
    /// # Errors
    /// Those of inotify(7).
    pub fn new(file: &Path) -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        inotify.add_watch(file, AddWatchFlags::IN_MODIFY)?;
        Ok(Self {
            inotify: readiness::register(OwnedFd::from(inotify), Interest::READABLE)?,
        })
    }

    /// Waits for at least one change since the last call.
    ///
    /// # Errors
    /// Those of read(2).
    pub async fn changed(&self) -> io::Result<()> {
        let mut events = [0; 4096];
        self.inotify
            .async_io(Interest::READABLE, |fd| {
                Ok(rustix::io::read(fd, &mut events)?)
            })
            .await?;
        Ok(())
    }
}

/// Waits until the text of `file` satisfies `done`, at most `patience`.
///
/// # Errors
/// `TimedOut`, or why the file cannot be read.
pub async fn until(file: &Path, patience: Duration, done: impl Fn(&str) -> bool) -> io::Result<()> {
    let watch = Watch::new(file)?;
    let wait = async {
        while !done(&fs::read_to_string(file)?) {
            watch.changed().await?;
        }
        Ok(())
    };
    timeout(patience, wait)
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}
