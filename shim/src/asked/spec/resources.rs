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
