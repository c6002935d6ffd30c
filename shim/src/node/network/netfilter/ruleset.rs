//! A namespace's rules as they are handed on, and what is said of those that cannot be.
//!
//! The agent's answer is not trusted: it may only speak of what it was sent.

use std::io;

use brig_agent_protocol::agent;
use slog::{Logger, warn};

use crate::asked::config::Netfilter;
use crate::node::network::error::NetworkError;

/// One thing of a ruleset.
#[derive(Debug, Clone, PartialEq)]
pub struct Object {
    /// As the agent loads it.
    pub message: agent::NetfilterObject,
    /// What it is, e.g. `rule 2 of chain OUTPUT in table ip nat (iptables: owner)`.
    pub name: String,
}

/// A namespace's rules.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Ruleset {
    /// In the order in which they are made.
    pub objects: Vec<Object>,
    /// One sentence for each thing that no guest can have.
    pub refused: Vec<String>,
    /// The kernel's number of this state.
    pub generation: u32,
}

impl Ruleset {
    /// Applies the operator's policy to what cannot be taken.
    ///
    /// # Errors
    /// [`NetworkError::Unsupported`] when the pod has to have it.
    pub fn decide(&self, policy: Netfilter) -> Result<(), NetworkError> {
        match (policy, self.refused.first()) {
            (Netfilter::Require, Some(what)) => Err(NetworkError::Unsupported(sentence(what))),
            _ => Ok(()),
        }
    }

    /// The state of the rules that a guest is given; none if there are no rules to give.
    #[must_use]
    pub fn given(&self) -> Option<u32> {
        (!self.objects.is_empty()).then_some(self.generation)
    }

    /// What the agent is asked to load; nothing of an empty ruleset.
    #[must_use]
    pub fn request(&self, policy: Netfilter) -> Option<agent::Netfilter> {
        if self.objects.is_empty() {
            return None;
        }
        let objects = self.objects.iter().map(|object| object.message.clone());
        Some(agent::Netfilter {
            objects: objects.collect(),
            best_effort: policy != Netfilter::Require,
            ..agent::Netfilter::default()
        })
    }

    /// What the agent is asked to load in the place of a ruleset of this generation.
    #[must_use]
    pub fn replacement(&self, policy: Netfilter, generation: u32) -> agent::Netfilter {
        agent::Netfilter {
            replaces: generation,
            best_effort: policy != Netfilter::Require,
            ..self.request(policy).unwrap_or_default()
        }
    }

    /// Judges by the operator's policy what the agent could not load, and logs what is to be done without.
    ///
    /// # Errors
    /// `Unimplemented`, naming the first thing, when the pod has to have it.
    pub fn accept(
        &self,
        refused: &[agent::NetfilterRefusal],
        policy: Netfilter,
        logger: &Logger,
    ) -> Result<(), NetworkError> {
        for what in self.named(refused) {
            if policy == Netfilter::Require {
                return Err(NetworkError::Unsupported(sentence(&what)));
            }
            warn!(logger, "the guest's network is not all of the pod's"; "left_out" => what);
        }
        Ok(())
    }

    /// What the agent could not load, by name. It may only speak of what it was sent.
    fn named(&self, refused: &[agent::NetfilterRefusal]) -> Vec<String> {
        let named = refused.iter().filter_map(|refusal| {
            let position = usize::try_from(refusal.object).ok()?;
            let object = self.objects.get(position)?;
            let errno = i32::try_from(refusal.errno).unwrap_or(0);
            let why = match errno {
                libc::ENOENT | libc::EOPNOTSUPP | libc::EPROTONOSUPPORT | libc::EAFNOSUPPORT => {
                    "the guest's kernel has no such thing".to_owned()
                }
                _ => io::Error::from_raw_os_error(errno).to_string(),
            };
            Some(format!("{}: {why}", object.name))
        });
        named.take(self.objects.len()).collect()
    }
}

/// Why a pod is refused for one thing, and what can be done.
fn sentence(what: &str) -> String {
    format!(
        "the packet filter of its network namespace cannot be loaded in the guest: {what}; remove it, or set \
         netfilter = \"warn\" in Brig's configuration to start pods without such rules"
    )
}
