//! Who may use what of a pod's VM: the books that its size is reckoned from.

use std::collections::BTreeMap;

use super::above::{both, within};
use crate::asked::spec::{CpuMillis, Limits};
use crate::node::cgroup::Bounds;

/// Who may use what.
#[derive(Debug, Clone, Default)]
pub(super) struct Wishes {
    /// What the pod said before it started, until a container's limits say otherwise.
    declared: Limits,
    containers: BTreeMap<String, Wish>,
    /// What the pod's cgroup lets all of them use, as far as the VM has grown to that.
    bounds: Bounds,
}

/// One container's.
#[derive(Debug, Clone, Copy, Default)]
struct Wish {
    limits: Limits,
    /// What it was limited to before that limit was taken away: one without a limit is to have no less than it had.
    memory_before: Option<u64>,
    cpus_before: Option<u64>,
}

/// What a change has changed.
#[derive(Debug)]
pub(super) struct Before {
    id: String,
    wish: Wish,
    declared: Limits,
    bounds: Bounds,
}

impl Wish {
    /// What there should be for it.
    fn wanted(&self) -> Limits {
        let cpus = self.limits.cpu_millis;
        Limits {
            memory: self.limits.memory.or(self.memory_before),
            cpu_millis: CpuMillis {
                // More than it was limited to is not asked for by anything but a request.
                limit: cpus.limit.or(cpus.request.max(self.cpus_before)),
                request: None,
            },
            ..self.limits
        }
    }

    /// With other limits.
    fn changed(&self, limits: Limits) -> Self {
        let (memory, cpus) = (self.limits.memory, self.limits.cpu_millis.limit);
        let kept = |now: Option<u64>, old: Option<u64>| if now.is_none() { old } else { None };
        Self {
            limits,
            memory_before: kept(limits.memory, memory.or(self.memory_before)),
            cpus_before: kept(limits.cpu_millis.limit, cpus.or(self.cpus_before)),
        }
    }
}

impl Wishes {
    /// Those of a pod that says it wants this.
    pub(super) fn new(declared: Limits, bounds: Bounds) -> Self {
        Self {
            declared,
            containers: BTreeMap::new(),
            bounds,
        }
    }

    /// All containers may use this much.
    pub(super) fn limits(&self) -> Limits {
        within(self.said(), &self.bounds)
    }

    /// As much as they are told that they may use.
    pub(super) fn said(&self) -> Limits {
        let sum = self
            .containers
            .values()
            .fold(Limits::default(), |sum, wish| sum.and(&wish.wanted()));
        self.declared.or_more(&sum)
    }

    /// What one may use, if it is there.
    pub(super) fn of(&self, id: &str) -> Option<Limits> {
        Some(self.containers.get(id)?.limits)
    }

    /// There is one more.
    pub(super) fn add(&mut self, id: &str, limits: Limits) {
        let wish = Wish {
            limits,
            ..Wish::default()
        };
        self.containers.insert(id.to_owned(), wish);
    }

    /// One has gone.
    pub(super) fn remove(&mut self, id: &str) {
        self.containers.remove(id);
    }

    /// The pod may use this.
    pub(super) fn bound(&mut self, bounds: Bounds) {
        self.bounds = bounds;
    }

    /// It may not use more than this any more. More is for who has the VM grow to say.
    pub(super) fn lower(&mut self, bounds: Bounds) {
        self.bounds = both(self.bounds, bounds);
    }

    /// A container of other limits, if it is there, in a pod that may use this. What the pod said before it started holds no longer where they differ,
    /// unless there is no limit now.
    pub(super) fn change(&mut self, id: &str, limits: Limits, bounds: Bounds) -> Option<Before> {
        let wish = self.containers.get_mut(id)?;
        let before = Before {
            id: id.to_owned(),
            wish: *wish,
            declared: self.declared,
            bounds: self.bounds,
        };
        self.bounds = bounds;
        let old = wish.limits;
        *wish = wish.changed(limits);
        if limits.memory.is_some() && old.memory != limits.memory {
            self.declared.memory = None;
        }
        let (old, new) = (old.cpu_millis, limits.cpu_millis);
        let taken_away = old.limit.is_some() && new.limit.is_none();
        if !taken_away && old.wanted() != new.wanted() {
            self.declared.cpu_millis = CpuMillis::default();
        }
        Some(before)
    }

    /// The change was none. Who has gone meanwhile stays away.
    pub(super) fn undo(&mut self, before: Before) {
        self.declared = before.declared;
        self.bounds = before.bounds;
        if let Some(wish) = self.containers.get_mut(&before.id) {
            *wish = before.wish;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(declared: Limits) -> Wishes {
        Wishes::new(declared, Bounds::default())
    }

    fn change(wishes: &mut Wishes, id: &str, limits: Limits) -> Option<Before> {
        wishes.change(id, limits, Bounds::default())
    }

    fn memory(memory: Option<u64>) -> Limits {
        Limits {
            memory,
            ..Limits::default()
        }
    }

    fn cpus(limit: Option<u64>, request: Option<u64>) -> Limits {
        Limits {
            cpu_millis: CpuMillis { limit, request },
            ..Limits::default()
        }
    }

    fn wanted_cpus(wishes: &Wishes) -> Option<u64> {
        wishes.limits().cpu_millis.wanted()
    }

    #[test]
    fn what_the_pod_said_counts_until_a_containers_limit_says_otherwise() {
        let mut wishes = of(memory(Some(300)));
        wishes.add("a", memory(Some(100)));
        assert_eq!(wishes.limits().memory, Some(300));
        // Of another kind: it says nothing of memory.
        let mut both = memory(Some(100));
        both.cpu_millis.limit = Some(500);
        change(&mut wishes, "a", both).unwrap();
        assert_eq!(wishes.limits().memory, Some(300));
        change(&mut wishes, "a", memory(Some(50))).unwrap();
        assert_eq!(wishes.limits().memory, Some(50));
        wishes.add("b", memory(Some(200)));
        wishes.add("c", memory(None));
        assert_eq!(wishes.limits().memory, Some(250));
        wishes.remove("b");
        assert_eq!(wishes.limits().memory, Some(50));
    }

    #[test]
    fn who_loses_a_limit_keeps_what_it_had_until_it_has_another() {
        let mut wishes = of(memory(Some(900)));
        wishes.add("a", memory(Some(500)));
        wishes.add("b", memory(Some(200)));
        change(&mut wishes, "a", memory(None)).unwrap();
        assert_eq!(wishes.of("a").unwrap().memory, None);
        assert_eq!(wishes.limits().memory, Some(900));
        change(&mut wishes, "b", memory(Some(300))).unwrap();
        assert_eq!(wishes.limits().memory, Some(800));
        // Again, and of something else.
        change(&mut wishes, "a", cpus(None, Some(5))).unwrap();
        assert_eq!(wishes.limits().memory, Some(800));
        change(&mut wishes, "a", memory(Some(100))).unwrap();
        assert_eq!(wishes.limits().memory, Some(400));

        let mut wishes = of(Limits::default());
        wishes.add("a", cpus(Some(3000), Some(500)));
        change(&mut wishes, "a", cpus(None, Some(500))).unwrap();
        assert_eq!(wanted_cpus(&wishes), Some(3000));
        change(&mut wishes, "a", cpus(None, Some(4000))).unwrap();
        assert_eq!(wanted_cpus(&wishes), Some(4000));
        // It was never limited to these.
        change(&mut wishes, "a", cpus(None, Some(600))).unwrap();
        assert_eq!(wanted_cpus(&wishes), Some(3000));
        change(&mut wishes, "a", cpus(Some(1000), Some(600))).unwrap();
        assert_eq!(wanted_cpus(&wishes), Some(1000));
    }

    #[test]
    fn cpus_that_were_asked_for_add_up_with_those_of_limits() {
        let mut wishes = of(cpus(None, Some(4000)));
        assert_eq!(wanted_cpus(&wishes), Some(4000));
        wishes.add("a", cpus(Some(2000), Some(100)));
        wishes.add("b", cpus(None, Some(3000)));
        assert_eq!(wanted_cpus(&wishes), Some(5000));
        change(&mut wishes, "b", cpus(None, Some(1000))).unwrap();
        assert_eq!(wanted_cpus(&wishes), Some(3000));
    }

    #[test]
    fn a_change_that_is_undone_is_none_and_brings_nobody_back() {
        let mut wishes = of(memory(Some(300)));
        wishes.add("a", memory(Some(100)));
        let before = change(&mut wishes, "a", memory(Some(700))).unwrap();
        wishes.add("b", memory(Some(500)));
        assert_eq!(wishes.limits().memory, Some(1200));
        wishes.undo(before);
        assert_eq!(wishes.of("a").unwrap().memory, Some(100));
        assert_eq!(wishes.limits().memory, Some(600));
        let before = change(&mut wishes, "a", memory(Some(700))).unwrap();
        wishes.remove("a");
        wishes.undo(before);
        assert!(wishes.of("a").is_none());
        assert!(change(&mut wishes, "a", memory(Some(1))).is_none());
        assert_eq!(wishes.limits().memory, Some(500));
    }

    #[test]
    fn what_the_pods_cgroup_allows_is_known_as_far_as_the_vm_has_grown_to_it() {
        let bounds = |memory| Bounds {
            memory: Some(memory),
            cpu_millis: None,
        };
        let mut wishes = Wishes::new(memory(Some(400)), bounds(400));
        for id in ["a", "b"] {
            wishes.add(id, memory(Some(400)));
        }
        assert_eq!(
            (wishes.limits().memory, wishes.said().memory),
            (Some(400), Some(800))
        );
        let before = wishes.change("a", memory(Some(500)), bounds(500)).unwrap();
        assert_eq!(wishes.limits().memory, Some(500));
        wishes.undo(before);
        // Whoever asks again has the VM grow again.
        wishes.lower(bounds(500));
        assert_eq!(wishes.limits().memory, Some(400));
        wishes.lower(bounds(300));
        assert_eq!(wishes.limits().memory, Some(300));
        wishes.bound(bounds(700));
        assert_eq!(wishes.limits().memory, Some(700));
    }
}
