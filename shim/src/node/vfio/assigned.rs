//! Which groups kubelet's assignments to a pod mean: by CDI names, and by PCI addresses, as some device plugins call their
//! devices. What means none of VFIO's is nobody's fault: a device plugin's device may be anything, and one that could not be
//! recognised here comes when its container names it. Blocking.

use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;

use super::{Node, Way, target};
use crate::node::cdi::Names;
use crate::node::pod_resources::Assigned;

/// What assignments mean.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Meant {
    /// Groups, each once, with the container that it is for and the way to it.
    pub groups: Vec<(u32, Way, String)>,
    /// The others, with what is known of them.
    pub others: Vec<String>,
}

impl Node {
    /// Looks assignments up.
    #[must_use]
    pub fn meant(&self, assigned: &[Assigned], names: &Names) -> Meant {
        let mut meant = Meant::default();
        for one in assigned {
            let (groups, why) = self.groups_of(one, names);
            if groups.is_empty() {
                meant.others.push(why);
            }
            for (number, way) in groups {
                if meant.groups.iter().all(|(other, ..)| *other != number) {
                    meant.groups.push((number, way, one.container.clone()));
                }
            }
        }
        meant
    }

    fn groups_of(&self, one: &Assigned, names: &Names) -> (Vec<(u32, Way)>, String) {
        let why = match names.look_up(&one.name) {
            Ok(edits) => {
                let nodes = edits.nodes.iter();
                let groups = nodes.filter_map(|path| self.named_at(path)?.group());
                let groups: Vec<_> = groups.collect();
                if !groups.is_empty() {
                    return (groups, String::new());
                }
                format!("{} names no device of VFIO", one.name)
            }
            Err(error) => error.to_string(),
        };
        let by_address = one.id().and_then(|id| self.group_at(id));
        (
            by_address
                .map(|group| (group, Way::Groups))
                .into_iter()
                .collect(),
            why,
        )
    }

    /// What a node in /dev is to VFIO.
    #[must_use]
    pub fn named_at(&self, path: &Path) -> Option<super::Named> {
        let metadata = fs::metadata(path).ok()?;
        if !metadata.file_type().is_char_device() {
            return None;
        }
        let number = metadata.rdev();
        self.named((rustix::fs::major(number), rustix::fs::minor(number)))
    }

    /// The group of the device at a PCI address, if vfio-pci has it.
    fn group_at(&self, id: &str) -> Option<u32> {
        let is_address = id.len() == 12
            && id
                .bytes()
                .all(|byte| byte.is_ascii_hexdigit() || b":.".contains(&byte));
        let device = self.sys.join("bus/pci/devices").join(id);
        let driver = target(&device.join("driver")).filter(|_| is_address)?;
        if !driver.contains("vfio") {
            return None;
        }
        target(&device.join("iommu_group"))?.parse().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::Fake;
    use super::*;

    fn assigned(name: &str) -> Assigned {
        Assigned {
            container: "main".to_owned(),
            name: name.to_owned(),
        }
    }

    #[test]
    fn names_of_cdi_and_addresses_with_vfio_pci_mean_groups_and_the_rest_is_told() {
        let fake = Fake::new();
        fake.device("0000:00:02.0", "0x010802", Some("vfio-pci"), Some(7));
        fake.device("0000:00:03.0", "0x020000", Some("e1000e"), Some(8));
        // A stand-in whose numbers are VFIO's here: it is there on every machine.
        fake.character("1:3", "devices/virtual/vfio/12");
        let cdi = tempfile::tempdir().unwrap();
        let file = r#"{"kind": "v.com/gpu", "devices": [
            {"name": "0", "containerEdits": {"deviceNodes": [{"path": "/dev/null"}]}},
            {"name": "none", "containerEdits": {"deviceNodes": [{"path": "/dev/zero"}, {"path": "/etc/passwd"}]}}]}"#;
        fs::write(cdi.path().join("a.json"), file).unwrap();
        let names = Names::of(&[cdi.path()]);
        let all = [
            "v.com/gpu=0",
            "v.com/nvme=0000:00:02.0",
            "v.com/again=0000:00:02.0",
            "v.com/gpu=none",
            "v.com/nic=0000:00:03.0",
            "v.com/fpga=7",
            "v.com/odd=../0000:00:02",
        ];
        let meant = fake.node.meant(&all.map(assigned), &names);
        let main = || "main".to_owned();
        assert_eq!(
            meant.groups,
            [(12, Way::Groups, main()), (7, Way::Groups, main())]
        );
        assert_eq!(meant.others.len(), 4, "{:?}", meant.others);
        assert!(meant.others[0].contains("v.com/gpu=none names no device of VFIO"));
        assert!(meant.others[1].contains("v.com/nic=0000:00:03.0"));
    }
}
