//! A volume's files are given to a group, as kubelet does it for volumes that it can see (`fsGroup`).
//!
//! What is on the disk is hostile: directories are opened below its top, through no link and not into another mount.
use std::{
    ffi::{CString, OsStr},
    io,
    os::{fd::OwnedFd, unix::ffi::OsStrExt as _},
};

use rustix::fs::{
    AtFlags, Dir, FileType, Gid, Mode, OFlags, ResolveFlags, chmodat, chownat, fchmod, fchown,
    fstat, openat2, statat,
};

/// The group reads and writes, and in directories new files are its too.
const FILE: u32 = 0o660;
const DIRECTORY: u32 = 0o2770;

/// Gives all below `top` to the group, and the top last: what has a top as it should be is taken for given by
/// `unless_root`.
///
/// # Errors
/// Those of the file system.
pub(super) fn give(top: &OwnedFd, group: u32, unless_root: bool) -> io::Result<()> {
    let found = fstat(top)?;
    let (mode, gid) = (found.st_mode & 0o7777, Gid::from_raw(group));
    if unless_root && found.st_gid == group && mode & DIRECTORY == DIRECTORY {
        return Ok(());
    }
    // Relative to the top.
    let mut waiting = vec![CString::default()];
    while let Some(directory) = waiting.pop() {
        let here = open(top, &directory)?;
        for entry in Dir::read_from(&here)? {
            let entry = entry?;
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            let seen = statat(&here, name, AtFlags::SYMLINK_NOFOLLOW)?;
            let kind = FileType::from_raw_mode(seen.st_mode);
            if seen.st_gid != group {
                chownat(&here, name, None, Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
            }
            let wanted = match kind {
                FileType::Symlink => continue,
                FileType::Directory => DIRECTORY,
                _ => FILE,
            };
            // A change of owner takes set-id bits away.
            let mode = seen.st_mode & 0o7777;
            if mode & wanted != wanted || seen.st_gid != group {
                chmodat(
                    &here,
                    name,
                    Mode::from_raw_mode(mode | wanted),
                    AtFlags::empty(),
                )?;
            }
            if kind == FileType::Directory {
                waiting.push(below(&directory, OsStr::from_bytes(name.to_bytes()))?);
            }
        }
    }
    fchown(top, None, Some(gid))?;
    fchmod(top, Mode::from_raw_mode(mode | DIRECTORY))?;
    Ok(())
}

fn open(top: &OwnedFd, directory: &CString) -> io::Result<OwnedFd> {
    let path = if directory.is_empty() {
        c"."
    } else {
        directory.as_c_str()
    };
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(openat2(top, path, flags, Mode::empty(), resolve)?)
}

fn below(directory: &CString, name: &OsStr) -> io::Result<CString> {
    let mut path = directory.as_bytes().to_vec();
    if !path.is_empty() {
        path.push(b'/');
    }
    path.extend_from_slice(name.as_bytes());
    Ok(CString::new(path)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, File};
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};

    #[test]
    fn all_of_a_volume_is_its_groups_and_nothing_that_a_link_leads_to() {
        if !brig_fixtures::needs::root() {
            return;
        }
        let base = tempfile::tempdir().unwrap();
        let (volume, other) = (base.path().join("volume"), base.path().join("other"));
        fs::create_dir_all(volume.join("a/b")).unwrap();
        fs::create_dir(&other).unwrap();
        fs::write(volume.join("a/b/file"), "").unwrap();
        fs::write(volume.join("a/run"), "").unwrap();
        fs::set_permissions(volume.join("a/run"), fs::Permissions::from_mode(0o4701)).unwrap();
        fs::write(other.join("file"), "").unwrap();
        let before = fs::metadata(other.join("file")).unwrap();
        symlink(other.join("file"), volume.join("link")).unwrap();
        symlink(&other, volume.join("a/way")).unwrap();
        let top: OwnedFd = File::open(&volume).unwrap().into();
        give(&top, 4242, false).unwrap();
        let of = |path: &str| {
            let seen = fs::symlink_metadata(volume.join(path)).unwrap();
            (seen.gid(), seen.mode() & 0o7777)
        };
        assert_eq!(of("").0, 4242);
        for directory in ["", "a", "a/b"] {
            let (gid, mode) = of(directory);
            assert_eq!((gid, mode & DIRECTORY), (4242, DIRECTORY), "{directory}");
        }
        assert_eq!(of("a/b/file").1 & FILE, FILE);
        assert_eq!(of("a/run"), (4242, 0o4761));
        assert_eq!(of("link").0, 4242);
        let after = fs::metadata(other.join("file")).unwrap();
        assert_eq!((after.gid(), after.mode()), (before.gid(), before.mode()));
        // One that seems to be given is left alone, if that is wanted.
        fs::write(volume.join("new"), "").unwrap();
        std::os::unix::fs::chown(volume.join("new"), None, Some(7)).unwrap();
        give(&top, 4242, true).unwrap();
        assert_eq!(of("new").0, 7);
        give(&top, 4242, false).unwrap();
        assert_eq!(of("new").0, 4242);
    }
}
