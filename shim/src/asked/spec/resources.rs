//! What a container may use, as far as its VM must have room for it (runtime-spec config-linux.md,
//! "resources"). The limits themselves are the agent's to apply.
//!
//! Trusted: containerd, who wrote it.

use serde::Deserialize;

/// A larger limit is none.
const UNLIMITED: u64 = 1 << 62;

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Resources {
    memory: Option<Memory>,
    hugepage_limits: Option<Vec<HugePageLimit>>,
    devices: Option<Vec<DeviceRule>>,
}

/// What a container may do with a device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Access {
    /// Read it.
    pub read: bool,
    /// Write to it.
    pub write: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct DeviceRule {
    allow: bool,
    #[serde(rename = "type")]
    kind: Option<String>,
    major: Option<i64>,
    minor: Option<i64>,
    access: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Memory {
    limit: Option<i64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct HugePageLimit {
    page_size: String,
    limit: u64,
}

impl Resources {
    /// The last rule allows everything: containerd's way to say that a container is privileged.
    pub(super) fn allow_all_devices(&self) -> bool {
        let any = |number: Option<i64>| number.is_none_or(|number| number < 0);
        let last = self.devices.as_ref().and_then(|rules| rules.last());
        last.is_some_and(|rule| {
            let access = rule.access.as_deref().unwrap_or_default();
            rule.allow
                && matches!(rule.kind.as_deref(), None | Some("" | "a"))
                && any(rule.major)
                && any(rule.minor)
                && "rwm".chars().all(|one| access.contains(one))
        })
    }

    /// What the rules let a container do with a block device of the node: the last rule that matches counts, and
    /// without one nothing is allowed.
    pub(super) fn block_access(&self, (major, minor): (u32, u32)) -> Access {
        let covers = |rule: Option<i64>, number: u32| {
            rule.is_none_or(|rule| rule < 0 || rule == i64::from(number))
        };
        let allows = |letter: char| {
            let matching = self.devices.iter().flatten().rev().find(|rule| {
                let access = rule.access.as_deref().unwrap_or_default();
                matches!(rule.kind.as_deref(), None | Some("" | "a" | "b"))
                    && covers(rule.major, major)
                    && covers(rule.minor, minor)
                    && (access.is_empty() || access.contains(letter))
            });
            matching.is_some_and(|rule| rule.allow)
        };
        Access {
            read: allows('r'),
            write: allows('w'),
        }
    }

    /// In bytes, if there is one.
    pub(super) fn memory_limit(&self) -> Option<u64> {
        let limit = self.memory.as_ref()?.limit?;
        u64::try_from(limit).ok().filter(|&limit| limit > 0)
    }

    /// Of 2 MiB pages, in bytes.
    pub(super) fn huge_pages(&self) -> u64 {
        let mut limits = self.hugepage_limits.iter().flatten().rev();
        let limit = limits.find(|limit| limit.page_size == "2MB" && limit.limit < UNLIMITED);
        limit.map_or(0, |limit| limit.limit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_rule_that_matches_says_what_may_be_done_with_a_block_device() {
        let access = |rules: &str, numbers| {
            let parsed: Resources = serde_json::from_str(rules).unwrap();
            let Access { read, write } = parsed.block_access(numbers);
            (read, write)
        };
        let rules = r#"{"devices":[{"allow":false,"access":"rwm"},
            {"allow":true,"type":"b","major":7,"minor":0,"access":"rwm"},
            {"allow":true,"type":"b","major":7,"minor":1,"access":"r"},
            {"allow":true,"type":"c","major":7,"minor":2,"access":"rw"},
            {"allow":true,"type":"b","major":8,"minor":-1},
            {"allow":false,"type":"b","major":8,"minor":3,"access":"w"}]}"#;
        for (numbers, wanted) in [
            ((7, 0), (true, true)),
            ((7, 1), (true, false)),
            ((7, 2), (false, false)),
            ((8, 1), (true, true)),
            ((8, 3), (true, false)),
        ] {
            assert_eq!(access(rules, numbers), wanted, "{numbers:?}");
        }
        assert_eq!(access("{}", (7, 0)), (false, false));
        let all = r#"{"devices":[{"allow":true,"access":"rwm"}]}"#;
        assert_eq!(access(all, (7, 0)), (true, true));
    }

    #[test]
    fn limits_are_what_is_above_nothing() {
        let parse = |text: &str| -> Resources { serde_json::from_str(text).unwrap() };
        for text in ["{}", r#"{"memory":null}"#, r#"{"memory":{"limit":-1}}"#] {
            assert_eq!(parse(text).memory_limit(), None, "{text}");
        }
        let none = r#"{"hugepageLimits":[{"pageSize":"2MB","limit":9223372036854775807}]}"#;
        assert_eq!(parse(none).huge_pages(), 0);
        let both = parse(
            r#"{"memory":{"limit":5},"hugepageLimits":[{"pageSize":"1GB","limit":0},
            {"pageSize":"2MB","limit":4194304}]}"#,
        );
        assert_eq!((both.memory_limit(), both.huge_pages()), (Some(5), 4 << 20));
    }
}
