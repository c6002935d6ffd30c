//! Devices that are plugged into the running VM: found by scanning the PCI bus, and taken off it before they go.
//!
//! Nothing tells a guest of either. Drivers probe when they like, some in a task of their own, so a device counts as
//! there when a driver has it and, where its class promises nodes below /dev, has made some. Trusts the host, and
//! the guest's sysfs.
use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use brig_agent_protocol::agent::{DeviceNode, FoundDevice};
use tokio::time::{Instant, sleep};

use crate::{
    bundle::Bundle,
    error::{Error, Result},
    modules,
};

/// The longest wait for a driver: loading its module and its firmware.
const MAX_WAIT: Duration = Duration::from_secs(600);
/// For a device of which no module answers: a driver of the kernel's own takes it while the bus is scanned, or soon after.
const WITHOUT_MODULE: Duration = Duration::from_secs(3);
/// The longest wait for a disk that is still mounted somewhere.
const MAX_RELEASE: Duration = Duration::from_secs(10);
/// Between two looks; a link in sysfs has nothing to wait on.
const LOOK: Duration = Duration::from_millis(5);
/// Deepest directory below a device that is looked into: a partition of a disk of an NVMe is four down.
const MAX_DEPTH: usize = 8;
/// Nodes of one device.
const MAX_NODES: usize = 256;
/// Base classes whose drivers make nodes: storage, display, accelerators.
const WITH_NODES: [u32; 3] = [0x01, 0x03, 0x12];

/// A disk that is memory: vendor and device of virtio-pmem.
const PMEM: (u32, u32) = (0x1af4, 0x105b);
/// The longest wait for its disk.
const MAX_PMEM: Duration = Duration::from_secs(10);
/// What makes a disk of it. Nobody asks for a driver of what lies below a PCI function.
const PMEM_MODULES: [&str; 2] = ["virtio_pmem", "nd_pmem"];

/// The class of a port, as sysfs has it.
const PORT: &str = "0x0604";

/// Looks for new devices on all buses.
///
/// # Errors
/// `Internal`.
pub async fn rescan() -> Result<()> {
    write("/sys/bus/pci/rescan".into())
        .await
        .map_err(|e| Error::io("PCI rescan", e))
}

/// Finds the device of a function, after scanning the bus, and waits for its driver.
///
/// # Errors
/// `NotFound` if there is none, `FailedPrecondition` if no driver takes it within `wait`.
pub async fn find(function: u32, wait: Duration) -> Result<FoundDevice> {
    let (name, directory) = place(function)?;
    rescan().await?;
    let mut deadline = Instant::now() + wait.min(MAX_WAIT);
    let mut loaded = None;
    loop {
        let here = directory.clone();
        let looked = tokio::task::spawn_blocking(move || look(&device_at(here))).await;
        let looked = looked.map_err(|e| Error::Internal(e.to_string()))?;
        let found = looked.map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => {
                Error::NotFound(format!("the guest's PCI bus has no device at {name}"))
            }
            _ => Error::io(format_args!("PCI device {name}"), error),
        })?;
        // The nodes of one that the handler's bundle is for need not be the kernel's.
        if is_ready(&found, matches!(loaded, Some(Ok(true)))) {
            return Ok(found);
        }
        if loaded.is_none() {
            if is_pmem(&found) {
                load_pmem().await.map_err(|reason| {
                    Error::FailedPrecondition(format!("{}: {reason}", lacking(&name, &found)))
                })?;
                // Its layers can be a disk as well: no long wait for what does not come.
                deadline = deadline.min(Instant::now() + MAX_PMEM);
                loaded = Some(Ok(false));
                continue;
            }
            let has_driver = !found.driver.is_empty();
            let outcome = load_driver(device_at(directory.clone()), has_driver).await;
            if outcome.is_err() {
                deadline = deadline.min(Instant::now() + WITHOUT_MODULE);
            }
            loaded = Some(outcome);
            continue;
        }
        if Instant::now() >= deadline {
            let mut sentence = lacking(&name, &found);
            if let Some(Err(reason)) = loaded {
                sentence = format!("{sentence}: {reason}");
            }
            return Err(Error::FailedPrecondition(sentence));
        }
        sleep(LOOK).await;
    }
}

/// The nodes that there are of the device of a function now.
///
/// # Errors
/// `NotFound` if there is none.
pub async fn nodes(function: u32) -> Result<Vec<DeviceNode>> {
    let (name, directory) = place(function)?;
    let looked = tokio::task::spawn_blocking(move || look(&device_at(directory))).await;
    match looked.map_err(|e| Error::Internal(e.to_string()))? {
        Ok(found) => Ok(found.nodes),
        Err(error) => Err(Error::NotFound(format!(
            "the guest's device at {name} has gone: {error}"
        ))),
    }
}

/// Loads the modules that say they drive the device, unless it has a driver; nobody else in the guest does. Says whether the
/// handler's driver bundle is for it.
async fn load_driver(directory: PathBuf, has_driver: bool) -> std::result::Result<bool, String> {
    let loaded = tokio::task::spawn_blocking(move || {
        let alias = fs::read_to_string(directory.join("modalias")).map_err(|e| e.to_string())?;
        let alias = alias.trim();
        let bundle = Bundle::open()?;
        let found = match &bundle {
            _ if has_driver => true,
            Some(bundle) => bundle.load_driver(alias)?,
            None => modules::load(alias).map_err(|e| e.to_string())?,
        };
        if found {
            Ok(bundle.is_some_and(|bundle| bundle.is_for(alias)))
        } else {
            Err("no module is for it".to_owned())
        }
    });
    loaded.await.map_err(|e| e.to_string())?
}

async fn load_pmem() -> std::result::Result<(), String> {
    let loaded = tokio::task::spawn_blocking(|| {
        for module in PMEM_MODULES {
            match modules::load(module) {
                Ok(true) => {}
                Ok(false) => return Err(format!("the guest's kernel has no module {module}")),
                Err(failure) => return Err(failure.to_string()),
            }
        }
        Ok(())
    });
    loaded.await.map_err(|e| e.to_string())?
}

/// Takes the device of a function from its driver and off the bus. A disk is first waited for: what was mounted of it
/// is given up a moment after the last process that saw it has gone.
///
/// # Errors
/// `Internal`. One that is not there is none.
pub async fn remove(function: u32) -> Result<()> {
    let (name, directory) = place(function)?;
    if let Ok(nodes) = nodes(function).await
        && let Some(disk) = nodes.iter().find(|node| node.block)
    {
        let (path, deadline) = (
            Path::new("/dev").join(&disk.name),
            Instant::now() + MAX_RELEASE,
        );
        loop {
            let path = path.clone();
            let held = tokio::task::spawn_blocking(move || is_held(&path)).await;
            if !matches!(held, Ok(true)) || Instant::now() >= deadline {
                break;
            }
            sleep(LOOK).await;
        }
    }
    match write(directory.join("remove")).await {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::io(format_args!("removing PCI device {name}"), error))
        }
        _ => Ok(()),
    }
}

/// Whether a disk, or a part of it, is mounted or otherwise one user's alone.
fn is_held(disk: &Path) -> bool {
    use std::os::unix::fs::OpenOptionsExt as _;
    let mut options = fs::OpenOptions::new();
    let opened = options.read(true).custom_flags(libc::O_EXCL).open(disk);
    opened.is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY))
}

/// Drivers take their time in both: never on the agent's own thread.
async fn write(path: PathBuf) -> io::Result<()> {
    let written = tokio::task::spawn_blocking(move || fs::write(path, "1")).await;
    written.map_err(io::Error::other)?
}

fn place(function: u32) -> Result<(String, PathBuf)> {
    let number = u8::try_from(function)
        .map_err(|_| Error::InvalidArgument(format!("PCI function {function} is not on bus 0")))?;
    let name = format!("0000:00:{:02x}.{}", number >> 3, number & 7);
    let directory = Path::new("/sys/bus/pci/devices").join(&name);
    Ok((name, directory))
}

/// The device that a function is: itself, or what is behind it if it is a port. They come and go together.
pub fn device_at(function: PathBuf) -> PathBuf {
    let class = fs::read_to_string(function.join("class")).unwrap_or_default();
    if !class.starts_with(PORT) {
        return function;
    }
    let entries = fs::read_dir(&function).into_iter().flatten().flatten();
    let mut devices = entries.filter(|entry| {
        let name = entry.file_name();
        name.to_string_lossy().starts_with("0000:") && entry.path().join("vendor").exists()
    });
    devices.next().map_or(function, |entry| entry.path())
}

/// The function of a name in sysfs, if it is on bus 0.
pub fn number(name: &str) -> Option<u32> {
    let (slot, function) = name.strip_prefix("0000:00:")?.split_once('.')?;
    let slot = u32::from_str_radix(slot, 16).ok()?;
    let function = function.parse::<u32>().ok().filter(|number| *number < 8)?;
    Some(slot << 3 | function)
}

fn is_pmem(device: &FoundDevice) -> bool {
    (device.vendor, device.device) == PMEM
}

fn is_ready(device: &FoundDevice, bundled: bool) -> bool {
    if is_pmem(device) {
        // Its first nodes are for its managers.
        return device.nodes.iter().any(|node| node.block);
    }
    let promises = WITH_NODES.contains(&(device.class >> 16)) && !bundled;
    !device.driver.is_empty() && (!promises || !device.nodes.is_empty())
}

fn lacking(name: &str, device: &FoundDevice) -> String {
    let FoundDevice {
        vendor,
        device: id,
        class,
        driver,
        ..
    } = device;
    let what = format!("device {vendor:04x}:{id:04x} (class {class:06x}) at {name} of the guest");
    if driver.is_empty() {
        format!("no driver of the guest's kernel has taken the {what}")
    } else {
        format!("the driver {driver} has made no node in /dev for the {what}")
    }
}

/// What there is of a device now.
fn look(directory: &Path) -> io::Result<FoundDevice> {
    let number = |file: &str| {
        let text = fs::read_to_string(directory.join(file))?;
        let digits = text.trim().trim_start_matches("0x");
        u32::from_str_radix(digits, 16).map_err(io::Error::other)
    };
    let mut nodes = Vec::new();
    collect(directory, 0, &mut nodes)?;
    Ok(FoundDevice {
        vendor: number("vendor")?,
        device: number("device")?,
        class: number("class")?,
        driver: link_name(&directory.join("driver")).unwrap_or_default(),
        nodes,
        ..FoundDevice::default()
    })
}

/// The nodes of everything below a device. What goes meanwhile is not there.
fn collect(directory: &Path, depth: usize, nodes: &mut Vec<DeviceNode>) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let Ok(entry) = entry else { continue };
        if depth == MAX_DEPTH || nodes.len() == MAX_NODES {
            return Ok(());
        }
        let path = entry.path();
        // A link leads to another device or to a class, which lists this one again.
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        if let Ok(event) = fs::read_to_string(path.join("uevent"))
            && let Some(mut node) = node(&event)
        {
            let subsystem = link_name(&path.join("subsystem"));
            node.block = subsystem.is_some_and(|name| name == "block");
            nodes.push(node);
        }
        // What is gone by now has nothing below it.
        let _ = collect(&path, depth + 1, nodes);
    }
    Ok(())
}

/// A node as the kernel's `uevent` file names it: one has a name and numbers.
fn node(event: &str) -> Option<DeviceNode> {
    let value = |key: &str| {
        let mut lines = event.lines();
        lines.find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
    };
    let name = value("DEVNAME")?;
    Some(DeviceNode {
        name: name.trim_start_matches("/dev/").to_owned(),
        major: value("MAJOR")?.parse().ok()?,
        minor: value("MINOR")?.parse().ok()?,
        ..DeviceNode::default()
    })
}

fn link_name(link: &Path) -> Option<String> {
    let target = fs::read_link(link).ok()?;
    Some(target.file_name()?.to_str()?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// An NVMe as the kernel shows it once its driver has found a namespace with a partition.
    fn nvme(root: &Path) -> PathBuf {
        let device = root.join("0000:00:04.0");
        let put = |path: &str, text: &str| {
            let file = device.join(path);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, text).unwrap();
        };
        let link = |path: &str, target: &str| symlink(target, device.join(path)).unwrap();
        put("vendor", "0x1b36\n");
        put("device", "0x0010\n");
        put("class", "0x010802\n");
        put("uevent", "DRIVER=nvme\nPCI_CLASS=10802\n");
        link("driver", "../../../bus/pci/drivers/nvme");
        link("subsystem", "../../../bus/pci");
        put("nvme/nvme0/uevent", "MAJOR=242\nMINOR=0\nDEVNAME=nvme0\n");
        link("nvme/nvme0/subsystem", "../../../../../class/nvme");
        let disk = "nvme/nvme0/nvme0n1";
        put(
            &format!("{disk}/uevent"),
            "MAJOR=259\nMINOR=0\nDEVNAME=nvme0n1\nDEVTYPE=disk\n",
        );
        link(
            &format!("{disk}/subsystem"),
            "../../../../../../class/block",
        );
        put(
            &format!("{disk}/nvme0n1p1/uevent"),
            "MAJOR=259\nMINOR=1\nDEVNAME=nvme0n1p1\n",
        );
        link(
            &format!("{disk}/nvme0n1p1/subsystem"),
            "../../../../../../../class/block",
        );
        // Back up: a loop for whoever follows it.
        link("nvme/nvme0/device", "../..");
        device
    }

    #[test]
    fn a_port_is_looked_at_for_what_is_behind_it() {
        let root = tempfile::tempdir().unwrap();
        let port = root.path().join("0000:00:1f.0");
        fs::create_dir_all(port.join("pci_bus/0000:1f")).unwrap();
        fs::write(port.join("class"), "0x060400\n").unwrap();
        // Nothing is there yet.
        assert_eq!(device_at(port.clone()), port);
        let behind = port.join("0000:1f:00.0");
        fs::create_dir_all(&behind).unwrap();
        assert_eq!(device_at(port.clone()), port);
        fs::write(behind.join("vendor"), "0x1234\n").unwrap();
        assert_eq!(device_at(port), behind);
        let plain = nvme(root.path());
        assert_eq!(device_at(plain.clone()), plain);
    }

    #[test]
    fn the_nodes_of_a_device_are_those_of_all_that_its_driver_has_made() {
        let root = tempfile::tempdir().unwrap();
        let found = look(&nvme(root.path())).unwrap();
        assert_eq!(found.driver, "nvme");
        assert_eq!((found.vendor, found.class), (0x1b36, 0x01_0802));
        let mut nodes: Vec<_> = found
            .nodes
            .iter()
            .map(|node| (node.name.as_str(), node.block, node.major, node.minor))
            .collect();
        nodes.sort_unstable();
        assert_eq!(
            nodes,
            [
                ("nvme0", false, 242, 0),
                ("nvme0n1", true, 259, 0),
                ("nvme0n1p1", true, 259, 1)
            ]
        );
        assert!(is_ready(&found, false));
    }

    #[test]
    fn a_device_is_waited_for_until_its_driver_has_made_what_its_class_promises() {
        let mut found = FoundDevice {
            vendor: 0x1b36,
            device: 0x10,
            class: 0x01_0802,
            ..FoundDevice::default()
        };
        assert!(!is_ready(&found, false));
        let said = lacking("0000:00:04.0", &found);
        assert!(
            said.contains("no driver") && said.contains("1b36:0010"),
            "{said}"
        );
        found.driver = "nvme".into();
        assert!(!is_ready(&found, false));
        assert!(lacking("0000:00:04.0", &found).contains("driver nvme has made no node"));
        found.nodes.push(DeviceNode::default());
        assert!(is_ready(&found, false));
        // A bundle may make them.
        found.nodes.clear();
        assert!(is_ready(&found, true));
        // Memory is there when it is a disk, whatever else its driver has made.
        let mut memory = FoundDevice {
            vendor: 0x1af4,
            device: 0x105b,
            class: 0x05_8000,
            driver: "virtio-pci".into(),
            ..FoundDevice::default()
        };
        assert!(!is_ready(&memory, false));
        memory.nodes.push(DeviceNode::default());
        assert!(!is_ready(&memory, false));
        memory.nodes[0].block = true;
        assert!(is_ready(&memory, false));
        // An interface has none.
        found.nodes.clear();
        found.class = 0x02_0000;
        assert!(is_ready(&found, false));
    }

    #[test]
    fn a_function_has_its_name_and_only_those_of_bus_0_have_one() {
        assert_eq!(place(0x22).unwrap().0, "0000:00:04.2");
        assert_eq!(place(0xff).unwrap().0, "0000:00:1f.7");
        assert!(place(0x100).is_err());
        for function in [0, 0x22, 0xff] {
            assert_eq!(number(&place(function).unwrap().0), Some(function));
        }
        assert_eq!(number("0000:01:00.0"), None);
        assert_eq!(number("0000:00:00.8"), None);
    }

    #[test]
    fn what_is_no_node_is_none() {
        assert!(node("DRIVER=nvme\n").is_none());
        assert!(node("DEVNAME=x\nMAJOR=1\n").is_none());
        assert!(node("DEVNAME=x\nMAJOR=a\nMINOR=0\n").is_none());
        assert_eq!(
            node("MAJOR=226\nMINOR=0\nDEVNAME=dri/card0\n")
                .unwrap()
                .name,
            "dri/card0"
        );
    }
}
