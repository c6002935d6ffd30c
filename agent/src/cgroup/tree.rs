//! The cgroups below a container's, which it has made: as deep and as many as it likes, named so long that no path reaches them.
//!
//! Every one is reached from the one above it by its name alone, and nothing here calls itself.
use std::{
    ffi::{CStr, CString},
    io::{self, Read as _},
    os::fd::OwnedFd,
    path::Path,
};

use rustix::{
    fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, openat, statat, unlinkat},
    io::Errno,
};

/// How deep cgroups below a container's may be (`cgroup.max.depth`).
pub const MAX_DEPTH: usize = 32;

const OPEN: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

/// Calls `found` with each cgroup of the tree, the upper ones first. One that goes meanwhile is left out.
///
/// # Errors
/// Those of open(2) and readdir(3), and those of `found`.
pub fn each(top: &Path, mut found: impl FnMut(&OwnedFd) -> io::Result<()>) -> io::Result<()> {
    let top = openat(CWD, top, OPEN, Mode::empty())?;
    found(&top)?;
    // As many descriptors as there are levels; deeper ones cannot be made.
    let mut levels = vec![(Dir::read_from(&top)?, top)];
    while let (depth, Some((entries, here))) = (levels.len(), levels.last_mut()) {
        let Some(entry) = entries.next() else {
            levels.pop();
            continue;
        };
        let entry = match entry {
            Ok(entry) => entry,
            Err(Errno::NOENT) => continue,
            Err(error) => return Err(error.into()),
        };
        if !is_below(here, entry.file_name(), entry.file_type())? || depth > MAX_DEPTH {
            continue;
        }
        match openat(&*here, entry.file_name(), OPEN, Mode::empty()) {
            Ok(below) => {
                found(&below)?;
                levels.push((Dir::read_from(&below)?, below));
            }
            Err(Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// The text of a file of a cgroup; `None` for one that has gone, or that tells nothing (a threaded cgroup of its processes).
pub fn read(cgroup: &OwnedFd, file: &str) -> Option<String> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let file = openat(cgroup, file, flags, Mode::empty()).ok()?;
    let mut text = String::new();
    std::fs::File::from(file).read_to_string(&mut text).ok()?;
    Some(text)
}

/// Removes a cgroup without processes and those below it, however deep. Blocking.
///
/// # Errors
/// Those of rmdir(2).
pub fn remove(top: &Path) -> io::Result<()> {
    let mut here = openat(CWD, top, OPEN, Mode::empty())?;
    // Names from the top to here: the way up is "..", which in this file system leads where one came from.
    let mut way: Vec<CString> = Vec::new();
    loop {
        if let Some(name) = first_below(&here)? {
            match openat(&here, &name, OPEN, Mode::empty()) {
                Ok(below) => {
                    here = below;
                    way.push(name);
                }
                Err(Errno::NOENT) => {}
                Err(error) => return Err(error.into()),
            }
            continue;
        }
        let Some(name) = way.pop() else { break };
        here = openat(&here, "..", OPEN, Mode::empty())?;
        match unlinkat(&here, &name, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
    }
    drop(here);
    std::fs::remove_dir(top)
}

fn first_below(cgroup: &OwnedFd) -> io::Result<Option<CString>> {
    for entry in Dir::read_from(cgroup)? {
        let entry = entry?;
        if is_below(cgroup, entry.file_name(), entry.file_type())? {
            return Ok(Some(entry.file_name().to_owned()));
        }
    }
    Ok(None)
}

/// Whether a directory's entry is a cgroup below it.
fn is_below(cgroup: &OwnedFd, name: &CStr, kind: FileType) -> io::Result<bool> {
    if matches!(name.to_bytes(), b"." | b"..") {
        return Ok(false);
    }
    if kind != FileType::Unknown {
        return Ok(kind == FileType::Directory);
    }
    match statat(cgroup, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(FileType::from_raw_mode(stat.st_mode) == FileType::Directory),
        Err(Errno::NOENT) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::mkdirat;

    /// Directories with names of 200 bytes, one in another, beside `width` others on each level.
    fn deep(top: &Path, depth: usize, width: usize) {
        let name = "d".repeat(200);
        let mut here = openat(CWD, top, OPEN, Mode::empty()).unwrap();
        for _ in 0..depth {
            for beside in 0..width {
                mkdirat(&here, format!("b{beside}"), Mode::RWXU).unwrap();
            }
            mkdirat(&here, name.as_str(), Mode::RWXU).unwrap();
            here = openat(&here, name.as_str(), OPEN, Mode::empty()).unwrap();
        }
    }

    #[test]
    fn a_tree_that_no_path_reaches_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().join("c");
        std::fs::create_dir(&top).unwrap();
        deep(&top, 3000, 1);
        remove(&top).unwrap();
        assert!(!top.exists());
    }

    #[test]
    fn what_is_not_empty_is_told_and_not_tried_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().join("c");
        deep_with_file(&top);
        assert!(remove(&top).is_err());
    }

    /// A file stands for a process: the directory cannot be removed.
    fn deep_with_file(top: &Path) {
        std::fs::create_dir_all(top.join("a/b")).unwrap();
        std::fs::write(top.join("a/b/x"), "").unwrap();
    }

    #[test]
    fn every_cgroup_is_found_down_to_the_depth_that_there_is() {
        let dir = tempfile::tempdir().unwrap();
        deep(dir.path(), MAX_DEPTH + 5, 2);
        let mut found = 0;
        each(dir.path(), |_| {
            found += 1;
            Ok(())
        })
        .unwrap();
        assert_eq!(found, 1 + 3 * MAX_DEPTH);
        remove(dir.path()).unwrap();
    }
}
