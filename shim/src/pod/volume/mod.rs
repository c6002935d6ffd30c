//! A pod's volumes (DESIGN section 9, docs/volumes.md): what each bind mount of a container is, and those
//! that live in the guest's memory.
//!
//! Most sources are shared by virtio-fs. What kubelet writes for a pod to read (ConfigMap, Secret,
//! projected, downward API) is copied and kept up to date, so that it raises inotify events and leaves
//! no trace on the share; an emptyDir of medium Memory or HugePages is the guest's own. One volume serves all
//! containers of the pod that mount the same host directory.

mod classify;
mod direct;
mod feed;
mod find;
mod follow;
pub(crate) mod mountinfo;
mod on_disk;
mod own;
mod parts;
mod shared;
mod snapshot;
mod view;
mod watch;

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use brig_agent_protocol::agent::{MountSource, update_volume_request};
use slog::{Logger, info};

use crate::asked::spec::{BindMount, Propagation};
use crate::error::{Error, Result};
use crate::guest::vm::boot::Boot;
use crate::guest::vm::{Vm, shown};
use crate::node::disk::{Numbers, Owner};
use feed::{Budget, Feed, Source, Volume};
use find::{Classified, Direct, Found, Key, classify_all, told};
use on_disk::OnDisk;
use parts::{Place, Within};
use shared::{Attachment, Use};
use watch::Watcher;

/// The volumes of one pod; cheap to clone.
#[derive(Clone)]
pub struct Volumes {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    budget: Arc<Budget>,
    logger: Logger,
}

#[derive(Default)]
struct State {
    made: u64,
    live: HashMap<Key, Weak<Volume>>,
    /// Volumes that last as long as the pod.
    kept: Vec<Arc<Volume>>,
    /// What a container of the pod may write, also one that has gone.
    writable: BTreeSet<PathBuf>,
    /// What is attached to the share.
    attached: HashMap<view::Key, Attached>,
    /// Volumes on disks that a container of the pod has, or has had.
    on_disk: Vec<Arc<OnDisk>>,
    watcher: Option<Arc<Watcher>>,
}

/// Something of the node that a pod has, and the mounts that use it.
struct Attached {
    attachment: Attachment,
    /// Where it is on the node.
    source: PathBuf,
    uses: usize,
    /// How many of them may write.
    writers: usize,
}

/// What becomes of a container's bind mounts.
pub struct Planned {
    shared: Vec<(BindMount, Place)>,
    in_guest: Vec<InGuest>,
    disks: Vec<DiskMount>,
    direct: Vec<Direct>,
    logger: Logger,
}

/// A mount of the node of a block device.
#[derive(Debug, PartialEq, Eq)]
pub struct DiskMount {
    /// Index into the spec's mounts.
    pub index: u32,
    /// Where it appears in the container.
    pub destination: String,
    /// The device.
    pub numbers: Numbers,
    /// Of the node's node.
    pub owner: Owner,
    /// It is not to be written to.
    pub readonly: bool,
}

struct InGuest {
    index: usize,
    what: What,
}

enum What {
    Device(String),
    Volume {
        volume: Arc<Volume>,
        /// What of it is mounted.
        inside: PathBuf,
        /// The host's emptyDir, whose directories on the way are made in the guest too.
        memory: Option<PathBuf>,
    },
}

/// A container's hold on its volumes, to be given to [`Volumes::release`].
#[derive(Default)]
pub struct Leases {
    in_guest: Vec<Arc<Volume>>,
    shared: Vec<Use>,
    on_disk: Vec<on_disk::Use>,
}

impl Volumes {
    /// A pod without volumes.
    #[must_use]
    pub fn new(logger: Logger) -> Self {
        Self {
            shared: Arc::new(Shared {
                state: Mutex::default(),
                budget: Arc::default(),
                logger,
            }),
        }
    }

    /// Decides what each bind mount is and starts to read what is to be copied; the guest need not be up. With
    /// `direct`, volumes that storage drivers hand over as block devices are taken.
    ///
    /// # Errors
    /// `InvalidArgument` or `NotFound` with the reason for a source that no guest can have.
    pub async fn plan(&self, binds: Vec<BindMount>, boot: &Boot, direct: bool) -> Result<Planned> {
        let classified = tokio::task::spawn_blocking(move || classify_all(binds, direct));
        let (classified, direct) = classified.await??;
        let mut planned = Planned {
            shared: Vec::new(),
            in_guest: Vec::new(),
            disks: Vec::new(),
            direct,
            logger: self.shared.logger.clone(),
        };
        let writable = self.writable(&classified);
        // All are started before one is waited for.
        let mut waiting = Vec::new();
        for (bind, key_of_share, found) in classified {
            match found {
                Found::Volume {
                    key: Key::Live(_),
                    source,
                    ..
                } if source.is_in_or_around(&writable) => {
                    let reason = "a container of the pod may write it";
                    planned.share_instead(bind, key_of_share, reason);
                }
                Found::Share => planned.shared.push((bind, key_of_share)),
                Found::Disk(numbers, owner) => planned.disks.push(DiskMount {
                    index: u32::try_from(bind.index)
                        .map_err(|_| Error::invalid("too many mounts"))?,
                    destination: bind.destination,
                    numbers,
                    owner,
                    readonly: bind.readonly,
                }),
                Found::Device(name) => planned.in_guest.push(InGuest {
                    index: bind.index,
                    what: What::Device(name),
                }),
                Found::Volume {
                    key,
                    source,
                    inside,
                    memory,
                } => match self.volume(key, source, boot) {
                    Ok(volume) => {
                        let what = What::Volume {
                            volume,
                            inside,
                            memory,
                        };
                        let only_here = matches!(key, Key::Huge(_));
                        waiting.push((bind, key_of_share, what, only_here));
                    }
                    Err(reason) => planned.share_instead(bind, key_of_share, &reason),
                },
            }
        }
        for (bind, key_of_share, what, only_here) in waiting {
            let suitable = match &what {
                What::Volume { volume, .. } => volume.suitable().await,
                What::Device(_) => Ok(()),
            };
            match suitable {
                Ok(()) => planned.in_guest.push(InGuest {
                    index: bind.index,
                    what,
                }),
                // The node's own cannot be shared.
                Err(reason) if only_here => {
                    return Err(Error::invalid(format!(
                        "mount on {}: huge pages: {reason}",
                        bind.destination
                    )));
                }
                Err(reason) => planned.share_instead(bind, key_of_share, &reason),
            }
        }
        self.find_parts(&mut planned.shared).await?;
        Ok(planned)
    }

    /// Finds what of these lies in others of them, or in what the pod has.
    async fn find_parts(&self, shared: &mut [(BindMount, Place)]) -> Result<()> {
        let candidates = {
            let state = self.shared.lock();
            let attached = state.attached.iter();
            parts::candidates(
                shared,
                attached.map(|(key, has)| (key, has.source.as_path())),
            )
        };
        if candidates.is_empty() {
            return Ok(());
        }
        let found = tokio::task::spawn_blocking(move || parts::found(candidates)).await?;
        for (index, within) in found {
            if let Some((_, place)) = shared.get_mut(index) {
                place.within.push(within);
            }
        }
        Ok(())
    }

    /// Adds what these mounts let a container write to what others may; returns all of it.
    fn writable(&self, classified: &[Classified]) -> BTreeSet<PathBuf> {
        let new = classified
            .iter()
            .filter(|(bind, _, found)| !bind.readonly && matches!(found, Found::Share))
            .map(|(_, place, _)| place.source.clone());
        let mut state = self.shared.lock();
        state.writable.extend(new);
        state.writable.clone()
    }

    /// Asks for what is to be attached to the share. Nothing is waited for, so that an abandoned creation
    /// knows what to give back.
    pub fn share(&self, planned: &mut Planned, vm: &Arc<Vm>, leases: &mut Leases) -> Attaching {
        let mut state = self.shared.lock();
        let mut attaching = Vec::new();
        // Before its parts.
        planned.shared.sort_by_key(|(_, place)| place.key.depth());
        for (bind, place) in planned.shared.drain(..) {
            let (key, source, inside) = state.choose(place, bind.readonly);
            state.made += 1;
            let number = state.made;
            let entry = state.attached.entry(key.clone()).or_insert_with(|| {
                let logger = self.shared.logger.clone();
                Attached {
                    attachment: Attachment::start(&key, &source, number, Arc::clone(vm), logger),
                    source,
                    uses: 0,
                    writers: 0,
                }
            });
            entry.uses += 1;
            entry.writers += usize::from(!bind.readonly);
            attaching.push(entry.attachment.acquire(&bind));
            // All of it: the guest's volume is the whole.
            let propagates =
                bind.propagation != Propagation::Private && bind.recursive && inside.is_empty();
            leases.shared.push(Use {
                key,
                index: bind.index,
                inside,
                propagates,
                attachment: entry.attachment.clone(),
                readonly: bind.readonly,
            });
        }
        for (bind, wanted, inside) in planned.direct.drain(..) {
            let mut known = state.on_disk.iter();
            let volume = match known.find(|volume| volume.wanted == wanted) {
                Some(volume) => Arc::clone(volume),
                None => {
                    state.made += 1;
                    let (id, logger) = (format!("d{}", state.made), self.shared.logger.clone());
                    let volume = Arc::new(OnDisk::new(wanted, id, Arc::clone(vm), logger));
                    state.on_disk.push(Arc::clone(&volume));
                    volume
                }
            };
            volume.acquire();
            leases.on_disk.push(on_disk::Use {
                index: bind.index,
                destination: bind.destination,
                inside,
                volume,
            });
        }
        Attaching(attaching)
    }

    /// Lets go of a container's volumes, after the guest has unmounted them: returns when what nobody
    /// else uses is free on the node.
    pub async fn release(&self, leases: Leases) {
        // The guest's own volumes end by themselves.
        drop(leases.in_guest);
        for held in leases.on_disk {
            held.volume.release().await;
        }
        for held in leases.shared.into_iter().rev() {
            let last = self.shared.lock().give_back(&held);
            held.attachment.release(held.readonly, last).await;
        }
    }

    /// The volume of this key, started if the pod does not have it.
    fn volume(
        &self,
        key: Key,
        source: Source,
        boot: &Boot,
    ) -> std::result::Result<Arc<Volume>, String> {
        let mut state = self.shared.lock();
        // One that failed is made anew: kubelet tries again.
        let known = state.live.get(&key).and_then(Weak::upgrade);
        if let Some(volume) = known.filter(|volume| !volume.has_failed()) {
            return Ok(volume);
        }
        state.kept.retain(|volume| !volume.has_failed());
        let subscription = match key {
            Key::Live(_) => Some(state.watcher()?.subscribe()),
            Key::Fixed(_) | Key::PodFile(_) | Key::Memory(_) | Key::Huge(_) => None,
        };
        state.made += 1;
        let feed = Feed {
            id: format!("v{}", state.made),
            source,
            subscription,
            boot: boot.clone(),
            budget: Arc::clone(&self.shared.budget),
            logger: self.shared.logger.clone(),
        };
        let volume = feed.start();
        state.live.retain(|_, volume| volume.strong_count() > 0);
        state.live.insert(key, Arc::downgrade(&volume));
        if key.is_kept() {
            state.kept.push(Arc::clone(&volume));
        }
        Ok(volume)
    }
}

impl Shared {
    /// Consistent whenever the lock is free.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// What is to be used, where it is on the node, and what of it. What shows the same already is used as it is; a part is
    /// taken from what somebody may write, or is only read if nobody may.
    fn choose(&self, place: Place, readonly: bool) -> (view::Key, PathBuf, String) {
        if self.attached.contains_key(&place.key) {
            return (place.key, place.source, place.inside);
        }
        let suits = |within: &&Within, written: bool| {
            let whole = self.attached.get(&within.whole);
            whole.is_some_and(|whole| (whole.writers > 0) == written)
        };
        let all = || place.within.iter();
        let read = || all().find(|within| readonly && suits(within, false));
        match all().find(|within| suits(within, true)).or_else(read) {
            Some(Within { whole, inside }) => (whole.clone(), place.source, inside.clone()),
            None => (place.key, place.source, place.inside),
        }
    }

    /// Whether this was the last use.
    fn give_back(&mut self, held: &Use) -> bool {
        let Some(attached) = self.attached.get_mut(&held.key) else {
            return true;
        };
        attached.uses = attached.uses.saturating_sub(1);
        attached.writers = attached.writers.saturating_sub(usize::from(!held.readonly));
        let last = attached.uses == 0;
        if last {
            self.attached.remove(&held.key);
        }
        last
    }

    fn watcher(&mut self) -> std::result::Result<Arc<Watcher>, String> {
        if let Some(watcher) = &self.watcher {
            return Ok(Arc::clone(watcher));
        }
        let watcher = Watcher::new().map_err(|error| {
            format!(
                "the node's files cannot be watched: {error}; raise fs.inotify.max_user_instances"
            )
        })?;
        Ok(Arc::clone(self.watcher.insert(Arc::new(watcher))))
    }
}

/// Attachments to the share that are under way.
pub struct Attaching(Vec<tokio::sync::oneshot::Receiver<Result<()>>>);

impl Attaching {
    /// Waits until all are there.
    ///
    /// # Errors
    /// The first one's, with the mount's destination.
    pub async fn done(self) -> Result<()> {
        for attached in self.0 {
            attached
                .await
                .unwrap_or_else(|_| Err(Error::internal("an attachment's task has ended")))?;
        }
        Ok(())
    }
}

/// A container's volumes on disks.
pub struct Disks(Vec<(String, PathBuf, Arc<OnDisk>)>);

impl Disks {
    /// Has the guest, which is up, mount them, as far as it has not.
    ///
    /// # Errors
    /// One sentence with the mount's destination: the node's, the VMM's or the guest's. Those before it stay.
    pub async fn mount(self, vm: &Vm) -> Result<()> {
        for (destination, inside, volume) in self.0 {
            volume.ready(&destination).await?;
            prepare_way(vm, volume.id(), &volume.wanted.path, &inside).await?;
        }
        Ok(())
    }
}

impl Leases {
    /// What the agent is told of the mounts that are shared.
    ///
    /// # Errors
    /// `InvalidArgument` for more mounts than a number holds.
    pub fn sources(&self) -> Result<Vec<MountSource>> {
        let number =
            |index: usize| u32::try_from(index).map_err(|_| Error::invalid("too many mounts"));
        let source = |held: &Use| {
            let index = number(held.index)?;
            Ok(match held.volume() {
                Some(volume) => MountSource {
                    index,
                    volume: volume.clone(),
                    mapped_on_host: held.mapped_on_host(),
                    ..MountSource::default()
                },
                None => MountSource {
                    index,
                    share_path: held.attachment.path.clone(),
                    volume_path: held.inside.clone(),
                    readonly_on_host: held.readonly_on_host(),
                    mapped_on_host: held.mapped_on_host(),
                    directory: held.is_directory(),
                    ..MountSource::default()
                },
            })
        };
        let on_disk = self.on_disk.iter().map(|held| {
            Ok(MountSource {
                index: number(held.index)?,
                volume: held.volume.id().to_owned(),
                volume_path: told(&held.inside, &held.destination)?,
                ..MountSource::default()
            })
        });
        self.shared.iter().map(source).chain(on_disk).collect()
    }

    /// What [`Disks::mount`] does is a step of its own, which is not given up half way.
    pub fn disks(&self) -> Disks {
        let uses = self.on_disk.iter().map(|held| {
            let (destination, inside) = (held.destination.clone(), held.inside.clone());
            (destination, inside, Arc::clone(&held.volume))
        });
        Disks(uses.collect())
    }

    /// Waits until the guest, which is up, has made what it needs for those mounts.
    ///
    /// # Errors
    /// The agent's or the VM's.
    pub async fn join(&self) -> Result<()> {
        for held in &self.shared {
            held.join().await?;
        }
        Ok(())
    }
}

impl Planned {
    fn share_instead(&mut self, bind: BindMount, place: Place, reason: &str) {
        info!(self.logger, "a volume is shared by virtio-fs, not copied: no inotify";
            "mount" => &bind.destination, "reason" => reason);
        self.shared.push((bind, place));
    }

    /// Waits until the guest has every volume; returns what the agent is told of them.
    ///
    /// # Errors
    /// The agent's or the VM's.
    pub async fn in_guest(&self, vm: &Vm) -> Result<Vec<MountSource>> {
        let mut sources = Vec::new();
        for mount in &self.in_guest {
            let mut source = MountSource {
                index: u32::try_from(mount.index).map_err(|_| Error::invalid("too many mounts"))?,
                ..MountSource::default()
            };
            match &mount.what {
                What::Device(name) => source.device = name.clone(),
                What::Volume {
                    volume,
                    inside,
                    memory,
                } => {
                    volume.ready().await?;
                    if let Some(top) = memory {
                        prepare_way(vm, &volume.id, top, inside).await?;
                    }
                    source.volume = volume.id.clone();
                    // Checked when it was planned.
                    source.volume_path = inside.to_str().unwrap_or_default().to_owned();
                }
            }
            sources.push(source);
        }
        Ok(sources)
    }

    /// The mounts that are block devices of the node.
    pub fn take_disks(&mut self) -> Vec<DiskMount> {
        std::mem::take(&mut self.disks)
    }

    /// Adds what has to be held as long as the container exists.
    pub fn lease(self, leases: &mut Leases) {
        let volumes = self
            .in_guest
            .into_iter()
            .filter_map(|mount| match mount.what {
                What::Volume { volume, .. } => Some(volume),
                What::Device(_) => None,
            });
        leases.in_guest.extend(volumes);
    }
}

/// Makes the directories in the guest's emptyDir that kubelet has made for a sub-path in the host's.
async fn prepare_way(vm: &Vm, id: &str, top: &Path, inside: &Path) -> Result<()> {
    if inside.as_os_str().is_empty() {
        return Ok(());
    }
    let (host, below) = (top.to_owned(), inside.to_owned());
    let entries = tokio::task::spawn_blocking(move || snapshot::chain(&host, &below));
    let entries = entries.await?.map_err(|error| {
        Error::state(format!(
            "the sub-path {} of {} cannot be read: {error}",
            shown(inside),
            shown(top)
        ))
    })?;
    for request in feed::requests(id, update_volume_request::Kind::MEMORY, 0, entries) {
        feed::update(vm, &request).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
