//! PCI devices of the node in pods, as a device plugin gives them: kubelet asks for the nodes of their IOMMU groups among
//! the container's devices. The node needs an IOMMU and devices (`BRIG_NODE_VFIO=1`).

use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use brig_tests::node::check::{contains, contains_one, equal, that};
use brig_tests::node::clock;
use brig_tests::node::given::{DISPLAY, E1000E, Given, LARGE, NVME, VIRTIO, interface};
use k8s_cri::v1::Device;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::life::sandbox_pid;
use super::passthrough_list::pinned;
use crate::container::{Container, ContainerSpec, eventually};
use crate::node;
use crate::pod::Pod;
use crate::suite::{Case, SLEEP, Suite, case, not_here};

pub const CASES: &[Case] = &[
    case(
        "passthrough",
        "an NVMe: a file system made on it, its pod killed, read by the next pod and by the node's own driver",
        file_system,
    ),
    case(
        "passthrough",
        "an interface carries traffic both ways, and interrupts",
        traffic,
    ),
    case(
        "passthrough",
        "a display is one container's, and its neighbour can neither see nor open it",
        display,
    ),
    case(
        "passthrough",
        "two devices in two pods at once, then both in one pod",
        two,
    ),
    case(
        "passthrough",
        "a device by its own node (iommufd), then one by its group's in the same pod",
        by_own_node,
    ),
    case("passthrough", "a BAR of 64 GiB has its place", large),
    case(
        "passthrough",
        "a display of PCI Express is behind a root port, which resets it, and comes and goes with it",
        port,
    ),
    case(
        "passthrough",
        "what is written under load is what is read, with an interrupt for each",
        load,
    ),
    case(
        "passthrough",
        "what cannot be given is refused in one sentence with the fix",
        refusals,
    ),
];

/// Where an NVMe's disk is, for a shell.
const DISK: &str = "disk=$(ls /dev/nvme?n1)";

/// Adds what kubelet adds for a device plugin's answer: the group's node, and that of all groups.
pub fn with<'a>(spec: ContainerSpec<'a>, given: &[&Given]) -> ContainerSpec<'a> {
    let nodes = given.iter().map(|given| given.node());
    with_nodes(spec, nodes.chain([interface().to_owned()]))
}

/// Adds nodes of the node's /dev.
fn with_nodes(spec: ContainerSpec<'_>, nodes: impl Iterator<Item = String>) -> ContainerSpec<'_> {
    let device = |path: String| Device {
        container_path: path.clone(),
        host_path: path,
        permissions: "mrw".to_owned(),
    };
    let all: Vec<Device> = nodes.map(device).collect();
    spec.edit(|config| config.devices.extend(all))
}

/// As [`with`], for one that may mount and set interfaces up.
pub fn admin<'a>(pod: &'a Pod, name: &str, given: &[&Given]) -> ContainerSpec<'a> {
    let spec = pod.container(name, SLEEP).security(|security| {
        let capabilities = security.capabilities.get_or_insert_default();
        capabilities.add_capabilities = vec!["SYS_ADMIN".to_owned(), "NET_ADMIN".to_owned()];
    });
    with(spec, given)
}

/// Skips what is Brig's alone.
pub fn only_brig(suite: &Suite) -> Result<()> {
    if suite.is_brig() {
        return Ok(());
    }
    not_here("a runc container has the node of the group, and no device behind it")
}

/// Kills the pod's VMM and waits until containerd has seen it.
fn kill_vmm(pod: &Pod) -> Result<()> {
    kill(Pid::from_raw(sandbox_pid(pod)?), Signal::SIGKILL)?;
    eventually("the pod is NotReady", clock::seconds(4), || {
        Ok((!pod.is_ready()?).then_some(()))
    })
}

fn file_system(suite: &mut Suite) -> Result<()> {
    only_brig(suite)?;
    let given = Given::take(NVME)?;
    let pod = suite.run("nvme")?;
    let writer = admin(&pod, "writer", &[&given]).start()?;
    let sum = writer.sh(&format!(
        "{DISK} && mke2fs -q $disk >/dev/null 2>&1 && mkdir /m && mount -t ext2 $disk /m && \
         dd if=/dev/urandom of=/m/data bs=64k count=64 2>/dev/null && sync && sha256sum < /m/data"
    ))?;
    // In use when it dies.
    kill_vmm(&pod)?;
    drop(writer);
    drop(pod);
    given.is_with("vfio-pci")?;

    let pod = suite.run("nvme-next")?;
    let reader = admin(&pod, "reader", &[&given]).start()?;
    let read = "mkdir /m && mount -t ext2 $disk /m && sha256sum < /m/data";
    let found = reader.sh(&format!("{DISK} && {read} && umount /m"))?;
    equal("in the next pod", &sum, &found)?;
    // One that ends leaves it to the next of the pod.
    reader.remove()?;
    let again = admin(&pod, "again", &[&given]).start()?;
    equal(
        "in the next container",
        &sum,
        &again.sh(&format!("{DISK} && {read}"))?,
    )?;
    drop(again);
    drop(pod);

    let address = given.address.clone();
    drop(given);
    node::run("modprobe", &["nvme"])?;
    let disks = format!("/sys/bus/pci/devices/{address}/nvme");
    let disk = eventually("the node's driver has it", clock::seconds(4), || {
        let names = fs::read_dir(&disks).into_iter().flatten().flatten();
        let mut names = names.map(|entry| entry.file_name().to_string_lossy().into_owned());
        let disk = names.next().map(|name| format!("/dev/{name}n1"));
        Ok(disk.filter(|disk| fs::metadata(disk).is_ok()))
    })?;
    let found = node::run(
        "sh",
        &[
            "-c",
            &format!(
                "mkdir -p /run/given && mount -t ext2 -o ro {disk} /run/given && sha256sum < /run/given/data; umount /run/given"
            ),
        ],
    )?;
    equal("by the node", &sum, &found.trim().to_owned())
}

/// The interface of the node at the other end of the cable.
const NEAR: &str = "eth1";
const NODE_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 201, 0, 1);
const POD_ADDRESS: &str = "10.201.0.2";

/// The node's end, as long as this is there.
struct Near;

impl Near {
    fn up() -> Result<Self> {
        let near = Self;
        let cidr = format!("{NODE_ADDRESS}/24");
        node::run("ip", &["address", "replace", &cidr, "dev", NEAR])?;
        node::run("ip", &["link", "set", NEAR, "up"])?;
        Ok(near)
    }
}

impl Drop for Near {
    fn drop(&mut self) {
        let _ = node::run("ip", &["link", "set", NEAR, "down"]);
    }
}

fn traffic(suite: &mut Suite) -> Result<()> {
    only_brig(suite)?;
    let given = Given::take(E1000E)?;
    let pod = suite.run("nic")?;
    let container = admin(&pod, "main", &[&given]).start()?;
    let name = container.sh(
        "for i in /sys/class/net/*; do test $(basename $(readlink $i/device/driver)) = e1000e && basename $i; done; true",
    )?;
    equal(
        "its address",
        "52:54:00:b2:19:01",
        container.sh(&format!("cat /sys/class/net/{name}/address"))?,
    )?;
    container.sh(&format!(
        "ip link set {name} up && ip address add {POD_ADDRESS}/24 dev {name}"
    ))?;
    // Up no longer than somebody is there to hear it: QEMU keeps what nobody takes, and the node's kernel warns of it.
    let near = Near::up()?;
    eventually("the link is up", clock::seconds(10), || {
        let carrier = container.sh(&format!("cat /sys/class/net/{name}/carrier"))?;
        Ok((carrier == "1").then_some(()))
    })?;
    let count = format!(
        "awk '/{name}/ {{ for (i = 2; i <= NF; i++) if ($i ~ /^[0-9]+$/) n += $i }} END {{ print n + 0 }}' /proc/interrupts"
    );
    let before: u64 = container.sh(&count)?.parse()?;
    // It comes back as it was sent: the node echoes.
    let listener = TcpListener::bind((NODE_ADDRESS, 0))?;
    let port = listener.local_addr()?.port();
    let echo = std::thread::spawn(move || -> Result<u64> {
        let (stream, _) = listener.accept()?;
        stream.set_read_timeout(Some(clock::seconds(60)))?;
        Ok(std::io::copy(&mut &stream, &mut &stream)?)
    });
    let sums = container.sh(&format!(
        "dd if=/dev/urandom of=/data bs=64k count=64 2>/dev/null && \
         nc {NODE_ADDRESS} {port} < /data | head -c 4194304 | sha256sum && sha256sum < /data"
    ))?;
    let mut sums = sums.lines();
    equal("what came back", sums.next(), sums.next())?;
    let echoed = echo
        .join()
        .map_err(|_| anyhow::anyhow!("the echo panicked"))??;
    equal("what the node saw", 4 << 20, echoed)?;
    let after: u64 = container.sh(&count)?.parse()?;
    that(
        &format!("interrupts came: {before}, then {after}"),
        after > before + 100,
    )?;
    // Its neighbour in the pod has no node of it, but the network is the pod's.
    drop((near, container));
    let other = pod.container("other", SLEEP).start()?;
    other
        .sh(&format!("! test -e /sys/class/net/{name}"))
        .context("it goes with its container")
        .map(drop)
}

fn display(suite: &mut Suite) -> Result<()> {
    only_brig(suite)?;
    let given = Given::take(DISPLAY)?;
    let pod = suite.run("display")?;
    let other = pod.container("other", SLEEP).start()?;
    let container = with(pod.container("main", SLEEP), &[&given]).start()?;
    let node = container.sh("stat -c '%F %t %T' /dev/dri/card0 && exec 3<> /dev/dri/card0")?;
    contains("its node", "character special file e2 0", &node)?;
    equal(
        "its class",
        "0x038000",
        container.sh("cat /sys/class/drm/card0/device/class")?,
    )?;
    for neighbour in [other, pod.container("later", SLEEP).start()?] {
        neighbour
            .sh("! test -e /dev/dri")
            .context("no node of it")?;
        let refused = neighbour.sh_fails("mknod /card c 226 0 && : < /card")?;
        contains_one("nor by its number", &["not permitted"], &refused)?;
    }
    Ok(())
}

/// Writes random bytes and gives the sum of what is read back from the disk itself.
fn write_and_read(container: &Container, megabytes: u32) -> Result<()> {
    let sums = container.sh(&format!(
        "for disk in /dev/nvme?n1; do dd if=/dev/urandom of=/data bs=1M count={megabytes} 2>/dev/null && \
         dd if=/data of=$disk bs=64k oflag=direct 2>/dev/null && sha256sum < /data && \
         dd if=$disk bs=64k count=$(({megabytes} * 16)) iflag=direct 2>/dev/null | sha256sum; done"
    ))?;
    let sums: Vec<_> = sums.lines().collect();
    ensure!(!sums.is_empty(), "no disk is there");
    for pair in sums.chunks(2) {
        equal("what is read", pair.first(), pair.last())?;
    }
    Ok(())
}

fn two(suite: &mut Suite) -> Result<()> {
    only_brig(suite)?;
    let (one, two) = (Given::nth(NVME, 0)?, Given::nth(NVME, 1)?);
    {
        let pods = (suite.run("first")?, suite.run("second")?);
        let first = with(pods.0.container("main", SLEEP), &[&one]).start()?;
        let second = with(pods.1.container("main", SLEEP), &[&two]).start()?;
        first.sh(&format!("{DISK} && echo of the first > $disk"))?;
        second.sh(&format!("{DISK} && echo of the second > $disk"))?;
        for container in [&first, &second] {
            write_and_read(container, 2)?;
            equal("disks", "1", container.sh("ls /dev/nvme?n1 | wc -l")?)?;
        }
        first.sh(&format!("{DISK} && echo of the first > $disk && sync"))?;
        second.sh(&format!("{DISK} && echo of the second > $disk && sync"))?;
    }
    let pod = suite.run("both")?;
    let both = with(pod.container("main", SLEEP), &[&one, &two]).start()?;
    equal(
        "both disks",
        "of the first\nof the second",
        both.sh("for disk in /dev/nvme?n1; do head -n 1 $disk; done | sort")?,
    )?;
    write_and_read(&both, 2)?;
    drop(both);
    // One each.
    let first = with(pod.container("first", SLEEP), &[&one]).start()?;
    let second = with(pod.container("second", SLEEP), &[&two]).start()?;
    for container in [&first, &second] {
        equal("a disk each", "1", container.sh("ls /dev/nvme?n1 | wc -l")?)?;
        write_and_read(container, 1)?;
    }
    Ok(())
}

/// Where the kernel has both interfaces: the first one that a pod's devices are asked for by is that of all of them, so
/// what is refused by either is in use.
fn by_own_node(suite: &mut Suite) -> Result<()> {
    only_brig(suite)?;
    let (one, two) = (Given::nth(NVME, 0)?, Given::nth(NVME, 1)?);
    let Some(own) = one.own_node() else {
        return not_here("the node's kernel has no iommufd (BRIG_NODE_IOMMUFD=1)");
    };
    let pod = suite.run("own-node")?;
    let by_own = |name| {
        let nodes = [own.clone(), "/dev/iommu".to_owned()];
        with_nodes(pod.container(name, SLEEP), nodes.into_iter())
    };
    let vmm = sandbox_pid(&pod)?;
    let first = by_own("first").start()?;
    first.sh("! ls /dev/vfio && ! ls /dev/iommu")?;
    write_and_read(&first, 2)?;
    let locked = pinned(vmm)?;
    let second = with(pod.container("second", SLEEP), &[&two]).start()?;
    for container in [&first, &second] {
        equal("a disk each", "1", container.sh("ls /dev/nvme?n1 | wc -l")?)?;
        write_and_read(container, 1)?;
    }
    // The second one's group was not opened, and memory is pinned once.
    equal("KiB pinned", locked, pinned(vmm)?)?;
    that("both are in use", !one.is_free()? && !two.is_free()?)?;
    let other = suite.run("own-node-other")?;
    let said = refusal(&other, "held", &[&one])?;
    contains("in another pod", "in use by another pod", &said)?;
    second.remove()?;
    first.remove()?;
    let again = by_own("again").start()?;
    write_and_read(&again, 1)
}

fn port(suite: &mut Suite) -> Result<()> {
    only_brig(suite)?;
    let (express, plain) = (Given::nth(DISPLAY, 2)?, Given::nth(DISPLAY, 0)?);
    let pod = suite.run("port")?;
    let observer = pod.container("observer", SLEEP).start()?;
    let ports = "grep -l 0x0604 /sys/bus/pci/devices/*/class | wc -l";
    for _ in 0..2 {
        equal("ports", "0", observer.sh(ports)?)?;
        let container = admin(&pod, "main", &[&express]).start()?;
        equal("ports", "1", container.sh(ports)?)?;
        let place =
            container.sh("readlink -f /sys/class/drm/card0/device && exec 3<> /dev/dri/card0")?;
        contains(
            "it is behind the port",
            "/0000:00:1f.0/0000:1f:00.0",
            &place,
        )?;
        // Its registers are where the guest has put them: by them its driver knows it.
        equal(
            "its driver",
            "bochs-drm",
            container.sh("basename $(readlink /sys/class/drm/card0/device/driver)")?,
        )?;
        // As drivers of accelerators reset theirs: by the bus, and then all is where it was.
        container.sh(
            "mount -o remount,rw /sys && cd /sys/bus/pci/devices/0000:1f:00.0 && echo bus > reset_method && \
             od -tx1 config > /tmp/before && echo 1 > reset && od -tx1 config | diff /tmp/before - && \
             exec 3<> /dev/dri/card0",
        )?;
        let beside = with(pod.container("beside", SLEEP), &[&plain]).start()?;
        equal("ports", "1", beside.sh(ports)?)?;
        beside.sh("exec 3<> $(ls /dev/dri/card*)")?;
        container.remove()?;
        beside
            .sh("exec 3<> $(ls /dev/dri/card*)")
            .context("the other one works")?;
        beside.remove()?;
    }
    for given in [&express, &plain] {
        given.is_with("vfio-pci")?;
    }
    Ok(())
}

fn large(suite: &mut Suite) -> Result<()> {
    only_brig(suite)?;
    let given = Given::take(LARGE)?;
    let pod = suite.run("large")?;
    // It has no driver anywhere, so that is what is refused: after it was on the bus.
    let refused = with(pod.container("main", SLEEP), &[&given]).start();
    let said = match refused {
        Ok(_) => anyhow::bail!("a device without a driver was given"),
        Err(error) => format!("{error:#}"),
    };
    contains("the refusal", "1b36:0005", &said)?;
    contains("the refusal", "no module is for it", &said)?;
    given.is_with("vfio-pci")?;
    that("the pod is there still", pod.is_ready()?)
}

/// How long the load lasts; `BRIG_PASSTHROUGH_SECONDS` makes it longer.
fn load_time() -> Duration {
    let seconds = std::env::var("BRIG_PASSTHROUGH_SECONDS").ok();
    Duration::from_secs(seconds.and_then(|text| text.parse().ok()).unwrap_or(20))
}

fn load(suite: &mut Suite) -> Result<()> {
    only_brig(suite)?;
    let (one, two) = (Given::nth(NVME, 0)?, Given::nth(NVME, 1)?);
    let pod = suite.run("load")?;
    let container = with(pod.container("main", SLEEP), &[&one, &two]).start()?;
    let count = "awk '/nvme/ { for (i = 2; i <= NF; i++) if ($i ~ /^[0-9]+$/) n += $i } END { print n + 0 }' /proc/interrupts";
    let before: u64 = container.sh(count)?.parse()?;
    let end = Instant::now() + load_time();
    let mut rounds = 0;
    while rounds == 0 || Instant::now() < end {
        write_and_read(&container, 4)?;
        rounds += 1;
    }
    let after: u64 = container.sh(count)?.parse()?;
    // Two disks, 4 MiB each way in pieces of 64 KiB.
    let requests = rounds * 2 * 2 * 64;
    that(
        &format!(
            "an interrupt for each of {requests} requests, not {}",
            after - before
        ),
        after - before >= requests,
    )
}

/// What the pod's container is refused with.
pub fn refusal(pod: &Pod, name: &str, given: &[&Given]) -> Result<String> {
    match with(pod.container(name, SLEEP), given).start() {
        Ok(_) => anyhow::bail!("{name} was started"),
        Err(error) => Ok(format!("{error:#}")),
    }
}

fn refusals(suite: &mut Suite) -> Result<()> {
    only_brig(suite)?;
    let given = Given::take(VIRTIO)?;
    let pod = suite.run("refused")?;
    {
        let (edu, held) = Given::pair("uio_pci_generic")?;
        let said = refusal(&pod, "not-whole", &[&edu])?;
        let other = format!("{} (uio_pci_generic)", held.address);
        contains("a group that is not whole", &other, &said)?;
        contains(
            "a group that is not whole",
            "bind every device of the group to vfio-pci",
            &said,
        )?;
    }
    {
        let wide = Given::nth(DISPLAY, 1)?;
        let said = refusal(&pod, "too-large", &[&wide])?;
        contains(
            "a BAR that does not fit",
            "a BAR of 0x20000000 bytes does not fit",
            &said,
        )?;
        contains("a BAR that does not fit", &wide.address, &said)?;
    }
    {
        let holder = suite.run("holder")?;
        let container = with(holder.container("main", SLEEP), &[&given]).start()?;
        let said = refusal(&pod, "held", &[&given])?;
        contains("in another pod", "in use by another pod", &said)?;
        let said = refusal(&holder, "again", &[&given])?;
        contains("in another container of the pod", &container.id, &said)?;
    }
    // What was refused has spoilt nothing.
    let container = with(pod.container("main", SLEEP), &[&given]).start()?;
    container.sh("test -b /dev/vda")?;
    given.is_with("vfio-pci")
}
