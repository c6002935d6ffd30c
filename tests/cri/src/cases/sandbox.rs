//! Sandboxes: their state, what containers of a pod share, and that they outlive containers.

use anyhow::{Context, Result};
use brig_tests::node::check::{contains, equal, that};
use k8s_cri::v1::{ContainerEventType, NamespaceMode};

use crate::container::Container;
use crate::events::Events;
use crate::suite::{Case, SLEEP, Suite, case, not_here, refused, smoke};

pub const CASES: &[Case] = &[
    smoke("sandbox", "a pod is ready and says who it is", ready),
    smoke(
        "sandbox",
        "the pod's host name is its containers'",
        hostname,
    ),
    case(
        "sandbox",
        "a pod that names no host has the node's name",
        no_hostname,
    ),
    case("sandbox", "a host name has at most 64 bytes", long_hostname),
    smoke(
        "sandbox",
        "containers share the loopback interface",
        loopback,
    ),
    smoke("sandbox", "containers share /dev/shm", shm),
    case(
        "sandbox",
        "by default each container has a pid namespace",
        pid_private,
    ),
    smoke(
        "sandbox",
        "shareProcessNamespace: containers see each other",
        pid_shared,
    ),
    smoke(
        "sandbox",
        "an ephemeral container joins its target's processes",
        pid_target,
    ),
    case(
        "sandbox",
        "orphans in a shared pid namespace are reaped",
        orphans,
    ),
    smoke(
        "sandbox",
        "a container is restarted in a living pod",
        restart,
    ),
    smoke(
        "sandbox",
        "the last container's end leaves the pod ready",
        last_container,
    ),
    case(
        "sandbox",
        "init containers run before, sidecars beside the others",
        init_and_sidecar,
    ),
    case("sandbox", "stop and remove may be repeated", idempotent),
    smoke(
        "sandbox",
        "removing a running pod takes its containers along",
        remove_running,
    ),
    case(
        "sandbox",
        "an unknown handler is refused by name",
        unknown_handler,
    ),
    case(
        "sandbox",
        "events: created, started, stopped, deleted, in this order",
        events,
    ),
    case("sandbox", "the clock is the node's", clock_is_right),
    case(
        "sandbox",
        "a systemd slice as the pod's cgroup parent",
        slice,
    ),
    case(
        "sandbox",
        "an annotation counts where the operator allows it",
        annotation,
    ),
    smoke("sandbox", "hostNetwork: as the handler can", host_network),
    case("sandbox", "hostPID: as the handler can", host_pid),
    case("sandbox", "hostIPC: as the handler can", host_ipc),
];

fn ready(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let status = shared.pod.status()?;
    that("the pod is SANDBOX_READY", shared.pod.is_ready()?)?;
    equal("runtime handler", &suite.handler, &status.runtime_handler)?;
    let metadata = status.metadata.context("no metadata")?;
    equal("name", "shared", metadata.name.as_str())?;
    equal("namespace", "brig-cri", metadata.namespace.as_str())?;
    that("the time of creation is set", status.created_at > 0)?;
    that(
        "its label is kept",
        status
            .labels
            .get("suite")
            .is_some_and(|it| it == "brig-cri"),
    )?;
    that(
        "ListPodSandbox shows it",
        suite.pods()?.contains(&shared.pod.id),
    )
}

fn hostname(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    equal("hostname", "shared", shared.container.sh("hostname")?)?;
    let other = shared.pod.container("second", SLEEP).start()?;
    equal(
        "of another",
        "shared",
        other.sh("cat /proc/sys/kernel/hostname")?,
    )
}

fn no_hostname(suite: &mut Suite) -> Result<()> {
    let pod = suite.pod("no-name").edit(|config| config.hostname.clear());
    let pod = pod.run(&suite.cri)?;
    let main = pod.container("main", SLEEP).start()?;
    let node = std::fs::read_to_string("/proc/sys/kernel/hostname")?;
    equal("hostname", node.trim(), &main.sh("hostname")?)?;
    equal("/etc/hostname", node.trim(), &main.sh("cat /etc/hostname")?)
}

fn long_hostname(suite: &mut Suite) -> Result<()> {
    let name = "h".repeat(64);
    let pod = suite
        .pod("long-name")
        .edit(|config| config.hostname = name.clone());
    let pod = pod.run(&suite.cri)?;
    let main = pod.container("main", SLEEP).start()?;
    equal("hostname of 64 bytes", &name, &main.sh("hostname")?)?;
    let longer = suite
        .pod("longer-name")
        .edit(|config| config.hostname = "h".repeat(65));
    refused(
        "a host name of 65 bytes",
        longer.run(&suite.cri),
        &["host name", "hostname", "invalid argument"],
    )
}

fn loopback(suite: &mut Suite) -> Result<()> {
    let pod = suite.run("loopback")?;
    let server = ["httpd", "-f", "-p", "127.0.0.1:8081", "-h", "/etc"];
    let _server = pod.container("server", &server).start()?;
    let client = pod.container("client", SLEEP).start()?;
    // No `until`: the server listens a moment after its start.
    let page = "for i in 1 2 3 4 5 6 7 8 9; do wget -qO- http://127.0.0.1:8081/hostname && exit 0; sleep 1; done; exit 1";
    equal("page of the neighbour", "loopback", client.sh(page)?)
}

fn shm(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let second = shared.pod.container("shm", SLEEP).start()?;
    shared.container.sh("echo hello > /dev/shm/brig")?;
    equal(
        "file of the neighbour",
        "hello",
        second.sh("cat /dev/shm/brig")?,
    )?;
    let mounts = second.sh("grep ' /dev/shm ' /proc/mounts")?;
    contains("/dev/shm is a tmpfs", "tmpfs", &mounts)?;
    shared.container.sh("rm /dev/shm/brig").map(drop)
}

fn pid_private(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let second = shared.pod.container("pids", SLEEP).start()?;
    equal("PID 1", "sleep", second.sh("cat /proc/1/comm")?)?;
    let count = second.sh("ps -o comm | grep -c '^sleep$'")?;
    equal("sleeping processes it sees", "1", count)
}

fn pid_shared(suite: &mut Suite) -> Result<()> {
    let pod = suite
        .pod("pid-shared")
        .namespaces(|namespaces| namespaces.pid = NamespaceMode::Pod.into())
        .run(&suite.cri)?;
    let first = pod.container("first", &["sleep", "1111"]).start()?;
    let second = pod.container("second", &["sleep", "2222"]).start()?;
    for (name, container) in [("first", &first), ("second", &second)] {
        let all = container.sh("ps -o args")?;
        contains(name, "sleep 1111", &all)?;
        contains(name, "sleep 2222", &all)?;
    }
    that(
        "PID 1 is neither container's",
        first.sh("cat /proc/1/comm")? != "sleep",
    )?;
    // A container's end does not take the namespace along.
    first.stop(0)?;
    second.sh("true").map(drop)
}

fn pid_target(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let target = shared.container.id.clone();
    let debugger = shared
        .pod
        .container("debugger", &["sleep", "3333"])
        .security(|security| {
            let namespaces = security.namespace_options.get_or_insert_default();
            namespaces.pid = NamespaceMode::Target.into();
            namespaces.target_id = target;
        })
        .start()?;
    let all = debugger.sh("ps -o args")?;
    contains("the target's process", "sleep 1000000", &all)?;
    contains("its own", "sleep 3333", &all)?;
    contains(
        "the target sees it",
        "sleep 3333",
        &shared.container.sh("ps -o args")?,
    )
}

fn orphans(suite: &mut Suite) -> Result<()> {
    let pod = suite
        .pod("orphans")
        .namespaces(|namespaces| namespaces.pid = NamespaceMode::Pod.into())
        .run(&suite.cri)?;
    let main = pod.container("main", SLEEP).start()?;
    // The inner shell leaves its child to the namespace's first process.
    main.sh("sh -c 'sleep 0.2 & exit 0'; sleep 1.5")?;
    let zombies = main.sh("grep -l '^State:.*Z' /proc/[0-9]*/status || true")?;
    equal("zombies", "", zombies)
}

fn restart(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let script = ["sh", "-c", "echo once >> /marker; exit 7"];
    for attempt in 0..2 {
        let (container, status) = shared
            .pod
            .container("restarted", &script)
            .attempt(attempt)
            .finish()?;
        equal("exit code", 7, status.exit_code)?;
        container.remove()?;
    }
    let again = shared
        .pod
        .container("restarted", &["sh", "-c", "test ! -e /marker"])
        .attempt(2);
    equal(
        "a new attempt has a new root file system",
        0,
        again.finish()?.1.exit_code,
    )?;
    that("the pod is still ready", shared.pod.is_ready()?)
}

fn last_container(suite: &mut Suite) -> Result<()> {
    let pod = suite.run("last")?;
    that("ready without a container", pod.is_ready()?)?;
    let (first, _) = pod.container("only", &["true"]).finish()?;
    that("ready after its only container ended", pod.is_ready()?)?;
    first.remove()?;
    that("ready after it was removed", pod.is_ready()?)?;
    let next = pod.container("next", SLEEP).start()?;
    next.sh("true").map(drop)
}

fn init_and_sidecar(suite: &mut Suite) -> Result<()> {
    let pod = suite.run("init")?;
    let init = pod.container("init", &["sh", "-c", "echo ready > /dev/shm/init"]);
    let (_init, status) = init.finish()?;
    equal("exit code of the init container", 0, status.exit_code)?;
    let sidecar = pod.container("sidecar", SLEEP).start()?;
    let (_main, status) = pod
        .container("main", &["grep", "ready", "/dev/shm/init"])
        .finish()?;
    equal("the main container finds its work", 0, status.exit_code)?;
    sidecar.sh("true").map(drop)
}

fn idempotent(suite: &mut Suite) -> Result<()> {
    let pod = suite.run("idempotent")?;
    let container = pod.container("main", SLEEP).start()?;
    container.stop(0)?;
    container.stop(0).context("a second StopContainer")?;
    container.remove()?;
    container.remove().context("a second RemoveContainer")?;
    pod.stop()?;
    that("not ready after its stop", !pod.is_ready()?)?;
    pod.stop().context("a second StopPodSandbox")?;
    pod.remove()?;
    pod.remove().context("a second RemovePodSandbox")
}

fn remove_running(suite: &mut Suite) -> Result<()> {
    let pod = suite.run("running")?;
    let container = pod.container("main", SLEEP).start()?;
    pod.stop()?;
    let status = container.wait()?;
    equal("exit code of its container", 137, status.exit_code)?;
    pod.remove()?;
    that("its container is gone", container.status().is_err())
}

/// What kubelet's evented PLEG reads.
fn events(suite: &mut Suite) -> Result<()> {
    let mut events = Events::open(&suite.cri)?;
    let shared = suite.shared()?;
    let (container, _) = shared.pod.container("events", &["true"]).finish()?;
    container.remove()?;
    let expected = [
        ContainerEventType::ContainerCreatedEvent,
        ContainerEventType::ContainerStartedEvent,
        ContainerEventType::ContainerStoppedEvent,
        ContainerEventType::ContainerDeletedEvent,
    ];
    let mut seen = Vec::new();
    while seen.last() != Some(&ContainerEventType::ContainerDeletedEvent) {
        let event = events
            .next(&suite.cri)
            .with_context(|| format!("after {seen:?}"))?;
        if event.container_id == container.id {
            seen.push(event.container_event_type());
        }
    }
    equal("events", expected.as_slice(), seen.as_slice())
}

fn clock_is_right(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let now = || -> Result<u64> {
        Ok(std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)?
            .as_secs())
    };
    let before = now()?;
    let inside: u64 = shared.container.sh("date +%s")?.parse()?;
    let after = now()?;
    that(
        &format!("{inside} is between {before} and {after}, to a second"),
        (before.saturating_sub(1)..=after + 1).contains(&inside),
    )
}

/// Kubelet with the systemd driver names a slice; containerd makes `slice:cri-containerd:ID` of it.
fn slice(suite: &mut Suite) -> Result<()> {
    let parent = "brig.slice/brig-cri.slice/brig-cri-pod1.slice";
    let pod = suite
        .pod("slice")
        .linux(|linux| parent.clone_into(&mut linux.cgroup_parent))
        .run(&suite.cri)?;
    let container = pod.container("main", SLEEP).start()?;
    container.sh("true")?;
    drop(container);
    pod.stop()?;
    pod.remove()
}

/// containerd passes `io.brig.*` on to Brig's handlers; runc knows no such thing.
fn annotation(suite: &mut Suite) -> Result<()> {
    if !suite.is_brig() {
        return not_here("runc has no annotations of its own");
    }
    let total = |container: &Container| -> Result<u64> {
        let script = "awk '/^MemTotal:/ { print $2 }' /proc/meminfo";
        Ok(container.sh(script)?.parse()?)
    };
    let ask = |suite: &Suite, memory: &str| {
        suite
            .pod("annotated")
            .edit(|config| {
                config
                    .annotations
                    .insert("io.brig.memory".to_owned(), memory.to_owned());
            })
            .run(&suite.cri)
    };
    refused(
        "an annotation that the operator has not allowed",
        ask(suite, "192MiB"),
        &["io.brig.memory"],
    )?;
    let drop_in = DropIn::new("pod_annotations = [\"memory\"]\n")?;
    refused(
        "an annotation that is no size",
        ask(suite, "plenty"),
        &["io.brig.memory"],
    )?;
    let pod = ask(suite, "192MiB")?;
    let container = pod.container("main", SLEEP).start()?;
    drop(drop_in);
    let kib = total(&container)?;
    that(
        &format!("its kernel has less than 192 MiB, and most of that: {kib} KiB"),
        (120 << 10..192 << 10).contains(&kib),
    )
}

/// A drop-in of Brig's configuration, for as long as it is in scope.
pub(super) struct DropIn(std::path::PathBuf);

impl DropIn {
    pub(super) fn new(text: &str) -> Result<Self> {
        let directory = std::path::Path::new("/etc/brig/config.d");
        std::fs::create_dir_all(directory)?;
        let path = directory.join("brig-cri.toml");
        std::fs::write(&path, text)?;
        Ok(Self(path))
    }
}

impl Drop for DropIn {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn unknown_handler(suite: &mut Suite) -> Result<()> {
    let pod = crate::pod::PodSpec::new("no-such-handler", "unknown").run(&suite.cri);
    refused("an unknown handler", pod, &["no-such-handler"])
}

/// A pod in the node's network: runc has it, a VM says that it cannot.
fn host_network(suite: &mut Suite) -> Result<()> {
    if ["brig-shim", "brig-streaming"].contains(&suite.handler.as_str())
        && suite.containerd == "2.1"
    {
        return not_here(
            "containerd 2.1.9 itself panics on hostNetwork with sandboxer = \"shim\", whatever the shim",
        );
    }
    let pod = suite
        .pod("host-network")
        // Kubelet gives such a pod the node's.
        .edit(|config| config.hostname.clear())
        .namespaces(|namespaces| namespaces.network = NamespaceMode::Node.into())
        .run(&suite.cri);
    if suite.is_brig() {
        return refused("hostNetwork", pod, &["network"]);
    }
    let pod = pod?;
    let container = pod.container("main", SLEEP).start()?;
    container
        .sh("ip link show cni0 || ip link show eth0")
        .map(drop)
}

fn host_pid(suite: &mut Suite) -> Result<()> {
    let pod = suite
        .pod("host-pid")
        .namespaces(|namespaces| namespaces.pid = NamespaceMode::Node.into())
        .run(&suite.cri)
        .and_then(|pod| {
            pod.container("main", SLEEP).start()?;
            Ok(pod)
        });
    if suite.is_brig() {
        return refused("hostPID", pod, &["pid"]);
    }
    let pod = pod?;
    let container = pod.container("main", SLEEP).start()?;
    contains(
        "the node's processes",
        "containerd",
        &container.sh("ps -o args")?,
    )
}

fn host_ipc(suite: &mut Suite) -> Result<()> {
    let pod = suite
        .pod("host-ipc")
        .namespaces(|namespaces| namespaces.ipc = NamespaceMode::Node.into())
        .run(&suite.cri)
        .and_then(|pod| {
            pod.container("main", SLEEP).start()?;
            Ok(pod)
        });
    if suite.is_brig() {
        return refused("hostIPC", pod, &["ipc"]);
    }
    let pod = pod?;
    let container = pod.container("main", SLEEP).start()?;
    let namespace = std::fs::read_link("/proc/self/ns/ipc")?;
    equal(
        "IPC namespace",
        namespace.display().to_string(),
        container.sh("readlink /proc/1/ns/ipc")?,
    )
}
