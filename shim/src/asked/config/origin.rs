//! Where a value of the configuration in force is from.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

/// Who has set a value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// A configuration file or a drop-in.
    File(PathBuf),
    /// The pod, by the annotation `io.brig.KEY`.
    Annotation,
    /// The limits of the pod's containers, which need more than is configured.
    Limits,
}

/// By key; keys with their defaults are not in it.
pub type Origins = BTreeMap<String, Origin>;

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Annotation => f.write_str("the pod's annotation"),
            Self::Limits => f.write_str("the pod's limits"),
        }
    }
}
