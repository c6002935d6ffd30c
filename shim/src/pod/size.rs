//! What size a pod's VM should have: what its containers may use, and what the guest needs beside it
//! (docs/overhead.md). A pod says it before it starts, by the sum of its containers' limits; what counts
//! later are the containers themselves, as they come and as their limits change.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use slog::{Logger, warn};

use crate::asked::config::{Config, MAX_VCPUS, MIB};
use crate::asked::spec::Limits;
use crate::error::Result;
use crate::guest::vm::Vm;
use crate::node::templates::Machine;

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
    wishes: Mutex<Wishes>,
    /// Held over a change of a container's limits: one after another.
    changing: tokio::sync::Mutex<()>,
}

/// Who may use what.
#[derive(Debug, Clone, Default)]
struct Wishes {
    /// What the pod said before it started, until a container's limits say otherwise.
    declared: Limits,
    containers: BTreeMap<String, Limits>,
}

impl Wishes {
    /// All containers may use this much.
    fn limits(&self) -> Limits {
        let sum = self
            .containers
            .values()
            .fold(Limits::default(), Limits::and);
        self.declared.or_more(&sum)
    }

    /// A container of other limits. What the pod said before it started holds no longer where they differ.
    fn change(&mut self, id: &str, limits: Limits) {
        let old = self
            .containers
            .insert(id.to_owned(), limits)
            .unwrap_or_default();
        if old.memory != limits.memory {
            self.declared.memory = None;
        }
        if old.cpu_millis != limits.cpu_millis {
            self.declared.cpu_millis = None;
        }
    }
}

/// What a VM should have.
#[derive(Debug, Clone, Copy)]
struct Needed {
    memory: u64,
    cpus: u8,
}

impl PodSize {
    /// That of a pod of a handler whose VMs have this at least, which says it wants `declared`.
    #[must_use]
    pub fn new(memory: u64, vcpus: u8, declared: Limits) -> Self {
        let wishes = Wishes {
            declared,
            ..Wishes::default()
        };
        Self(Arc::new(Inner {
            memory,
            vcpus,
            wishes: Mutex::new(wishes),
            changing: tokio::sync::Mutex::default(),
        }))
    }

    fn wishes(&self) -> MutexGuard<'_, Wishes> {
        self.0.wishes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a VM of these wishes has, whatever it may have.
    fn needed(&self, wishes: &Wishes) -> Needed {
        let limits = wishes.limits();
        Needed {
            memory: guest_memory(&limits, self.0.memory, u64::MAX),
            cpus: guest_cpus(&limits, self.0.vcpus, MAX_VCPUS),
        }
    }

    /// A container is about to be made: the VM gets the size that the pod needs with it, as far as that can be had. A
    /// limit is no reservation, and one beyond the VM's size is none, as it is for runc beyond the node's.
    pub async fn admit(&self, id: &str, limits: Limits, vm: &Arc<Vm>, logger: &Logger) {
        let needed = {
            let mut wishes = self.wishes();
            wishes.containers.insert(id.to_owned(), limits);
            self.needed(&wishes)
        };
        if needed.memory <= vm.memory() && needed.cpus <= vm.cpus() {
            return;
        }
        // To its end even when the creation is abandoned: half of it would be in nobody's books.
        let (id, vm, logger) = (id.to_owned(), Arc::clone(vm), logger.clone());
        let growing = tokio::spawn(async move {
            let grown = async {
                let memory = needed.memory.min(vm.most_memory());
                vm.grow(memory, &logger).await?;
                vm.add_cpus(needed.cpus.min(vm.most_cpus()), &logger).await
            };
            if let Err(error) = grown.await {
                warn!(logger, "the VM stays smaller than what its containers may use"; "container" => id,
                    "needed_mib" => needed.memory / MIB, "memory_mib" => vm.memory() / MIB,
                    "needed_vcpus" => needed.cpus, "vcpus" => vm.cpus(), "reason" => error.message);
            }
        });
        let _ = growing.await;
    }

    /// The container has gone. Its memory has gone back with its pages; the VM's size stays, for the next one.
    pub fn gone(&self, id: &str) {
        self.wishes().containers.remove(id);
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
        let _changing = self.0.changing.lock().await;
        let before = self.wishes().clone();
        let mut after = before.clone();
        let old = before.containers.get(id).copied().unwrap_or_default();
        let limits = old.changed_by(resources)?;
        after.change(id, limits);
        let (had, needs) = (self.needed(&before), self.needed(&after));
        // One that wants no more than it had is not refused for what it had.
        if needs.memory > had.memory {
            vm.grow(needs.memory, logger).await?;
        }
        let mut applied = Ok(());
        if needs.cpus > had.cpus {
            if vm.has_spare_cpus() {
                applied = vm.add_cpus(needs.cpus, logger).await;
            } else {
                // As on a node: a limit beyond its CPUs holds, and adds none.
                warn!(logger, "a CPU limit is beyond the VM's CPUs, to which max_vcpus lets none be added"; "container" => id,
                    "needed_vcpus" => needs.cpus, "vcpus" => vm.cpus());
            }
        }
        if applied.is_ok() {
            applied = apply.await;
        }
        if applied.is_ok() {
            self.wishes().change(id, limits);
        }
        // Nobody waits for what a guest gives back.
        let (size, vm, logger) = (self.clone(), Arc::clone(vm), logger.clone());
        tokio::spawn(async move {
            let _changing = size.0.changing.lock().await;
            let needed = || size.needed(&size.wishes());
            vm.take_cpus(|| needed().cpus, &logger).await;
            vm.shrink(|| needed().memory, &logger).await;
        });
        applied
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
    let wanted = limits.cpu_millis.map_or(0, |millis| {
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

    fn limits(memory: Option<u64>, huge_pages: u64) -> Limits {
        Limits {
            memory,
            huge_pages,
            cpu_millis: None,
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
        let cpus = |cpu_millis| Limits {
            cpu_millis,
            ..Limits::default()
        };
        assert_eq!(guest_cpus(&cpus(None), 1, 8), 1);
        assert_eq!(guest_cpus(&cpus(Some(1)), 2, 8), 2);
        assert_eq!(guest_cpus(&cpus(Some(2001)), 2, 8), 3);
        assert_eq!(guest_cpus(&cpus(Some(u64::MAX)), 1, 8), 8);
        assert_eq!(guest_cpus(&cpus(Some(u64::MAX)), 16, 8), 16);
    }

    #[test]
    fn what_the_pod_said_counts_until_a_containers_limit_says_otherwise() {
        let mut wishes = Wishes {
            declared: limits(Some(300), 0),
            ..Wishes::default()
        };
        wishes.containers.insert("a".into(), limits(Some(100), 0));
        assert_eq!(wishes.limits().memory, Some(300));
        // Of another kind: it says nothing of memory.
        let mut cpus = limits(Some(100), 0);
        cpus.cpu_millis = Some(500);
        wishes.change("a", cpus);
        assert_eq!(wishes.limits().memory, Some(300));
        wishes.change("a", limits(Some(50), 0));
        assert_eq!(wishes.limits().memory, Some(50));
        wishes.containers.insert("b".into(), limits(Some(200), 0));
        wishes.containers.insert("c".into(), limits(None, 0));
        assert_eq!(wishes.limits().memory, Some(250));
        wishes.change("b", limits(None, 0));
        wishes.change("a", limits(None, 0));
        assert_eq!(wishes.limits().memory, None);
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
