//! What of a container's resources is about the node, where its VMM works for it: the node's block devices, CPUs and NUMA
//! nodes (runtime-spec config-linux.md, "blockIO" and "cpu").
//!
//! Trusted: containerd, who wrote it.

use std::collections::BTreeSet;
use std::fmt;

use super::resources::{Cpu, Resources, parsed};
use super::throttles::{BlockIo, Throttles};
use crate::error::{Error, Result};

/// The highest number that a list may have: beyond any kernel's CPUs and nodes.
const MAX_NUMBER: u32 = 65_535;

/// What a container asks for on the node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OnNode {
    /// Limits of block devices.
    pub throttles: Throttles,
    /// CPUs that it may run on, if only on some.
    pub cpus: Option<NumberList>,
    /// Nodes that it may have memory of, if only of some.
    pub mems: Option<NumberList>,
}

impl OnNode {
    pub(super) fn of(resources: &Resources) -> Result<Self> {
        let (no_limits, no_cpu) = (BlockIo::default(), Cpu::default());
        let cpu = resources.cpu.as_ref().unwrap_or(&no_cpu);
        Ok(Self {
            throttles: resources
                .block_io
                .as_ref()
                .unwrap_or(&no_limits)
                .throttles()?,
            cpus: numbers("cpus", cpu.cpus.as_deref())?,
            mems: numbers("mems", cpu.mems.as_deref())?,
        })
    }

    /// What a change says of it: `resources` is OCI's `LinuxResources` as JSON.
    ///
    /// # Errors
    /// `InvalidArgument`.
    pub fn changed(resources: &[u8]) -> Result<Self> {
        Self::of(&parsed(resources)?)
    }

    /// Whether nothing is said.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.throttles.is_empty() && self.cpus.is_none() && self.mems.is_none()
    }

    /// Takes over what a `change` names.
    pub fn take(&mut self, change: Self) {
        self.throttles.extend(change.throttles);
        self.cpus = change.cpus.or_else(|| self.cpus.take());
        self.mems = change.mems.or_else(|| self.mems.take());
    }
}

fn numbers(field: &str, list: Option<&str>) -> Result<Option<NumberList>> {
    // An empty one says nothing, as to runc.
    let list = list.map(str::trim).filter(|list| !list.is_empty());
    let read = |list| {
        NumberList::parse(list).ok_or_else(|| {
            Error::invalid(format!(
                "linux.resources.cpu.{field} = {list:?} is no list of numbers such as 0-3,8"
            ))
        })
    };
    list.map(read).transpose()
}

/// Numbers of CPUs or of NUMA nodes, at least one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NumberList(BTreeSet<u32>);

impl NumberList {
    /// From the kernel's notation: `0-3,8`, and `0-7:2/4`, which is the first two of each four.
    #[must_use]
    pub fn parse(list: &str) -> Option<Self> {
        let mut all = BTreeSet::new();
        for part in list.split([',', ' ']).filter(|part| !part.is_empty()) {
            let number = |text: &str| -> Option<u32> {
                let number = text.parse().ok()?;
                (number <= MAX_NUMBER).then_some(number)
            };
            let (range, stride) = part.split_once(':').unwrap_or((part, "1/1"));
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            let (used, group) = stride.split_once('/')?;
            let (first, last) = (number(first)?, number(last)?);
            let (used, group) = (number(used)?, number(group)?);
            if first > last || used == 0 || used > group {
                return None;
            }
            all.extend((first..=last).filter(|it| (it - first) % group < used));
        }
        (!all.is_empty()).then_some(Self(all))
    }

    /// These and those.
    #[must_use]
    pub fn and(mut self, others: &Self) -> Self {
        self.0.extend(&others.0);
        self
    }
}

/// As the kernel writes it.
impl fmt::Display for NumberList {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut ranges: Vec<(u32, u32)> = Vec::new();
        for &number in &self.0 {
            match ranges.last_mut() {
                Some((_, last)) if *last + 1 == number => *last = number,
                _ => ranges.push((number, number)),
            }
        }
        for (index, (first, last)) in ranges.into_iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            match first == last {
                true => write!(formatter, "{comma}{first}")?,
                false => write!(formatter, "{comma}{first}-{last}")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_and_written_as_the_kernel_does() {
        for (given, expected) in [
            ("0", "0"),
            ("3,1-2", "1-3"),
            ("0-1, 3,5-7", "0-1,3,5-7"),
            ("0-7:2/4", "0-1,4-5"),
            ("1,", "1"),
            ("8191", "8191"),
        ] {
            let read = NumberList::parse(given).unwrap();
            assert_eq!(read.to_string(), expected, "{given}");
        }
        for none in [
            "",
            ",",
            "all",
            "-1",
            "2-1",
            "1-",
            "0-7:0/4",
            "0-7:5/4",
            "0-3:1",
            "65536",
            "0-4294967295",
        ] {
            assert_eq!(NumberList::parse(none), None, "{none}");
        }
        let both = NumberList::parse("0-1")
            .unwrap()
            .and(&NumberList::parse("2,4").unwrap());
        assert_eq!(both.to_string(), "0-2,4");
    }

    #[test]
    fn a_change_takes_over_what_it_names() {
        let text = br#"{"cpu":{"cpus":"0-1","mems":" 0\n"},"blockIO":{"throttleReadBpsDevice":[{"major":8,"minor":0,"rate":1}]}}"#;
        let mut asked = OnNode::changed(text).unwrap();
        assert!(!asked.is_empty());
        let before = asked.clone();
        for nothing in ["{}", r#"{"cpu":null}"#, r#"{"cpu":{"cpus":"","shares":5}}"#] {
            let nothing = OnNode::changed(nothing.as_bytes()).unwrap();
            assert!(nothing.is_empty());
            asked.take(nothing);
        }
        assert_eq!(asked, before);
        asked.take(OnNode::changed(br#"{"cpu":{"cpus":"3"}}"#).unwrap());
        let told = |list: &Option<NumberList>| list.as_ref().unwrap().to_string();
        assert_eq!(
            (told(&asked.cpus), told(&asked.mems)),
            ("3".into(), "0".into())
        );
        assert_eq!(asked.throttles, before.throttles);
        let error = OnNode::changed(br#"{"cpu":{"cpus":"0-x"}}"#).unwrap_err();
        assert!(error.message.contains("cpu.cpus = \"0-x\""), "{error}");
        assert_eq!(error.kind, crate::error::Kind::InvalidArgument);
    }
}
