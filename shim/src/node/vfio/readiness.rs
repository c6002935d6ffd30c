//! What the node as a whole has to have before any of its devices can be given: an IOMMU, VFIO's modules, and memory
//! that may be pinned. Blocking; only looks.

use std::fs;
use std::path::Path;

use super::refusal::Refusal;
use super::{Node, Way};
use crate::asked::config::MIB;
use crate::node::daemon::Daemon;

/// What lets a kernel give devices away although their interrupts are not remapped.
const UNSAFE_INTERRUPTS: [&str; 2] = [
    "vfio_iommu_type1/parameters/allow_unsafe_interrupts",
    "iommufd/parameters/allow_unsafe_interrupts",
];

/// What to do about interrupts that are not remapped.
const REMAP: &str = "turn interrupt remapping on in the firmware, and take intremap=off and nointremap from the kernel's \
                     command line";

/// What becomes of devices' interrupts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Remapping {
    /// They go where the node lets them; or nothing is known of it.
    On,
    /// They go anywhere, so no device is given away.
    Off,
    /// They go anywhere, and that was allowed.
    Ignored,
}

/// How far a module is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Module {
    /// In the kernel.
    Loaded,
    /// Among its modules.
    Loadable,
    /// Not for this kernel.
    Missing,
}

impl Node {
    /// Whether there is an IOMMU, and interrupts go through it.
    ///
    /// # Errors
    /// What to turn on.
    pub fn iommu(&self) -> Result<String, Refusal> {
        let count = |path: &str| fs::read_dir(self.sys.join(path)).map_or(0, Iterator::count);
        let groups = count("kernel/iommu_groups");
        if groups == 0 {
            return Err(Refusal::new(
                "none, or it is off: no pod can have a PCI device of the node",
                "turn it on in the firmware (VT-d, AMD-Vi), and with intel_iommu=on in the kernel's command line",
            ));
        }
        let what = match self.remapping() {
            Remapping::On => return Ok(format!("{groups} groups")),
            Remapping::Off => "so devices are refused to pods",
            Remapping::Ignored => {
                "and allow_unsafe_interrupts is set: a pod with a device can send the node any interrupt"
            }
        };
        Err(Refusal::new(
            format!("{groups} groups, but interrupts are not remapped, {what}"),
            REMAP,
        ))
    }

    /// Whether the kernel gives a device away, by what becomes of its interrupts.
    pub(super) fn gives_away(&self) -> Result<(), Refusal> {
        match self.remapping() {
            Remapping::On | Remapping::Ignored => Ok(()),
            Remapping::Off => Err(Refusal::new("the node does not remap interrupts", REMAP)),
        }
    }

    fn remapping(&self) -> Remapping {
        let interrupts = fs::read_to_string(self.proc.join("interrupts")).unwrap_or_default();
        if !interrupts.contains(" PCI-MSI") || interrupts.contains(" IR-PCI-MSI") {
            return Remapping::On;
        }
        let is_on = |path: &str| {
            let text = fs::read_to_string(self.sys.join("module").join(path));
            text.is_ok_and(|text| text.trim() == "Y")
        };
        if UNSAFE_INTERRUPTS.iter().any(|path| is_on(path)) {
            Remapping::Ignored
        } else {
            Remapping::Off
        }
    }

    /// Which of the kernel's interfaces to its devices there is.
    ///
    /// # Errors
    /// What to load or to build.
    pub fn interface(&self) -> Result<String, Refusal> {
        match self.module("vfio-pci") {
            Module::Missing => {
                return Err(Refusal::new(
                    "this node's kernel has no vfio-pci",
                    "install the package with all of its modules, or a kernel with CONFIG_VFIO_PCI",
                ));
            }
            Module::Loadable => {
                return Err(Refusal::new(
                    "vfio-pci is not loaded",
                    "modprobe vfio-pci, and name it in a file of /etc/modules-load.d",
                ));
            }
            Module::Loaded => {}
        }
        let (groups, iommufd) = (self.dev.join("vfio/vfio"), self.dev.join("iommu"));
        let behind = match self.way(Way::Groups) {
            Way::Groups => "vfio_iommu_type1",
            Way::Iommufd => "iommufd",
        };
        if !groups.exists() && !iommufd.exists() {
            return Err(Refusal::new(
                "vfio-pci is loaded, but there is neither /dev/vfio/vfio nor /dev/iommu",
                "let the node's udev make them, or load vfio and iommufd",
            ));
        }
        if self.module(behind) == Module::Missing {
            return Err(Refusal::new(
                format!(
                    "vfio-pci is loaded, but this node's kernel has no {behind}, which maps memory for it"
                ),
                "install the package with all of its modules, or a kernel with CONFIG_VFIO_IOMMU_TYPE1 or CONFIG_IOMMUFD",
            ));
        }
        let own = self.dev.join("vfio/devices").exists();
        Ok(match (groups.exists(), iommufd.exists() && own) {
            (true, true) => "groups and iommufd".to_owned(),
            (true, false) => "groups".to_owned(),
            (false, _) => "iommufd".to_owned(),
        })
    }

    fn module(&self, name: &str) -> Module {
        let plain = name.replace('-', "_");
        // A driver that is built in has no directory among the modules unless it has parameters.
        let loaded = [
            self.sys.join("module").join(&plain),
            self.sys.join("bus/pci/drivers").join(name),
        ];
        if loaded.iter().any(|place| place.exists()) {
            return Module::Loaded;
        }
        let lists = |file: &str| {
            let text = fs::read_to_string(self.modules.join(file)).unwrap_or_default();
            let mut names = text.lines().filter_map(|line| {
                let path = line.split(':').next()?;
                let own = Path::new(path).file_name()?.to_str()?;
                Some(own.split('.').next()?.replace('-', "_"))
            });
            names.any(|own| own == plain)
        };
        if lists("modules.builtin") {
            Module::Loaded
        } else if lists("modules.dep") {
            Module::Loadable
        } else {
            Module::Missing
        }
    }

    /// Whether a VM of `needed` bytes can have them all pinned, started by `starter` below one of the cgroups that
    /// kubelet makes.
    ///
    /// # Errors
    /// The limit that is below, with the numbers.
    pub fn pinnable(&self, needed: u64, starter: Option<&Daemon>) -> Result<String, Refusal> {
        let mib = |bytes: u64| bytes.div_ceil(MIB);
        let lockable = starter.and_then(Daemon::lockable);
        if let Some(limit) = lockable.filter(|limit| *limit < needed) {
            return Err(Refusal::new(
                format!(
                    "a VM of {} MiB that is given a device has all of it locked, but RLIMIT_MEMLOCK of containerd is {} MiB",
                    mib(needed),
                    limit / MIB
                ),
                "set LimitMEMLOCK=infinity in containerd's unit, or give containerd CAP_SYS_RESOURCE",
            ));
        }
        let cgroups = [
            "kubepods.slice",
            "kubepods",
            "memory/kubepods.slice",
            "memory/kubepods",
        ];
        for name in cgroups {
            let place = self.sys.join("fs/cgroup").join(name);
            let read = |file: &str| fs::read_to_string(place.join(file));
            let text = read("memory.max").or_else(|_| read("memory.limit_in_bytes"));
            let limit = text.ok().and_then(|text| text.trim().parse::<u64>().ok());
            if let Some(limit) = limit.filter(|limit| *limit < needed) {
                return Err(Refusal::new(
                    format!(
                        "a VM of {} MiB that is given a device has all of it pinned, but the cgroup {name} of all pods is \
                         limited to {} MiB",
                        mib(needed),
                        limit / MIB
                    ),
                    "give pods more of the node (kubelet's reserved memory), or the handler less memory",
                ));
            }
        }
        let meminfo = fs::read_to_string(self.proc.join("meminfo")).unwrap_or_default();
        let available = meminfo
            .lines()
            .find_map(|line| line.strip_prefix("MemAvailable:"));
        let available = available
            .and_then(|text| text.split_ascii_whitespace().next()?.parse::<u64>().ok())
            .map_or(u64::MAX, |kib| kib << 10);
        if available < needed {
            return Err(Refusal::new(
                format!(
                    "a VM of {} MiB that is given a device has all of it pinned, and the node has {} MiB",
                    mib(needed),
                    available / MIB
                ),
                "free some, or give the handler less memory",
            ));
        }
        let limit = match lockable {
            Some(limit) => format!("up to {} MiB", limit / MIB),
            None => "without a limit but the pod's".to_owned(),
        };
        Ok(format!(
            "{limit}; a VM that is given a device takes all of its {} MiB at once",
            mib(needed)
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::Fake;
    use super::*;

    fn write(place: &Path, text: &str) {
        fs::create_dir_all(place.parent().unwrap()).unwrap();
        fs::write(place, text).unwrap();
    }

    #[test]
    fn an_iommu_that_is_not_there_or_remaps_nothing_is_told_with_what_to_turn_on() {
        let fake = Fake::new();
        let said = || fake.node.iommu().map_err(|refusal| refusal.to_string());
        assert!(said().unwrap_err().contains("intel_iommu=on"));
        fake.member(3, "0000:03:00.0", "0x030000", None);
        assert_eq!(said().unwrap(), "1 groups");
        let interrupts = fake.node.proc.join("interrupts");
        write(&interrupts, " 24:  1  PCI-MSI-0000:00:02.0   0-edge  x\n");
        let refused = said().unwrap_err();
        assert!(
            refused.contains("not remapped, so devices are refused"),
            "{refused}"
        );
        let allowed = fake.node.sys.join("module").join(UNSAFE_INTERRUPTS[1]);
        write(&allowed, "Y\n");
        let refused = said().unwrap_err();
        assert!(
            refused.contains("can send the node any interrupt"),
            "{refused}"
        );
        write(
            &interrupts,
            " 24:  1  IR-PCI-MSI-0000:00:02.0   0-edge  x\n",
        );
        said().unwrap();
    }

    #[test]
    fn what_is_missing_of_vfio_is_told_from_what_is_only_not_loaded() {
        let fake = Fake::new();
        let said = || fake.node.interface().map_err(|refusal| refusal.to_string());
        assert!(said().unwrap_err().contains("CONFIG_VFIO_PCI"));
        write(
            &fake.node.modules.join("modules.dep"),
            "kernel/drivers/vfio/pci/vfio-pci.ko.xz: kernel/drivers/vfio/vfio.ko.xz\n",
        );
        assert!(said().unwrap_err().contains("modprobe vfio-pci"));
        write(
            &fake.node.modules.join("modules.builtin"),
            "kernel/drivers/vfio/pci/vfio-pci.ko\n",
        );
        assert!(
            said()
                .unwrap_err()
                .contains("neither /dev/vfio/vfio nor /dev/iommu")
        );
        fake.node_file("vfio/vfio");
        assert!(said().unwrap_err().contains("no vfio_iommu_type1"));
        write(
            &fake.node.modules.join("modules.dep"),
            "kernel/drivers/vfio/vfio_iommu_type1.ko: \nkernel/drivers/iommu/iommufd/iommufd.ko:\n",
        );
        assert_eq!(said().unwrap(), "groups");
        fake.node_file("iommu");
        assert_eq!(said().unwrap(), "groups");
        fake.node_file("vfio/devices/vfio0");
        assert_eq!(said().unwrap(), "groups and iommufd");
        fs::remove_file(fake.node.dev.join("vfio/vfio")).unwrap();
        assert_eq!(said().unwrap(), "iommufd");
    }

    #[test]
    fn the_limit_that_is_below_a_vms_size_is_named_with_the_numbers() {
        let fake = Fake::new();
        let place = fake.process(7, "containerd");
        let starter = Daemon::named(&fake.node.proc, "containerd").remove(0);
        let said = |needed: u64| {
            let told = fake.node.pinnable(needed, Some(&starter));
            told.map_err(|refusal| refusal.to_string())
        };
        let limits = "Limit  Soft Limit  Hard Limit  Units\nMax locked memory         8192   104857600   bytes\n";
        write(&place.join("limits"), limits);
        write(
            &place.join("status"),
            "Name:\tcontainerd\nCapEff:\t0000000000200000\n",
        );
        assert!(said(100 * MIB).unwrap().starts_with("up to 100 MiB"));
        let refused = said(101 * MIB).unwrap_err();
        assert!(
            refused.contains("RLIMIT_MEMLOCK of containerd is 100 MiB"),
            "{refused}"
        );
        // It lifts the limit.
        write(&place.join("status"), "CapEff:\t000001ffffffffff\n");
        assert!(said(101 * MIB).unwrap().starts_with("without a limit"));
        write(
            &fake.node.sys.join("fs/cgroup/kubepods.slice/memory.max"),
            "209715200\n",
        );
        let refused = said(201 * MIB).unwrap_err();
        assert!(
            refused.contains("kubepods.slice of all pods is limited to 200 MiB"),
            "{refused}"
        );
        write(
            &fake.node.sys.join("fs/cgroup/kubepods.slice/memory.max"),
            "max\n",
        );
        write(
            &fake.node.proc.join("meminfo"),
            "MemTotal: 1 kB\nMemAvailable:     204800 kB\n",
        );
        said(200 * MIB).unwrap();
        let refused = said(201 * MIB).unwrap_err();
        assert!(refused.contains("the node has 200 MiB"), "{refused}");
    }
}
