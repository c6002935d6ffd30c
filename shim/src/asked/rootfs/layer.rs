//! What the layers of a root file system ask for beyond being mounted: as whose files they are seen, and what they are checked against.
//! Trusts containerd in meaning, not in form.

use std::path::{Path, PathBuf};

use brig_hypervisor::share::IdRange;

/// The file beside a layer that has the root hash of its dm-verity tree.
#[derive(Debug, PartialEq, Eq)]
pub struct Sidecar {
    /// The file.
    pub path: PathBuf,
    /// Without it the layer is not to be read.
    pub required: bool,
}

/// Users and groups of a user namespace.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct IdMap {
    /// Ranges of users.
    pub users: Vec<IdRange>,
    /// Ranges of groups.
    pub groups: Vec<IdRange>,
}

/// The file that `X-containerd.dmverity` names: its path, or a mode, which means the file beside the layer.
pub(super) fn sidecar(value: &str, layer: &str) -> std::result::Result<Option<Sidecar>, String> {
    let (path, required) = match value {
        "off" => return Ok(None),
        "auto" | "on" => (absolute(&format!("{layer}.dmverity"))?, value == "on"),
        path => (absolute(path)?, true),
    };
    Ok(Some(Sidecar { path, required }))
}

/// Ranges of a map as containerd writes them: `inside:outside:size`, several with commas.
pub(super) fn ranges(option: &str, text: &str) -> std::result::Result<Vec<IdRange>, String> {
    let wrong = || format!("{option:?} is no map of ids: one is like uidmap=0:65536:65536");
    let range = |text: &str| {
        let mut numbers = text.split(':').map(|number| number.parse::<u32>().ok());
        let range = IdRange {
            stored: numbers.next()??,
            seen: numbers.next()??,
            length: numbers.next()??,
        };
        numbers.next().is_none().then_some(range)
    };
    text.split(',')
        .map(|one| range(one).ok_or_else(wrong))
        .collect()
}

pub(super) fn absolute(text: &str) -> std::result::Result<PathBuf, String> {
    let path = Path::new(text);
    let plain = path.is_absolute() && !path.components().any(|part| part.as_os_str() == "..");
    plain
        .then(|| path.to_owned())
        .ok_or_else(|| format!("{text:?} must be an absolute path without \"..\""))
}
