//! The account that is kept of a pod whose shim was killed, from what its directory has. (Of one that failed while its
//! shim lived the pod itself gives one.)

use std::time::SystemTime;

use serde_json::{Value, json};

use crate::error::Kind;
use crate::log::rfc3339;
use crate::node::journal::Journal;

/// What is kept of a pod whose shim was killed: what its directory has.
#[must_use]
pub fn account_of_killed(
    (namespace, id): (&str, &str),
    at: SystemTime,
    journal: &Journal,
    timeline: &[u8],
) -> Value {
    json!({
        "namespace": namespace,
        "id": id,
        "pod": journal.pod,
        "reason": "the pod's shim was killed, and its VM with it; the node's kernel log may say why",
        "code": KILLED,
        "at": rfc3339(at),
        "timeline": serde_json::from_slice::<Value>(timeline).ok(),
        "journal": journal,
    })
}

/// The class of a pod whose shim was killed.
pub const KILLED: &str = "killed";

/// Every class that an account can have.
pub fn codes() -> impl Iterator<Item = &'static str> {
    Kind::ALL.into_iter().map(Kind::name).chain([KILLED])
}
