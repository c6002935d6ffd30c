//! Controllers that somebody takes from a pod's cgroup. systemd's slices give their children what systemd's own units in them ask
//! for; a directory that a shim has made is no unit, so each change of a slice's limits takes them all away, and with them the files and what was
//! written there. The kernel tells nobody that a file has gone, but whoever takes a controller writes to a file of a parent.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::io::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::{CONTROL, Cgroup, ROOT, parents};
use crate::node::watched::watched;

/// Tells when somebody may have taken or given controllers. One inotify instance.
pub struct Taken(AsyncFd<OwnedFd>);

impl Taken {
    /// Of this cgroup, from now on. Inside a runtime.
    ///
    /// # Errors
    /// `EMFILE` when the node has no instance left.
    pub fn watch(cgroup: &Cgroup) -> io::Result<Self> {
        Self::watch_below(Path::new(ROOT), cgroup)
    }

    pub(crate) fn watch_below(root: &Path, cgroup: &Cgroup) -> io::Result<Self> {
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        for parent in cgroup.dirs().iter().flat_map(|dir| parents(root, dir)) {
            let control = parent.join(CONTROL);
            match inotify::add_watch(&inotify, &control, WatchFlags::MODIFY) {
                // Its children have none.
                Ok(_) | Err(Errno::NOENT) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Self(watched(inotify, Interest::READABLE)?))
    }

    /// Waits until somebody does.
    ///
    /// # Errors
    /// What the kernel says.
    pub async fn changed(&self) -> io::Result<()> {
        loop {
            let mut ready = self.0.readable().await?;
            let mut buffer = [MaybeUninit::<u8>::uninit(); 1024];
            let mut reader = inotify::Reader::new(self.0.get_ref(), &mut buffer);
            let mut any = false;
            loop {
                match reader.next() {
                    Ok(_) => any = true,
                    Err(Errno::INTR) => {}
                    Err(Errno::AGAIN) => break,
                    Err(error) => return Err(error.into()),
                }
            }
            ready.clear_ready();
            if any {
                return Ok(());
            }
        }
    }
}
