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
