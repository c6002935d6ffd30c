//! Mounts that the node makes below what is shared already.

use std::os::unix::fs::symlink;
use std::process::Command;

use brig_hypervisor::share::{FileId, LaterMount};

use super::*;

#[test]
fn later_mounts_of_the_host_appear_only_if_asked_for() {
    let (jailed, share) = Jailed::start();
    let volume = tempfile::tempdir_in("/dev/shm").unwrap();
    mount_tmpfs(volume.path());
    let shared = Command::new("mount")
        .arg("--make-shared")
        .arg(volume.path())
        .status();
    assert!(shared.unwrap().success());
    let later = volume.path().join("later");
    fs::create_dir(&later).unwrap();
    let recursive = Attributes {
        recursive: true,
        ..Attributes::default()
    };
    for name in ["private", "follows"] {
        let recursive = recursive.clone();
        share.attach_dir(volume.path(), name, recursive).unwrap();
    }
    mount_tmpfs(&later);
    fs::write(later.join("file"), "").unwrap();
    assert_eq!(jailed.ask("list /shared/private/later"), "");
    assert_eq!(jailed.ask("list /shared/follows/later"), "");
    let below = Path::new("later");
    let (top, id) = (volume.path(), mount_id(&later));
    share
        .attach_below(&made_later(top, below, id), "follows", true)
        .unwrap();
    assert_eq!(jailed.ask("list /shared/private/later"), "");
    assert_eq!(jailed.ask("list /shared/follows/later"), "file");
    assert_eq!(
        jailed.ask("write /shared/follows/later/new"),
        format!("error {}", libc::EROFS)
    );
    jailed.has_flags("/shared/follows/later");
    // What the jail has open of it keeps it from neither end.
    assert_eq!(jailed.ask("hold /shared/follows/later/file"), "held");
    share.detach_below("follows", below).unwrap();
    assert_eq!(jailed.ask("list /shared/follows/later"), "");
    assert!(matches!(
        share.detach_below("follows", below),
        Err(ShareError::NotAttached { .. })
    ));
    jailed.ask("release");
    unmount(&later);
    for name in ["private", "follows"] {
        detach(&share, name);
    }
    unmount(volume.path());
}

fn mount_id(path: &Path) -> u64 {
    let flags = rustix::fs::StatxFlags::MNT_ID;
    let at = rustix::fs::AtFlags::empty();
    rustix::fs::statx(rustix::fs::CWD, path, at, flags)
        .unwrap()
        .stx_mnt_id
}

pub(super) fn made_later<'a>(top: &'a Path, way: &'a Path, id: u64) -> LaterMount<'a> {
    let stat = rustix::fs::stat(top).unwrap();
    LaterMount {
        top,
        identity: FileId {
            device: stat.st_dev,
            inode: stat.st_ino,
        },
        way,
        id,
        id_map: None,
    }
}

#[test]
fn a_later_mount_of_the_nodes_kernel_never_comes_along() {
    let (jailed, share) = Jailed::start();
    let volume = tempfile::tempdir_in("/dev/shm").unwrap();
    let below = volume.path().join("proc");
    fs::create_dir(&below).unwrap();
    share
        .attach_dir(volume.path(), "v", Attributes::default())
        .unwrap();
    let mount = Command::new("mount")
        .args(["-t", "proc", "proc"])
        .arg(&below)
        .status();
    assert!(mount.unwrap().success());
    let later = made_later(volume.path(), Path::new("proc"), mount_id(&below));
    let refused = share.attach_below(&later, "v", false);
    assert!(
        matches!(refused, Err(ShareError::KernelFileSystem { .. })),
        "{refused:?}"
    );
    assert_eq!(jailed.ask("list /shared/v/proc"), "");
    unmount(&below);
    detach(&share, "v");
}

#[test]
fn a_later_mount_whose_place_was_exchanged_is_not_followed_anywhere() {
    let (jailed, share) = Jailed::start();
    let volume = tempfile::tempdir_in("/dev/shm").unwrap();
    let (top, below) = (volume.path(), volume.path().join("d/m"));
    fs::create_dir_all(&below).unwrap();
    let elsewhere = tempfile::tempdir_in("/dev/shm").unwrap();
    fs::create_dir(elsewhere.path().join("m")).unwrap();
    fs::write(elsewhere.path().join("m/secret"), "s").unwrap();
    let share_path = "v";
    share
        .attach_dir(top, share_path, Attributes::default())
        .unwrap();
    mount_tmpfs(&below);
    let id = mount_id(&below);
    let try_it =
        |way: &str| share.attach_below(&made_later(top, Path::new(way), id), share_path, false);
    // What a guest's rename does: the mount's place is a link, or a directory above it is.
    symlink(elsewhere.path().join("m"), top.join("d/link")).unwrap();
    symlink(elsewhere.path(), top.join("up")).unwrap();
    for way in ["d/link", "up/m", "../x", "/", "d", "gone"] {
        let refused = try_it(way);
        assert!(
            matches!(refused, Err(ShareError::Moved { .. })),
            "{way}: {refused:?}"
        );
    }
    // Another directory at the volume's own path.
    let mut other = made_later(top, Path::new("d/m"), id);
    other.identity.inode += 1;
    let refused = share.attach_below(&other, share_path, false);
    assert!(matches!(refused, Err(ShareError::Moved { .. })));
    let linked = elsewhere.path().join("top");
    symlink(top, &linked).unwrap();
    let refused = share.attach_below(
        &made_later(&linked, Path::new("d/m"), id),
        share_path,
        false,
    );
    assert!(matches!(refused, Err(ShareError::Moved { .. })));
    // In the jail's view the place can be exchanged as well.
    assert_eq!(jailed.ask("list /shared/v/d/m"), "");
    try_it("d/m").unwrap();
    for way in ["up/m", "../x", "/proc"] {
        assert!(
            share.detach_below(share_path, Path::new(way)).is_err(),
            "{way}"
        );
    }
    detach(&share, share_path);
    unmount(&below);
}
