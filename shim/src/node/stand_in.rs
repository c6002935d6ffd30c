//! A pid on the node for one container of a pod.
//!
//! On the node the containers of a pod have one process in common, the VMM. But containerd names a
//! container by its pid in one place: what targets another container's pid namespace (`kubectl debug
//! --target`) says `/proc/PID/ns/pid`, and nothing else. So each container has the id of a thread of the
//! shim that does nothing: live, in the pod's network namespace and cgroup, and nobody else's for as
//! long as containerd may name it.

use std::convert::Infallible;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;

use tokio::sync::oneshot;

use crate::node::network::Namespace;

/// Of the thread, in bytes. It waits, and little more.
const STACK: usize = 64 << 10;

/// The thread; it ends when this is dropped.
#[derive(Debug)]
pub struct StandIn {
    pid: u32,
    _end: mpsc::Sender<Infallible>,
}

impl StandIn {
    /// Starts the thread in the network namespace at `network`, or in the shim's.
    ///
    /// # Errors
    /// When there can be no more threads, or the namespace is gone.
    pub async fn start(network: Option<PathBuf>) -> io::Result<Self> {
        let (tell, told) = oneshot::channel();
        let (end, ended) = mpsc::channel();
        thread::Builder::new()
            .name("container".to_owned())
            .stack_size(STACK)
            .spawn(move || {
                let entered = network.as_deref().map_or(Ok(()), enter);
                let ready = entered.is_ok();
                let pid = rustix::thread::gettid().as_raw_nonzero().get();
                let _ = tell.send(entered.map(|()| pid.unsigned_abs()));
                if ready {
                    // Nothing is ever sent.
                    let _ = ended.recv();
                }
            })?;
        let pid = told.await.map_err(|_| io::ErrorKind::BrokenPipe)??;
        Ok(Self { pid, _end: end })
    }

    /// The pid.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }
}

fn enter(path: &Path) -> io::Result<()> {
    let namespace = Namespace::open(path).map_err(io::Error::other)?;
    Ok(nix::sched::setns(
        namespace,
        nix::sched::CloneFlags::CLONE_NEWNET,
    )?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exists(pid: u32) -> bool {
        Path::new(&format!("/proc/{pid}/ns/pid")).exists()
    }

    #[tokio::test]
    async fn each_has_a_live_pid_of_its_own_until_it_is_dropped() {
        let first = StandIn::start(None).await.unwrap();
        let second = StandIn::start(None).await.unwrap();
        let pid = first.pid();
        assert!(pid != second.pid() && pid != std::process::id());
        assert!(exists(pid) && exists(second.pid()));
        drop(first);
        // The thread ends on its own time.
        for _ in 0..1000 {
            if !exists(pid) {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        panic!("the thread goes on");
    }

    #[tokio::test]
    async fn a_namespace_that_is_gone_is_an_error() {
        let missing = PathBuf::from("/run/netns/brig-no-such");
        assert!(StandIn::start(Some(missing)).await.is_err());
    }
}
