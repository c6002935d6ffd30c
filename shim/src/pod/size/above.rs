//! What a pod may use by the cgroup above its own on the node. Containers may be told more than that: kubelet gives each one
//! without a limit that of the whole pod (`spec.resources`), and the sum of these is several times what the node lets the pod
//! have. A VM of that size would fill itself with cache until the node kills it.

use crate::asked::config::MIB;
use crate::asked::spec::Limits;
use crate::node::cgroup::{Bounds, bounds_of_parent};

/// As much of the cgroup's limits as may be for the pod itself and not for its containers (`overhead.podFixed`). A cgroup
/// that has more to spare is not one pod's alone.
const MOST_OVERHEAD: Bounds = Bounds {
    memory: Some(256 * MIB),
    cpu_millis: Some(1000),
};

/// The cgroup above a pod's own.
#[derive(Debug, Default)]
pub(super) struct Above {
    /// That of the pod, as its spec names it.
    cgroups_path: Option<String>,
    /// What the cgroup had beyond what the pod said of its containers: the overhead of its `RuntimeClass`.
    overhead: Bounds,
}

impl Above {
    /// That of a pod which says that its containers may use this, and what they may by it. Blocking.
    pub(super) fn of(cgroups_path: Option<String>, declared: &Limits) -> (Self, Bounds) {
        let bounds = cgroups_path.as_deref().map(bounds_of_parent);
        let bounds = bounds.unwrap_or_default();
        let above = Self {
            overhead: overhead(bounds, declared),
            cgroups_path,
        };
        let bounds = above.of_containers(bounds);
        (above, bounds)
    }

    /// What containers may use by it now.
    pub(super) async fn bounds(&self) -> Bounds {
        let Some(path) = self.cgroups_path.clone() else {
            return Bounds::default();
        };
        let read = tokio::task::spawn_blocking(move || bounds_of_parent(&path));
        // One that cannot be read bounds nothing.
        self.of_containers(read.await.unwrap_or_default())
    }

    fn of_containers(&self, bounds: Bounds) -> Bounds {
        let less = |bound: Option<u64>, overhead: Option<u64>| {
            Some(bound?.saturating_sub(overhead.unwrap_or(0)))
        };
        Bounds {
            memory: less(bounds.memory, self.overhead.memory),
            cpu_millis: less(bounds.cpu_millis, self.overhead.cpu_millis),
        }
    }
}

fn overhead(bounds: Bounds, declared: &Limits) -> Bounds {
    let beyond = |bound: Option<u64>, declared: Option<u64>, most: Option<u64>| {
        let beyond = bound?.saturating_sub(declared?);
        Some(beyond.min(most.unwrap_or(u64::MAX)))
    };
    Bounds {
        memory: beyond(bounds.memory, declared.memory, MOST_OVERHEAD.memory),
        cpu_millis: beyond(
            bounds.cpu_millis,
            declared.cpu_millis.limit,
            MOST_OVERHEAD.cpu_millis,
        ),
    }
}

/// The lower of each.
pub(super) fn both(one: Bounds, other: Bounds) -> Bounds {
    let lower = |one: Option<u64>, other: Option<u64>| match (one, other) {
        (Some(one), Some(other)) => Some(one.min(other)),
        _ => one.or(other),
    };
    Bounds {
        memory: lower(one.memory, other.memory),
        cpu_millis: lower(one.cpu_millis, other.cpu_millis),
    }
}

/// No more than this.
pub(super) fn within(mut limits: Limits, bounds: &Bounds) -> Limits {
    let least =
        |limit: Option<u64>, bound: Option<u64>| Some(limit?.min(bound.unwrap_or(u64::MAX)));
    limits.memory = least(limits.memory, bounds.memory);
    limits.cpu_millis.limit = least(limits.cpu_millis.wanted(), bounds.cpu_millis);
    limits
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::asked::spec::CpuMillis;

    fn limits(memory: u64, cpus: u64) -> Limits {
        Limits {
            memory: Some(memory),
            huge_pages: 0,
            cpu_millis: CpuMillis {
                limit: Some(cpus),
                request: None,
            },
            ..Limits::default()
        }
    }

    fn bounds(memory: u64, cpus: u64) -> Bounds {
        Bounds {
            memory: Some(memory),
            cpu_millis: Some(cpus),
        }
    }

    fn above(at_first: Bounds, declared: &Limits) -> Above {
        Above {
            cgroups_path: None,
            overhead: overhead(at_first, declared),
        }
    }

    #[test]
    fn containers_may_use_what_the_pod_may_without_its_overhead() {
        let above = above(bounds((300 + 194) * MIB, 2250), &limits(300 * MIB, 2000));
        let now = above.of_containers(bounds((300 + 194) * MIB, 2250));
        let wanted = within(limits(900 * MIB, 6000), &now);
        assert_eq!(wanted, limits(300 * MIB, 2000));
        // Kubelet raises it before a container's limit.
        let now = above.of_containers(bounds((500 + 194) * MIB, 3250));
        assert_eq!(
            within(limits(500 * MIB, 3000), &now),
            limits(500 * MIB, 3000)
        );
        assert_eq!(within(limits(700 * MIB, 500), &now), limits(500 * MIB, 500));
    }

    #[test]
    fn a_cgroup_of_many_pods_keeps_none_from_growing() {
        let above = above(bounds(64 << 30, 16_000), &limits(300 * MIB, 500));
        let now = above.of_containers(bounds(64 << 30, 16_000));
        let grown = limits(32 << 30, 12_000);
        assert_eq!(within(grown, &now), grown);
    }

    #[test]
    fn without_a_limit_there_is_no_bound_and_with_one_no_wish() {
        let grown = limits(1 << 50, 64_000);
        let unknown = above(Bounds::default(), &Limits::default());
        assert_eq!(
            within(grown, &unknown.of_containers(Bounds::default())),
            grown
        );
        let now = unknown.of_containers(bounds(400 * MIB, 1000));
        assert_eq!(within(grown, &now), limits(400 * MIB, 1000));
        assert_eq!(within(Limits::default(), &now), Limits::default());
    }
}
