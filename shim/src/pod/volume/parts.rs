//! Parts: a directory or file that lies in another which a container of the pod mounts too, as a sub-path of a volume or a
//! hostPath in another. It is taken from that one, so that both are one file system in the guest: locks hold, sockets and
//! named pipes connect, maps and inotify are one.
//!
//! A guest is given nothing for that which no container of its pod has asked for: neither the whole for a part's sake, nor
//! leave to write to a whole that is only read.

use std::path::{Path, PathBuf};

use super::view::{self, Key};
use crate::asked::spec::BindMount;

/// What the agent looks for by the path on the node, to show the guest's own modules beside it.
const MODULES: [&str; 2] = ["/lib/modules", "/usr/lib/modules"];

/// A part of what is shared.
pub(super) struct Place {
    pub(super) key: Key,
    /// Where that is on the node, without links.
    pub(super) source: PathBuf,
    /// Empty for all.
    pub(super) inside: String,
    /// What shows it too, the largest first.
    pub(super) within: Vec<Within>,
}

/// What shows a mount's source too.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Within {
    pub(super) whole: Key,
    /// The way there.
    pub(super) inside: String,
}

/// Where to look for a mount's source.
pub(super) struct Candidate {
    /// Index into the mounts that are shared.
    mount: usize,
    part: Key,
    top: PathBuf,
    within: Within,
}

/// What the mounts of a container may be parts of: of one another, or of what is attached, each with its source.
pub(super) fn candidates<'a>(
    shared: &'a [(BindMount, Place)],
    attached: impl Iterator<Item = (&'a Key, &'a Path)>,
) -> Vec<Candidate> {
    let own = shared
        .iter()
        .map(|(_, place)| (&place.key, place.source.as_path()));
    let wholes: Vec<(&Key, &Path)> = attached.chain(own).collect();
    let mut candidates = Vec::new();
    for (mount, (bind, place)) in shared.iter().enumerate() {
        if MODULES.iter().any(|path| bind.source == Path::new(path)) {
            continue;
        }
        for (whole, top) in &wholes {
            if let Some(inside) = whole.way_to(&place.key) {
                candidates.push(Candidate {
                    mount,
                    part: place.key.clone(),
                    top: (*top).to_owned(),
                    within: Within {
                        whole: (*whole).clone(),
                        inside,
                    },
                });
            }
        }
    }
    // The largest first: it serves most.
    candidates.sort_by_key(|candidate| candidate.within.whole.depth());
    candidates
}

/// Those that are there, by the index of the mount. Blocking.
pub(super) fn found(candidates: Vec<Candidate>) -> Vec<(usize, Within)> {
    let there = |candidate: &Candidate| {
        let Within { whole, inside } = &candidate.within;
        view::leads(
            &candidate.top,
            whole.identity,
            inside,
            candidate.part.identity,
        )
    };
    candidates
        .into_iter()
        .filter(there)
        .map(|candidate| (candidate.mount, candidate.within))
        .collect()
}
