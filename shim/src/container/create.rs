//! Makes a container: mounts while the guest boots, then streams, then the agent's CreateContainer.
//! Whatever was made is undone when a later step fails or the creation is abandoned.

use std::path::Path;
use std::sync::Arc;

use brig_agent_protocol::agent::{CreateContainerRequest, MountSource};
use tokio::sync::watch;
use ttrpc::context;

use super::{Context, Creation, Made, work};
use crate::error::{Error, Kind, Result};
use crate::spec::BindMount;
use crate::stdio::{Ends, Stdio};
use crate::vm::boot::Boot;
use crate::vm::{Mounts, RootfsMount, Vm, mount_path, rootfs_path};

/// Creates the container; `cancelled` turning true abandons it.
pub(super) async fn create(
    context: &Context,
    creation: Creation,
    boot: Boot,
    mut cancelled: watch::Receiver<bool>,
) -> Result<Made> {
    let id = creation.id.clone();
    let mut undo = Undo::default();
    let result = tokio::select! {
        result = steps(context, creation, boot, &mut undo) => result,
        _ = cancelled.wait_for(|cancelled| *cancelled) => {
            Err(Error::state(format!("container {id} was deleted while it was being created")))
        }
    };
    match (result, undo) {
        (Ok((vm, stdio)), undo) => Ok(Made {
            vm,
            stdio,
            attached: undo.attached,
        }),
        (Err(error), undo) => {
            undo.run(context, &id).await;
            Err(error)
        }
    }
}

/// What has been made so far.
#[derive(Default)]
struct Undo {
    vm: Option<Arc<Vm>>,
    attached: Vec<String>,
    asked_agent: bool,
}

impl Undo {
    async fn run(self, context: &Context, id: &str) {
        let Some(vm) = self.vm else { return };
        if self.asked_agent {
            work::kill_created(&vm, id).await;
            work::release(context, &vm, id, "", None, true).await;
        }
        work::detach(context, &vm, id, &self.attached).await;
    }
}

async fn steps(
    context: &Context,
    creation: Creation,
    boot: Boot,
    undo: &mut Undo,
) -> Result<(Arc<Vm>, Stdio)> {
    let binds = creation.spec.bind_mounts()?;
    let ends = Ends::open(
        &creation.io,
        &context.namespace,
        &creation.id,
        context.drain,
    )
    .await?;
    let vm = boot.launched().await?;
    undo.vm = Some(Arc::clone(&vm));
    let rootfs = Rootfs::of(&creation);
    // Noted before they are made: taking away what is not there is no error.
    undo.attached.push(rootfs_path(&creation.id));
    let paths = binds
        .iter()
        .map(|bind| mount_path(&creation.id, bind.index));
    undo.attached.extend(paths);
    let sources: Result<Vec<MountSource>> = binds
        .iter()
        .map(|bind| source(&creation.id, bind))
        .collect();
    let sources = sources?;
    let id = creation.id.clone();
    let attach = vm.with_mounts(move |mounts| attach_all(mounts, &id, &rootfs, &binds));
    let ((), vm) = tokio::try_join!(attach, boot.ready())?;
    let stdio = ends.connect(&vm).await?;
    let request = CreateContainerRequest {
        id: creation.id.clone(),
        spec: creation.spec_bytes,
        stdio: Some(stdio.numbers.clone()).into(),
        rootfs: rootfs_path(&creation.id),
        mount_sources: sources,
        ..CreateContainerRequest::default()
    };
    undo.asked_agent = true;
    let answer = vm
        .agent()
        .create_container(context::Context::default(), &request);
    if let Err(error) = vm.call("CreateContainer", answer).await {
        stdio.abandon(&vm).await;
        return Err(error);
    }
    Ok((vm, stdio))
}

fn source(id: &str, bind: &BindMount) -> Result<MountSource> {
    Ok(MountSource {
        index: u32::try_from(bind.index).map_err(|_| Error::invalid("too many mounts"))?,
        share_path: mount_path(id, bind.index),
        ..MountSource::default()
    })
}

/// Where the root file system comes from.
enum Rootfs {
    Mounts(Vec<RootfsMount>),
    Directory(std::path::PathBuf),
}

impl Rootfs {
    fn of(creation: &Creation) -> Self {
        if creation.rootfs.is_empty() {
            return Self::Directory(creation.spec.root_path(&creation.bundle));
        }
        let mounts = creation.rootfs.iter().map(|mount| RootfsMount {
            kind: mount.type_.clone(),
            source: mount.source.clone(),
            options: mount.options.clone(),
        });
        Self::Mounts(mounts.collect())
    }
}

/// Blocking.
fn attach_all(mounts: &dyn Mounts, id: &str, rootfs: &Rootfs, binds: &[BindMount]) -> Result<()> {
    let path = rootfs_path(id);
    match rootfs {
        Rootfs::Mounts(list) => mounts.attach_rootfs(&path, list)?,
        Rootfs::Directory(directory) => {
            if !is_directory(directory) {
                return Err(Error::invalid(format!(
                    "the root file system {} is missing: it is not a directory on this node",
                    directory.display()
                )));
            }
            mounts.attach(&path, directory, false, true)?;
        }
    }
    for bind in binds {
        mounts
            .attach(
                &mount_path(id, bind.index),
                &bind.source,
                bind.readonly,
                bind.recursive,
            )
            .map_err(|error| {
                let kind = match error.kind {
                    Kind::NotFound => Kind::InvalidArgument,
                    kind => kind,
                };
                Error::new(
                    kind,
                    format!("mount on {}: {}", bind.destination, error.message),
                )
            })?;
    }
    Ok(())
}

fn is_directory(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|metadata| metadata.is_dir())
}
