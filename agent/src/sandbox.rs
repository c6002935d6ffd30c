//! The sandbox's work on its containers: their creation, and the end of all of them.
use std::{
    collections::BTreeMap,
    fs,
    os::fd::OwnedFd,
    path::Path,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use brig_agent_protocol::agent;
use tokio::{sync::mpsc, time::timeout};

use crate::{
    bundled,
    cgroup::{self, Cgroup},
    command::Command,
    container::{self, Container, Parts},
    context::Context,
    control::{Create, Instructions, MountSource},
    error::{Error, Result},
    exec_defaults::ExecDefaults,
    given::{self, Given},
    huge_pages::Reservation,
    inherited, names, root_disks,
    spec::{self, Spec},
    stdio::ChildEnds,
    submounts::Entered,
    validate, variables, volume,
};

/// How long [`end_all`] waits for output that nobody reads.
const DRAIN_TIME: Duration = Duration::from_secs(2);

/// Creates a container up to the point where its init process waits for its start.
///
/// # Errors
/// `AlreadyExists`, or why it cannot be created; nothing of it is then left.
pub async fn create(context: &Arc<Context>, request: agent::CreateContainerRequest) -> Result<u32> {
    names::id(&request.id)?;
    names::share_path(&request.rootfs)?;
    let mut spec: Spec = spec::parse(&request.spec).map_err(|e| {
        Error::InvalidArgument(format!("the spec of container {}: {e}", request.id))
    })?;
    let asked = spec.process.clone().unwrap_or_default();
    if let Some(process) = &mut spec.process {
        for entry in &request.env {
            variables::set(&mut process.env, entry);
        }
    }
    let mut given = given::apply(&mut spec.linux, &request.devices, &request.disks).await?;
    let mut mount_sources = validate::mount_sources(&spec, &request.mount_sources)?;
    mount_sources.extend(bundled::apply(&mut spec, &mut given, &request.devices).await?);
    let root = root_disks::resolve(&request.root, &request.root_disks).await?;
    validate::spec(&spec)?;
    context.claim(&request.id)?;
    let id = request.id.clone();
    let outcome = build(context, request, (spec, &asked, given, root), mount_sources).await;
    match &outcome {
        Ok(pid) => {
            slog::info!(context.logger, "container created"; "container" => &id, "pid" => pid)
        }
        Err(error) => {
            slog::warn!(context.logger, "container not created"; "container" => &id, "error" => %error);
            context.forget(&id);
        }
    }
    outcome
}

async fn build(
    context: &Arc<Context>,
    request: agent::CreateContainerRequest,
    (spec, asked, given, root): (Spec, &spec::Process, Given, Vec<root_disks::Mount>),
    mount_sources: BTreeMap<u32, MountSource>,
) -> Result<u32> {
    let id = request.id;
    let stdio = request.stdio.into_option().unwrap_or_default();
    note_ignored(context, &id, &spec);
    if context.places.owns_machine && may_track_connections(&spec) {
        inherited::grow_connection_table(&context.logger);
    }
    let joined = match request.pid_namespace_of.as_str() {
        "" if wants_shared_pids(&spec) => Some(shared_pid_namespace(context).await?),
        "" => None,
        target => {
            let command = |reply| Command::PidNamespace { reply };
            Some(context.ask(target, command).await?)
        }
    };
    let huge_pages = reserve_huge_pages(context, &spec).await?;
    let dir = context.places.run.join("containers").join(&id);
    let root_mount = dir.join("rootfs");
    fs::create_dir_all(&root_mount).map_err(|e| Error::io("container directory", e))?;
    let cgroup = Cgroup::create(
        context.places.cgroup_base.join(&id),
        spec.linux.resources.as_ref(),
        &context.logger,
    );
    let mut cgroup = cgroup.inspect_err(|_| drop(fs::remove_dir_all(&dir)))?;
    if given.disks.may_be_revoked() {
        cgroup.keep_rules(spec.linux.resources.as_ref());
    }
    let volumes = enter_volumes(context, &mount_sources).await;
    let parts = Parts {
        id: id.clone(),
        dir,
        seccomp: spec.linux.seccomp.clone(),
        exec_defaults: ExecDefaults::of(&spec, asked),
        uid_mappings: spec.linux.uid_mappings.clone(),
        gid_mappings: spec.linux.gid_mappings.clone(),
        time_namespace: spec.linux.namespaces.iter().any(|n| n.kind == "time"),
        cgroup,
        disks: given.disks.clone(),
        _huge_pages: huge_pages,
        volumes,
    };
    let no_process = spec::Process::default();
    let terminal = container::terminal_of(&stdio, spec.process.as_ref().unwrap_or(&no_process));
    let instructions = Instructions::Create(Box::new(Create {
        id: id.clone(),
        spec,
        root_mount,
        share: context.places.share.clone(),
        rootfs: request.rootfs,
        root,
        mount_sources,
        volumes: volume::directory(&context.places.run),
        given: given.nodes,
        disks: given.disks.names(),
        shm: context.places.run.join("shm"),
        cgroup: parts.cgroup.path().to_owned(),
        shares_pids: joined.is_some(),
        cgroup_root: context.places.cgroup_root.clone(),
        limits: context.limits.all(),
        terminal,
    }));
    let (mailbox, commands) = mpsc::unbounded_channel();
    let prepared = container::prepare(
        context,
        (&instructions, joined.as_ref()),
        &stdio,
        &mailbox,
        ("", 0),
    );
    let init = match prepared.await {
        Ok(init) => init,
        Err(error) => {
            if let Err(left) = cgroup::remove(parts.cgroup.path()).await {
                slog::warn!(context.logger, "cgroup stays"; "container" => &id, "error" => %left);
            }
            let _ = fs::remove_dir_all(&parts.dir);
            if let Some(volumes) = parts.volumes {
                volumes.leave().await;
            }
            return Err(error);
        }
    };
    let pid = init.pid();
    context.created(id, mailbox.clone());
    tokio::spawn(Container::new(parts, Arc::clone(context), mailbox, init).run(commands));
    Ok(pid)
}

/// Has the share's directories among the mounts be file systems of their own, before the container's namespace is made.
async fn enter_volumes(
    context: &Context,
    mount_sources: &BTreeMap<u32, MountSource>,
) -> Option<Entered> {
    let paths: Vec<String> = mount_sources
        .values()
        .filter_map(|source| match source {
            MountSource::Share {
                path,
                directory: true,
                ..
            } => Some(path.clone()),
            _ => None,
        })
        .collect();
    if paths.is_empty() {
        return None;
    }
    let submounts = Arc::clone(&context.submounts);
    tokio::task::spawn_blocking(move || submounts.enter(paths))
        .await
        .ok()
}

async fn reserve_huge_pages(context: &Context, spec: &Spec) -> Result<Option<Reservation>> {
    let Some(resources) = spec.linux.resources.clone() else {
        return Ok(None);
    };
    let pages = Arc::clone(&context.huge_pages);
    tokio::task::spawn_blocking(move || pages.reserve(&resources))
        .await
        .map_err(|error| Error::Internal(format!("reserving huge pages: {error}")))?
}

/// Host security modules have no meaning here: noted, not refused, or no pod of such a host
/// would start.
fn note_ignored(context: &Context, id: &str, spec: &Spec) {
    let process = spec.process.as_ref();
    let ignored = [
        (
            "apparmorProfile",
            process.is_some_and(|p| !p.apparmor_profile.is_empty()),
        ),
        (
            "selinuxLabel",
            process.is_some_and(|p| !p.selinux_label.is_empty()),
        ),
        ("mountLabel", !spec.linux.mount_label.is_empty()),
    ];
    for (field, _) in ignored.iter().filter(|(_, present)| *present) {
        slog::info!(context.logger, "a label of the node has no meaning in the guest and is left out"; "container" => id, "field" => field);
    }
}

/// A pid namespace for containers that share one (a path in the spec), or that would have the
/// host's (no entry): never the agent's own.
async fn shared_pid_namespace(context: &Context) -> Result<OwnedFd> {
    let holder = context
        .pid_holder
        .get_or_try_init(async || {
            let (logger, ending) = (context.logger.clone(), Arc::clone(&context.ending));
            let on_exit = move |_| {
                if !ending.load(Ordering::Relaxed) {
                    slog::error!(logger, "the holder of the shared pid namespace ended");
                }
            };
            // No container has this id (validate::id).
            let cgroup = context.places.cgroup_base.join("_pause");
            fs::create_dir_all(&cgroup)
                .map_err(|e| Error::io(format_args!("cgroup {}", cgroup.display()), e))?;
            let instructions = Instructions::HoldPidNamespace { cgroup };
            let prepared = context
                .launcher
                .prepare(&instructions, None, ChildEnds::null(), on_exit)
                .await?;
            Ok::<_, Error>(prepared.pidfd)
        })
        .await?;
    holder.try_clone().map_err(|e| Error::io("pidfd", e))
}

/// Sends SIGTERM to every process of every container, and waits at most `grace` for their end.
pub async fn terminate_all(context: &Context, grace: Duration) {
    let ids = context.ids();
    slog::info!(context.logger, "the containers are asked to end"; "containers" => ids.len(), "grace_ms" => grace.as_millis());
    let ended = ids.iter().map(|id| async move {
        let command = |reply| Command::Signal {
            exec_id: String::new(),
            signal: libc::SIGTERM,
            all: true,
            reply,
        };
        // One that has ended meanwhile is what is wanted.
        let _ = context.ask(id, command).await;
        let events = context.places.cgroup_base.join(id).join("cgroup.events");
        let empty = |text: &str| text.lines().any(|line| line == "populated 0");
        cgroup::watch::until(&events, grace, empty).await
    });
    // At once: the grace is one for all.
    let _ = timeout(grace, futures::future::join_all(ended)).await;
}

/// Kills every container and waits a little for their output.
pub async fn end_all(context: &Context) {
    let base: &Path = &context.places.cgroup_base;
    context.ending.store(true, Ordering::Relaxed);
    if let Err(error) = fs::write(base.join("cgroup.kill"), "1") {
        slog::warn!(context.logger, "cannot kill the containers"; "error" => %error);
    }
    let _ = timeout(DRAIN_TIME, context.outputs.idle()).await;
}

/// Whether its processes can make rules that track connections.
fn may_track_connections(spec: &Spec) -> bool {
    let capabilities = spec.process.as_ref().and_then(|p| p.capabilities.as_ref());
    capabilities.is_some_and(|own| own.bounding.iter().any(|name| name == "CAP_NET_ADMIN"))
}

fn wants_shared_pids(spec: &Spec) -> bool {
    !spec
        .linux
        .namespaces
        .iter()
        .any(|n| n.kind == "pid" && n.path.is_empty())
}
