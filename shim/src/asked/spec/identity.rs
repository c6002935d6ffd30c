//! Users and groups by number, where a specification names them (runtime-spec config.md, "user").
//!
//! Trusted: containerd, who wrote it, but what the largest number means to Linux it may not have known: containerd before
//! 2.0.4 and 1.7.27 takes it from an image (CVE-2024-40635).

use brig_agent_protocol::identity;
use serde::Deserialize;

use crate::error::{Error, Result};

/// Who a process is to be.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct User {
    uid: Option<u32>,
    gid: Option<u32>,
    additional_gids: Option<Vec<u32>>,
}

impl User {
    /// # Errors
    /// `InvalidArgument` that names the field.
    pub(super) fn check(&self) -> Result<()> {
        check("process.user.uid", self.uid)?;
        check("process.user.gid", self.gid)?;
        let groups = self.additional_gids.iter().flatten();
        for (index, group) in groups.enumerate() {
            check(
                &format!("process.user.additionalGids[{index}]"),
                Some(*group),
            )?;
        }
        Ok(())
    }
}

/// Refuses the number that is nobody's.
///
/// # Errors
/// `InvalidArgument` that names the field.
pub(super) fn check(field: &str, id: Option<u32>) -> Result<()> {
    id.map_or(Ok(()), |id| identity::check(field, id))
        .map_err(Error::invalid)
}

/// Refuses `size` numbers from `first` on where one of them is nobody's.
///
/// # Errors
/// `InvalidArgument` that names the field.
pub(super) fn check_range(field: &str, first: u32, size: u32) -> Result<()> {
    identity::check_range(field, first, size).map_err(Error::invalid)
}

/// What the shim reads of the process of an exec.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Process {
    user: Option<User>,
}

/// Looks at the process of an exec, OCI's as JSON: the rest of it is the agent's to judge.
///
/// # Errors
/// `InvalidArgument` for what is no process, and for a user or group that there is not.
pub fn check_process(process: &[u8]) -> Result<()> {
    let process: Process = serde_json::from_slice(process)
        .map_err(|error| Error::invalid(format!("it is not an OCI process as JSON: {error}")))?;
    process.user.as_ref().map_or(Ok(()), User::check)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    #[test]
    fn an_exec_as_nobody_is_refused_by_the_field() {
        for (process, field) in [
            (r#"{"user":{"uid":4294967295}}"#, "process.user.uid"),
            (r#"{"user":{"gid":4294967295}}"#, "process.user.gid"),
            (
                r#"{"user":{"additionalGids":[0,4294967295]}}"#,
                "process.user.additionalGids[1]",
            ),
            (r#"{"user":{"uid":-1}}"#, "-1"),
            ("x", "JSON"),
        ] {
            let error = check_process(process.as_bytes()).unwrap_err();
            assert_eq!(error.kind, Kind::InvalidArgument);
            assert!(error.message.contains(field), "{error}");
        }
        for process in [
            "{}",
            r#"{"user":null,"args":["x"]}"#,
            r#"{"user":{"uid":4294967294,"gid":0,"additionalGids":null}}"#,
        ] {
            check_process(process.as_bytes()).unwrap();
        }
    }

    #[test]
    fn a_range_ends_before_nobody() {
        check_range("f", 0, u32::MAX).unwrap();
        check_range("f", u32::MAX - 1, 1).unwrap();
        for (first, size) in [(0, 0), (u32::MAX, 1), (1, u32::MAX)] {
            assert!(check_range("f", first, size).is_err(), "{first} {size}");
        }
    }
}
