//! Makes a container: mounts while the guest boots, then streams, then the agent's CreateContainer.
//! Whatever was made is undone when a later step fails or the creation is abandoned.

use std::path::Path;
use std::sync::Arc;

use brig_agent_protocol::agent::CreateContainerRequest;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use ttrpc::context;

use super::context::Context;
use super::creation::{Creation, Made};
use super::devices::{Asked, Given};
use super::work;
use crate::asked::rootfs::{self, Plan};
use crate::asked::spec::with_guest_addresses;
use crate::error::{Error, Kind, Result};
use crate::guest::vm::boot::Boot;
use crate::guest::vm::{Attributes, Mounts, RootGiven, RootfsMount, Vm, rootfs_path};
use crate::node::hooks::{ContainerHooks, Stage};
use crate::pod::stdio::{Ends, Stdio};
use crate::pod::volume::Leases;

/// Creates the container; `cancelled` turning true abandons it.
pub(super) async fn create(
    context: &Context,
    creation: Creation,
    boot: Boot,
    hooks: Option<Arc<ContainerHooks>>,
    mut cancelled: watch::Receiver<bool>,
) -> Result<Made> {
    let id = creation.id.clone();
    let mut progress = Progress {
        hooks,
        ..Progress::default()
    };
    let result = tokio::select! {
        result = steps(context, creation, boot, &mut progress) => result,
        _ = cancelled.wait_for(|cancelled| *cancelled) => {
            Err(Error::state(format!("container {id} was deleted while it was being created")))
        }
    };
    match result {
        Ok((vm, stdio)) => Ok(Made {
            vm,
            stdio,
            attached: progress.attached,
            leases: progress.leases,
        }),
        Err(error) => {
            progress.undo(context, &id).await;
            Err(error)
        }
    }
}

/// What has been made so far, and what is under way: an abandoned creation waits for the latter before
/// it undoes anything, because what comes into being afterwards would stay.
#[derive(Default)]
struct Progress {
    vm: Option<Arc<Vm>>,
    attached: Vec<String>,
    leases: Leases,
    attaching: Option<JoinHandle<Result<()>>>,
    hooks: Option<Arc<ContainerHooks>>,
    hooking: Option<JoinHandle<Result<()>>>,
    giving: Option<JoinHandle<Result<(RootGiven, Given)>>>,
    /// The hooks of a creation have begun to run, so those of its end follow.
    hooked: bool,
    stdio: Option<Stdio>,
    asking: Option<JoinHandle<Result<()>>>,
    /// The agent was asked and did not answer in time.
    unanswered: bool,
}

impl Progress {
    async fn undo(self, context: &Context, id: &str) {
        let Some(vm) = self.vm else { return };
        let answered = match self.asking {
            None => None,
            Some(asking) => Some(asking.await.unwrap_or(Ok(()))),
        };
        // An error of the agent means that it has made nothing; without an answer it may have.
        if self.unanswered || answered.is_some_and(|created| may_exist(&created)) {
            work::kill(&vm, id, "").await;
            work::release(context, &vm, id, "", None, true).await;
        }
        if let Some(stdio) = self.stdio {
            stdio.abandon(&vm).await;
        }
        for under_way in [self.attaching, self.hooking].into_iter().flatten() {
            let _ = under_way.await;
        }
        if let Some(giving) = self.giving {
            let _ = giving.await;
        }
        if self.hooked {
            work::poststop(context, id, self.hooks, vm.pid()).await;
        }
        work::take_devices(context, &vm, id).await;
        work::detach(context, &vm, id, &self.attached).await;
        context.volumes.release(self.leases).await;
    }
}

/// Whether the agent may have a container after this answer to its creation.
fn may_exist(created: &Result<()>) -> bool {
    match created {
        Ok(()) => true,
        Err(error) => error.kind == Kind::DeadlineExceeded,
    }
}

/// Waits for a step that goes on by itself when the creation is abandoned.
async fn step<T>(under_way: &mut Option<JoinHandle<Result<T>>>) -> Result<T> {
    let Some(handle) = under_way else {
        return Err(Error::internal("a step was not begun"));
    };
    let result = handle.await;
    *under_way = None;
    result.unwrap_or_else(|error| Err(Error::internal(format!("a step has ended: {error}"))))
}

async fn steps(
    context: &Context,
    creation: Creation,
    boot: Boot,
    progress: &mut Progress,
) -> Result<(Arc<Vm>, Stdio)> {
    let binds = creation.spec.bind_mounts()?;
    let on_node = creation.spec.on_node()?;
    let mut rootfs = Rootfs::of(&creation)?;
    let root_plan = rootfs.take_plan();
    // Read while the VM starts.
    let mut planned = context
        .volumes
        .plan(binds, &boot, context.direct_volumes)
        .await?;
    let ends = Ends::open(
        &creation.io,
        &context.streams,
        &context.namespace,
        &creation.id,
        context.drain,
    )
    .await?;
    let vm = boot.launched().await?;
    progress.vm = Some(Arc::clone(&vm));
    // Noted before they are made: taking away what is not there is no error.
    progress.attached.push(rootfs_path(&creation.id));
    let volumes = context
        .volumes
        .share(&mut planned, &vm, &mut progress.leases);
    let (id, for_mounts) = (creation.id.clone(), Arc::clone(&vm));
    progress.attaching = Some(tokio::spawn(async move {
        let attach = move |mounts: &dyn Mounts| attach_rootfs(mounts, &id, &rootfs);
        for_mounts.with_mounts(attach).await
    }));
    let ((), (), vm) =
        tokio::try_join!(step(&mut progress.attaching), volumes.done(), boot.ready())?;
    progress.leases.join().await?;
    let mut sources = progress.leases.sources()?;
    sources.extend(planned.in_guest(&vm).await?);
    let disks = planned.take_disks();
    planned.lease(&mut progress.leases);
    if let Some(hooks) = progress.hooks.clone() {
        progress.hooked = true;
        let pid = vm.pid();
        let run = move || hooks.run(Stage::Create, pid);
        progress.hooking = Some(tokio::task::spawn_blocking(run));
        step(&mut progress.hooking).await?;
    }
    // Before a device of the node holds its memory.
    let limits = creation.spec.limits();
    let size = &context.size;
    size.admit(&creation.id, limits, &vm, &context.logger).await;
    let asked = Asked::by(&creation, disks, context.driver_bundle.clone());
    let (for_devices, logger) = (Arc::clone(&vm), context.logger.clone());
    let id = creation.id.clone();
    let volumes = progress.leases.disks();
    progress.giving = Some(tokio::spawn(async move {
        volumes.mount(&for_devices).await?;
        let root = match root_plan {
            Some(plan) => for_devices.give_root(plan, &id, &logger).await?,
            None => RootGiven::default(),
        };
        Ok((root, asked.give(for_devices, logger).await?))
    }));
    let (root, given) = step(&mut progress.giving).await?;
    sources.extend(given.sources);
    let disks = given.disks.iter().map(|disk| (disk.major, disk.minor));
    let (limits, disks) = (&context.node_limits, disks.collect());
    limits
        .admit(&creation.id, on_node, disks, boot.cgroup(), &context.logger)
        .await?;
    let stdio = ends.connect(&vm).await?;
    let spec = creation.spec_bytes;
    let moved = with_guest_addresses(&spec, &vm.addresses(&creation.id))?;
    let request = CreateContainerRequest {
        id: creation.id.clone(),
        spec: moved.unwrap_or(spec),
        stdio: Some(stdio.numbers.clone()).into(),
        rootfs: rootfs_path(&creation.id),
        mount_sources: sources,
        pid_namespace_of: creation.pid_namespace_of.unwrap_or_default(),
        devices: given.devices,
        disks: given.disks,
        root: root.mounts,
        root_disks: root.disks,
        env: given.env,
        ..CreateContainerRequest::default()
    };
    progress.stdio = Some(stdio);
    let agent = Arc::clone(&vm);
    progress.asking = Some(tokio::spawn(async move {
        let context = context::Context::default();
        let answer = agent.agent().create_container(context, &request);
        let limit = agent.timeouts().setup;
        let created = agent.call_within(limit, "CreateContainer", answer).await;
        created.map(drop)
    }));
    let created = step(&mut progress.asking).await;
    progress.unanswered = created.is_err() && may_exist(&created);
    created?;
    let stdio = progress.stdio.take();
    let stdio = stdio.ok_or_else(|| Error::internal("the streams of a container are gone"))?;
    Ok((vm, stdio))
}

/// Where the root file system comes from.
enum Rootfs {
    Mounts(Vec<RootfsMount>),
    Directory(std::path::PathBuf),
    /// It is mounted in the guest; a directory of the node may hold what is written.
    Disks {
        plan: Option<Plan>,
        shared: Option<std::path::PathBuf>,
    },
}

impl Rootfs {
    fn of(creation: &Creation) -> Result<Self> {
        if creation.rootfs.is_empty() {
            return Ok(Self::Directory(creation.spec.root_path(&creation.bundle)));
        }
        let mounts = creation.rootfs.iter().map(|mount| rootfs::Mount {
            kind: mount.type_.clone(),
            source: mount.source.clone(),
            options: mount.options.clone(),
        });
        if let Some(plan) = Plan::of(&mounts.collect::<Vec<_>>())? {
            let shared = plan.shared.clone();
            return Ok(Self::Disks {
                plan: Some(plan),
                shared,
            });
        }
        let mounts = creation.rootfs.iter().map(|mount| RootfsMount {
            kind: mount.type_.clone(),
            source: mount.source.clone(),
            options: mount.options.clone(),
        });
        Ok(Self::Mounts(mounts.collect()))
    }

    /// What is to be plugged, if it is on disks.
    fn take_plan(&mut self) -> Option<Plan> {
        match self {
            Self::Disks { plan, .. } => plan.take(),
            _ => None,
        }
    }
}

/// Blocking.
fn attach_rootfs(mounts: &dyn Mounts, id: &str, rootfs: &Rootfs) -> Result<()> {
    let path = rootfs_path(id);
    match rootfs {
        Rootfs::Mounts(list) => mounts.attach_rootfs(&path, list),
        Rootfs::Disks { shared: None, .. } => Ok(()),
        Rootfs::Disks {
            shared: Some(directory),
            ..
        } => mounts
            .attach(&path, directory, Attributes::default())
            .map(drop),
        Rootfs::Directory(directory) => {
            if !is_directory(directory) {
                return Err(Error::invalid(format!(
                    "the root file system {} is missing: it is not a directory on this node",
                    directory.display()
                )));
            }
            let how = Attributes {
                recursive: true,
                ..Attributes::default()
            };
            // An image has no mounts of its own.
            mounts.attach(&path, directory, how).map(drop)
        }
    }
}

fn is_directory(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|metadata| metadata.is_dir())
}
