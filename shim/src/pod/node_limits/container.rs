//! What each container asks for on the node, and what all of a pod amount to.

use std::collections::BTreeSet;

use crate::asked::spec::{NumberList, OnNode, Throttled, Throttles};
use crate::node::disk::Numbers;

/// One container.
#[derive(Debug, Clone, Default)]
pub(super) struct Container {
    /// The node's devices that it has in the guest: there limits of them are the agent's to apply.
    pub(super) disks: BTreeSet<Numbers>,
    pub(super) asked: OnNode,
}

impl Container {
    /// Limits that are the node's to apply.
    fn throttles(&self) -> impl Iterator<Item = (&(Numbers, Throttled), &u64)> {
        let throttles = self.asked.throttles.iter();
        throttles.filter(|((numbers, _), rate)| **rate > 0 && !self.disks.contains(numbers))
    }
}

/// All containers of a pod together.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Wanted {
    /// As much as those that have a limit may together.
    pub(super) throttles: Throttles,
    /// Those that any of them may run on; `None` as soon as one may run on all.
    pub(super) cpus: Option<NumberList>,
    /// As the CPUs.
    pub(super) mems: Option<NumberList>,
    /// There is nobody: a pod between two containers.
    pub(super) nobody: bool,
}

impl Wanted {
    pub(super) fn by<'a>(containers: impl Iterator<Item = &'a Container> + Clone) -> Self {
        let mut throttles = Throttles::new();
        for container in containers.clone() {
            for (what, rate) in container.throttles() {
                let sum = throttles.entry(*what).or_default();
                *sum = rate.saturating_add(*sum);
            }
        }
        Self {
            throttles,
            cpus: union(containers.clone().map(|it| it.asked.cpus.as_ref())),
            mems: union(containers.clone().map(|it| it.asked.mems.as_ref())),
            nobody: containers.count() == 0,
        }
    }

    pub(super) fn is_nothing(&self) -> bool {
        self.throttles.is_empty() && self.cpus.is_none() && self.mems.is_none()
    }
}

/// None of none.
fn union<'a>(lists: impl Iterator<Item = Option<&'a NumberList>>) -> Option<NumberList> {
    let lists: Option<Vec<&NumberList>> = lists.collect();
    lists?.into_iter().cloned().reduce(|all, one| all.and(&one))
}
