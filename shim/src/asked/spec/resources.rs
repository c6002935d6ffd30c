//! What a container may use, as far as its VM must have room for it (runtime-spec config-linux.md,
//! "resources"). The limits themselves are the agent's to apply.
//!
//! Trusted: containerd, who wrote it.

use serde::Deserialize;

use super::throttles::BlockIo;
use crate::error::{Error, Result};

/// A larger limit is none.
const UNLIMITED: u64 = 1 << 62;
/// Of a quota of CPU time that comes without one, in microseconds.
const DEFAULT_PERIOD: u64 = 100_000;
/// Shares of one CPU, as Kubernetes reckons.
const CPU_SHARES: u64 = 1024;
/// The kernel's least, which kubelet sends for a container that asks for nothing.
const LEAST_SHARES: u64 = 2;

/// What somebody may use.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Of memory, in bytes, if that is limited.
    pub memory: Option<u64>,
    /// Of 2 MiB huge pages beside it, in bytes.
    pub huge_pages: u64,
    /// Of CPUs.
    pub cpu_millis: CpuMillis,
    /// What a limit of CPUs was reckoned from, of one container: a change may name one half of it.
    pub cpu_time: CpuTime,
}

/// CFS's bandwidth, in microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CpuTime {
    /// May be used in each period; none is no limit.
    quota: Option<u64>,
    /// None is the default one.
    period: Option<u64>,
}

/// Thousandths of CPUs. A limit holds. A request is a weight, which counts for the CPUs that there are: kubelet limits
/// nobody who has CPUs for himself, and most who ask for some have no limit either.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CpuMillis {
    /// Time that may be used, as CPUs, if it is limited.
    pub limit: Option<u64>,
    /// What was asked for, if it was.
    pub request: Option<u64>,
}

impl CpuMillis {
    /// Of CFS's quota and period in microseconds, and shares. A quota that is not positive is no limit, and without a
    /// period there is none either.
    #[must_use]
    pub fn new(quota: i64, period: u64, shares: u64) -> Self {
        Self {
            limit: u64::try_from(quota)
                .ok()
                .and_then(|quota| of_quota(quota, period)),
            request: of_shares(shares),
        }
    }

    /// As [`new`](Self::new), of the sums of a pod's containers: a limit that some of them do not have is not in the one,
    /// and more is asked for than that only if there is one without.
    #[must_use]
    pub fn of_pod(quota: i64, period: u64, shares: u64) -> Self {
        let sums = Self::new(quota, period, shares);
        Self {
            limit: sums.limit.filter(|limit| sums.request <= Some(*limit)),
            ..sums
        }
    }

    /// CPUs that there should be.
    #[must_use]
    pub fn wanted(self) -> Option<u64> {
        self.limit.or(self.request)
    }
}

impl CpuTime {
    /// In thousandths of CPUs.
    fn limit(self) -> Option<u64> {
        of_quota(self.quota?, self.period.unwrap_or(DEFAULT_PERIOD))
    }
}

/// Rounded up.
fn of_quota(quota: u64, period: u64) -> Option<u64> {
    (quota > 0 && period > 0).then(|| quota.saturating_mul(1000).div_ceil(period))
}

/// Rounded up, as kubelet rounds the shares down.
fn of_shares(shares: u64) -> Option<u64> {
    (shares > LEAST_SHARES).then(|| shares.saturating_mul(1000).div_ceil(CPU_SHARES))
}

impl Limits {
    /// Both of them together; a limit that one does not have is not counted.
    #[must_use]
    pub fn and(self, other: &Self) -> Self {
        self.merge(other, u64::saturating_add)
    }

    /// The larger of each.
    #[must_use]
    pub fn or_more(self, other: &Self) -> Self {
        self.merge(other, u64::max)
    }

    fn merge(self, other: &Self, with: fn(u64, u64) -> u64) -> Self {
        let either = |one: Option<u64>, other: Option<u64>| match (one, other) {
            (Some(one), Some(other)) => Some(with(one, other)),
            _ => one.or(other),
        };
        Self {
            memory: either(self.memory, other.memory),
            huge_pages: with(self.huge_pages, other.huge_pages),
            // Of one that is limited and one that is not there is no other sum.
            cpu_millis: CpuMillis {
                limit: either(self.cpu_millis.wanted(), other.cpu_millis.wanted()),
                request: None,
            },
            cpu_time: CpuTime::default(),
        }
    }

    /// After a change: `resources` is OCI's `LinuxResources` as JSON, in which what is not named stays.
    ///
    /// # Errors
    /// `InvalidArgument`.
    pub fn changed_by(self, resources: &[u8]) -> Result<Self> {
        let changed = parsed(resources)?;
        let (cpu_millis, cpu_time) = changed.cpus((self.cpu_millis, self.cpu_time));
        Ok(Self {
            memory: changed.memory_limit(self.memory),
            // Those of a running container do not change.
            huge_pages: self.huge_pages,
            cpu_millis,
            cpu_time,
        })
    }
}

pub(super) fn parsed(resources: &[u8]) -> Result<Resources> {
    serde_json::from_slice(resources).map_err(|error| {
        Error::invalid(format!(
            "the resources are not OCI LinuxResources as JSON: {error}"
        ))
    })
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Resources {
    memory: Option<Memory>,
    pub(super) cpu: Option<Cpu>,
    hugepage_limits: Option<Vec<HugePageLimit>>,
    devices: Option<Vec<DeviceRule>>,
    #[serde(rename = "blockIO")]
    pub(super) block_io: Option<BlockIo>,
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
#[serde(default)]
pub(super) struct Cpu {
    quota: Option<i64>,
    period: Option<u64>,
    shares: Option<u64>,
    pub(super) cpus: Option<String>,
    pub(super) mems: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct HugePageLimit {
    page_size: String,
    limit: u64,
}

impl Resources {
    /// The last rule about everything allows it: containerd's way to say that a container is privileged. Rules for
    /// single devices may follow, as of `ctr run --privileged --device`.
    pub(super) fn allow_all_devices(&self) -> bool {
        let any = |number: Option<i64>| number.is_none_or(|number| number < 0);
        let mut rules = self.devices.iter().flatten().rev();
        let last = rules.find(|rule| {
            matches!(rule.kind.as_deref(), None | Some("" | "a"))
                && any(rule.major)
                && any(rule.minor)
        });
        last.is_some_and(|rule| {
            let access = rule.access.as_deref().unwrap_or_default();
            rule.allow && "rwm".chars().all(|one| access.contains(one))
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

    /// What it may use.
    pub(super) fn limits(&self) -> Limits {
        let none = Limits::default();
        let (cpu_millis, cpu_time) = self.cpus((none.cpu_millis, none.cpu_time));
        Limits {
            memory: self.memory_limit(none.memory),
            huge_pages: self.huge_pages(),
            cpu_millis,
            cpu_time,
        }
    }

    /// In bytes, if there is one; `old` if nothing is said of it.
    fn memory_limit(&self, old: Option<u64>) -> Option<u64> {
        match self.memory.as_ref().and_then(|memory| memory.limit) {
            None | Some(0) => old,
            Some(limit) => u64::try_from(limit).ok().filter(|limit| *limit < UNLIMITED),
        }
    }

    /// As [`Self::memory_limit`]. A quota without a period is for the old one, and a period without a quota gives the old
    /// one another length, as with runc.
    fn cpus(&self, (old, old_time): (CpuMillis, CpuTime)) -> (CpuMillis, CpuTime) {
        let Some(cpu) = &self.cpu else {
            return (old, old_time);
        };
        let quota = cpu.quota.filter(|quota| *quota != 0);
        let period = cpu.period.filter(|period| *period > 0);
        let time = CpuTime {
            quota: quota.map_or(old_time.quota, |quota| {
                u64::try_from(quota).ok().filter(|quota| *quota > 0)
            }),
            period: period.or(old_time.period),
        };
        let limit = match quota.is_some() || period.is_some() {
            true => time.limit(),
            false => old.limit,
        };
        let request = match cpu.shares {
            None | Some(0) => old.request,
            Some(shares) => of_shares(shares),
        };
        (CpuMillis { limit, request }, time)
    }

    /// Of 2 MiB pages, in bytes.
    fn huge_pages(&self) -> u64 {
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
    fn everything_is_allowed_by_the_last_rule_about_everything_whatever_it_says_of_single_devices()
    {
        let all = r#"{"allow":true,"access":"rwm"}"#;
        let none = r#"{"allow":false,"access":"rwm"}"#;
        let one = r#"{"allow":true,"type":"b","major":7,"minor":0,"access":"rwm"}"#;
        for (rules, privileged) in [
            (vec![none, all], true),
            (vec![all, one], true),
            (
                vec![
                    all,
                    r#"{"allow":false,"type":"c","major":10,"minor":232,"access":"rwm"}"#,
                ],
                true,
            ),
            (
                vec![r#"{"allow":true,"type":"a","major":-1,"minor":-1,"access":"rwm"}"#],
                true,
            ),
            (vec![], false),
            (vec![none, one], false),
            (vec![all, none], false),
            (vec![all, r#"{"allow":false,"access":"w"}"#], false),
            (vec![r#"{"allow":true,"access":"rw"}"#], false),
            (vec![r#"{"allow":true,"type":"c","access":"rwm"}"#], false),
        ] {
            let text = format!(r#"{{"devices":[{}]}}"#, rules.join(","));
            let parsed: Resources = serde_json::from_str(&text).unwrap();
            assert_eq!(parsed.allow_all_devices(), privileged, "{text}");
        }
    }

    #[test]
    fn limits_are_what_is_above_nothing() {
        let parse = |text: &str| -> Resources { serde_json::from_str(text).unwrap() };
        for text in ["{}", r#"{"memory":null}"#, r#"{"memory":{"limit":-1}}"#] {
            assert_eq!(parse(text).limits().memory, None, "{text}");
        }
        let none = r#"{"hugepageLimits":[{"pageSize":"2MB","limit":9223372036854775807}]}"#;
        assert_eq!(parse(none).huge_pages(), 0);
        let both = parse(
            r#"{"memory":{"limit":5},"hugepageLimits":[{"pageSize":"1GB","limit":0},
            {"pageSize":"2MB","limit":4194304}]}"#,
        );
        let both = both.limits();
        assert_eq!((both.memory, both.huge_pages), (Some(5), 4 << 20));
    }

    #[test]
    fn what_a_change_does_not_name_stays() {
        let before = Limits {
            memory: Some(5),
            huge_pages: 7,
            cpu_millis: CpuMillis {
                limit: Some(250),
                request: Some(100),
            },
            cpu_time: CpuTime {
                quota: Some(25_000),
                period: Some(100_000),
            },
        };
        let after = |text: &str| before.changed_by(text.as_bytes()).unwrap();
        assert_eq!(after("{}"), before);
        assert_eq!(after(r#"{"memory":{"swap":9},"cpu":{"shares":0}}"#), before);
        assert_eq!(after(r#"{"memory":{"limit":0},"cpu":{"quota":0}}"#), before);
        let more = after(r#"{"memory":{"limit":6},"cpu":{"quota":150000,"period":100000}}"#);
        assert_eq!((more.memory, more.cpu_millis.limit), (Some(6), Some(1500)));
        let none = after(r#"{"memory":{"limit":-1},"cpu":{"quota":-1}}"#);
        assert_eq!((none.memory, none.cpu_millis.limit), (None, None));
        assert_eq!(none.cpu_millis.wanted(), Some(100));
        assert_eq!(after(r#"{"cpu":{"quota":1}}"#).cpu_millis.limit, Some(1));
        let asks = after(r#"{"cpu":{"quota":-1,"shares":4096}}"#).cpu_millis;
        assert_eq!((asks.limit, asks.wanted()), (None, Some(4000)));
        let least = after(r#"{"cpu":{"quota":-1,"shares":2}}"#).cpu_millis;
        assert_eq!(least.wanted(), None);
        assert!(before.changed_by(b"{").is_err());
        assert!(before.changed_by(br#"{"memory":{"limit":"x"}}"#).is_err());
    }

    #[test]
    fn a_quota_and_its_period_change_one_without_the_other() {
        let said = |texts: &[&str]| {
            let first: Resources = serde_json::from_str(texts[0]).unwrap();
            let changed = |limits: Limits, text: &&str| limits.changed_by(text.as_bytes()).unwrap();
            let limits = texts[1..].iter().fold(first.limits(), changed);
            limits.cpu_millis.limit
        };
        let both = r#"{"cpu":{"quota":100000,"period":50000}}"#;
        assert_eq!(said(&[both]), Some(2000));
        assert_eq!(said(&[both, r#"{"cpu":{"quota":50000}}"#]), Some(1000));
        assert_eq!(said(&[both, r#"{"cpu":{"period":200000}}"#]), Some(500));
        assert_eq!(said(&[both, r#"{"cpu":{"shares":7}}"#]), Some(2000));
        let none = r#"{"cpu":{"quota":-1}}"#;
        assert_eq!(said(&[both, none]), None);
        assert_eq!(said(&[both, none, r#"{"cpu":{"period":1000}}"#]), None);
        let again = r#"{"cpu":{"quota":50000}}"#;
        assert_eq!(said(&[both, none, again]), Some(1000));
        assert_eq!(said(&[r#"{"cpu":{"period":25000}}"#, again]), Some(2000));
    }

    #[test]
    fn limits_add_up_and_none_adds_nothing() {
        let some = Limits {
            memory: Some(u64::MAX),
            huge_pages: 1,
            ..Limits::default()
        };
        let sum = some.and(&some).and(&Limits::default());
        assert_eq!(
            (sum.memory, sum.huge_pages, sum.cpu_millis.wanted()),
            (Some(u64::MAX), 2, None)
        );
        let limit = |quota, period| CpuMillis::new(quota, period, 0).wanted();
        assert_eq!(limit(150_000, 100_000), Some(1500));
        assert_eq!(limit(1, 100_000), Some(1));
        assert_eq!((limit(-1, 1), limit(1, 0)), (None, None));
    }

    #[test]
    fn what_is_asked_for_counts_where_nothing_limits() {
        let wanted = |quota, shares| CpuMillis::new(quota, 100_000, shares).wanted();
        // Kubelet's shares of 1, 250, 999, 1001 and 4000 thousandths.
        for (shares, millis) in [
            (2, None),
            (256, Some(250)),
            (1022, Some(999)),
            (1025, Some(1001)),
            (4096, Some(4000)),
        ] {
            assert_eq!(wanted(-1, shares), millis, "{shares}");
            assert_eq!(wanted(0, shares), millis, "{shares}");
        }
        assert_eq!(wanted(50_000, 4096), Some(500));
        let limits = |quota, shares| Limits {
            cpu_millis: CpuMillis::new(quota, 100_000, shares),
            ..Limits::default()
        };
        let sum = limits(400_000, 102).and(&limits(-1, 2048));
        assert_eq!(sum.cpu_millis.wanted(), Some(6000));
    }

    #[test]
    fn a_pod_in_which_one_is_not_limited_has_what_is_asked_for() {
        let wanted = |quota, shares| CpuMillis::of_pod(quota, 100_000, shares).wanted();
        // A sidecar limited to half a CPU that asks for a tenth, beside one that asks for four.
        assert_eq!(wanted(50_000, 4198), Some(4100));
        assert_eq!(wanted(450_000, 4198), Some(4500));
        assert_eq!(wanted(50_000, 2), Some(500));
        assert_eq!((wanted(-1, 2), wanted(-1, 4096)), (None, Some(4000)));
        // One that is limited to what it asks for is limited.
        for millis in 2..5000 {
            let all = CpuMillis::of_pod(millis * 100, 100_000, millis.unsigned_abs() * 1024 / 1000);
            assert_eq!(all.limit, Some(millis.unsigned_abs()));
        }
    }
}
