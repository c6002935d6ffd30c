//! Host directories and files that are shared by virtio-fs, each attached to the share once, whatever
//! number of the pod's containers mount it: so they are one file system in the guest, where a rename, a
//! lock, a named pipe or a socket of one container is the other's at once.
//!
//! One task owns each attachment. It is read-only on the host's side as long as nobody may write.

use std::path::PathBuf;
use std::sync::Arc;

use brig_agent_protocol::agent::Empty;
use slog::{Logger, warn};
use tokio::sync::{mpsc, oneshot};
use ttrpc::context;

use super::follow::{Below, Changed, Changes};
use super::mountinfo::MountTable;
use super::snapshot::Identity;
use crate::error::{Error, Kind, Result};
use crate::spec::{BindMount, Propagation};
use crate::vm::Vm;

/// Where the attachments lie below the share: no container's id begins with a dot.
const DIRECTORY: &str = ".volumes";

/// What makes two mounts of a pod the same. Mounts made on the node in between make a difference, because
/// a bind mount shows what there was when its container was created.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Key {
    source: PathBuf,
    identity: Identity,
    recursive: bool,
    /// Later mounts of the node are seen.
    follows: bool,
    mounts: Vec<u64>,
    /// Where read-only cannot be taken back: mounts below, or a read-only source.
    readonly: Option<bool>,
}

impl Key {
    /// Of a source without links. Blocking.
    pub(super) fn of(
        bind: &BindMount,
        source: PathBuf,
        identity: Identity,
        table: &MountTable,
    ) -> Self {
        let mut seen = table.seen_from(&source);
        let follows = bind.propagation == Propagation::HostToContainer && bind.recursive;
        // Those below come and go for all who follow.
        if !bind.recursive || follows {
            seen.truncate(1);
        }
        let plain = !follows && seen.len() == 1 && seen.iter().all(|mounted| !mounted.readonly);
        Self {
            source,
            identity,
            recursive: bind.recursive,
            follows,
            mounts: seen.iter().map(|mounted| mounted.id).collect(),
            readonly: (!plain).then_some(bind.readonly),
        }
    }
}

/// The path of the share for an attachment of this number.
pub(super) fn path(number: u64) -> String {
    format!("{DIRECTORY}/{number}")
}

/// Something is wanted of an attachment's task.
enum Message {
    Acquire {
        readonly: bool,
        /// For the error's sentence.
        destination: String,
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
    mailbox: mpsc::UnboundedSender<Message>,
}

/// One container's use of an attachment. To be given back with [`Attachment::release`].
pub(super) struct Use {
    pub(super) key: Key,
    pub(super) index: usize,
    pub(super) attachment: Attachment,
    pub(super) readonly: bool,
}

impl Attachment {
    /// Starts the task; nothing is attached yet.
    pub(super) fn start(key: &Key, path: String, vm: Arc<Vm>, logger: Logger) -> Self {
        let (mailbox, messages) = mpsc::unbounded_channel();
        let task = Task {
            source: key.source.clone(),
            recursive: key.recursive,
            follows: key.follows,
            path: path.clone(),
            vm,
            logger,
            attached: false,
            writable: false,
            writers: 0,
            below: None,
        };
        tokio::spawn(task.run(messages));
        Self { path, mailbox }
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
    recursive: bool,
    follows: bool,
    path: String,
    vm: Arc<Vm>,
    logger: Logger,
    attached: bool,
    writable: bool,
    writers: usize,
    /// What lies below, once it is attached, if that is followed.
    below: Option<(Below, Changed)>,
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
            let (source, recursive) = (self.source.clone(), self.recursive);
            // First, so that nothing is missed.
            let changed =
                match self.follows {
                    true => Some(Changed::new().map_err(|error| {
                        Error::io("the node's mounts cannot be followed", &error)
                    })?),
                    false => None,
                };
            let table = self
                .vm
                .with_mounts(move |mounts| {
                    let table = MountTable::read()
                        .map_err(|error| Error::io("cannot read the node's mounts", &error))?;
                    mounts.attach(&path, &source, !writable, recursive)?;
                    Ok(table)
                })
                .await?;
            self.attached = true;
            self.writable = writable;
            self.below = changed.map(|changed| (Below::new(&self.source, &table), changed));
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
        let Changes { added, removed } = below.changes(&table);
        let (any_gone, readonly) = (!removed.is_empty(), !self.writable);
        let (path, logger) = (self.path.clone(), self.logger.clone());
        let _ = self
            .vm
            .with_mounts(move |mounts| {
                for way in &removed {
                    if let Err(error) = mounts.detach_below(&path, way) {
                        warn!(logger, "a mount of the node that has gone is still in the pod";
                            "path" => &path, "error" => error.message);
                    }
                }
                for (source, way) in &added {
                    if let Err(error) = mounts.attach_below(&path, way, source, readonly) {
                        warn!(logger, "a later mount of the node is not in the pod";
                            "path" => &path, "error" => error.message);
                    }
                }
                Ok(())
            })
            .await;
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

    async fn release(&mut self, last: bool) {
        if self.vm.death().is_some() {
            return;
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
