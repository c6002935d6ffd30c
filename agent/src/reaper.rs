//! The one place that reaps children: those the agent started and, as PID 1, every orphan.
//!
//! Exits are handed over in the order the kernel reports them, which is what keeps a container's
//! exec exits before its own.
use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex, MutexGuard},
    time::SystemTime,
};

use nix::{errno::Errno, unistd::Pid};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::sync::lock;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// 0 to 255; 128 + n for signal n.
    pub status: u32,
    /// When it was reaped.
    pub at: SystemTime,
}

type Callback = Box<dyn FnOnce(Exit) + Send>;

#[derive(Default)]
struct Table {
    waiting: HashMap<i32, Callback>,
    /// Exits of processes nobody waits for yet, kept only while a launch is under way: a
    /// container's init may end before its launcher has told the agent its pid.
    unclaimed: HashMap<i32, Exit>,
    launches: usize,
}

/// Handle to the reaper. Cheap to clone.
#[derive(Clone, Default)]
pub struct Reaper {
    table: Arc<Mutex<Table>>,
}

/// While it lives, exits of unknown processes are kept for [`Reaper::watch`].
pub struct Launch {
    reaper: Reaper,
}

impl Drop for Launch {
    fn drop(&mut self) {
        let mut table = self.reaper.table();
        table.launches -= 1;
        if table.launches == 0 {
            table.unclaimed.clear();
        }
    }
}

impl Reaper {
    fn table(&self) -> MutexGuard<'_, Table> {
        lock(&self.table)
    }

    /// Announces that a process is about to be started whose pid becomes known only later.
    pub fn launch(&self) -> Launch {
        self.table().launches += 1;
        Launch {
            reaper: self.clone(),
        }
    }

    /// Calls `on_exit` once, when `pid` has been reaped. The [`Launch`] that covers the start of
    /// the process shows that its exit cannot have been missed.
    pub fn watch(&self, _launch: &Launch, pid: Pid, on_exit: impl FnOnce(Exit) + Send + 'static) {
        let mut table = self.table();
        if let Some(exit) = table.unclaimed.remove(&pid.as_raw()) {
            drop(table);
            on_exit(exit);
        } else {
            table.waiting.insert(pid.as_raw(), Box::new(on_exit));
        }
    }

    /// Starts to listen for SIGCHLD. Must be called before the first child is started.
    ///
    /// # Errors
    /// When the signal handler cannot be installed.
    pub fn listen() -> io::Result<Signal> {
        signal(SignalKind::child())
    }

    /// Reaps for ever.
    pub async fn run(self, mut children: Signal) {
        while children.recv().await.is_some() {
            self.reap();
        }
    }

    fn reap(&self) {
        while let Some((pid, status)) = wait_any() {
            let exit = Exit {
                status,
                at: SystemTime::now(),
            };
            let mut table = self.table();
            if let Some(callback) = table.waiting.remove(&pid) {
                drop(table);
                callback(exit);
            } else if table.launches > 0 {
                table.unclaimed.insert(pid, exit);
            }
        }
    }
}

/// Reaps one child if one has ended: its pid and exit status. nix's wrapper is not used because
/// it loses the status of a process killed by a real-time signal.
fn wait_any() -> Option<(i32, u32)> {
    loop {
        let mut status = 0;
        // SAFETY: `status` is a valid place for an int; waitpid keeps no pointer.
        let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
        match pid {
            -1 if Errno::last() == Errno::EINTR => {}
            1.. => return Some((pid, exit_code(status))),
            _ => return None,
        }
    }
}

/// The exit code of a wait status: 128 + n for signal n.
fn exit_code(status: i32) -> u32 {
    let code = if libc::WIFSIGNALED(status) {
        128 + libc::WTERMSIG(status)
    } else {
        libc::WEXITSTATUS(status)
    };
    u32::try_from(code).unwrap_or(255)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;
    use tokio::sync::mpsc;

    #[test]
    fn a_wait_status_maps_to_the_shell_convention() {
        assert_eq!(exit_code(3 << 8), 3);
        assert_eq!(exit_code(9), 137);
        assert_eq!(exit_code(11 | 0x80), 139);
        assert_eq!(exit_code(34), 162);
    }

    #[test]
    fn an_exit_before_the_watch_is_kept_only_during_a_launch() {
        let reaper = Reaper::default();
        let (tx, mut rx) = mpsc::unbounded_channel();
        let launch = reaper.launch();
        reaper.table().unclaimed.insert(
            7,
            Exit {
                status: 5,
                at: SystemTime::UNIX_EPOCH,
            },
        );
        reaper.watch(&launch, Pid::from_raw(7), move |exit| {
            tx.send(exit.status).unwrap()
        });
        assert_eq!(rx.try_recv().unwrap(), 5);
        reaper.table().unclaimed.insert(
            8,
            Exit {
                status: 0,
                at: SystemTime::UNIX_EPOCH,
            },
        );
        drop(launch);
        assert!(reaper.table().unclaimed.is_empty());
    }

    #[test]
    #[allow(clippy::zombie_processes)] // The reaper waits for it: that is the test.
    fn the_sigchld_of_a_real_child_reaches_its_watcher() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let reaper = Reaper::default();
            let children = Reaper::listen().unwrap();
            let task = tokio::spawn(reaper.clone().run(children));
            let launch = reaper.launch();
            let child = Command::new("/bin/sh")
                .args(["-c", "exit 42"])
                .spawn()
                .unwrap();
            let (tx, mut rx) = mpsc::unbounded_channel();
            let pid = Pid::from_raw(i32::try_from(child.id()).unwrap());
            reaper.watch(&launch, pid, move |exit| tx.send(exit.status).unwrap());
            assert_eq!(rx.recv().await, Some(42));
            task.abort();
        });
    }
}
