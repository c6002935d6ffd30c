use super::*;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::PathBuf;

fn read_with(top: &Path, limits: Limits) -> Result<Snapshot, ReadError> {
    directory(top, identity(top).unwrap(), limits, &mut |_| Ok(()))
}

fn read(top: &Path) -> Result<Snapshot, ReadError> {
    read_with(top, LIMITS)
}

fn atomic() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let generation = dir.path().join("..2026_1");
    fs::create_dir(&generation).unwrap();
    fs::write(generation.join("token"), "sesame").unwrap();
    chown(generation.join("token"), Some(1000), Some(2000)).unwrap();
    fs::set_permissions(generation.join("token"), fs::Permissions::from_mode(0o440)).unwrap();
    symlink("..2026_1", dir.path().join("..data")).unwrap();
    symlink("..data/token", dir.path().join("token")).unwrap();
    (dir, generation)
}

#[test]
fn everything_is_read_with_owner_mode_and_content_and_parents_come_first() {
    let (dir, _) = atomic();
    let snapshot = read(dir.path()).unwrap();
    let seen: Vec<(String, &[u8])> = snapshot
        .entries
        .iter()
        .map(|e| {
            (
                String::from_utf8(e.path.clone()).unwrap(),
                e.content.as_slice(),
            )
        })
        .collect();
    assert_eq!(
        seen,
        [
            (String::new(), &b""[..]),
            ("..2026_1".into(), b""),
            ("..2026_1/token".into(), b"sesame"),
            ("..data".into(), b"..2026_1"),
            ("token".into(), b"..data/token"),
        ]
    );
    let token = &snapshot.entries[2];
    assert_eq!(
        (token.uid, token.gid, token.mode & 0o7777),
        (1000, 2000, 0o440)
    );
    assert_eq!(snapshot.bytes, 6);
    for entry in &snapshot.entries {
        let path = std::path::Path::new(std::ffi::OsStr::from_bytes(&entry.path));
        let stat = fs::symlink_metadata(dir.path().join(path)).unwrap();
        let modified = (
            entry.modified.seconds,
            i64::from(entry.modified.nanoseconds),
        );
        assert_eq!(modified, (stat.mtime(), stat.mtime_nsec()), "{path:?}");
    }
}

#[test]
fn a_secret_is_not_shown_by_debug() {
    let (dir, _) = atomic();
    let shown = format!("{:?}", read(dir.path()).unwrap());
    assert!(!shown.contains("sesame"), "{shown}");
}

#[test]
fn each_directory_is_watched_before_it_is_listed() {
    let (dir, generation) = atomic();
    let mut watched = Vec::new();
    let snapshot = directory(
        dir.path(),
        identity(dir.path()).unwrap(),
        LIMITS,
        &mut |fd| {
            watched.push(fstat(fd)?.st_ino);
            // Made at the last moment, it is still seen.
            if watched.len() == 2 {
                fs::write(generation.join("late"), "x")?;
            }
            Ok(())
        },
    )
    .unwrap();
    assert_eq!(watched.len(), 2);
    assert!(snapshot.entries.iter().any(|e| e.path == b"..2026_1/late"));
}

#[test]
fn limits_are_kept_and_named() {
    let (dir, generation) = atomic();
    let reason = |limits| match read_with(dir.path(), limits) {
        Err(ReadError::Unsuitable(reason)) => reason,
        other => panic!("{other:?}"),
    };
    let small = |change: fn(&mut Limits)| {
        let mut limits = LIMITS;
        change(&mut limits);
        limits
    };
    assert!(reason(small(|l| l.entries = 4)).contains("4 files"));
    assert!(reason(small(|l| l.file = 5)).contains("5 bytes"));
    assert!(reason(small(|l| l.total = 5)).contains("5 bytes"));
    assert!(reason(small(|l| l.depth = 1)).contains("1 deep"));
    nix::unistd::mkfifo(&generation.join("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(reason(LIMITS).contains("something else"));
}

#[test]
fn another_directory_at_the_path_is_not_taken_for_the_first() {
    let (dir, _) = atomic();
    let other = tempfile::tempdir().unwrap();
    let identity = identity(other.path()).unwrap();
    let got = directory(dir.path(), identity, LIMITS, &mut |_| Ok(()));
    assert!(matches!(got, Err(ReadError::Gone)), "{got:?}");
    let got = directory(Path::new("/nonexistent/x"), identity, LIMITS, &mut |_| {
        Ok(())
    });
    assert!(matches!(got, Err(ReadError::Gone)), "{got:?}");
}

#[test]
fn a_single_file_becomes_a_directory_that_holds_it() {
    let (_dir, generation) = atomic();
    let snapshot = file(&generation.join("token"), "file", LIMITS).unwrap();
    assert_eq!(snapshot.entries.len(), 2);
    assert_eq!(snapshot.entries[1].path, b"file");
    assert_eq!(snapshot.entries[1].content, b"sesame");
    assert_eq!(snapshot.entries[1].mode & 0o7777, 0o440);
}

#[test]
fn the_way_to_a_sub_path_has_owners_and_modes() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("a/b")).unwrap();
    chown(dir.path().join("a/b"), None, Some(2000)).unwrap();
    fs::set_permissions(dir.path().join("a/b"), fs::Permissions::from_mode(0o2777)).unwrap();
    let entries = chain(dir.path(), Path::new("a/b")).unwrap();
    let paths: Vec<_> = entries.iter().map(|e| e.path.as_slice()).collect();
    assert_eq!(paths, [&b"a"[..], b"a/b"]);
    assert_eq!((entries[1].gid, entries[1].mode & 0o7777), (2000, 0o2777));
    assert!(chain(dir.path(), Path::new("")).unwrap().is_empty());
}
