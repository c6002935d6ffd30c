//! What size a pod's VM should have: what its containers may use, and what the guest needs beside it
//! (docs/overhead.md). A pod says it before it starts, by the sum of its containers' limits; what counts
//! later are the containers themselves, as they come and as their limits change, within what the pod's cgroup on the node
//! lets it have.
//!
//! Who wants more notes it in the books first and then has the VM grow to all that is noted; who wants less, or has gone, has
//! it shrink to that. So whoever comes last has reckoned with all the others.

mod above;
mod wishes;

use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use slog::{Logger, warn};

use crate::asked::config::{Config, MAX_VCPUS, MIB};
use crate::asked::spec::Limits;
use crate::error::Result;
use crate::guest::vm::Vm;
use crate::node::cgroup::Bounds;
use crate::node::templates::Machine;
use above::{Above, within};
use wishes::{Before, Wishes};

/// Guest memory on top of what the containers may use, for kernel and agent, in bytes (docs/overhead.md).
const GUEST_OVERHEAD: u64 = 64 * MIB;
/// What the agent keeps free of huge pages (`agent/src/huge_pages.rs`), and what the guest's kernel holds already.
const BESIDE_HUGE_PAGES: u64 = 160 * MIB;
/// The guest's kernel describes each page of 4096 bytes with 64 bytes.
const PAGE_DESCRIPTORS: u64 = 64;

/// The size of one pod. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct PodSize(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    /// The handler's memory in bytes.
    memory: u64,
    /// The handler's CPUs.
    vcpus: u8,
    above: Above,
    wishes: Mutex<Wishes>,
    /// Held over a change of a container's limits, one after another, and while the VM gives back what none of them needs:
    /// what a limit allows is there until the limit is a lower one.
    updating: tokio::sync::Mutex<()>,
}

/// What a VM should have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Needed {
    memory: u64,
    cpus: u8,
}

/// A container's new limits, as they are in the books.
struct Change {
    limits: Limits,
    /// What was needed before.
    had: Needed,
    needs: Needed,
    /// What it would need by itself.
    own: Needed,
    before: Before,
}

impl PodSize {
    /// That of a pod of a handler whose VMs have this at least, which says it wants `declared`, in this cgroup. Blocking.
    #[must_use]
    pub fn new(memory: u64, vcpus: u8, declared: Limits, cgroups_path: Option<String>) -> Self {
        let (above, bounds) = Above::of(cgroups_path, &declared);
        Self(Arc::new(Inner {
            memory,
            vcpus,
            above,
            wishes: Mutex::new(Wishes::new(declared, bounds)),
            updating: tokio::sync::Mutex::default(),
        }))
    }

    fn wishes(&self) -> MutexGuard<'_, Wishes> {
        self.0.wishes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a VM of these limits has, whatever it may have.
    fn needed_by(&self, limits: &Limits) -> Needed {
        Needed {
            memory: guest_memory(limits, self.0.memory, u64::MAX),
            cpus: guest_cpus(limits, self.0.vcpus, MAX_VCPUS),
        }
    }

    /// What all need that are in the books.
    fn needed(&self) -> Needed {
        let limits = self.wishes().limits();
        self.needed_by(&limits)
    }

    /// A container is about to be made: the VM gets the size that the pod needs with it, as far as that can be had. A
    /// limit is no reservation, and one beyond the VM's size is none, as it is for runc beyond the node's.
    pub async fn admit(&self, id: &str, limits: Limits, vm: &Arc<Vm>, logger: &Logger) {
        let said = {
            let mut wishes = self.wishes();
            wishes.add(id, limits);
            self.needed_by(&wishes.said())
        };
        if vm.has(said.memory, said.cpus).await {
            return;
        }
        // To its end even when the creation is abandoned: half of it would be in nobody's books.
        let (size, id) = (self.clone(), id.to_owned());
        let (vm, logger) = (Arc::clone(vm), logger.clone());
        let growing = tokio::spawn(async move {
            let bounds = size.0.above.bounds().await;
            size.wishes().bound(bounds);
            let needed = size.needed();
            let memory = needed.memory.min(vm.most_memory());
            let memory = vm.grow_as_far_as_it_takes(memory, &logger).await;
            let cpus = vm.add_cpus(needed.cpus.min(vm.most_cpus()), &logger).await;
            for error in [memory.err(), cpus.err()].into_iter().flatten() {
                warn!(logger, "the VM stays smaller than what its containers may use"; "container" => &id,
                    "needed_mib" => needed.memory / MIB, "memory_mib" => vm.memory() / MIB,
                    "needed_vcpus" => needed.cpus, "vcpus" => vm.cpus(), "reason" => error.message);
            }
        });
        let _ = growing.await;
    }

    /// The container has gone. Its memory has gone back with its pages; the VM's size stays, for the next one.
    pub fn gone(&self, id: &str) {
        self.wishes().remove(id);
    }

    /// Changes the limits of a container: `resources` is OCI's `LinuxResources` as JSON, and `apply` gives them to the
    /// guest. The VM grows before that, or shrinks after it.
    ///
    /// # Errors
    /// `InvalidArgument` for what is not JSON; why the VM cannot be what the pod needs, with the numbers; what `apply`
    /// says. The limits and the VM's size are the old ones then.
    pub async fn update(
        &self,
        id: &str,
        resources: &[u8],
        vm: &Arc<Vm>,
        logger: &Logger,
        apply: impl Future<Output = Result<()>>,
    ) -> Result<()> {
        let _updating = self.0.updating.lock().await;
        let bounds = self.0.above.bounds().await;
        let Some(change) = self.note(id, resources, bounds)? else {
            // It has just gone, and needs nothing.
            return apply.await;
        };
        let mut applied = self.make_room(id, &change, vm, logger).await;
        if applied.is_ok() {
            applied = apply.await;
        }
        if applied.is_err() {
            self.wishes().undo(change.before);
        }
        // Nobody waits for what a guest gives back.
        let (size, vm, logger) = (self.clone(), Arc::clone(vm), logger.clone());
        tokio::spawn(async move {
            let _updating = size.0.updating.lock().await;
            let bounds = size.0.above.bounds().await;
            size.wishes().lower(bounds);
            vm.take_cpus(|| size.needed().cpus, &logger).await;
            vm.shrink(|| size.needed().memory, &logger).await;
        });
        applied
    }

    /// Enters what a container is to have, if it is there, in a pod that may use this.
    fn note(&self, id: &str, resources: &[u8], bounds: Bounds) -> Result<Option<Change>> {
        let mut wishes = self.wishes();
        let old = wishes.of(id).unwrap_or_default();
        let limits = old.changed_by(resources)?;
        let had = self.needed_by(&wishes.limits());
        let Some(before) = wishes.change(id, limits, bounds) else {
            return Ok(None);
        };
        Ok(Some(Change {
            limits,
            had,
            needs: self.needed_by(&wishes.limits()),
            own: self.needed_by(&within(limits, &bounds)),
            before,
        }))
    }

    /// Has the VM grow for a change. One that wants no more than it had is not refused for what it had; one that goes beyond
    /// what the VM may have is, unless others have gone beyond it before and this one alone would not.
    async fn make_room(
        &self,
        id: &str,
        change: &Change,
        vm: &Arc<Vm>,
        logger: &Logger,
    ) -> Result<()> {
        let Change {
            had, needs, own, ..
        } = change;
        if needs.memory > had.memory {
            let most = vm.most_memory();
            let to_blame = had.memory <= most || own.memory > most;
            let possible = if to_blame { u64::MAX } else { most };
            vm.grow(needs.memory.min(possible), logger).await?;
        }
        if needs.cpus <= had.cpus {
            return Ok(());
        }
        if !vm.has_spare_cpus() {
            // As on a node: a limit beyond its CPUs holds, and adds none.
            warn!(logger, "what a container may use of CPUs is beyond the VM's, to which max_vcpus lets none be added";
                "container" => id, "needed_vcpus" => needs.cpus, "vcpus" => vm.cpus());
            return Ok(());
        }
        let most = vm.most_cpus();
        // A request is a weight, which any number of CPUs can give.
        let limited = change.limits.cpu_millis.limit.is_some();
        let to_blame = limited && (had.cpus <= most || own.cpus > most);
        let possible = if to_blame { MAX_VCPUS } else { most };
        vm.add_cpus(needs.cpus.min(possible), logger).await
    }
}

/// Guest memory in bytes for a pod whose containers may use `limits`: never less
/// than the handler's, because a container without a limit is not counted in it, and never more than the
/// node's.
pub(super) fn guest_memory(limits: &Limits, configured: u64, node: u64) -> u64 {
    let wanted = limits
        .memory
        .map_or(0, |limit| described(limit).saturating_add(GUEST_OVERHEAD));
    let beside = if limits.huge_pages == 0 {
        0
    } else {
        BESIDE_HUGE_PAGES
    };
    let beside = configured.max(wanted).max(beside);
    let wanted = beside.saturating_add(described(limits.huge_pages));
    configured.max(wanted.min(node))
}

/// With the descriptors of its pages: of all the guest's memory they are one part in 64, so 63 remain.
fn described(memory: u64) -> u64 {
    memory.saturating_add(memory.div_ceil(PAGE_DESCRIPTORS - 1))
}

/// Guest CPUs for a pod whose containers may use `limits`: never fewer than the handler's, never more
/// than `most`.
pub(super) fn guest_cpus(limits: &Limits, configured: u8, most: u8) -> u8 {
    let wanted = limits.cpu_millis.wanted().map_or(0, |millis| {
        u8::try_from(millis.div_ceil(1000)).unwrap_or(MAX_VCPUS)
    });
    configured.max(wanted.min(most))
}

/// CPUs of the node: more than it has are no use to a VM.
pub(super) fn node_cpus() -> u8 {
    let node = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    u8::try_from(node).unwrap_or(MAX_VCPUS).min(MAX_VCPUS)
}

/// The machine of a handler's template.
#[must_use]
pub fn template_machine(config: &Config) -> Machine {
    Machine {
        memory: config.memory,
        max_memory: most_memory(config, config.memory),
        most_cpus: config.vcpus.max(config.max_vcpus),
    }
}

/// As much as a VM of `memory` bytes may grow to: the handler's bound, and no more than the node has.
pub(super) fn most_memory(config: &Config, memory: u64) -> u64 {
    config.max_memory.min(node_memory()).max(memory)
}

/// The node's memory in bytes: more than it has is no use to a VM.
pub(super) fn node_memory() -> u64 {
    let info = nix::sys::sysinfo::sysinfo();
    info.map_or(u64::MAX, |info| info.ram_total())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::asked::spec::CpuMillis;

    fn limits(memory: Option<u64>, huge_pages: u64) -> Limits {
        Limits {
            memory,
            huge_pages,
            ..Limits::default()
        }
    }

    #[test]
    fn a_pods_limits_make_its_vm_larger_but_never_smaller_than_the_handlers() {
        let (default, node) = (256 * MIB, 4096 * MIB);
        for (limit, expected) in [
            (None, 256),
            (Some(16 * MIB), 256),
            (Some(63 * MIB), 256),
            (Some(1008 * MIB), 1008 + 16 + 64),
            (Some(3024 * MIB), 3024 + 48 + 64),
            (Some(u64::MAX), 4096),
        ] {
            assert_eq!(
                guest_memory(&limits(limit, 0), default, node),
                expected * MIB
            );
        }
        for (limit, huge_pages, expected) in [
            (None, 126, 256 + 128),
            (Some(3024 * MIB), 126, 3024 + 48 + 64 + 128),
            (None, u64::MAX >> 20, 4096),
        ] {
            let limits = limits(limit, huge_pages * MIB);
            assert_eq!(guest_memory(&limits, default, node), expected * MIB);
        }
        assert_eq!(
            guest_memory(&limits(None, 63 * MIB), 64 * MIB, node),
            (160 + 64) * MIB
        );
        let cpus = |limit| Limits {
            cpu_millis: CpuMillis {
                limit,
                request: None,
            },
            ..Limits::default()
        };
        assert_eq!(guest_cpus(&cpus(None), 1, 8), 1);
        assert_eq!(guest_cpus(&cpus(Some(1)), 2, 8), 2);
        assert_eq!(guest_cpus(&cpus(Some(2001)), 2, 8), 3);
        assert_eq!(guest_cpus(&cpus(Some(u64::MAX)), 1, 8), 8);
        assert_eq!(guest_cpus(&cpus(Some(u64::MAX)), 16, 8), 16);
    }

    #[test]
    fn a_vm_is_not_larger_than_what_the_pods_cgroup_lets_it_use() {
        let one = Limits {
            cpu_millis: CpuMillis::new(200_000, 100_000, 0),
            ..limits(Some(300 * MIB), 0)
        };
        let bounds = Bounds {
            memory: Some(300 * MIB),
            cpu_millis: Some(2000),
        };
        let size = PodSize::new(256 * MIB, 1, one, None);
        for id in ["a", "b", "c"] {
            size.wishes().add(id, one);
        }
        assert!(size.needed().memory > 900 * MIB && size.needed().cpus == 6);
        size.wishes().bound(bounds);
        let whole = Needed {
            memory: guest_memory(&limits(Some(300 * MIB), 0), 256 * MIB, u64::MAX),
            cpus: 2,
        };
        assert_eq!(size.needed(), whole);
        // One that may use more than the pod needs no more.
        let resources = br#"{"memory":{"limit":325058560}}"#;
        let change = size.note("a", resources, bounds).unwrap().unwrap();
        assert_eq!((change.had, change.needs), (whole, whole));
        // Kubelet raises the pod's cgroup before the limit, and the VM grows with that alone.
        let raised = Bounds {
            memory: Some(310 * MIB),
            ..bounds
        };
        let change = size.note("a", resources, raised).unwrap().unwrap();
        assert!(change.had == whole && change.needs.memory > whole.memory);
        // It does not bound what the handler has.
        size.wishes().lower(Bounds {
            memory: Some(MIB),
            cpu_millis: Some(1),
        });
        let least = size.needed();
        assert_eq!((least.memory, least.cpus), (256 * MIB, 1));
    }

    #[test]
    fn a_vm_may_grow_as_far_as_the_handler_says_and_the_node_has() {
        let mut config = Config::installed();
        assert_eq!(most_memory(&config, 256 * MIB), node_memory());
        config.max_memory = 512 * MIB;
        assert_eq!(most_memory(&config, 256 * MIB), 512 * MIB);
        assert_eq!(most_memory(&config, 1024 * MIB), 1024 * MIB);
    }
}
