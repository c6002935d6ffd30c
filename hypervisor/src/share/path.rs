//! A path relative to the share's root, checked once.

use std::ffi::CString;
use std::fmt;

use super::ShareError;

/// Longest path of the share in bytes; far below `PATH_MAX` with `/shared/` before it.
const MAX_LENGTH: usize = 1024;

/// One or more plain names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SharePath {
    path: String,
}

impl SharePath {
    pub(super) fn new(path: &str) -> Result<Self, ShareError> {
        let plain = |part: &str| {
            !part.is_empty()
                && part != "."
                && part != ".."
                && part.len() <= 255
                && !part.contains('\0')
        };
        if path.len() <= MAX_LENGTH && path.split('/').all(plain) {
            Ok(Self {
                path: path.to_owned(),
            })
        } else {
            Err(ShareError::InvalidPath {
                path: path.chars().take(MAX_LENGTH).collect(),
            })
        }
    }

    /// Its names from the root on.
    pub(super) fn parts(&self) -> impl DoubleEndedIterator<Item = &str> {
        self.path.split('/')
    }

    /// Where it is in the VMM's mount namespace.
    pub(super) fn inside(&self) -> CString {
        // There is no zero byte: `new` has seen to that.
        CString::new(format!("{}/{}", crate::jail::SHARED, self.path)).unwrap_or_default()
    }

    pub(super) fn as_str(&self) -> &str {
        &self.path
    }
}

impl fmt::Display for SharePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn plain_relative_paths_are_taken() {
        for path in ["a", "a/b", "containers/x-1/rootfs", "..a", "a b"] {
            assert_eq!(SharePath::new(path).unwrap().as_str(), path);
        }
    }

    #[test]
    fn paths_that_could_lead_elsewhere_are_refused() {
        for path in [
            "", "/", "/a", "a/", "a//b", ".", "..", "a/../b", "a/./b", "a\0b",
        ] {
            assert!(SharePath::new(path).is_err(), "{path:?}");
        }
        assert!(SharePath::new(&"a/".repeat(600)).is_err());
        assert!(SharePath::new(&"a".repeat(256)).is_err());
    }

    proptest! {
        #[test]
        fn an_accepted_path_stays_below_the_share(path in ".{0,64}") {
            if let Ok(path) = SharePath::new(&path) {
                let inside = path.inside().into_string().unwrap();
                prop_assert!(inside.starts_with("/shared/"));
                prop_assert!(!inside.split('/').any(|part| part == ".."));
                prop_assert_eq!(path.parts().count(), inside.split('/').count() - 2);
            }
        }
    }
}
