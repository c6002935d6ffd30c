//! Device nodes of a container (runtime-spec config-linux.md, "devices").

use serde::Deserialize;

use super::identity;
use crate::error::Result;

/// A device node that a container asks for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Device {
    /// Where, in the container.
    pub path: String,
    #[serde(rename = "type")]
    kind: String,
    major: i64,
    minor: i64,
    uid: Option<u32>,
    gid: Option<u32>,
}

impl Device {
    /// The numbers of a character device.
    #[must_use]
    pub fn character(&self) -> Option<(u32, u32)> {
        let numbers = (
            u32::try_from(self.major).ok()?,
            u32::try_from(self.minor).ok()?,
        );
        matches!(self.kind.as_str(), "c" | "u").then_some(numbers)
    }

    /// The numbers of a block device.
    #[must_use]
    pub fn block(&self) -> Option<(u32, u32)> {
        let numbers = (
            u32::try_from(self.major).ok()?,
            u32::try_from(self.minor).ok()?,
        );
        (self.kind == "b").then_some(numbers)
    }

    /// Refuses an owner who is nobody.
    ///
    /// # Errors
    /// `InvalidArgument` that names the field.
    pub(super) fn check_owner(&self) -> Result<()> {
        for (field, id) in [("uid", self.uid), ("gid", self.gid)] {
            identity::check(&format!("linux.devices {}: {field}", self.path), id)?;
        }
        Ok(())
    }
}
