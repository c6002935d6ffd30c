//! What goes on beside a VM while it lives: the agent's log and events, its signs of life, and the end of a VM whose agent
//! breaks the rules. The agent is not trusted.

use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};

use brig_agent_protocol::LOG_STREAM;
use brig_agent_protocol::agent::Empty;
use brig_hypervisor::control::mark;
use slog::{Logger, debug, error, warn};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::{sleep, timeout};
use ttrpc::context;

use super::news::News;
use crate::error::Result;
use crate::guest::vm::frames::Ending;
use crate::guest::vm::{Vm, lines};
use crate::node::heap;

/// Missed signs of life after which the agent counts as silent.
const MISSES: u32 = 3;

/// Forwards the agent's own log.
pub(super) async fn follow_log(vm: &Vm, logger: &Logger) {
    let Ok((read, write)) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC) else {
        return;
    };
    match vm.open_numbered(LOG_STREAM, None, Some(write)).await {
        Ok(_end) => {
            tokio::spawn(lines::forward(read, "agent", logger.clone()));
        }
        Err(error) => warn!(logger, "no log of the agent"; "error" => error.message),
    }
}

/// Passes the agent's events to the pod, in order, until the VM ends.
pub(super) async fn subscribe(
    vm: &Arc<Vm>,
    news: mpsc::Sender<News>,
    logger: &Logger,
) -> Result<()> {
    let request = Empty::new();
    let answer = vm.agent.events(context::Context::default(), &request);
    let mut events = vm.call("Events", answer).await?;
    let (ahead, logger) = (Arc::clone(&vm.ahead), logger.clone());
    let vm = Arc::downgrade(vm);
    tokio::spawn(async move {
        while let Ok(Some(event)) = events.recv().await {
            if news.send(News::Agent(Box::new(event))).await.is_err() {
                return;
            }
            ahead.taken();
        }
        debug!(logger, "the agent's events have ended");
        // Without them no end of a process would be heard of.
        let why = "ended its events, or sent one that is none";
        end_unless_over(vm, why, &logger).await;
    });
    Ok(())
}

/// Ends a VM whose agent has broken the connection, or the rules of it.
pub(super) async fn watch_connection(
    vm: Weak<Vm>,
    ended: oneshot::Receiver<Ending>,
    logger: Logger,
) {
    match ended.await {
        Ok(Ending::Broken(rule)) => {
            if let Some(vm) = vm.upgrade() {
                cut_off(&vm, &rule, &logger);
            }
        }
        Ok(Ending::Closed) | Err(_) => end_unless_over(vm, "closed its connection", &logger).await,
    }
}

/// Ends a VM that goes on although its agent has ended. A guest that powers off closes everything shortly before.
async fn end_unless_over(vm: Weak<Vm>, why: &str, logger: &Logger) {
    let Some(vm) = vm.upgrade() else { return };
    if timeout(vm.timeouts.stop, vm.ended()).await.is_err() {
        cut_off(&vm, why, logger);
    }
}

fn cut_off(vm: &Vm, why: &str, logger: &Logger) {
    let reason = format!("the guest's agent {why}, and the VM was stopped");
    error!(logger, "the VM is stopped"; "reason" => &reason);
    vm.end(reason);
}

/// The VMM's own boot marks and its exits up to the agent's call, for the timeline.
pub(super) async fn report_counters(vm: Arc<Vm>, news: mpsc::Sender<News>, executed: SystemTime) {
    let Ok(counters) = vm.control.counters().await else {
        return;
    };
    for (value, micros) in counters.marks.into_iter().take(32) {
        let name = match value {
            mark::VMM_MAIN => "vmm.main".to_owned(),
            mark::JAILED => "vmm.jailed".to_owned(),
            mark::START => "vmm.start".to_owned(),
            mark::BUILT => "vmm.built".to_owned(),
            mark::KERNEL_ENTRY => "kernel.entry".to_owned(),
            mark::RESUMED => "guest.resumed".to_owned(),
            // The shim has its own mark for this moment.
            mark::AGENT_CONNECTED => continue,
            0xB1 => "guest.init".to_owned(),
            0xB2 => "guest.agent".to_owned(),
            other => format!("mark.{other:#x}"),
        };
        let at = executed + Duration::from_micros(micros);
        let _ = news.try_send(News::Mark(name, at));
    }
    let _ = news.try_send(News::Exits(counters.exits));
}

/// Asks the guest to let go of cached files when the file server runs short of descriptors; one
/// request at a time.
pub(super) async fn relieve(vm: Weak<Vm>, pressure: Arc<Notify>, logger: Logger) {
    loop {
        let Some(held) = vm.upgrade() else { return };
        tokio::select! {
            () = pressure.notified() => {}
            _ = held.ended() => return,
        }
        debug!(logger, "the guest is asked to drop its caches");
        let request = Empty::new();
        let answer = held
            .agent
            .drop_caches(context::Context::default(), &request);
        let _ = held.call("DropCaches", answer).await;
    }
}

/// Asks the agent for a sign of life now and then; one that is silent for several is stopped.
pub(super) async fn watch_agent(vm: Weak<Vm>, logger: Logger) {
    let mut missed = 0;
    loop {
        let Some(held) = vm.upgrade() else { return };
        let interval = held.timeouts.ping;
        drop(held);
        sleep(interval).await;
        let Some(vm) = vm.upgrade() else { return };
        if vm.death().is_some() {
            return;
        }
        let request = Empty::new();
        let answer = vm.agent.ping(context::Context::default(), &request);
        match timeout(interval, answer).await {
            Ok(Ok(_)) => {
                missed = 0;
                // Awake anyway.
                heap::trim();
            }
            // Its CPUs stand still, or did.
            _ if vm.is_debugged() => missed = 0,
            _ => {
                missed += 1;
                warn!(logger, "the guest's agent is silent"; "missed" => missed);
            }
        }
        if missed == MISSES {
            let seconds = (interval * (2 * MISSES)).as_secs_f64();
            cut_off(&vm, &format!("was silent for {seconds:.0} s"), &logger);
            return;
        }
    }
}
