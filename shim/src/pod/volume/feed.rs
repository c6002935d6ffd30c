//! One volume in the guest's memory, from its first reading to its end: a task that reads the host
//! directory, sends it to the agent, and again after each change, until the last container has let go.
//!
//! Contents may be secret; only ids, sizes and reasons are logged. The agent is not trusted: it gets what
//! its pod may see, and every call is bounded in time.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use brig_agent_protocol::agent::{
    UpdateVolumeRequest, VolumeEntry, VolumeRef, update_volume_request,
};
use brig_hypervisor::share::FileId;
use slog::{Logger, debug, info, warn};
use tokio::sync::{Semaphore, SemaphorePermit, oneshot, watch};
use tokio::time::{Instant, sleep};
use ttrpc::context;

use super::snapshot::{self, LIMITS, Limits, ReadError, Snapshot};
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
const ATTEMPTS: u32 = 10;
/// How long its writer is left alone in between, at first and at most: kubelet writes a generation in a few
/// milliseconds.
const SETTLE: Duration = Duration::from_millis(20);
const LAST_SETTLE: Duration = Duration::from_secs(1);
/// Changes of one volume that are taken as they come, and how far apart they are beyond. kubelet writes when a
/// ConfigMap or token changes, and looks once a minute.
const BURST: u32 = 16;
const PACE: Duration = Duration::from_secs(5);

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
    /// The first content of a file that the pod's containers have from then on, under this name in the copy.
    PodFile {
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

impl Source {
    /// Whether it is a copy of something of the node that is in one of these directories, or has one in it.
    pub(super) fn is_in_or_around(&self, directories: &BTreeSet<PathBuf>) -> bool {
        match self {
            Self::Directory { top, .. } | Self::File { path: top, .. } => directories
                .iter()
                .any(|other| top.starts_with(other) || other.starts_with(top)),
            _ => false,
        }
    }

    /// The guest's own once it is made, as long as the pod lives.
    fn stays(&self) -> bool {
        matches!(
            self,
            Self::PodFile { .. } | Self::Memory { .. } | Self::Huge { .. }
        )
    }
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

/// What the copies of a pod may hold together, and whose turn it is to read.
#[derive(Debug)]
pub(super) struct Budget {
    held: AtomicU64,
    turn: Semaphore,
}

impl Default for Budget {
    fn default() -> Self {
        Self {
            held: AtomicU64::new(0),
            turn: Semaphore::new(1),
        }
    }
}

/// One volume's part of the budget.
struct Reserved {
    budget: Arc<Budget>,
    bytes: u64,
}

impl Reserved {
    fn none(budget: &Arc<Budget>) -> Self {
        Self {
            budget: Arc::clone(budget),
            bytes: 0,
        }
    }

    /// The most that the volume may hold beside the others.
    fn most(&self) -> u64 {
        let held = self.budget.held.load(Ordering::Relaxed);
        POD_BYTES.saturating_sub(held.saturating_sub(self.bytes))
    }

    /// Holds so many bytes instead. At most [`Self::most`], by whose turn it is.
    fn hold(&mut self, bytes: u64) {
        self.budget.held.fetch_add(bytes, Ordering::Relaxed);
        self.budget.held.fetch_sub(self.bytes, Ordering::Relaxed);
        self.bytes = bytes;
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        self.hold(0);
    }
}

/// When the next change of a volume may be taken: a burst, then now and then.
#[derive(Debug)]
struct Pace {
    left: u32,
    since: Instant,
}

impl Pace {
    fn new(now: Instant) -> Self {
        Self {
            left: BURST,
            since: now,
        }
    }

    /// Takes one; how long to wait before.
    fn take(&mut self, now: Instant) -> Duration {
        while self.left < BURST && now.saturating_duration_since(self.since) >= PACE {
            self.left += 1;
            self.since += PACE;
        }
        if self.left == BURST {
            self.since = now;
        }
        if self.left > 0 {
            self.left -= 1;
            return Duration::ZERO;
        }
        // The next one that is earned is taken in advance.
        self.since += PACE;
        self.since.saturating_duration_since(now)
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
        let mut reserved = Reserved::none(&self.budget);
        let read = tokio::select! {
            read = self.read_in_turn(&mut reserved) => read.map(|(_turn, snapshot)| snapshot),
            _ = &mut ended => return,
        };
        let snapshot = match read {
            Ok(snapshot) => snapshot,
            Err(error) => {
                progress.send_replace(Progress::Unsuitable(error.to_string()));
                return;
            }
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
                self.follow(&vm, &mut reserved, &mut ended).await;
                self.source.stays()
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
    async fn follow(
        &mut self,
        vm: &Vm,
        reserved: &mut Reserved,
        ended: &mut oneshot::Receiver<()>,
    ) {
        let mut retry = None;
        let mut pace = Pace::new(Instant::now());
        loop {
            tokio::select! {
                () = changed(self.subscription.as_mut()) => retry = None,
                () = later(retry) => {}
                _ = &mut *ended => return,
                _ = vm.ended() => return,
            }
            let pause = pace.take(Instant::now());
            let read = async {
                sleep(pause).await;
                self.read_in_turn(reserved).await
            };
            let read = tokio::select! {
                read = read => read,
                _ = &mut *ended => return,
                _ = vm.ended() => return,
            };
            let updated = match read {
                // The next one's turn comes when this one has been let go of.
                Ok((_turn, snapshot)) => {
                    self.send(vm, snapshot).await.map_err(|error| error.message)
                }
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

    /// Waits for the pod's turn and reads no more than the budget has left, which is then held.
    async fn read_in_turn(
        &self,
        reserved: &mut Reserved,
    ) -> std::result::Result<(SemaphorePermit<'_>, Snapshot), ReadError> {
        let turn = self.budget.turn.acquire().await;
        let turn = turn.map_err(|error| ReadError::Io(std::io::Error::other(error)))?;
        let most = reserved.most();
        let limits = Limits {
            total: LIMITS.total.min(most),
            file: LIMITS.file.min(most),
            ..LIMITS
        };
        let snapshot = match self.read(limits).await {
            Err(ReadError::Unsuitable(_)) if most < LIMITS.total => {
                let reason = format!("the pod's copies together exceed {POD_BYTES} bytes");
                return Err(ReadError::Unsuitable(reason));
            }
            read => read?,
        };
        reserved.hold(snapshot.bytes);
        Ok((turn, snapshot))
    }

    /// Reads until nothing changed meanwhile.
    async fn read(&self, limits: Limits) -> std::result::Result<Snapshot, ReadError> {
        let marker = self.subscription.as_ref().map(Subscription::marker);
        let mut settle = SETTLE;
        for _ in 0..ATTEMPTS {
            let (source, marker) = (self.source.clone(), marker.clone());
            let read =
                tokio::task::spawn_blocking(move || read_once(&source, limits, marker.as_ref()));
            match read.await {
                Ok(Err(ReadError::Changed)) => {
                    sleep(settle).await;
                    settle = (settle * 2).min(LAST_SETTLE);
                }
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
            Source::PodFile { .. } => (update_volume_request::Kind::MEMORY, LIMITS.total),
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
fn read_once(
    source: &Source,
    limits: Limits,
    marker: Option<&Marker>,
) -> std::result::Result<Snapshot, ReadError> {
    let before = marker.map(Marker::count);
    let snapshot = match source {
        Source::Directory { top, identity } | Source::Memory { top, identity, .. } => {
            snapshot::directory(top, *identity, limits, &mut |directory| match marker {
                Some(marker) => marker.watch(directory),
                None => Ok(()),
            })?
        }
        Source::File { path, name } | Source::PodFile { path, name } => {
            snapshot::file(path, name, limits)?
        }
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
        let (mut first, mut second) = (Reserved::none(&budget), Reserved::none(&budget));
        assert_eq!(first.most(), POD_BYTES);
        first.hold(POD_BYTES - 1);
        assert_eq!((first.most(), second.most()), (POD_BYTES, 1));
        second.hold(1);
        // An update counts in place of what it replaces.
        first.hold(5);
        assert_eq!(second.most(), POD_BYTES - 5);
        drop((first, second));
        assert_eq!(budget.held.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn changes_are_taken_at_once_and_then_now_and_then() {
        let start = Instant::now();
        let mut pace = Pace::new(start);
        for _ in 0..BURST {
            assert_eq!(pace.take(start), Duration::ZERO);
        }
        let mut now = start;
        for _ in 0..100 {
            now += pace.take(now);
        }
        assert_eq!(now, start + PACE * 100);
        // A quiet time gives the burst back, and no more.
        now += PACE * 1000;
        for _ in 0..BURST {
            assert_eq!(pace.take(now), Duration::ZERO);
        }
        assert!(!pace.take(now).is_zero());
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
