//! Names of extended attributes between guest and host.
//!
//! The VMM may not write `trusted.*` on the host, and must not: an overlay of the node would obey it.
//! An overlay inside the pod needs them, so the guest's `trusted.x` is the host's `user.brig.trusted.x`.
//! Names of that prefix that come from the guest itself are refused: a container's user, who may
//! write `user.*`, would forge what only the guest's root may write.

use std::borrow::Cow;
use std::ffi::{CStr, CString};

const TRUSTED: &[u8] = b"trusted.";
const MAPPED: &[u8] = b"user.brig.";

/// The guest names an attribute that it may not reach.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Reserved;

/// The host's name of a guest's attribute.
pub(super) fn to_host(name: &CStr) -> Result<Cow<'_, CStr>, Reserved> {
    let bytes = name.to_bytes();
    if bytes.starts_with(MAPPED) {
        return Err(Reserved);
    }
    if !bytes.starts_with(TRUSTED) {
        return Ok(Cow::Borrowed(name));
    }
    CString::new([MAPPED, bytes].concat())
        .map(Cow::Owned)
        .map_err(|_| Reserved)
}

/// The guest's list of names, each ended by a zero byte, from the host's.
pub(super) fn list_to_guest(names: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(names.len());
    for name in names.split(|byte| *byte == 0) {
        let shown = match name.strip_prefix(MAPPED) {
            Some(mapped) if mapped.starts_with(TRUSTED) => mapped,
            Some(_) => continue,
            None if name.is_empty() || name.starts_with(TRUSTED) => continue,
            None => name,
        };
        out.extend_from_slice(shown);
        out.push(0);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_overlays_attributes_go_to_the_user_namespace_and_come_back() {
        let host = to_host(c"trusted.overlay.opaque").unwrap();
        assert_eq!(host.as_ref(), c"user.brig.trusted.overlay.opaque");
        assert_eq!(
            list_to_guest(b"user.brig.trusted.overlay.opaque\0security.capability\0"),
            b"trusted.overlay.opaque\0security.capability\0"
        );
    }

    #[test]
    fn a_container_cannot_forge_a_trusted_attribute() {
        assert_eq!(to_host(c"user.brig.trusted.overlay.opaque"), Err(Reserved));
        assert_eq!(to_host(c"user.brig.x"), Err(Reserved));
        assert_eq!(to_host(c"user.x").unwrap().as_ref(), c"user.x");
    }

    #[test]
    fn the_hosts_own_trusted_attributes_are_hidden() {
        assert_eq!(
            list_to_guest(b"trusted.overlay.origin\0user.brig.other\0user.a\0"),
            b"user.a\0"
        );
        assert_eq!(list_to_guest(b""), b"");
    }

    proptest! {
        #[test]
        fn no_guest_name_reaches_a_trusted_attribute_of_the_host(name in "(trusted|user|user\\.brig)?\\.?[a-z.]{0,20}") {
            let name = CString::new(name).unwrap();
            if let Ok(host) = to_host(&name) {
                prop_assert!(!host.to_bytes().starts_with(TRUSTED));
            }
        }

        #[test]
        fn lists_never_grow(names in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(list_to_guest(&names).len() <= names.len() + 1);
        }
    }
}
