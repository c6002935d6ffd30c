//! The end of a pod's VM: its processes have their grace, it powers off, and meanwhile this process leaves the pod's cgroup, whose removal
//! would wait for that else.

use std::time::Duration;

use futures::future::{join_all, maybe_done};
use tokio::sync::Notify;
use tokio::time::timeout;

use crate::guest::vm::boot::Boot;
use crate::node::cgroup::Cgroup;
use crate::pod::container::{ContainerHandle, Request};

/// Ends the VM, with `grace` for its processes unless `hurry` cuts that short, and waits for at most `drain` until the ends of `containers`
/// have been told. The pod's cgroup, if it has one, which this process has left if it could.
pub(super) async fn end(
    boot: &Boot,
    (grace, hurry): (Duration, &Notify),
    (containers, drain): (&[ContainerHandle], Duration),
    cgroup: Option<Cgroup>,
) -> Option<Cgroup> {
    let mut ending = std::pin::pin!(maybe_done(end_vm(boot, grace, hurry)));
    // While its processes have their grace the pod's cgroup has all that it had.
    tokio::select! {
        () = &mut ending => {}
        () = graceful(grace, containers) => {}
    }
    let ((), cgroup) = tokio::join!(ending, leave(boot, cgroup));
    // With the shim the last output would be lost.
    let _ = timeout(drain, exits_told(containers)).await;
    cgroup
}

/// Waits until every container's end has been told, which is after its output.
async fn exits_told(containers: &[ContainerHandle]) {
    let each = containers.iter().map(|container| async {
        let exec_id = String::new();
        let wait = container.ask(|reply| Request::Wait { exec_id, reply });
        // One that is gone has been told of.
        if let Ok(exit) = wait.await {
            let _ = exit.await;
        }
    });
    join_all(each).await;
}

/// Waits until the containers have ended or `grace` is over.
async fn graceful(grace: Duration, containers: &[ContainerHandle]) {
    if !grace.is_zero() {
        let _ = timeout(grace, exits_told(containers)).await;
    }
}

/// Moves this process out of the pod's cgroup, which is returned if there is one. Who removes it says why that cannot be.
async fn leave(boot: &Boot, cgroup: Option<Cgroup>) -> Option<Cgroup> {
    boot.settled().await;
    // A pod that fails at once ends before it has heard of its cgroup.
    let cgroup = cgroup.or_else(|| boot.cgroup())?;
    let own = cgroup.clone();
    let _ = tokio::task::spawn_blocking(move || own.leave()).await;
    Some(cgroup)
}

/// Powers off a VM that is up; one that is still booting is killed.
async fn end_vm(boot: &Boot, grace: Duration, hurry: &Notify) {
    if let Ok(vm) = boot.launched().await {
        if boot.is_ready() {
            vm.stop(grace, hurry).await;
        } else {
            vm.kill();
            vm.ended().await;
        }
    }
    boot.settled().await;
}
