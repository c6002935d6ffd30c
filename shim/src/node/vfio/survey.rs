//! What of the node's PCI devices a pod can have, and what it takes for the others. Blocking.
//!
//! Only looks: a group that was opened to see whether it is free would be missing to the pod that starts meanwhile.

use std::cell::OnceCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, StatxFlags, statx};

use super::fit::{self, Room};
use super::refusal::Refusal;
use super::{Node, Way, device_node, target};
use crate::asked::config::Wish;

/// One device.
#[derive(Debug)]
pub struct Surveyed {
    /// Where it is: `0000:3b:00.0`.
    pub address: String,
    /// Vendor and device: `10de:2330`.
    pub id: String,
    /// What drivers know it by (`modalias`), in a guest as on the node.
    pub alias: String,
    /// Its IOMMU group.
    pub group: Option<String>,
    /// The driver that has it.
    pub driver: Option<String>,
    /// What to name it by, with what else there is to say; or why it cannot be given.
    pub verdict: Result<String, Refusal>,
}

/// A look at the node's devices. What is the same for all of them is read once, when it is first asked for.
pub struct Survey<'a> {
    node: &'a Node,
    gives_away: OnceCell<Result<(), Refusal>>,
    mounted: OnceCell<BTreeSet<String>>,
}

impl Node {
    /// A look at its devices as they are now.
    #[must_use]
    pub fn survey(&self) -> Survey<'_> {
        Survey {
            node: self,
            gives_away: OnceCell::new(),
            mounted: OnceCell::new(),
        }
    }
}

impl Survey<'_> {
    /// Each PCI device of the node but its bridges, for a VM that has this `room`.
    #[must_use]
    pub fn devices(&self, room: &Room) -> Vec<Surveyed> {
        let Ok(entries) = fs::read_dir(self.node.sys.join("bus/pci/devices")) else {
            return Vec::new();
        };
        let holders = self.node.holders();
        let mut found: Vec<_> = entries
            .flatten()
            .filter_map(|entry| {
                let place = entry.path();
                let read = |file: &str| {
                    let text = fs::read_to_string(place.join(file)).unwrap_or_default();
                    text.trim().trim_start_matches("0x").to_owned()
                };
                if read("class").starts_with("06") {
                    return None;
                }
                let verdict = self.fitting(&place, room);
                let verdict = verdict.map(|node| told(&place, &node, &holders));
                Some(Surveyed {
                    address: entry.file_name().to_string_lossy().into_owned(),
                    id: format!("{}:{}", read("vendor"), read("device")),
                    alias: read("modalias"),
                    group: target(&place.join("iommu_group")),
                    driver: target(&place.join("driver")),
                    verdict,
                })
            })
            .collect();
        found.sort_by(|one, other| one.address.cmp(&other.address));
        found
    }

    /// As [`Self::verdict`], for a VM with this `room`: nobody is to bind what no VM can have.
    fn fitting(&self, device: &Path, room: &Room) -> Result<PathBuf, Refusal> {
        if device.join("iommu_group").exists() {
            fit::check(device, room)?;
            self.gives_away
                .get_or_init(|| self.node.gives_away())
                .clone()?;
        }
        self.verdict(device)
    }

    /// Whether a device can be given to a pod, by its directory in sysfs: its node in /dev.
    pub(super) fn verdict(&self, device: &Path) -> Result<PathBuf, Refusal> {
        const NO_IOMMU: (&str, &str) = (
            "no IOMMU stands above it",
            "turn it on in the firmware, and with intel_iommu=on",
        );
        let link = device.join("iommu_group");
        let (why, fix) = NO_IOMMU;
        let Some(group) = target(&link) else {
            return Err(Refusal::new(why, fix));
        };
        // VFIO makes groups of its own where there is no IOMMU, if it was told to.
        let name = fs::read_to_string(link.join("name")).unwrap_or_default();
        if name.trim() == "vfio-noiommu" {
            return Err(Refusal::new(
                format!("{why}, and what VFIO gives without one reaches all of the node's memory"),
                fix,
            ));
        }
        match target(&device.join("driver")) {
            Some(driver) if driver.contains("vfio") => {
                let number = group.parse();
                let number =
                    number.map_err(|_| Refusal::new(format!("IOMMU group {group}"), fix))?;
                self.node.whole(number)?;
                let path = self.node.dev.join("vfio");
                Ok(match self.node.way(Way::Groups) {
                    Way::Groups => path.join(group),
                    Way::Iommufd => path.join("devices").join(device_node(device)?),
                })
            }
            Some(driver) => {
                let (uses, bind) = (self.uses(device), self.node.bind(device, &group));
                let fix = if uses.is_empty() {
                    bind
                } else {
                    format!("take that from the node first, then {bind}")
                };
                let why = format!("the node uses it ({driver}, IOMMU group {group}{uses})");
                Err(Refusal::new(why, fix))
            }
            None => Err(Refusal::new(
                format!("no driver has it (IOMMU group {group})"),
                self.node.bind(device, &group),
            )),
        }
    }

    /// Entries of a handler's list for which the node has no device to give, with the reason: none of its pods can start.
    #[must_use]
    pub fn missing(&self, wishes: &[Wish], room: &Room) -> Vec<(String, String)> {
        let mut used = Vec::new();
        let mut missing = Vec::new();
        for wish in wishes {
            let candidates = self.node.candidates(wish);
            if candidates.is_empty() {
                missing.push((wish.to_string(), "this node has no such device".to_owned()));
                continue;
            }
            let mut reasons = Vec::new();
            let mut found = false;
            for address in candidates {
                if used.contains(&address) {
                    reasons.push(format!("{address} is on the list already"));
                    continue;
                }
                let device = self.node.sys.join("bus/pci/devices").join(&address);
                match self.fitting(&device, room) {
                    Ok(_) => {
                        used.push(address);
                        found = true;
                        break;
                    }
                    Err(refusal) => reasons.push(format!("{address}: {refusal}")),
                }
            }
            if !found {
                missing.push((wish.to_string(), reasons.join("; ")));
            }
        }
        missing
    }

    /// What of a device the node itself lives on, as `; its disk vda is mounted`.
    fn uses(&self, device: &Path) -> String {
        let mounted = self.mounted.get_or_init(|| self.node.mounted());
        let mut uses = Vec::new();
        for (class, place) in classes(device, 0) {
            let name = place.file_name().unwrap_or_default().to_string_lossy();
            let read = |place: &Path, file: &str| {
                let text = fs::read_to_string(place.join(file)).unwrap_or_default();
                text.trim().to_owned()
            };
            if class == "net" && read(&place, "operstate") == "up" {
                uses.push(format!("; its interface {name} is up"));
            }
            let parts = fs::read_dir(&place).into_iter().flatten().flatten();
            let parts = parts.map(|entry| read(&entry.path(), "dev"));
            let mut all = parts.chain([read(&place, "dev")]);
            if class == "block" && all.any(|number| mounted.contains(&number)) {
                uses.push(format!("; its disk {name} is mounted"));
            }
        }
        uses.sort();
        uses.concat()
    }
}

impl Node {
    fn bind(&self, device: &Path, group: &str) -> String {
        let others = self.held_beside(device, group);
        let others = if others.is_empty() {
            String::new()
        } else {
            format!(", and with it {} of the same group,", others.join(", "))
        };
        format!("bind it{others} to vfio-pci to give it to a pod")
    }

    /// The other members of a device's group that a driver of the node has, with their drivers.
    fn held_beside(&self, device: &Path, group: &str) -> Vec<String> {
        let own = device.file_name().map(|name| name.to_string_lossy());
        let members = self.members_of(group).unwrap_or_default();
        let held = members.into_iter().filter_map(|member| {
            let driver = member.held_by()?;
            (Some(member.name.as_str()) != own.as_deref())
                .then(|| format!("{} ({driver})", member.name))
        });
        held.collect()
    }

    /// Who has VFIO's nodes open.
    fn holders(&self) -> BTreeMap<PathBuf, Vec<String>> {
        let mut holders = BTreeMap::<PathBuf, Vec<String>>::new();
        let nodes = self.dev.join("vfio");
        let numbers = numbers_of(&nodes);
        // What a VMM was given was opened by a mount of the node's own, and has no other name than this.
        let by_number = |fd: &Path| numbers.get(&number_of(fd)?).cloned();
        for process in fs::read_dir(&self.proc).into_iter().flatten().flatten() {
            let pid = process.file_name().to_string_lossy().into_owned();
            if !pid.bytes().all(|byte| byte.is_ascii_digit()) {
                continue;
            }
            let open = fs::read_dir(process.path().join("fd"));
            let open = open.into_iter().flatten().flatten();
            let mut held: Vec<_> = open
                .filter_map(|fd| match fs::read_link(fd.path()).ok()? {
                    path if path == Path::new("/") => by_number(&fd.path()),
                    path => Some(path),
                })
                .filter(|path| path.starts_with(&nodes) && *path != nodes.join("vfio"))
                .collect();
            held.sort();
            held.dedup();
            for path in held {
                let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
                let holder = format!("process {pid} ({})", name.trim());
                holders.entry(path).or_default().push(holder);
            }
        }
        holders
    }

    /// The numbers of what is mounted, as `8:1`.
    fn mounted(&self) -> BTreeSet<String> {
        let mounts = fs::read_to_string(self.proc.join("self/mountinfo")).unwrap_or_default();
        let numbers = mounts.lines().filter_map(|line| line.split(' ').nth(2));
        numbers.map(str::to_owned).collect()
    }
}

/// VFIO's nodes by their device numbers.
fn numbers_of(directory: &Path) -> BTreeMap<(u32, u32), PathBuf> {
    let directories = [directory.to_owned(), directory.join("devices")];
    let entries = directories.iter().filter_map(|one| fs::read_dir(one).ok());
    let paths = entries.flatten().flatten().map(|entry| entry.path());
    paths
        .filter_map(|path| Some((number_of(&path)?, path)))
        .collect()
}

/// Of a character device. No server of a file system is asked: it may never answer.
fn number_of(path: &Path) -> Option<(u32, u32)> {
    let found = statx(CWD, path, AtFlags::STATX_DONT_SYNC, StatxFlags::TYPE).ok()?;
    let kind = FileType::from_raw_mode(found.stx_mode.into());
    (kind == FileType::CharacterDevice).then_some((found.stx_rdev_major, found.stx_rdev_minor))
}

/// What is to be said of a device that can be given.
fn told(device: &Path, node: &Path, holders: &BTreeMap<PathBuf, Vec<String>>) -> String {
    let mut text = format!("can be given to a pod as {}", node.display());
    if let Some(holders) = holders.get(node) {
        text = format!("{text}; in use by {} now", holders.join(", "));
    }
    let methods = fs::read_to_string(device.join("reset_method"));
    if methods.is_ok_and(|methods| methods.trim().is_empty()) {
        text += "; it has no reset, so that the next pod finds in it what this one has left";
    }
    text
}

/// Disks and interfaces that a device's drivers have made, below its directory in sysfs.
fn classes(place: &Path, depth: usize) -> Vec<(&'static str, PathBuf)> {
    /// Host, target, unit: a disk behind an adapter is not deeper.
    const MAX_DEPTH: usize = 6;
    let mut found = Vec::new();
    if depth > MAX_DEPTH {
        return found;
    }
    for entry in fs::read_dir(place).into_iter().flatten().flatten() {
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        let name = entry.file_name();
        let class = ["block", "net"].into_iter().find(|class| name == *class);
        match class {
            Some(class) => {
                let made = fs::read_dir(entry.path()).into_iter().flatten().flatten();
                found.extend(made.map(|made| (class, made.path())));
            }
            None => found.extend(classes(&entry.path(), depth + 1)),
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::super::testing::Fake;
    use super::*;

    const ROOM: Room = Room {
        memory: 256 << 20,
        max_memory: 256 << 20,
        vcpus: 1,
        phys_bits: 40,
    };

    fn said(fake: &Fake) -> Vec<String> {
        let all = fake.node.survey().devices(&ROOM).into_iter();
        all.map(|one| match one.verdict {
            Ok(told) => format!("{} ({}): {told}", one.address, one.id),
            Err(refusal) => format!("{} ({}) cannot: {refusal}", one.address, one.id),
        })
        .collect()
    }

    #[test]
    fn every_device_but_bridges_is_told_with_what_it_takes() {
        let fake = Fake::new();
        fake.device("0000:00:00.0", "0x060000", None, Some(0));
        fake.device("0000:00:02.0", "0x010802", Some("vfio-pci"), Some(2));
        fake.device("0000:00:03.0", "0x020000", Some("e1000e"), Some(3));
        fake.device("0000:00:04.0", "0x030000", None, Some(4));
        fake.device("0000:00:05.0", "0x030000", None, None);
        fake.node_file("vfio/vfio");
        let said = said(&fake);
        assert_eq!(said.len(), 4, "{said:?}");
        for (line, words) in said.iter().zip([
            "0000:00:02.0 (1b36:0010): can be given",
            "the node uses it (e1000e, IOMMU group 3): bind it to vfio-pci",
            "no driver has it",
            "no IOMMU stands above it",
        ]) {
            assert!(line.contains(words), "{line}");
        }
    }

    #[test]
    fn a_device_that_is_not_bound_is_told_with_those_of_its_group_that_the_node_uses() {
        let fake = Fake::new();
        fake.device("0000:03:00.0", "0x030000", Some("nouveau"), Some(3));
        fake.device("0000:03:00.1", "0x040300", Some("snd_hda_intel"), Some(3));
        fake.device("0000:03:00.2", "0x0c0330", None, Some(3));
        fake.member(3, "0000:02:00.0", "0x060400", Some("pcieport"));
        let said = said(&fake);
        let first =
            "bind it, and with it 0000:03:00.1 (snd_hda_intel) of the same group, to vfio-pci";
        assert!(said[0].contains(first), "{}", said[0]);
        let third = "0000:03:00.0 (nouveau), 0000:03:00.1 (snd_hda_intel) of the same group";
        assert!(said[2].contains(third), "{}", said[2]);
    }

    #[test]
    fn a_device_of_a_kernel_without_groups_is_told_by_its_own_node() {
        let fake = Fake::new();
        fake.device("0000:00:02.0", "0x010802", Some("vfio-pci"), Some(2));
        fake.node_file("iommu");
        fake.node_file("vfio/devices/vfio3");
        assert!(said(&fake)[0].contains("CONFIG_VFIO_DEVICE_CDEV"));
        fake.own_node("0000:00:02.0", "vfio3");
        assert!(said(&fake)[0].ends_with("/vfio/devices/vfio3"));
    }

    #[test]
    fn what_no_vm_has_room_for_is_told_before_anybody_binds_it() {
        let fake = Fake::new();
        let place = fake.device("0000:00:03.0", "0x030000", None, Some(3));
        let bar = "0x00000000c0000000 0x00000000dfffffff 0x0000000000042208\n";
        fs::write(place.join("resource"), bar).unwrap();
        assert!(said(&fake)[0].contains("a BAR of 0x20000000 bytes does not fit"));
        assert!(!said(&fake)[0].contains("vfio-pci"));
        let missing = fake
            .node
            .survey()
            .missing(&["00:03.0".parse().unwrap()], &ROOM);
        assert!(missing[0].1.contains("does not fit"), "{missing:?}");
    }

    #[test]
    fn a_node_that_remaps_no_interrupts_has_no_device_to_give() {
        let fake = Fake::new();
        fake.device("0000:00:03.0", "0x030000", Some("vfio-pci"), Some(3));
        fake.node_file("vfio/vfio");
        fs::create_dir_all(&fake.node.proc).unwrap();
        fs::write(
            fake.node.proc.join("interrupts"),
            " 25: 0 PCI-MSIX-0000:00:0b.0 0-edge x\n",
        )
        .unwrap();
        assert!(
            said(&fake)[0].contains("does not remap interrupts"),
            "{}",
            said(&fake)[0]
        );
    }

    #[test]
    fn what_all_devices_have_in_common_is_read_once() {
        let fake = Fake::new();
        for (name, group) in [("0000:00:03.0", 3), ("0000:00:04.0", 4)] {
            let place = fake.device(name, "0x010802", Some("nvme"), Some(group));
            fs::create_dir_all(place.join("block/nvme0")).unwrap();
            fs::write(place.join("block/nvme0/dev"), "8:1\n").unwrap();
        }
        let (table, interrupts) = (
            fake.node.proc.join("self/mountinfo"),
            fake.node.proc.join("interrupts"),
        );
        fs::create_dir_all(table.parent().unwrap()).unwrap();
        fs::write(&table, "30 1 8:1 / / rw - ext4 /dev/nvme0 rw\n").unwrap();
        fs::write(&interrupts, "25: 0 IR-PCI-MSI 0-edge x\n").unwrap();
        let survey = fake.node.survey();
        let uses = |survey: &Survey| {
            let all = survey.devices(&ROOM).into_iter();
            all.filter(|one| {
                one.verdict
                    .as_ref()
                    .is_err_and(|refusal| refusal.why.contains("nvme0 is mounted"))
            })
            .count()
        };
        assert_eq!(uses(&survey), 2);
        fs::write(&table, "").unwrap();
        fs::write(&interrupts, "25: 0 PCI-MSI 0-edge x\n").unwrap();
        assert_eq!(uses(&survey), 2);
        assert_eq!(uses(&fake.node.survey()), 0);
        assert!(said(&fake)[0].contains("does not remap interrupts"));
    }

    #[test]
    fn a_device_that_is_in_use_or_cannot_be_reset_is_told_so() {
        let fake = Fake::new();
        let place = fake.device("0000:00:02.0", "0x010802", Some("vfio-pci"), Some(2));
        fake.node_file("vfio/vfio");
        fake.node_file("vfio/2");
        fs::write(place.join("reset_method"), "flr bus\n").unwrap();
        assert!(said(&fake)[0].ends_with("/vfio/2"));
        fs::write(place.join("reset_method"), "\n").unwrap();
        let process = fake.process(77, "a-shim");
        symlink(fake.node.dev.join("vfio/2"), process.join("fd/4")).unwrap();
        symlink(fake.node.dev.join("vfio/vfio"), process.join("fd/5")).unwrap();
        let said = said(&fake);
        assert!(
            said[0].contains("; in use by process 77 (a-shim) now"),
            "{}",
            said[0]
        );
        assert!(said[0].contains("has no reset"), "{}", said[0]);
    }

    #[test]
    fn a_group_that_vfio_has_made_without_an_iommu_is_none() {
        let fake = Fake::new();
        let place = fake.device("0000:00:02.0", "0x010802", Some("vfio-pci"), Some(2));
        fs::write(place.join("iommu_group/name"), "vfio-noiommu\n").unwrap();
        assert!(said(&fake)[0].contains("no IOMMU stands above it, and what VFIO gives"));
    }

    #[test]
    fn what_the_node_lives_on_is_named_beside_its_driver() {
        let fake = Fake::new();
        let place = fake.device("0000:00:03.0", "0x020000", Some("e1000e"), Some(3));
        fs::create_dir_all(place.join("virtio1/net/eth7")).unwrap();
        fs::write(place.join("virtio1/net/eth7/operstate"), "up\n").unwrap();
        let table = fake.node.proc.join("self/mountinfo");
        fs::create_dir_all(table.parent().unwrap()).unwrap();
        fs::write(table, "30 1 8:1 / / rw - ext4 /dev/sdx1 rw\n").unwrap();
        fs::create_dir_all(place.join("host0/block/sdx/sdx1")).unwrap();
        fs::write(place.join("host0/block/sdx/sdx1/dev"), "8:1\n").unwrap();
        let expected = "(e1000e, IOMMU group 3; its disk sdx is mounted; its interface eth7 is up): take that from the node \
             first, then bind it to vfio-pci";
        assert!(said(&fake)[0].contains(expected), "{}", said(&fake)[0]);
    }

    #[test]
    fn an_entry_of_a_list_that_no_device_can_be_given_for_is_told_with_the_reasons() {
        let fake = Fake::new();
        fake.node_file("vfio/vfio");
        fake.device("0000:00:02.0", "0x010802", Some("vfio-pci"), Some(2));
        fake.device("0000:00:03.0", "0x010802", Some("nvme"), Some(3));
        let missing = |texts: &[&str]| {
            let wishes: Vec<Wish> = texts.iter().map(|text| text.parse().unwrap()).collect();
            fake.node.survey().missing(&wishes, &ROOM)
        };
        assert!(missing(&["00:02.0"]).is_empty());
        assert!(missing(&["1b36:0010"]).is_empty());
        let told = missing(&["00:02.0", "1b36:0010", "00:09.0"]);
        assert_eq!(told.len(), 2, "{told:?}");
        for words in [
            "0000:00:02.0 is on the list already",
            "0000:00:03.0: the node uses it (nvme",
        ] {
            assert!(told[0].1.contains(words), "{told:?}");
        }
        assert_eq!(told[1].1, "this node has no such device");
    }
}
