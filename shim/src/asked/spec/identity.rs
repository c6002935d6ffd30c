//! Users and groups by number, where a specification names them (runtime-spec config.md, "user").
//!
//! Trusted: containerd, who wrote it, but what the largest number means to Linux it may not have known: containerd before
//! 2.0.4 and 1.7.27 takes it from an image (CVE-2024-40635).

use serde::Deserialize;

use crate::error::{Error, Result};

/// The number that is nobody's: system calls take it for "leave it as it is", and who is to become it stays root.
const NOBODYS: u32 = u32::MAX;

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
    if id == Some(NOBODYS) {
        return Err(Error::invalid(format!(
            "{field} = {NOBODYS} is no id, it means \"none\" to Linux: they go from 0 to {}",
            NOBODYS - 1
        )));
    }
    Ok(())
}

/// Refuses `size` numbers from `first` on where one of them is nobody's.
///
/// # Errors
/// `InvalidArgument` that names the field.
pub(super) fn check_range(field: &str, first: u32, size: u32) -> Result<()> {
    match first.checked_add(size) {
        Some(_) if size > 0 => Ok(()),
        Some(_) => Err(Error::invalid(format!("{field} has a range of no ids"))),
        None => Err(Error::invalid(format!(
            "{field}: {size} ids from {first} on go beyond the last there is, {}",
            NOBODYS - 1
        ))),
    }
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
        check_range("f", 0, NOBODYS).unwrap();
        check_range("f", NOBODYS - 1, 1).unwrap();
        for (first, size) in [(0, 0), (NOBODYS, 1), (1, NOBODYS)] {
            assert!(check_range("f", first, size).is_err(), "{first} {size}");
        }
    }
}
