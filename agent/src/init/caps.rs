//! Capability sets.
use caps::{CapSet, Capability, CapsHashSet};

use super::{
    agent::Agent,
    failure::{Failure, Result},
};
use crate::spec::Capabilities;

/// The five sets of a process; without a specification all are empty.
#[derive(Debug, Default)]
pub struct Sets {
    bounding: CapsHashSet,
    effective: CapsHashSet,
    inheritable: CapsHashSet,
    permitted: CapsHashSet,
    ambient: CapsHashSet,
}

/// The names this build knows; the rest are returned by name.
fn known(names: &[String]) -> (CapsHashSet, Vec<&str>) {
    let mut set = CapsHashSet::new();
    let mut unknown = Vec::new();
    for name in names {
        match name.parse::<Capability>() {
            Ok(capability) => {
                set.insert(capability);
            }
            Err(_) => unknown.push(name.as_str()),
        }
    }
    (set, unknown)
}

impl Sets {
    /// The sets of the specification, without what this kernel does not have.
    pub fn resolve(agent: &Agent, capabilities: Option<&Capabilities>) -> Self {
        let Some(capabilities) = capabilities else {
            return Self::default();
        };
        // What the bounding set of this process lacks, the kernel lacks: PID 1 had everything.
        let available = caps::read(None, CapSet::Bounding).unwrap_or_default();
        let resolve = |names: &[String]| {
            let (set, unknown) = known(names);
            for name in unknown {
                agent.warn(format!("capability {name} is not known and was left out"));
            }
            set.intersection(&available).copied().collect()
        };
        Self {
            bounding: resolve(&capabilities.bounding),
            effective: resolve(&capabilities.effective),
            inheritable: resolve(&capabilities.inheritable),
            permitted: resolve(&capabilities.permitted),
            ambient: resolve(&capabilities.ambient),
        }
    }

    /// Drops from the bounding set what is not in it. Before the user changes: it needs CAP_SETPCAP.
    pub fn drop_bounding(&self) -> Result<()> {
        let current = caps::read(None, CapSet::Bounding).map_err(|e| failure("bounding", &e))?;
        for capability in current.difference(&self.bounding) {
            caps::drop(None, CapSet::Bounding, *capability).map_err(|e| failure("bounding", &e))?;
        }
        Ok(())
    }

    /// Sets the other four. Effective and permitted shrink first, so that inheritable and ambient
    /// can never hold more.
    pub fn apply(&self) -> Result<()> {
        // Raising a capability to inheritable needs it in permitted or CAP_SETPCAP in effective.
        caps::set(None, CapSet::Inheritable, &self.inheritable)
            .map_err(|e| failure("inheritable", &e))?;
        // Effective must never exceed permitted, and after setuid it is empty.
        let effective: CapsHashSet = self
            .effective
            .intersection(&self.permitted)
            .copied()
            .collect();
        caps::set(None, CapSet::Effective, &effective).map_err(|e| failure("effective", &e))?;
        caps::set(None, CapSet::Permitted, &self.permitted)
            .map_err(|e| failure("permitted", &e))?;
        // A capability is ambient only while permitted and inheritable (capabilities(7)); the
        // rest are left out, as with runc.
        let ambient: CapsHashSet = self
            .ambient
            .iter()
            .filter(|c| self.permitted.contains(c) && self.inheritable.contains(c))
            .copied()
            .collect();
        caps::clear(None, CapSet::Ambient).map_err(|e| failure("ambient", &e))?;
        for capability in ambient {
            caps::raise(None, CapSet::Ambient, capability).map_err(|e| failure("ambient", &e))?;
        }
        Ok(())
    }
}

/// Makes every permitted capability effective again, which a change of user has undone.
pub fn raise_effective() -> Result<()> {
    let permitted = caps::read(None, CapSet::Permitted).map_err(|e| failure("permitted", &e))?;
    caps::set(None, CapSet::Effective, &permitted).map_err(|e| failure("effective", &e))
}

fn failure(set: &str, error: &caps::errors::CapsError) -> Failure {
    Failure(format!("process.capabilities.{set}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_name_is_left_out_and_reported() {
        let names = ["CAP_NET_ADMIN".to_owned(), "CAP_FROM_THE_FUTURE".to_owned()];
        let (set, unknown) = known(&names);
        assert!(set.contains(&Capability::CAP_NET_ADMIN));
        assert_eq!(unknown, ["CAP_FROM_THE_FUTURE"]);
    }
}
