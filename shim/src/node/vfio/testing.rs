//! A node for tests: its sysfs and /dev are directories, and its kernel is a stand-in that keeps to the rules of the real
//! one as far as an order of calls can break them.

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::fs;
use std::io::{self, PipeReader};
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::Node;
use super::calls::{
    ATTACH_IOMMUFD_PT, BIND_IOMMUFD, CHECK_EXTENSION, Calls, GET_API_VERSION, IOAS_ALLOC, OPTION,
    SET_IOMMU,
};

/// A node.
pub(crate) struct Fake {
    root: tempfile::TempDir,
    pub(crate) node: Node,
    pub(super) kernel: Arc<FakeKernel>,
}

impl Fake {
    pub(crate) fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let kernel = Arc::new(FakeKernel::default());
        let node = Node {
            sys: root.path().join("sys"),
            dev: root.path().join("dev"),
            proc: root.path().join("proc"),
            modules: root.path().join("modules"),
            calls: kernel.clone(),
        };
        fs::create_dir_all(node.dev.join("vfio")).unwrap();
        Self { root, node, kernel }
    }

    /// One whose devices, all with vfio-pci, can be had by both ways.
    pub(super) fn with_devices(devices: &[(&str, u32)]) -> Self {
        let fake = Self::new();
        fake.node_file("vfio/vfio");
        fake.node_file("iommu");
        for (number, (name, group)) in devices.iter().enumerate() {
            fake.device(name, "0x010802", Some("vfio-pci"), Some(*group));
            fake.node_file(&format!("vfio/{group}"));
            fake.node_file(&format!("vfio/devices/vfio{number}"));
            fake.own_node(name, &format!("vfio{number}"));
        }
        fake
    }

    fn directory(&self, path: &str) -> PathBuf {
        let made = self.root.path().join("sys").join(path);
        fs::create_dir_all(&made).unwrap();
        made
    }

    /// A node in /dev.
    pub(super) fn node_file(&self, path: &str) {
        let path = self.node.dev.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "").unwrap();
    }

    /// A member of a group.
    pub(super) fn member(&self, group: u32, name: &str, class: &str, driver: Option<&str>) {
        let device = self.directory(&format!("kernel/iommu_groups/{group}/devices/{name}"));
        fs::write(device.join("class"), format!("{class}\n")).unwrap();
        if let Some(driver) = driver {
            symlink(format!("/drivers/{driver}"), device.join("driver")).unwrap();
        }
    }

    /// An NVMe; its place in sysfs.
    pub(super) fn device(
        &self,
        name: &str,
        class: &str,
        driver: Option<&str>,
        group: Option<u32>,
    ) -> PathBuf {
        let place = self.directory(&format!("bus/pci/devices/{name}"));
        for (file, text) in [("class", class), ("vendor", "0x1b36"), ("device", "0x0010")] {
            fs::write(place.join(file), format!("{text}\n")).unwrap();
        }
        if let Some(driver) = driver {
            let target = self.directory(&format!("bus/pci/drivers/{driver}"));
            symlink(target, place.join("driver")).unwrap();
        }
        if let Some(group) = group {
            let target = self.directory(&format!("kernel/iommu_groups/{group}"));
            symlink(target, place.join("iommu_group")).unwrap();
            self.member(group, name, class, driver);
        }
        place
    }

    /// The configuration space of a device that is there.
    pub(super) fn configuration(&self, name: &str, space: &[u8]) {
        let path = self
            .directory(&format!("bus/pci/devices/{name}"))
            .join("config");
        fs::write(path, space).unwrap();
    }

    /// A process.
    pub(super) fn process(&self, pid: u32, name: &str) -> PathBuf {
        let place = self.node.proc.join(pid.to_string());
        fs::create_dir_all(place.join("fd")).unwrap();
        fs::write(place.join("comm"), format!("{name}\n")).unwrap();
        place
    }

    /// A device's own node; where it is in sysfs.
    pub(super) fn own_node(&self, device: &str, name: &str) -> String {
        let path = format!("bus/pci/devices/{device}/vfio-dev/{name}");
        let place = self.directory(&path);
        symlink(place.join("../.."), place.join("device")).unwrap();
        path
    }

    /// What a character device is.
    pub(crate) fn character(&self, number: &str, target: &str) {
        let target = self.directory(target);
        let links = self.directory("dev/char");
        symlink(target, links.join(number)).unwrap();
    }
}

/// What a descriptor is.
#[derive(Debug)]
struct Open {
    /// Below /dev, or a PCI address.
    what: String,
    /// Its other end: closed when the descriptor is.
    other: PipeReader,
    /// Groups in a container, address spaces of an iommufd, what a device is bound to.
    has: Vec<u32>,
    /// The IOMMU of a container is set; a device is attached.
    set: bool,
}

impl Open {
    fn lives(&self) -> bool {
        let mut fds = [PollFd::new(
            std::os::fd::AsFd::as_fd(&self.other),
            PollFlags::POLLIN,
        )];
        poll(&mut fds, PollTimeout::ZERO).unwrap();
        !fds[0].revents().unwrap().contains(PollFlags::POLLHUP)
    }
}

/// The stand-in.
#[derive(Debug, Default)]
pub(super) struct FakeKernel {
    open: Mutex<BTreeMap<RawFd, Open>>,
    /// Interrupts are not remapped.
    pub(super) unsafe_interrupts: std::sync::atomic::AtomicBool,
}

impl FakeKernel {
    /// What is open.
    pub(super) fn holds(&self) -> Vec<String> {
        let open = self.live();
        let mut names: Vec<_> = open.values().map(|open| open.what.clone()).collect();
        names.sort();
        names
    }

    fn live(&self) -> MutexGuard<'_, BTreeMap<RawFd, Open>> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|_, open| open.lives());
        open
    }

    fn make(&self, what: String) -> OwnedFd {
        let (other, own) = io::pipe().unwrap();
        let own = OwnedFd::from(own);
        let made = Open {
            what,
            other,
            has: Vec::new(),
            set: false,
        };
        self.live().insert(own.as_raw_fd(), made);
        own
    }

    fn is_unsafe(&self) -> bool {
        self.unsafe_interrupts
            .load(std::sync::atomic::Ordering::Relaxed)
    }
}

fn name(path: &Path) -> io::Result<String> {
    fs::metadata(path)?;
    let text = path.to_str().unwrap();
    Ok(text.split_once("/dev/").unwrap().1.to_owned())
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap())
}

impl Calls for FakeKernel {
    fn open(&self, path: &Path) -> io::Result<OwnedFd> {
        let what = name(path)?;
        // A group has one owner.
        if self.live().values().any(|open| open.what == what) {
            return Err(io::Error::from_raw_os_error(libc::EBUSY));
        }
        Ok(self.make(what))
    }

    fn open_sealed(&self, path: &Path) -> io::Result<OwnedFd> {
        Ok(self.make(name(path)?))
    }

    fn number(&self, fd: &OwnedFd, request: libc::Ioctl, _: libc::c_ulong) -> nix::Result<i32> {
        let mut open = self.live();
        let container = open.get_mut(&fd.as_raw_fd()).unwrap();
        assert_eq!(container.what, "vfio/vfio");
        match request {
            GET_API_VERSION => Ok(0),
            CHECK_EXTENSION => Ok(1),
            SET_IOMMU if container.has.is_empty() || container.set => Err(Errno::EINVAL),
            SET_IOMMU if self.is_unsafe() => Err(Errno::EPERM),
            SET_IOMMU => {
                container.set = true;
                Ok(0)
            }
            _ => Err(Errno::ENOTTY),
        }
    }

    fn structure(&self, fd: &OwnedFd, request: libc::Ioctl, bytes: &mut [u8]) -> nix::Result<()> {
        assert_eq!(word(bytes, 0) as usize, bytes.len());
        let mut open = self.live();
        let raw = fd.as_raw_fd();
        let what = open[&raw].what.clone();
        match (request, what.as_str()) {
            (OPTION, "iommu") if !open[&raw].has.is_empty() => Err(Errno::EBUSY),
            (OPTION, "iommu") => {
                assert_eq!(
                    &bytes[4..],
                    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]
                );
                Ok(())
            }
            (IOAS_ALLOC, "iommu") => {
                bytes[8..12].copy_from_slice(&5u32.to_ne_bytes());
                open.get_mut(&raw).unwrap().has.push(5);
                Ok(())
            }
            (BIND_IOMMUFD, _) => {
                let iommufd = word(bytes, 8).cast_signed();
                assert_eq!(open[&iommufd].what, "iommu");
                let bound = |open: &Open| open.what == what && !open.has.is_empty();
                if open.values().any(bound) {
                    return Err(Errno::EINVAL);
                }
                // Its group is open by the other way.
                let is_group = |open: &Open| {
                    open.what
                        .strip_prefix("vfio/")
                        .is_some_and(|name| name.parse::<u32>().is_ok())
                };
                if open.values().any(is_group) {
                    return Err(Errno::EBUSY);
                }
                if self.is_unsafe() {
                    return Err(Errno::EPERM);
                }
                let spaces = open[&iommufd].has.clone();
                open.get_mut(&raw).unwrap().has = spaces;
                Ok(())
            }
            (ATTACH_IOMMUFD_PT, _) => {
                let device = open.get_mut(&raw).unwrap();
                if !device.has.contains(&word(bytes, 8)) {
                    return Err(Errno::ENOENT);
                }
                device.set = true;
                Ok(())
            }
            _ => Err(Errno::ENOTTY),
        }
    }

    fn set_container(&self, group: &OwnedFd, container: &OwnedFd) -> nix::Result<()> {
        let mut open = self.live();
        let number = open[&group.as_raw_fd()]
            .what
            .strip_prefix("vfio/")
            .unwrap()
            .parse();
        let container = open.get_mut(&container.as_raw_fd()).unwrap();
        container.has.push(number.unwrap());
        let set = container.set;
        open.get_mut(&group.as_raw_fd()).unwrap().set = set;
        Ok(())
    }

    fn device(&self, group: &OwnedFd, name: &CStr) -> nix::Result<OwnedFd> {
        {
            let open = self.live();
            let group = &open[&group.as_raw_fd()];
            let set = open
                .values()
                .any(|open| open.what == "vfio/vfio" && open.set);
            if !set || !group.what.starts_with("vfio/") {
                return Err(Errno::EINVAL);
            }
        }
        Ok(self.make(name.to_str().unwrap().to_owned()))
    }
}
