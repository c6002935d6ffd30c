//! Host directories and files that are shared by virtio-fs, each attached to the share once, whatever
//! number of the pod's containers mount it: so they are one file system in the guest, where a rename, a
//! lock, a named pipe or a socket of one container is the other's at once.
//!
//! One task owns each attachment. It is read-only on the host's side as long as nobody may write.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use brig_agent_protocol::OWN_DIRECTORY;
use brig_agent_protocol::agent::{Empty, UpdateVolumeRequest, update_volume_request};
use brig_hypervisor::share::{FileId, IdMap};
use slog::{Logger, info, warn};
use tokio::sync::{mpsc, oneshot};
use ttrpc::context;

use super::feed;
use super::follow::{Below, Changed, Changes};
use super::mountinfo::MountTable;
use super::view::Key;
use crate::asked::spec::BindMount;
use crate::error::{Error, Kind, Result};
use crate::guest::vm::{Attributes, LaterMount, Vm};

/// Where the attachments lie below the share, or in what is the pod's own: no container's id begins with a dot.
const DIRECTORY: &str = ".volumes";

/// The path of the share for an attachment of this number.
fn path(number: u64, own: bool) -> String {
    if own {
        format!("{OWN_DIRECTORY}/{DIRECTORY}/{number}")
    } else {
        format!("{DIRECTORY}/{number}")
    }
}

/// Something is wanted of an attachment's task.
enum Message {
    Acquire {
        readonly: bool,
        /// For the error's sentence.
        destination: String,
        reply: oneshot::Sender<Result<()>>,
    },
    Join {
        reply: oneshot::Sender<Result<()>>,
    },
    Release {
        readonly: bool,
        last: bool,
        reply: oneshot::Sender<()>,
    },
}

/// The way to an attachment; cheap to clone.
#[derive(Clone)]
pub(super) struct Attachment {
    pub(super) path: String,
    /// The guest's volume that shows it, where mounts below it may propagate.
    volume: Option<String>,
    mailbox: mpsc::UnboundedSender<Message>,
}

/// One container's use of an attachment. To be given back with [`Attachment::release`].
pub(super) struct Use {
    pub(super) key: Key,
    pub(super) index: usize,
    /// What of it is mounted; empty for all.
    pub(super) inside: String,
    /// Mounts below it propagate.
    pub(super) propagates: bool,
    pub(super) attachment: Attachment,
    pub(super) readonly: bool,
}

impl Use {
    /// The guest's volume that it is to be mounted from, so that mounts below it propagate.
    pub(super) fn volume(&self) -> Option<&String> {
        let volume = self.attachment.volume.as_ref();
        volume.filter(|_| self.propagates)
    }

    /// Waits until the guest, which is up, has made that volume, if there is one.
    pub(super) async fn join(&self) -> Result<()> {
        match self.volume() {
            Some(_) => self.attachment.join().await,
            None => Ok(()),
        }
    }

    /// The guest must not make the mount read-only, which is so on the host as far as it should be. A part has no mounts
    /// below.
    pub(super) fn readonly_on_host(&self) -> bool {
        self.key.writable_below && self.inside.is_empty()
    }

    /// The guest makes it a file system of its own.
    pub(super) fn is_directory(&self) -> bool {
        self.key.directory
    }

    /// The guest sees owners as they should be seen already.
    pub(super) fn mapped_on_host(&self) -> bool {
        self.key.id_map.is_some()
    }
}

impl Attachment {
    /// Starts the task; nothing is attached yet.
    pub(super) fn start(
        key: &Key,
        source: &Path,
        number: u64,
        vm: Arc<Vm>,
        logger: Logger,
    ) -> Self {
        let path = path(number, key.own);
        let follows = key.follows.is_some();
        let volume = (follows || key.own).then(|| format!("s{number}"));
        let (mailbox, messages) = mpsc::unbounded_channel();
        let task = Task {
            source: source.to_owned(),
            identity: key.identity,
            recursive: key.is_recursive(),
            follows,
            remote: key.remote,
            writable_below: key.writable_below,
            id_map: key.id_map.clone(),
            path: path.clone(),
            vm,
            logger,
            attached: false,
            writable: false,
            writers: 0,
            below: None,
            volume: volume.clone(),
            in_guest: false,
        };
        tokio::spawn(task.run(messages));
        Self {
            path,
            volume,
            mailbox,
        }
    }

    /// Asks for the attachment. It is under way whether or not the answer is waited for.
    pub(super) fn acquire(&self, bind: &BindMount) -> oneshot::Receiver<Result<()>> {
        let (reply, answer) = oneshot::channel();
        let _ = self.mailbox.send(Message::Acquire {
            readonly: bind.readonly,
            destination: bind.destination.clone(),
            reply,
        });
        answer
    }

    async fn join(&self) -> Result<()> {
        let (reply, answer) = oneshot::channel();
        let _ = self.mailbox.send(Message::Join { reply });
        let ended = |_| Err(Error::internal("an attachment's task has ended"));
        answer.await.unwrap_or_else(ended)
    }

    /// Gives a use back and waits for what follows: the last one frees the source.
    pub(super) async fn release(&self, readonly: bool, last: bool) {
        let (reply, answer) = oneshot::channel();
        let _ = self.mailbox.send(Message::Release {
            readonly,
            last,
            reply,
        });
        let _ = answer.await;
    }
}

struct Task {
    source: PathBuf,
    identity: FileId,
    recursive: bool,
    follows: bool,
    remote: bool,
    writable_below: bool,
    id_map: Option<IdMap>,
    path: String,
    vm: Arc<Vm>,
    logger: Logger,
    attached: bool,
    writable: bool,
    writers: usize,
    /// What lies below, once it is attached, if that is followed.
    below: Option<(Below, Changed)>,
    volume: Option<String>,
    /// The guest has made it.
    in_guest: bool,
}

/// Waits for a change of the node's mounts, for ever if nobody wants to know.
async fn changed(below: Option<&(Below, Changed)>) {
    match below {
        Some((_, changed)) => changed.wait().await,
        None => std::future::pending().await,
    }
}

impl Task {
    async fn run(mut self, mut messages: mpsc::UnboundedReceiver<Message>) {
        loop {
            let message = tokio::select! {
                message = messages.recv() => message,
                () = changed(self.below.as_ref()) => {
                    self.follow().await;
                    continue;
                }
            };
            let Some(message) = message else { return };
            match message {
                Message::Acquire {
                    readonly,
                    destination,
                    reply,
                } => {
                    self.writers += usize::from(!readonly);
                    let acquired = self.acquire().await.map_err(|error| {
                        // The container is not what is missing.
                        let kind = match error.kind {
                            Kind::NotFound => Kind::InvalidArgument,
                            kind => kind,
                        };
                        Error::new(kind, format!("mount on {destination}: {}", error.message))
                    });
                    let _ = reply.send(acquired);
                }
                Message::Join { reply } => {
                    let _ = reply.send(self.join().await);
                }
                Message::Release {
                    readonly,
                    last,
                    reply,
                } => {
                    self.writers -= usize::from(!readonly);
                    self.release(last).await;
                    let _ = reply.send(());
                    if last {
                        return;
                    }
                }
            }
        }
    }

    async fn acquire(&mut self) -> Result<()> {
        let (path, writable) = (self.path.clone(), self.writers > 0);
        if !self.attached {
            let source = self.source.clone();
            let how = Attributes {
                readonly: !writable,
                writable_below: self.writable_below,
                // What lies below a followed one comes as later mounts do, through the same checks.
                recursive: self.recursive,
                expected: Some(self.identity),
                id_map: self.id_map.clone(),
            };
            // First, so that nothing is missed.
            let changed =
                match self.follows {
                    true => Some(Changed::new().map_err(|error| {
                        Error::io("the node's mounts cannot be followed", &error)
                    })?),
                    false => None,
                };
            if self.remote {
                self.vm.expect_remote(&self.path).await?;
            }
            let left_out = self
                .vm
                .with_mounts(move |mounts| mounts.attach(&path, &source, how))
                .await?;
            for mount in left_out {
                warn!(self.logger, "a mount of the node is not in the pod: its file system is not known to hold data; \
                    if it does, add it to file_systems in the handler's configuration";
                    "mount" => %mount.path.display(), "file_system" => mount.kind);
            }
            self.attached = true;
            self.writable = writable;
            self.below = changed.map(|changed| (Below::new(&self.source), changed));
            self.follow().await;
        } else if writable && !self.writable {
            self.vm
                .with_mounts(move |mounts| mounts.set_readonly(&path, false))
                .await?;
            self.writable = true;
        }
        Ok(())
    }

    /// Brings what lies below up to date.
    async fn follow(&mut self) {
        let Some((below, _)) = &mut self.below else {
            return;
        };
        if self.vm.death().is_some() {
            self.below = None;
            return;
        }
        let table = match tokio::task::spawn_blocking(MountTable::read).await {
            Ok(Ok(table)) => table,
            _ => return,
        };
        let Changes {
            added,
            removed,
            remote,
        } = below.changes(&table);
        if remote && !self.remote && self.vm.expect_remote(&self.path).await.is_ok() {
            self.remote = true;
        }
        let (any_gone, readonly) = (!removed.is_empty(), !self.writable);
        let (path, logger) = (self.path.clone(), self.logger.clone());
        let (top, identity) = (self.source.clone(), self.identity);
        let id_map = self.id_map.clone().filter(IdMap::maps_below);
        let missing = self
            .vm
            .with_mounts(move |mounts| {
                let mut missing = Vec::new();
                for way in &removed {
                    if let Err(error) = mounts.detach_below(&path, way) {
                        warn!(logger, "a mount of the node that has gone is still in the pod";
                            "path" => &path, "error" => error.message);
                    }
                }
                for (id, way) in &added {
                    let later = LaterMount {
                        top: &top,
                        identity,
                        way,
                        id: *id,
                        id_map: id_map.as_ref(),
                    };
                    if let Err(error) = mounts.attach_below(&path, &later, readonly) {
                        info!(logger, "a mount of the node is not in the pod";
                            "path" => &path, "error" => error.message);
                        // What can never be shared is not tried again.
                        if error.kind != Kind::InvalidArgument {
                            missing.push(*id);
                        }
                    }
                }
                Ok(missing)
            })
            .await;
        for id in missing.unwrap_or_default() {
            below.forget(id);
        }
        if any_gone {
            // The guest may still know files of it, which keep its device busy on the node.
            let request = Empty::new();
            let answer = self
                .vm
                .agent()
                .drop_caches(context::Context::default(), &request);
            let _ = self.vm.call("DropCaches", answer).await;
        }
    }

    async fn join(&mut self) -> Result<()> {
        if self.in_guest {
            return Ok(());
        }
        if let Some(volume) = &self.volume {
            let request = UpdateVolumeRequest {
                id: volume.clone(),
                kind: update_volume_request::Kind::SHARED.into(),
                share_path: self.path.clone(),
                ..UpdateVolumeRequest::default()
            };
            // Noted first: an answer that is late has made it too.
            self.in_guest = true;
            if let Err(error) = feed::update(&self.vm, &request).await {
                feed::remove(&self.vm, volume, &self.logger).await;
                self.in_guest = false;
                return Err(error);
            }
        }
        Ok(())
    }

    async fn release(&mut self, last: bool) {
        if self.vm.death().is_some() {
            return;
        }
        if let Some(volume) = self.volume.as_ref().filter(|_| last && self.in_guest) {
            feed::remove(&self.vm, volume, &self.logger).await;
        }
        let path = self.path.clone();
        if last {
            if let Err(error) = self.vm.detach(&[path]).await {
                warn!(self.logger, "a mount of the pod is still held";
                    "path" => &self.path, "error" => error.message);
            }
        } else if self.writable && self.writers == 0 {
            // Refused while the guest has a file open for writing, which nobody then may take away.
            let taken = self
                .vm
                .with_mounts(move |mounts| mounts.set_readonly(&path, true))
                .await;
            self.writable = taken.is_err();
        }
    }
}
