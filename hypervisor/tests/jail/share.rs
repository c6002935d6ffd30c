//! Private mounts of the share: seen in the jail and nowhere else.

use std::os::unix::fs::{MetadataExt as _, symlink};
use std::process::Command;

use brig_hypervisor::share::{IdMap, IdRange, RootfsMount};

use super::later_mounts::made_later;
use super::*;

#[test]
fn a_shared_directory_is_seen_in_the_jail_and_nowhere_else() {
    let (jailed, share) = Jailed::start();
    let volume = tempfile::tempdir().unwrap();
    fs::write(volume.path().join("file"), "hello").unwrap();

    share
        .attach_dir(volume.path(), "volumes/one", Attributes::default())
        .unwrap();
    assert_eq!(jailed.ask("read /shared/volumes/one/file"), "hello");
    assert_eq!(jailed.ask("write /shared/volumes/one/new"), "written");
    assert!(volume.path().join("new").exists());
    assert!(!node_shows(volume.path()), "the node's mount table");
    jailed.has_flags("/shared/volumes/one");

    detach(&share, "volumes/one");
    assert_eq!(
        jailed.ask("list /shared"),
        ".own",
        "the mount point is gone too"
    );
    // What is the pod's own lies in a directory that is served, and stays.
    let own = format!("/proc/{}/root/shared/.own", jailed.vmm.pid());
    let inode = || fs::metadata(&own).unwrap().ino();
    let before = inode();
    share
        .attach_dir(volume.path(), ".own/x/rootfs", Attributes::default())
        .unwrap();
    assert!(jailed.ask("list /shared/.own/x/rootfs").contains("file"));
    detach(&share, ".own/x/rootfs");
    assert_eq!(jailed.ask("list /shared/.own"), "");
    assert_eq!(inode(), before);
    assert!(matches!(
        share.detach("volumes/one"),
        Err(ShareError::NotAttached { .. })
    ));
}

#[test]
fn a_read_only_share_cannot_be_written_from_the_jail() {
    let (jailed, share) = Jailed::start();
    let volume = tempfile::tempdir().unwrap();
    let attributes = Attributes {
        readonly: true,
        ..Attributes::default()
    };
    share.attach_dir(volume.path(), "v", attributes).unwrap();
    assert_eq!(
        jailed.ask("write /shared/v/new"),
        format!("error {}", libc::EROFS)
    );
    assert_eq!(
        jailed.ask("write /shared/new"),
        format!("error {}", libc::EROFS),
        "the share's own root"
    );
}

#[test]
fn a_shared_file_is_alone() {
    let (jailed, share) = Jailed::start();
    let volume = tempfile::tempdir().unwrap();
    fs::write(volume.path().join("wanted"), "w").unwrap();
    fs::write(volume.path().join("neighbour"), "n").unwrap();
    share
        .attach_file(
            &volume.path().join("wanted"),
            "etc/hosts",
            Attributes::default(),
        )
        .unwrap();
    assert_eq!(jailed.ask("read /shared/etc/hosts"), "w");
    assert_eq!(jailed.ask("list /shared/etc"), "hosts");
    assert!(matches!(
        share.attach_dir(&volume.path().join("wanted"), "x", Attributes::default()),
        Err(ShareError::Kind {
            expected: "directory",
            ..
        })
    ));
    detach(&share, "etc/hosts");
}

#[test]
fn an_overlay_lives_in_the_jail_alone() {
    let (jailed, share) = Jailed::start();
    // The layers must not lie on an overlay themselves.
    let snapshots = tempfile::tempdir_in(overlay_base()).unwrap();
    for name in ["l1", "l2", "upper", "work"] {
        fs::create_dir(snapshots.path().join(name)).unwrap();
    }
    fs::write(snapshots.path().join("l1/one"), "1").unwrap();
    fs::write(snapshots.path().join("l2/two"), "2").unwrap();
    let at = |name: &str| snapshots.path().join(name).display().to_string();
    let mounts = [RootfsMount {
        fstype: "overlay".into(),
        source: "overlay".into(),
        options: vec![
            "index=off".into(),
            format!("lowerdir={}:{}", at("l2"), at("l1")),
            format!("upperdir={}", at("upper")),
            format!("workdir={}", at("work")),
        ],
    }];
    share.attach_rootfs(&mounts, "c1/rootfs").unwrap();
    assert_eq!(jailed.ask("list /shared/c1/rootfs"), "one two");
    assert_eq!(jailed.ask("write /shared/c1/rootfs/three"), "written");
    assert!(snapshots.path().join("upper/three").exists());
    assert!(!node_shows(snapshots.path()), "the node's mount table");

    assert_eq!(jailed.ask("hold /shared/c1/rootfs/one"), "held");
    assert!(matches!(
        share.detach("c1/rootfs"),
        Err(ShareError::Busy { .. })
    ));
    jailed.ask("release");
    detach(&share, "c1/rootfs");
    // Free: the same upper directory can be used by another overlay.
    share.attach_rootfs(&mounts, "c1/rootfs").unwrap();
}

fn overlay_base() -> &'static Path {
    Path::new("/dev/shm")
}

#[test]
fn an_occupied_path_is_refused_and_links_are_not_followed() {
    let (jailed, share) = Jailed::start();
    let volume = tempfile::tempdir().unwrap();
    fs::create_dir(volume.path().join("sub")).unwrap();
    symlink("/", volume.path().join("link")).unwrap();
    share
        .attach_dir(volume.path(), "v", Attributes::default())
        .unwrap();
    for path in ["v", "v/sub", "v/link/x"] {
        assert!(
            matches!(
                share.attach_dir(volume.path(), path, Attributes::default()),
                Err(ShareError::AlreadyAttached { .. })
            ),
            "{path}"
        );
    }
    for path in ["../x", "/x", ""] {
        assert!(matches!(
            share.attach_dir(volume.path(), path, Attributes::default()),
            Err(ShareError::InvalidPath { .. })
        ));
    }
    let error = share
        .attach_dir(Path::new("/nonexistent/x"), "y", Attributes::default())
        .unwrap_err();
    assert!(error.to_string().contains("/nonexistent/x"), "{error}");
    drop(jailed);
}

#[test]
fn dot_dot_leads_to_the_jails_own_root_from_everywhere() {
    let (jailed, share) = Jailed::start();
    let volume = tempfile::tempdir().unwrap();
    fs::create_dir(volume.path().join("sub")).unwrap();
    share
        .attach_dir(volume.path(), "v", Attributes::default())
        .unwrap();
    for directory in [
        "/",
        "/shared",
        "/shared/v",
        "/shared/v/sub",
        "/proc",
        "/proc/self/fd",
    ] {
        assert_eq!(
            jailed.ask(&format!("climb {directory}")),
            "/",
            "{directory}"
        );
    }
    assert_eq!(jailed.ask("list /proc"), "1 self thread-self", "subset=pid");
}

#[test]
fn the_nodes_kernel_file_systems_never_come_along() {
    let (jailed, share) = Jailed::start();
    for path in ["/proc", "/proc/sys", "/sys"] {
        assert!(
            matches!(
                share.attach_dir(Path::new(path), "v", Attributes::default()),
                Err(ShareError::KernelFileSystem { .. })
            ),
            "{path}"
        );
    }
    assert!(matches!(
        share.attach_file(
            Path::new("/proc/sys/kernel/core_pattern"),
            "v",
            Attributes::default()
        ),
        Err(ShareError::KernelFileSystem { .. })
    ));
    let recursive = Attributes {
        recursive: true,
        ..Attributes::default()
    };
    share.attach_dir(Path::new("/"), "host", recursive).unwrap();
    assert_eq!(jailed.ask("list /shared/host/proc"), "");
    assert_eq!(jailed.ask("list /shared/host/sys"), "");
    assert!(jailed.ask("list /shared/host/etc").contains("passwd"));
    let table = jailed.node("mountinfo");
    for kind in ["sysfs", "cgroup", "cgroup2", "debugfs"] {
        assert!(!table.contains(&format!(" - {kind} ")), "{kind}");
    }
    assert_eq!(table.matches(" - proc ").count(), 1, "only the jail's own");
    detach(&share, "host");
    // One that no list of the kernel's file systems of former days had.
    let volume = tempfile::tempdir_in("/dev/shm").unwrap();
    let below = volume.path().join("queues");
    fs::create_dir(&below).unwrap();
    fs::write(volume.path().join("file"), "").unwrap();
    let status = Command::new("mount")
        .args(["-t", "mqueue", "mqueue"])
        .arg(&below)
        .status();
    assert!(status.unwrap().success());
    let recursive = Attributes {
        recursive: true,
        ..Attributes::default()
    };
    let left_out = share.attach_dir(volume.path(), "v", recursive).unwrap();
    assert_eq!(
        left_out,
        [],
        "what is known to hold no data is not worth a line"
    );
    assert_eq!(jailed.ask("list /shared/v"), "file queues");
    assert!(!jailed.node("mountinfo").contains(" - mqueue "));
    let refused = share.attach_dir(&below, "queues", Attributes::default());
    assert!(matches!(refused, Err(ShareError::KernelFileSystem { .. })));
    detach(&share, "v");
    unmount(&below);
}

pub fn mount_tmpfs(path: &Path) {
    let arguments = ["-t", "tmpfs", "brig-test"];
    let status = Command::new("mount").args(arguments).arg(path).status();
    assert!(status.unwrap().success());
}

pub fn unmount(path: &Path) {
    assert!(Command::new("umount").arg(path).status().unwrap().success());
}

#[test]
fn a_source_that_is_not_what_was_examined_is_not_shared() {
    let (_jailed, share) = Jailed::start();
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let expected = Some(made_later(one.path(), Path::new(""), 0).identity);
    let attributes = Attributes {
        expected,
        ..Attributes::default()
    };
    share
        .attach_dir(one.path(), "v", attributes.clone())
        .unwrap();
    let refused = share.attach_dir(two.path(), "w", attributes);
    assert!(
        matches!(refused, Err(ShareError::Moved { .. })),
        "{refused:?}"
    );
    detach(&share, "v");
}

#[test]
fn owners_are_seen_through_the_map_of_a_mount() {
    let (jailed, share) = Jailed::start();
    let volume = tempfile::tempdir_in("/dev/shm").unwrap();
    mount_tmpfs(volume.path());
    let below = volume.path().join("below");
    fs::create_dir(&below).unwrap();
    mount_tmpfs(&below);
    // Nobody writes to a directory whose owner is in no map.
    for directory in [volume.path(), &below] {
        std::os::unix::fs::chown(directory, Some(1000), Some(2000)).unwrap();
    }
    // The VMM's root is the host's 1000 there.
    let range = |stored| IdRange {
        stored,
        seen: 0,
        length: 1,
    };
    for (map_below, owner_below) in [(false, 0), (true, 1000)] {
        let mapped = Attributes {
            recursive: true,
            id_map: Some(IdMap::new(&[range(1000)], &[range(2000)], map_below)),
            ..Attributes::default()
        };
        share.attach_dir(volume.path(), "v", mapped).unwrap();
        assert_eq!(jailed.ask("write /shared/v/new"), "written");
        let made = fs::metadata(volume.path().join("new")).unwrap();
        assert_eq!((made.uid(), made.gid()), (1000, 2000));
        assert_eq!(jailed.ask("write /shared/v/below/new"), "written");
        let made = fs::metadata(below.join("new")).unwrap();
        assert_eq!(made.uid(), owner_below);
        for made in [volume.path(), &below] {
            fs::remove_file(made.join("new")).unwrap();
        }
        detach(&share, "v");
    }
    unmount(&below);
    unmount(volume.path());
}

#[test]
fn a_file_system_without_maps_is_refused_with_the_fix() {
    let (_jailed, share) = Jailed::start();
    let volume = tempfile::tempdir_in("/dev/shm").unwrap();
    let status = Command::new("mount")
        .args(["-t", "ramfs", "brig-test"])
        .arg(volume.path())
        .status();
    assert!(status.unwrap().success());
    let all = [IdRange {
        stored: 0,
        seen: 200_000,
        length: 65_536,
    }];
    let mapped = Attributes {
        id_map: Some(IdMap::new(&all, &all, false)),
        ..Attributes::default()
    };
    let error = share.attach_dir(volume.path(), "v", mapped).unwrap_err();
    assert!(
        matches!(error, ShareError::Unmappable { .. }) && error.to_string().contains("hostUsers"),
        "{error}"
    );
    unmount(volume.path());
}

#[test]
fn read_only_can_be_taken_back_and_given_again() {
    let (jailed, share) = Jailed::start();
    let volume = tempfile::tempdir().unwrap();
    let attributes = Attributes {
        readonly: true,
        ..Attributes::default()
    };
    share.attach_dir(volume.path(), "a/v", attributes).unwrap();
    share.set_readonly("a/v", false).unwrap();
    assert_eq!(jailed.ask("write /shared/a/v/new"), "written");
    share.set_readonly("a/v", true).unwrap();
    assert_eq!(
        jailed.ask("write /shared/a/v/other"),
        format!("error {}", libc::EROFS)
    );
    // The share's own root stays as it is.
    assert!(share.set_readonly("a", false).is_err());
    assert!(share.set_readonly("none", false).is_err());
    assert_eq!(
        jailed.ask("write /shared/a/new"),
        format!("error {}", libc::EROFS)
    );
    detach(&share, "a/v");
}

#[test]
fn mounts_below_a_shared_directory_go_with_it() {
    let (jailed, share) = Jailed::start();
    let volume = tempfile::tempdir_in("/dev/shm").unwrap();
    let below = volume.path().join("below");
    fs::create_dir(&below).unwrap();
    mount_tmpfs(&below);
    fs::write(below.join("deep"), "d").unwrap();
    let recursive = Attributes {
        recursive: true,
        readonly: true,
        ..Attributes::default()
    };
    share
        .attach_dir(volume.path(), "v", recursive.clone())
        .unwrap();
    assert_eq!(jailed.ask("read /shared/v/below/deep"), "d");
    assert_eq!(
        jailed.ask("write /shared/v/below/x"),
        format!("error {}", libc::EROFS)
    );
    detach(&share, "v");
    let top_only = Attributes {
        writable_below: true,
        ..recursive
    };
    share.attach_dir(volume.path(), "v", top_only).unwrap();
    assert_eq!(
        jailed.ask("write /shared/v/x"),
        format!("error {}", libc::EROFS)
    );
    assert_eq!(jailed.ask("write /shared/v/below/x"), "written");
    detach(&share, "v");
    unmount(&below);
}

#[test]
fn a_mount_below_whose_directory_the_host_removes_does_not_keep_the_rest() {
    let (_jailed, share) = Jailed::start();
    let volume = tempfile::tempdir_in("/dev/shm").unwrap();
    let below = volume.path().join("below");
    fs::create_dir(&below).unwrap();
    mount_tmpfs(&below);
    let recursive = Attributes {
        recursive: true,
        ..Attributes::default()
    };
    share.attach_dir(volume.path(), "v", recursive).unwrap();
    unmount(&below);
    fs::remove_dir(&below).unwrap();
    detach(&share, "v");
}
