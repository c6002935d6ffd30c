//! Changes of host directories, by one inotify instance a pod: instances are few on a node (128 for all
//! of root, unless `fs.inotify.max_user_instances` says otherwise), watches are many.
//!
//! Each replica has a [`Subscription`] with a counter. Reading is void if the counter moved meanwhile, so
//! that no half-written generation is ever taken. What the kernel reports is trusted.

use std::collections::HashMap;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::io::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::node::watched::watched;

/// Everything that changes what a reader would find.
const CHANGES: WatchFlags = WatchFlags::CREATE
    .union(WatchFlags::DELETE)
    .union(WatchFlags::MOVED_FROM)
    .union(WatchFlags::MOVED_TO)
    .union(WatchFlags::MODIFY)
    .union(WatchFlags::ATTRIB)
    .union(WatchFlags::DELETE_SELF)
    .union(WatchFlags::MOVE_SELF)
    .union(WatchFlags::ONLYDIR);

/// The pod's inotify instance.
pub struct Watcher {
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

struct Shared {
    inotify: AsyncFd<OwnedFd>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    next: u64,
    counters: HashMap<u64, watch::Sender<u64>>,
    /// Who wants to know of a watch.
    watches: HashMap<i32, Vec<u64>>,
}

impl Watcher {
    /// Inside a runtime.
    ///
    /// # Errors
    /// `EMFILE` when the node has no instance left.
    pub fn new() -> io::Result<Self> {
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        let shared = Arc::new(Shared {
            inotify: watched(inotify, Interest::READABLE)?,
            state: Mutex::default(),
        });
        let reader = Arc::clone(&shared);
        let task = tokio::spawn(async move {
            while let Ok(mut ready) = reader.inotify.readable().await {
                reader.drain();
                ready.clear_ready();
            }
        });
        Ok(Self { shared, task })
    }

    /// A new counter, which no directory moves yet.
    #[must_use]
    pub fn subscribe(&self) -> Subscription {
        let (sender, changes) = watch::channel(0);
        let mut state = self.shared.lock();
        let number = state.next;
        state.next += 1;
        state.counters.insert(number, sender);
        drop(state);
        Subscription {
            shared: Arc::clone(&self.shared),
            number,
            changes,
        }
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Counts the changes of some directories; with it their watches go.
pub struct Subscription {
    shared: Arc<Shared>,
    number: u64,
    changes: watch::Receiver<u64>,
}

/// The part of a subscription that a blocking reader uses.
#[derive(Clone)]
pub struct Marker {
    shared: Arc<Shared>,
    number: u64,
}

impl Subscription {
    /// For a reader on another thread.
    #[must_use]
    pub fn marker(&self) -> Marker {
        Marker {
            shared: Arc::clone(&self.shared),
            number: self.number,
        }
    }

    /// Waits for a change after the last call.
    pub async fn changed(&mut self) {
        if self.changes.changed().await.is_err() {
            // The counter lives as long as this does.
            std::future::pending::<()>().await;
        }
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.counters.remove(&self.number);
        let mut unused = Vec::new();
        for (watch, subscribers) in &mut state.watches {
            subscribers.retain(|number| *number != self.number);
            if subscribers.is_empty() {
                unused.push(*watch);
            }
        }
        for watch in unused {
            state.watches.remove(&watch);
            // It goes by itself with its directory.
            let _ = inotify::remove_watch(self.shared.inotify.get_ref(), watch);
        }
    }
}

impl Marker {
    /// Watches a directory.
    ///
    /// # Errors
    /// `ENOSPC` when the node has no watch left.
    pub fn watch(&self, directory: BorrowedFd<'_>) -> io::Result<()> {
        let path = format!("/proc/self/fd/{}", directory.as_raw_fd());
        let mut state = self.shared.lock();
        let watch = inotify::add_watch(self.shared.inotify.get_ref(), path, CHANGES)?;
        let subscribers = state.watches.entry(watch).or_default();
        if !subscribers.contains(&self.number) {
            subscribers.push(self.number);
        }
        Ok(())
    }

    /// The count of changes, up to this moment.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.shared.drain();
        let state = self.shared.lock();
        state
            .counters
            .get(&self.number)
            .map_or(0, |sender| *sender.borrow())
    }
}

impl Shared {
    /// Consistent whenever the lock is free.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts what the kernel has reported. With the lock held, so that an event that has been read has
    /// also been counted when anyone asks.
    fn drain(&self) {
        let mut state = self.lock();
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut events = inotify::Reader::new(self.inotify.get_ref(), &mut buffer);
        loop {
            match events.next() {
                Ok(event) if event.events().contains(ReadFlags::QUEUE_OVERFLOW) => {
                    for counter in state.counters.values() {
                        counter.send_modify(|count| *count += 1);
                    }
                }
                Ok(event) => {
                    let watch = event.wd();
                    for number in state.watches.get(&watch).into_iter().flatten() {
                        if let Some(counter) = state.counters.get(number) {
                            counter.send_modify(|count| *count += 1);
                        }
                    }
                    if event.events().contains(ReadFlags::IGNORED) {
                        state.watches.remove(&watch);
                    }
                }
                Err(Errno::INTR) => {}
                Err(_) => return,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::fd::AsFd;
    use std::path::Path;
    use std::time::Duration;
    use tokio::time::timeout;

    fn watch(subscription: &Subscription, path: &Path) {
        let directory = fs::File::open(path).unwrap();
        subscription.marker().watch(directory.as_fd()).unwrap();
    }

    async fn changed(subscription: &mut Subscription) -> bool {
        timeout(Duration::from_secs(5), subscription.changed())
            .await
            .is_ok()
    }

    #[tokio::test]
    async fn a_change_is_told_to_those_who_watch_the_directory() {
        let watcher = Watcher::new().unwrap();
        let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (mut one, mut both) = (watcher.subscribe(), watcher.subscribe());
        watch(&one, dir.path());
        watch(&both, dir.path());
        watch(&both, other.path());
        fs::write(dir.path().join("f"), "x").unwrap();
        assert!(changed(&mut one).await && changed(&mut both).await);
        let (before_one, before_both) = (one.marker().count(), both.marker().count());
        fs::write(other.path().join("f"), "x").unwrap();
        assert_eq!(one.marker().count(), before_one);
        assert!(both.marker().count() > before_both);
    }

    #[tokio::test]
    async fn the_count_knows_of_a_change_at_once() {
        let watcher = Watcher::new().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let subscription = watcher.subscribe();
        watch(&subscription, dir.path());
        let marker = subscription.marker();
        assert_eq!(marker.count(), 0);
        // No task of the runtime runs between these lines.
        fs::rename(dir.path(), dir.path().with_extension("moved")).unwrap();
        assert!(marker.count() > 0);
        fs::remove_dir(dir.path().with_extension("moved")).unwrap();
    }

    #[tokio::test]
    async fn watches_go_with_their_subscription_and_hold_nothing_busy() {
        let watcher = Watcher::new().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (watcher.subscribe(), watcher.subscribe());
        watch(&one, dir.path());
        watch(&two, dir.path());
        drop(one);
        assert_eq!(watcher.shared.lock().watches.len(), 1);
        drop(two);
        let state = watcher.shared.lock();
        assert!(state.watches.is_empty() && state.counters.is_empty());
    }
}
