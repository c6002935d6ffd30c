//! The packet filter of the pod's network namespace, as far as the guest can have it.
//!
//! CNI plug-ins, meshes and firewalls put netfilter rules into the namespace. The pod's packets do not pass its
//! protocol stack (see `redirect`), so the rules are taken from it, as nf_tables tells them, and loaded
//! in the guest before its interfaces are up: there they see the processes too, so that matches of owners and
//! sockets hold. iptables-nft writes the same tables. What is handed on is what the kernel said, without what it
//! alone may say (handles, counts of users), and with
//! - numbers of interfaces marked, because the guest's are its own;
//! - the protocol of rules with iptables matches, which the kernel wants when they are made and does not tell;
//! - elements of interval sets in order, as the kernel wants them;
//! - chains that belong to one rule made chains of their own, which means the same.
//!
//! What cannot be taken is told by name: legacy iptables tables, and rules that mean something on the node alone.
//! What the guest's kernel lacks it says itself.
//!
//! Trusted: nothing of the rules. Their amount is bounded, their bytes are only copied, and they go to the kernel
//! of their own pod.

mod attributes;
mod expressions;
mod legacy;
mod listed;
mod read;
mod ruleset;
mod socket;
mod take;
#[cfg(test)]
mod tests;
mod uapi;
mod watch;

pub use read::{UNTOUCHED, is_as, read};
pub use ruleset::Ruleset;
pub use watch::{heard, watch};
