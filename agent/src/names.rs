//! The names that requests bring: ids and paths under the share, before anything is opened by them.
use std::path::{Component, Path};

use crate::error::{Error, Result};

/// Longest id; containerd's own limit is 76.
const MAX_ID: usize = 128;

/// An id becomes a directory name of cgroups and of the agent's files.
///
/// # Errors
/// `InvalidArgument`.
pub fn id(id: &str) -> Result<()> {
    let fine = !id.is_empty()
        && id.len() <= MAX_ID
        && id
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        && id.starts_with(|c: char| c.is_ascii_alphanumeric());
    if fine {
        Ok(())
    } else {
        Err(Error::InvalidArgument(format!("{id:?} is not an id")))
    }
}

/// A relative path of plain names.
///
/// # Errors
/// `InvalidArgument`.
pub fn share_path(path: &str) -> Result<()> {
    let plain = !path.is_empty()
        && Path::new(path)
            .components()
            .all(|c| matches!(c, Component::Normal(_)));
    if plain {
        Ok(())
    } else {
        Err(Error::InvalidArgument(format!(
            "{path:?} is not a path under the share"
        )))
    }
}

/// The name of a device below /dev, as the kernel has it (`net/tun`).
///
/// # Errors
/// `InvalidArgument`.
pub fn device(name: &str) -> Result<()> {
    let plain = name
        .split('/')
        .all(|part| !part.is_empty() && !part.bytes().all(|b| b == b'.'));
    let known = name
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || b"._-/".contains(&b));
    if plain && known && name.len() <= MAX_ID {
        Ok(())
    } else {
        Err(Error::InvalidArgument(format!(
            "{name:?} is not the name of a device"
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ids_are_plain_names() {
        assert!(id("c1-a.b_c").is_ok());
        for bad in ["", ".", "..", "-x", "a/b", "a b", "ä", &"x".repeat(129)] {
            assert!(id(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_device_is_a_name_below_dev() {
        for good in ["null", "net/tun", "vhost-net", "loop-control"] {
            assert!(device(good).is_ok(), "{good}");
        }
        for bad in [
            "", "/null", "../null", "net/../x", "net//tun", "net/", ".", "a b", "ä",
        ] {
            assert!(device(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn a_share_path_has_only_plain_names(path in "[a./]{0,12}") {
            if share_path(&path).is_ok() {
                prop_assert!(!path.starts_with('/') && !path.split('/').any(|c| c == ".."));
            }
        }
    }
}
