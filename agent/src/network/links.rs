//! Interfaces by their names, and what the kernel says of them.

use futures::TryStreamExt as _;
use rtnetlink::Handle;

use crate::error::{Error, Result};

/// The interface that every network has.
pub(super) const LOOPBACK: &str = "lo";

pub(super) fn refused(what: impl std::fmt::Display, error: &rtnetlink::Error) -> Error {
    Error::Internal(format!("{what}: {error}"))
}

pub(super) async fn index_of(handle: &Handle, name: &str) -> Result<u32> {
    let mut links = handle.link().get().match_name(name.to_owned()).execute();
    match links.try_next().await {
        Ok(Some(link)) => Ok(link.header.index),
        _ => Err(Error::InvalidArgument(format!(
            "the guest has no interface {name:?}"
        ))),
    }
}
