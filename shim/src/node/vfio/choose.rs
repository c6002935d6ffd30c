//! Which devices of the node a handler's list means: those at an address, and the first free ones of a kind. Blocking.
//!
//! Another pod may take one at any moment; to open a group is to have it, so that is how it is found out.

use std::collections::BTreeSet;
use std::fs;

use super::open::{Group, Space};
use super::{Node, Way, target};
use crate::asked::config::Wish;
use crate::error::{Error, Kind, Result};

/// Groups that are open, in the address space that they share.
#[derive(Debug)]
pub struct Opened {
    /// That one.
    pub space: Space,
    /// By their numbers.
    pub groups: Vec<(u32, Group)>,
    /// Those of the handler's list.
    pub for_all: BTreeSet<u32>,
}

impl Node {
    /// Opens the groups of all devices of a list, and those that kubelet has assigned to a container each.
    ///
    /// # Errors
    /// One sentence: the entry that cannot be had, and why no device that it means can be; or what was assigned.
    pub fn open_all(&self, wishes: &[Wish], assigned: &[(u32, Way, String)]) -> Result<Opened> {
        let wanted = assigned.first().map_or(Way::Groups, |(_, way, _)| *way);
        let space = self.space(self.way(wanted))?;
        let mut opened = Opened {
            space,
            groups: Vec::new(),
            for_all: BTreeSet::new(),
        };
        let mut used = BTreeSet::new();
        for wish in wishes {
            let address = self.choose(wish, &used, &mut opened)?;
            used.insert(address);
        }
        opened.for_all = opened.groups.iter().map(|(number, _)| *number).collect();
        for (number, _, container) in assigned {
            if opened.for_all.contains(number) {
                continue;
            }
            let first = opened.groups.is_empty();
            let group = self.open(*number, &opened.space, first).map_err(|error| {
                let what = "a device that kubelet has assigned to container";
                Error::new(error.kind, format!("{what} {container}: {}", error.message))
            })?;
            opened.groups.push((*number, group));
        }
        Ok(opened)
    }

    /// The devices that an entry of a list may mean.
    #[must_use]
    pub fn candidates(&self, wish: &Wish) -> Vec<String> {
        let devices = self.sys.join("bus/pci/devices");
        match wish {
            Wish::At(address) if devices.join(address).exists() => vec![address.clone()],
            Wish::At(_) => Vec::new(),
            Wish::Kind { vendor, device } => {
                let Ok(entries) = fs::read_dir(devices) else {
                    return Vec::new();
                };
                let found = entries.flatten().filter(|entry| {
                    let is = |file: &str, wanted: u16| {
                        let text = fs::read_to_string(entry.path().join(file)).unwrap_or_default();
                        text.trim() == format!("{wanted:#06x}")
                    };
                    is("vendor", *vendor) && is("device", *device)
                });
                let names = found.map(|entry| entry.file_name().to_string_lossy().into_owned());
                let mut names: Vec<_> = names.collect();
                names.sort();
                names
            }
        }
    }

    fn choose(&self, wish: &Wish, used: &BTreeSet<String>, opened: &mut Opened) -> Result<String> {
        let refused = |reason: String| {
            Error::new(
                Kind::FailedPrecondition,
                format!("device {wish} (devices of Brig's configuration): {reason}"),
            )
        };
        let candidates = self.candidates(wish);
        if candidates.is_empty() {
            return Err(refused("this node has none".to_owned()));
        }
        let mut reasons = Vec::new();
        for address in candidates {
            if used.contains(&address) {
                reasons.push(format!("{address} is on the list already"));
                continue;
            }
            match self.take(&address, opened) {
                Ok(()) => return Ok(address),
                Err(error) => reasons.push(error.message),
            }
        }
        Err(refused(reasons.join("; ")))
    }

    /// Opens the group of a device, unless it is open with another one of it.
    fn take(&self, address: &str, opened: &mut Opened) -> Result<()> {
        let device = self.sys.join("bus/pci/devices").join(address);
        self.survey()
            .verdict(&device)
            .map_err(|refusal| Error::new(Kind::FailedPrecondition, refusal.to_string()))?;
        let group = target(&device.join("iommu_group"));
        let number = group.and_then(|group| group.parse().ok());
        let number = number.ok_or_else(|| Error::internal("a group without a number"))?;
        if opened.groups.iter().any(|(other, _)| *other == number) {
            return Ok(());
        }
        let first = opened.groups.is_empty();
        let group = self.open(number, &opened.space, first)?;
        opened.groups.push((number, group));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::Fake;
    use super::*;

    #[test]
    fn an_entry_means_what_is_at_its_address_or_all_of_its_kind() {
        let fake = Fake::new();
        fake.device("0000:00:04.0", "0x030000", None, None);
        fake.device("0000:00:03.0", "0x030000", None, None);
        let candidates = |text: &str| fake.node.candidates(&text.parse().unwrap());
        assert_eq!(candidates("00:04.0"), ["0000:00:04.0"]);
        assert_eq!(candidates("1b36:0010"), ["0000:00:03.0", "0000:00:04.0"]);
        assert!(candidates("1b36:0011").is_empty() && candidates("00:05.0").is_empty());
    }

    #[test]
    fn what_cannot_be_had_is_named_with_the_reason_for_each_device_it_means() {
        let fake = Fake::new();
        fake.device("0000:00:03.0", "0x030000", Some("nvidia"), Some(3));
        fake.device("0000:00:04.0", "0x030000", None, None);
        let null = fs::File::open("/dev/null").unwrap();
        let mut opened = Opened {
            space: Space::Container(null.into()),
            groups: Vec::new(),
            for_all: BTreeSet::new(),
        };
        let mut said = |text: &str, used: &[&str]| {
            let used = used.iter().map(|name| (*name).to_owned()).collect();
            let refused = fake.node.choose(&text.parse().unwrap(), &used, &mut opened);
            refused.unwrap_err().message
        };
        let all = said("1b36:0010", &[]);
        assert!(
            all.contains("the node uses it (nvidia, IOMMU group 3)") && all.contains("no IOMMU"),
            "{all}"
        );
        assert!(said("01:00.0", &[]).contains("this node has none"));
        assert!(said("00:03.0", &["0000:00:03.0"]).contains("on the list already"));
    }
}
