//! Makes a volume's files equal to what the host described, in the order in which kubelet's atomic
//! writer changes the original: a container sees old or new, never half, and gets the same inotify events.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
};

use rustix::fs::FileType;

use super::{
    entry::{Entry, Kind},
    tree::{Links, Tree},
};

/// The link that is swapped when everything it leads to is there.
const DATA: &[u8] = b"..data";

/// What the agent has made of a replica so far.
#[derive(Default)]
pub struct Replica {
    made: BTreeMap<Vec<u8>, Made>,
    /// Directories that are new and have not got their time yet. One that stays is dated by what is made in it.
    undated: BTreeSet<Vec<u8>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct Made {
    identity: u64,
    kind: Kind,
}

impl Replica {
    /// Makes the files of `tree` exactly `entries`. After an error some may be old, some new; the next call
    /// goes on from there.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn become_exactly(&mut self, tree: &Tree, entries: Vec<Entry>) -> io::Result<()> {
        // By path, so that parents come before children.
        let wanted: BTreeMap<Vec<u8>, Entry> = entries
            .into_iter()
            .map(|entry| (entry.path.clone(), entry))
            .collect();
        if self.made.is_empty() {
            self.undated.insert(Vec::new());
        }
        let is_late = |entry: &Entry| entry.kind == Kind::Link && !entry.path.contains(&b'/');
        for entry in wanted.values().filter(|entry| !is_late(entry)) {
            self.put(tree, entry)?;
        }
        // Before anybody is led there; the top is not complete yet.
        let new = std::mem::take(&mut self.undated);
        for entry in new.iter().filter_map(|path| wanted.get(path)) {
            if entry.path.is_empty() {
                self.undated.insert(Vec::new());
            } else if entry.kind == Kind::Directory {
                tree.date(entry, Links::Refused)?;
            }
        }
        // `..data` first: the other links lead through it.
        if let Some(data) = wanted.get(DATA).filter(|entry| is_late(entry)) {
            self.put(tree, data)?;
        }
        for entry in wanted.values().filter(|entry| is_late(entry)) {
            if entry.path != DATA {
                self.put(tree, entry)?;
            }
        }
        let stale: BTreeSet<Vec<u8>> = self
            .made
            .keys()
            .filter(|path| !wanted.contains_key(*path))
            .cloned()
            .collect();
        for path in stale.iter().rev() {
            tree.remove(path)?;
            self.made.remove(path);
        }
        match wanted.get(&Vec::new()) {
            Some(top) if self.undated.remove(&top.path) => tree.date(top, Links::Refused),
            _ => Ok(()),
        }
    }

    fn put(&mut self, tree: &Tree, entry: &Entry) -> io::Result<()> {
        if entry.path.is_empty() {
            return tree.refresh(entry);
        }
        let made = Made {
            identity: entry.identity,
            kind: entry.kind,
        };
        let there = tree
            .stat(&entry.path)?
            .and_then(|stat| Kind::of(FileType::from_raw_mode(stat.st_mode)));
        let before = self.made.get(&entry.path).copied();
        let stays = before == Some(made) && there == Some(entry.kind);
        if stays || entry.kind == Kind::Link && there == Some(Kind::Link) {
            tree.refresh(entry)?;
        } else if there == Some(Kind::File) && entry.kind == Kind::File {
            tree.replace(entry)?;
        } else {
            self.forget_below(&entry.path);
            tree.remove(&entry.path)?;
            if entry.kind == Kind::Link {
                tree.replace(entry)?;
            } else {
                tree.make(entry, Links::Refused)?;
                self.undated.insert(entry.path.clone());
            }
        }
        self.made.insert(entry.path.clone(), made);
        Ok(())
    }

    fn forget_below(&mut self, path: &[u8]) {
        let mut top = path.to_vec();
        top.push(b'/');
        self.made.retain(|made, _| !made.starts_with(&top));
    }
}

/// Makes what is missing of `entries` and changes nothing that is there, except the top directory itself,
/// which the host names once.
///
/// # Errors
/// Those of the file system.
pub fn add_missing(tree: &Tree, entries: &[Entry]) -> io::Result<()> {
    let mut directories = Vec::new();
    for entry in entries {
        if entry.path.is_empty() {
            tree.refresh(entry)?;
            directories.push(entry);
            continue;
        }
        match tree.make(entry, Links::Inside) {
            Ok(()) if entry.kind == Kind::Directory => directories.push(entry),
            Ok(()) => {}
            // What the containers made counts, also when it is of another kind or a parent is.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::EEXIST | libc::ENOTDIR | libc::ELOOP | libc::ENOENT)
                ) => {}
            Err(error) => return Err(error),
        }
    }
    for entry in directories {
        // A container may have taken it away again.
        match tree.date(entry, Links::Inside) {
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::ENOENT | libc::ENOTDIR | libc::ELOOP)
                ) => {}
            dated => dated?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
