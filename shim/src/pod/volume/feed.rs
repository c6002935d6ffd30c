//! One volume in the guest's memory, from its first reading to its end: a task that reads the host
//! directory, sends it to the agent, and again after each change, until the last container has let go.
//!
//! Contents may be secret; only ids, sizes and reasons are logged. The agent is not trusted: it gets what
//! its pod may see, and every call is bounded in time.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use brig_agent_protocol::agent::{
    UpdateVolumeRequest, VolumeEntry, VolumeRef, update_volume_request,
};
use brig_hypervisor::share::FileId;
use slog::{Logger, debug, info, warn};
use tokio::sync::{oneshot, watch};
use tokio::time::sleep;
use ttrpc::context;

use super::snapshot::{self, LIMITS, ReadError, Snapshot};
use super::watch::{Marker, Subscription};
use crate::error::{Error, Result};
use crate::guest::vm::Vm;
use crate::guest::vm::boot::Boot;

/// Bytes of content after which a request ends; a ttrpc message may have 4 MiB, a file 2.
const REQUEST_BYTES: u64 = 1 << 20;
/// Entries after which a request ends.
const REQUEST_ENTRIES: usize = 1024;
/// What all copies of a pod may hold together, in bytes.
const POD_BYTES: u64 = 64 << 20;
/// How often a directory that changes while it is read is read again.
const ATTEMPTS: u32 = 20;
/// How long its writer is left alone in between: kubelet writes a generation in a few milliseconds.
const SETTLE: Duration = Duration::from_millis(20);

/// How long an update that failed waits for its next attempt, at first and at most.
const FIRST_RETRY: Duration = Duration::from_secs(1);
const LAST_RETRY: Duration = Duration::from_secs(60);

/// What is copied.
#[derive(Debug, Clone)]
pub(super) enum Source {
    /// A directory.
    Directory {
        /// Where.
        top: PathBuf,
        /// Which it was when the container was created.
        identity: FileId,
    },
    /// One file, under this name in the copy.
    File {
        /// Where.
        path: PathBuf,
        /// Its name in the copy.
        name: String,
    },
    /// The first content of an emptyDir.
    Memory {
        /// Where.
        top: PathBuf,
        /// Which.
        identity: FileId,
        /// Its limit in bytes.
        size: u64,
    },
    /// An emptyDir of huge pages: who may use it, and nothing of what is in it.
    Huge {
        /// Where.
        top: PathBuf,
        /// Which.
        identity: FileId,
        /// Its limit in bytes, or 0.
        size: u64,
    },
}

/// How far a volume is.
#[derive(Debug, Clone)]
pub(super) enum Progress {
    /// The host directory is being read.
    Reading,
    /// It was read; the guest is not up yet.
    Read,
    /// The guest has it.
    Ready,
    /// It cannot be a copy, and why.
    Unsuitable(String),
    /// The guest refused it, or did not come up.
    Failed(Error),
}

/// A volume in the guest's memory. The last one to let go of it ends it.
pub(super) struct Volume {
    pub(super) id: String,
    progress: watch::Receiver<Progress>,
    /// Its end ends the task.
    _alive: oneshot::Sender<()>,
}

impl Volume {
    /// Waits until it is known whether the source can be copied: the reason if not.
    pub(super) async fn suitable(&self) -> std::result::Result<(), String> {
        let mut progress = self.progress.clone();
        let known = progress
            .wait_for(|now| !matches!(now, Progress::Reading))
            .await;
        match known.as_deref() {
            Ok(Progress::Unsuitable(reason)) => Err(reason.clone()),
            Ok(_) => Ok(()),
            Err(_) => Err("its reader has ended".to_owned()),
        }
    }

    /// Whether it will never be there.
    pub(super) fn has_failed(&self) -> bool {
        matches!(*self.progress.borrow(), Progress::Failed(_))
    }

    /// Waits until the guest has it.
    pub(super) async fn ready(&self) -> Result<()> {
        let mut progress = self.progress.clone();
        let known = progress
            .wait_for(|now| !matches!(now, Progress::Reading | Progress::Read))
            .await;
        match known.as_deref() {
            Ok(Progress::Ready) => Ok(()),
            Ok(Progress::Failed(error)) => Err(error.clone()),
            Ok(Progress::Unsuitable(reason)) => Err(Error::internal(reason.clone())),
            Ok(_) | Err(_) => Err(Error::internal(format!("volume {} has ended", self.id))),
        }
    }
}

/// Bytes that the copies of a pod hold.
#[derive(Debug, Default)]
pub(super) struct Budget(AtomicU64);

struct Reserved {
    budget: Arc<Budget>,
    bytes: u64,
}

impl Reserved {
    fn take(budget: &Arc<Budget>, bytes: u64) -> Option<Self> {
        let taken = budget
            .0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |held| {
                held.checked_add(bytes).filter(|sum| *sum <= POD_BYTES)
            });
        taken.ok().map(|_| Self {
            budget: Arc::clone(budget),
            bytes,
        })
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        self.budget.0.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// What a volume's task needs.
pub(super) struct Feed {
    pub(super) id: String,
    pub(super) source: Source,
    /// Of a volume that is kept up to date.
    pub(super) subscription: Option<Subscription>,
    pub(super) boot: Boot,
    pub(super) budget: Arc<Budget>,
    pub(super) logger: Logger,
}

impl Feed {
    /// Starts the task.
    pub(super) fn start(self) -> Arc<Volume> {
        let (progress_in, progress) = watch::channel(Progress::Reading);
        let (alive, ended) = oneshot::channel();
        let id = self.id.clone();
        tokio::spawn(self.run(progress_in, ended));
        Arc::new(Volume {
            id,
            progress,
            _alive: alive,
        })
    }

    async fn run(mut self, progress: watch::Sender<Progress>, mut ended: oneshot::Receiver<()>) {
        let read = tokio::select! {
            read = self.read() => read,
            _ = &mut ended => return,
        };
        let snapshot = match read {
            Ok(snapshot) => snapshot,
            Err(error) => {
                progress.send_replace(Progress::Unsuitable(error.to_string()));
                return;
            }
        };
        let Some(_reserved) = Reserved::take(&self.budget, snapshot.bytes) else {
            let reason = format!("the pod's copies together exceed {POD_BYTES} bytes");
            progress.send_replace(Progress::Unsuitable(reason));
            return;
        };
        progress.send_replace(Progress::Read);
        let vm = tokio::select! {
            vm = self.boot.ready() => vm,
            _ = &mut ended => return,
        };
        let vm = match vm {
            Ok(vm) => vm,
            Err(error) => {
                progress.send_replace(Progress::Failed(error));
                return;
            }
        };
        // A call of the agent is never given up half way: what it makes late must be removed after it.
        let lives = match self.send(&vm, snapshot).await {
            Ok(()) => {
                progress.send_replace(Progress::Ready);
                self.follow(&vm, &mut ended).await;
                // An emptyDir lives as long as the pod.
                matches!(self.source, Source::Memory { .. } | Source::Huge { .. })
            }
            Err(error) => {
                progress.send_replace(Progress::Failed(error));
                false
            }
        };
        if !lives && vm.death().is_none() {
            self.subscription = None;
            remove(&vm, &self.id, &self.logger).await;
        }
    }

    /// Keeps the guest's state up to date until the volume's end or the VM's.
    async fn follow(&mut self, vm: &Vm, ended: &mut oneshot::Receiver<()>) {
        let mut retry = None;
        loop {
            tokio::select! {
                () = changed(self.subscription.as_mut()) => retry = None,
                () = later(retry) => {}
                _ = &mut *ended => return,
                _ = vm.ended() => return,
            }
            let read = tokio::select! {
                read = self.read() => read,
                _ = &mut *ended => return,
            };
            let updated = match read {
                Ok(snapshot) => self.send(vm, snapshot).await.map_err(|error| error.message),
                Err(ReadError::Gone) => {
                    debug!(self.logger, "a volume was removed from the node"; "volume" => &self.id);
                    Ok(())
                }
                Err(error) => Err(error.to_string()),
            };
            retry = match updated {
                Ok(()) => None,
                Err(reason) => {
                    // Its writer believes it done, and nobody else would try again.
                    let pause = retry.map_or(FIRST_RETRY, |last: Duration| last * 2);
                    let pause = pause.min(LAST_RETRY);
                    warn!(self.logger, "a volume's change did not reach the guest yet";
                        "volume" => &self.id, "reason" => reason, "seconds" => pause.as_secs());
                    Some(pause)
                }
            };
        }
    }

    /// Reads until nothing changed meanwhile.
    async fn read(&self) -> std::result::Result<Snapshot, ReadError> {
        let marker = self.subscription.as_ref().map(Subscription::marker);
        for _ in 0..ATTEMPTS {
            let (source, marker) = (self.source.clone(), marker.clone());
            let read = tokio::task::spawn_blocking(move || read_once(&source, marker.as_ref()));
            match read.await {
                Ok(Err(ReadError::Changed)) => sleep(SETTLE).await,
                Ok(read) => return read,
                Err(error) => return Err(ReadError::Io(std::io::Error::other(error))),
            }
        }
        Err(ReadError::Changed)
    }

    async fn send(&self, vm: &Vm, snapshot: Snapshot) -> Result<()> {
        let (kind, size) = match &self.source {
            Source::Memory { size, .. } => (update_volume_request::Kind::MEMORY, *size),
            Source::Huge { size, .. } => (update_volume_request::Kind::HUGE, *size),
            // A generation comes before the one before it goes.
            _ => (update_volume_request::Kind::REPLICA, LIMITS.total * 3),
        };
        let (count, bytes) = (snapshot.entries.len(), snapshot.bytes);
        for request in requests(&self.id, kind, size, snapshot.entries) {
            update(vm, &request).await?;
        }
        info!(self.logger, "a volume was sent to the guest";
            "volume" => &self.id, "entries" => count, "bytes" => bytes);
        Ok(())
    }
}

/// Frees a volume in the guest.
pub(super) async fn remove(vm: &Vm, id: &str, logger: &Logger) {
    let request = VolumeRef {
        id: id.to_owned(),
        ..VolumeRef::default()
    };
    let answer = vm
        .agent()
        .remove_volume(context::Context::default(), &request);
    if let Err(error) = vm.call("RemoveVolume", answer).await
        && vm.death().is_none()
    {
        warn!(logger, "a volume is left in the guest"; "volume" => id, "error" => error.message);
    }
}

/// Waits for a change of what is watched, for ever if nothing is.
async fn changed(subscription: Option<&mut Subscription>) {
    match subscription {
        Some(subscription) => subscription.changed().await,
        None => std::future::pending().await,
    }
}

/// Waits for the time of the next attempt, for ever if none is needed.
async fn later(retry: Option<Duration>) {
    match retry {
        Some(pause) => sleep(pause).await,
        None => std::future::pending().await,
    }
}

/// One call of the agent.
pub(super) async fn update(vm: &Vm, request: &UpdateVolumeRequest) -> Result<()> {
    let answer = vm
        .agent()
        .update_volume(context::Context::default(), request);
    vm.call("UpdateVolume", answer).await.map(drop)
}

/// Blocking.
fn read_once(source: &Source, marker: Option<&Marker>) -> std::result::Result<Snapshot, ReadError> {
    let before = marker.map(Marker::count);
    let snapshot = match source {
        Source::Directory { top, identity } | Source::Memory { top, identity, .. } => {
            snapshot::directory(top, *identity, LIMITS, &mut |directory| match marker {
                Some(marker) => marker.watch(directory),
                None => Ok(()),
            })?
        }
        Source::File { path, name } => snapshot::file(path, name, LIMITS)?,
        Source::Huge { top, identity, .. } => snapshot::top(top, *identity)?,
    };
    if marker.map(Marker::count) != before {
        return Err(ReadError::Changed);
    }
    Ok(snapshot)
}

/// Divides the entries of one update, in their order.
pub(super) fn requests(
    id: &str,
    kind: update_volume_request::Kind,
    size: u64,
    entries: Vec<VolumeEntry>,
) -> Vec<UpdateVolumeRequest> {
    let empty = || UpdateVolumeRequest {
        id: id.to_owned(),
        kind: kind.into(),
        size,
        more: true,
        continued: true,
        ..UpdateVolumeRequest::default()
    };
    let mut requests = Vec::new();
    let (mut current, mut bytes) = (empty(), 0);
    for entry in entries {
        let length = entry.content.len() + entry.path.len();
        bytes += u64::try_from(length).unwrap_or(u64::MAX);
        current.entries.push(entry);
        if bytes >= REQUEST_BYTES || current.entries.len() >= REQUEST_ENTRIES {
            requests.push(std::mem::replace(&mut current, empty()));
            bytes = 0;
        }
    }
    current.more = false;
    requests.push(current);
    if let Some(first) = requests.first_mut() {
        first.continued = false;
    }
    requests
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use protobuf::Message as _;

    #[test]
    fn a_pods_copies_are_bounded_together_and_given_back() {
        let budget = Arc::new(Budget::default());
        let first = Reserved::take(&budget, POD_BYTES - 1).unwrap();
        assert!(Reserved::take(&budget, 2).is_none());
        drop(first);
        assert!(Reserved::take(&budget, POD_BYTES).is_some());
        assert_eq!(budget.0.load(Ordering::Relaxed), 0);
    }

    proptest! {
        #[test]
        fn requests_keep_the_order_end_once_and_fit_a_message(sizes in proptest::collection::vec((0..(2_usize << 20), 1..4000_usize), 0..12)) {
            let entries: Vec<VolumeEntry> = sizes
                .iter()
                .enumerate()
                .map(|(n, (size, name))| VolumeEntry {
                    path: [n.to_string().into_bytes(), vec![b'x'; *name]].concat(),
                    content: vec![0; *size],
                    ..VolumeEntry::default()
                })
                .collect();
            let kind = update_volume_request::Kind::REPLICA;
            let requests = requests("v1", kind, 5, entries.clone());
            let together: Vec<VolumeEntry> = requests.iter().flat_map(|r| r.entries.clone()).collect();
            prop_assert!(together == entries);
            let more: Vec<bool> = requests.iter().map(|r| r.more).collect();
            prop_assert!(requests.iter().enumerate().all(|(n, r)| r.continued == (n > 0)));
            prop_assert!(more.iter().rev().skip(1).all(|more| *more) && !more[more.len() - 1]);
            for request in &requests {
                prop_assert!(request.compute_size() < 4 << 20);
            }
        }
    }
}
