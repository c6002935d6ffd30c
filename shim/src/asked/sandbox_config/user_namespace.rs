//! `hostUsers: false` as CRI asks for it of a pod (`runtime.v1.UserNamespace`), and what containerd's own
//! sandbox controller and runc refuse of it.

use crate::asked::wire::namespace_mode::{CONTAINER, NODE, POD, TARGET};
use crate::asked::wire::{Value, each_field};
use crate::error::{Error, Result};

/// The user namespace that a pod asks for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct UserNamespace {
    /// A `NamespaceMode`.
    mode: u64,
    users: Vec<Range>,
    groups: Vec<Range>,
}

/// A line of an id map.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Range {
    host: u64,
    container: u64,
    length: u64,
}

/// Ids that exist: `u32::MAX` is "none" in every system call.
const IDS: u64 = u32::MAX as u64;

impl UserNamespace {
    pub(super) fn read(bytes: &[u8]) -> protobuf::Result<Self> {
        let mut read = Self::default();
        each_field(bytes, |number, value| {
            match (number, value) {
                (1, Value::Number(mode)) => read.mode = mode,
                (2, Value::Bytes(range)) => read.users.push(Range::read(range)?),
                (3, Value::Bytes(range)) => read.groups.push(Range::read(range)?),
                _ => {}
            }
            Ok(())
        })?;
        Ok(read)
    }

    /// Whether the pod is to have one.
    pub(super) fn is_own(&self) -> bool {
        self.mode == POD
    }

    /// # Errors
    /// `InvalidArgument` for a mode or a map with which no pod can run.
    pub(super) fn check(&self) -> Result<()> {
        let maps = [("UID", &self.users), ("GID", &self.groups)];
        for (kind, map) in maps {
            check_map(map).map_err(|error| refused(format_args!("its {kind} mapping: {error}")))?;
        }
        match self.mode {
            POD => {
                for (kind, map) in maps {
                    let Some(range) = map.first() else {
                        return Err(refused(format_args!(
                            "mode POD cannot be used without UID and GID mappings; give a {kind} mapping"
                        )));
                    };
                    if !range.has(0) {
                        return Err(refused(format_args!(
                            "its {kind} mapping begins at container id {}: container id 0 must be mapped",
                            range.container
                        )));
                    }
                }
                Ok(())
            }
            NODE if self.users.is_empty() && self.groups.is_empty() => Ok(()),
            NODE => Err(refused(format_args!(
                "mode NODE cannot be used with mappings; there are {} UID and {} GID mappings",
                self.users.len(),
                self.groups.len()
            ))),
            CONTAINER => Err(refused(format_args!("unsupported mode CONTAINER"))),
            TARGET => Err(refused(format_args!("unsupported mode TARGET"))),
            other => Err(refused(format_args!("unsupported mode {other}"))),
        }
    }

    /// Whether a user of the pod is one of the namespace's.
    pub(super) fn has_user(&self, id: u64) -> bool {
        self.users.iter().any(|range| range.has(id))
    }

    /// Whether a group of the pod is one of the namespace's.
    pub(super) fn has_group(&self, id: u64) -> bool {
        self.groups.iter().any(|range| range.has(id))
    }

    /// The group outside of one of the namespace's.
    pub(super) fn group_outside(&self, id: u32) -> Option<u32> {
        let range = self.groups.iter().find(|range| range.has(id.into()))?;
        let offset = u64::from(id).checked_sub(range.container)?;
        u32::try_from(range.host.checked_add(offset)?).ok()
    }
}

impl Range {
    fn read(bytes: &[u8]) -> protobuf::Result<Self> {
        let mut range = Self::default();
        each_field(bytes, |number, value| {
            match (number, value) {
                (1, Value::Number(id)) => range.host = id,
                (2, Value::Number(id)) => range.container = id,
                (3, Value::Number(length)) => range.length = length,
                _ => {}
            }
            Ok(())
        })?;
        Ok(range)
    }

    fn has(&self, id: u64) -> bool {
        id.checked_sub(self.container)
            .is_some_and(|offset| offset < self.length)
    }
}

/// As containerd, which maps a root file system by one line: more are not supported.
fn check_map(map: &[Range]) -> std::result::Result<(), String> {
    let [range] = map else {
        return match map.len() {
            0 => Ok(()),
            lines => Err(format!("only one mapping line is supported, not {lines}")),
        };
    };
    if range.length == 0 {
        return Err("invalid mapping length 0".to_owned());
    }
    for (whose, start) in [("container", range.container), ("host", range.host)] {
        let end = start.checked_add(range.length);
        if end.is_none_or(|end| end > IDS) {
            return Err(format!(
                "{} ids from {whose} id {start} on go beyond the last id there is",
                range.length
            ));
        }
    }
    Ok(())
}

fn refused(why: std::fmt::Arguments<'_>) -> Error {
    Error::invalid(format!("user namespace configuration of the pod: {why}"))
}
