//! The server process: one thread, the Task service v2 and v3, the Sandbox service and the streaming service
//! on the socket that `start` made, and an orderly end, whether containerd or a signal brings it.

mod connections;
mod detached;

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use containerd_shim_protos::sandbox_async::create_sandbox;
use containerd_shim_protos::shim_async::create_task;
use rustix::fs::{Mode, OFlags};
use slog::{Logger, error, info, warn};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::timeout;
use ttrpc::asynchronous::transport::Listener;
use ttrpc::asynchronous::{Server, Service};

use crate::asked::config::Config;
use crate::containerd::bootstrap::args::Args;
use crate::containerd::bootstrap::start::{CONFIG_PATH, STARTED_AT, STATE_FILE, TTRPC_ADDRESS};
use crate::containerd::debug_service;
use crate::containerd::events::Publisher;
use crate::containerd::sandbox_service::SandboxService;
use crate::containerd::task_service::TaskService;
use crate::error::{Error, Result};
use crate::guest::vm::Host;
use crate::log::{self, Control};
use crate::node::collector::Collector;
use crate::node::heap;
use crate::node::identity::Identity;
use crate::node::journal::{Journal, StateDir};
use crate::node::limits;
use crate::pod::actor::{self, PodHandle, Setup};
use crate::pod::stdio::streaming::Streams;
use connections::Connections;
use detached::detached;

/// The two names of one service.
const TASK_NAMES: [&str; 2] = ["containerd.task.v2.Task", "containerd.task.v3.Task"];
/// How long containerd may take for the last events.
const FLUSH: Duration = Duration::from_secs(5);

/// How long clients may take to hang up once they have been answered.
const HANG_UP: Duration = Duration::from_secs(2);

/// Serves until the pod has ended.
///
/// # Errors
/// When the server cannot be set up; the log has it too.
pub fn serve(args: &Args, host: Arc<dyn Host>) -> Result<()> {
    let (logger, log) = log::open(Path::new("log"), args.debug);
    let result = set_up_and_run(args, host, (&logger, log));
    if let Err(error) = &result {
        error!(logger, "the shim has failed"; "error" => &error.message);
    }
    result
}

fn set_up_and_run(
    args: &Args,
    host: Arc<dyn Host>,
    (logger, log): (&Logger, Arc<Control>),
) -> Result<()> {
    let failed = |error: io::Error| Error::io("cannot set up the shim's server", &error);
    heap::share();
    // Not a member of containerd's session: its terminal's signals are not ours.
    let _ = rustix::process::setsid();
    let listener = take_listener().map_err(failed)?;
    adjust_oom_score();
    if let Err(error) = limits::raise_files() {
        warn!(logger, "the limit of open files is not raised"; "error" => %error);
    }
    let base = Config::state_dir();
    let state = StateDir::new(&base, &args.namespace, &args.id)?;
    state.create()?;
    // Whatever the configuration says by then: `delete` looks where the pod is. It comes without, if it must.
    let _ = std::fs::write(STATE_FILE, base.as_os_str().as_encoded_bytes());
    let socket = (!args.socket.is_empty()).then(|| PathBuf::from(&args.socket));
    let shim = Identity::of(std::process::id());
    let shim = shim.ok_or_else(|| Error::internal("/proc is not mounted"))?;
    let journal = Journal {
        socket,
        ..Journal::new(shim)
    };
    state.write(&journal)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .max_blocking_threads(8)
        .thread_keep_alive(Duration::from_secs(1))
        .build()
        .map_err(failed)?;
    let began = started_at();
    let ttrpc_address = std::env::var(TTRPC_ADDRESS).ok();
    let result = runtime.block_on(async {
        let publisher = Publisher::new(ttrpc_address, args.namespace.clone(), logger.clone());
        let streams = Streams::default();
        let collector = Collector::of(|name| std::env::var(name).ok());
        let collector = collector.unwrap_or_else(|error| {
            warn!(logger, "the pod's start is not traced"; "reason" => %error);
            None
        });
        let pod = actor::spawn(Setup {
            namespace: args.namespace.clone(),
            id: args.id.clone(),
            state: state.clone(),
            journal,
            began,
            host,
            events: publisher.events(),
            logger: logger.clone(),
            log: Arc::clone(&log),
            streams: streams.clone(),
            collector,
        });
        let config = std::env::var_os(CONFIG_PATH).map(PathBuf::from);
        let served = Served { listener, streams };
        run(served, config, pod, publisher, (logger, log)).await
    });
    // After an end in order everything is gone, and the names may be another shim's.
    if result.is_err() {
        state.remove_if_of(Some(shim));
    }
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}

/// What is listened on, and for what besides calls.
pub(crate) struct Served {
    listener: UnixListener,
    streams: Streams,
}

pub(crate) async fn run(
    served: Served,
    config: Option<PathBuf>,
    pod: PodHandle,
    publisher: Publisher,
    (logger, log): (&Logger, Arc<Control>),
) -> Result<()> {
    let failed = |error: io::Error| Error::io("cannot serve", &error);
    let Served { listener, streams } = served;
    let service = TaskService::new(pod.clone());
    let sandbox = SandboxService::new(pod.clone(), config);
    let listener = tokio::net::UnixListener::from_std(listener).map_err(failed)?;
    let (connections, mut open) = Connections::of(listener, streams, logger.clone());
    let mut server = Server::new()
        .add_listener(Listener::new(connections))
        .register_service(detached(debug_service::service(&pod, &log)))
        .register_service(detached(create_sandbox(Arc::new(sandbox))));
    for name in TASK_NAMES {
        let task = renamed(create_task(Arc::new(service.clone())), name);
        server = server.register_service(detached(task));
    }
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    server
        .start()
        .await
        .map_err(|error| Error::internal(format!("cannot serve: {error}")))?;
    info!(logger, "the shim is serving"; "version" => env!("CARGO_PKG_VERSION"));
    tokio::select! {
        () = pod.over() => {}
        // The node shuts down, or its operator ends this pod.
        () = either(&mut terminate, &mut interrupt) => tokio::select! {
            () = pod.terminate() => {}
            // The second time they mean it.
            () = either(&mut terminate, &mut interrupt) => drop(pod.shutdown(true).await),
        },
    }
    // Nobody new finds this server, whose socket went with the pod. From here on nothing is removed by its path.
    publisher.flush(FLUSH).await;
    let _ = timeout(HANG_UP, open.wait_for(|count| *count == 0)).await;
    let _ = timeout(FLUSH, server.shutdown()).await;
    info!(logger, "the shim has ended");
    Ok(())
}

async fn either(one: &mut Signal, other: &mut Signal) {
    tokio::select! {
        _ = one.recv() => {}
        _ = other.recv() => {}
    }
}

/// The generated table has one entry, under v3's name.
fn renamed(services: HashMap<String, Service>, name: &str) -> HashMap<String, Service> {
    services
        .into_values()
        .map(|service| (name.to_owned(), service))
        .collect()
}

/// Standard input is the listening socket; /dev/null takes its place.
fn take_listener() -> io::Result<UnixListener> {
    let socket: OwnedFd = io::stdin().as_fd().try_clone_to_owned()?;
    let null = rustix::fs::open("/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    rustix::stdio::dup2_stdin(&null)?;
    let listener = UnixListener::from(socket);
    listener.set_nonblocking(true)?;
    Ok(listener)
}

fn started_at() -> SystemTime {
    let since: Option<u64> = std::env::var(STARTED_AT)
        .ok()
        .and_then(|text| text.parse().ok());
    since.map_or_else(SystemTime::now, |ns| {
        SystemTime::UNIX_EPOCH + Duration::from_nanos(ns)
    })
}

/// One step easier to kill than containerd, as containerd's own shims are.
fn adjust_oom_score() {
    const PATH: &str = "/proc/self/oom_score_adj";
    let own = fs::read_to_string(PATH).ok();
    if let Some(own) = own.and_then(|text| text.trim().parse::<i32>().ok()) {
        let _ = fs::write(PATH, own.saturating_add(1).min(1000).to_string());
    }
}

#[cfg(test)]
mod tests;
