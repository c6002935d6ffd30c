//! The jail, the launcher and the share as living processes. Needs root; nothing else of the node.
//! `BRIG_JAIL_PROBE` names the probe where it is not where it was built.

// Helpers are no #[test] to clippy, and may fail a test in the same way.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use brig_hypervisor::jail::allow;
use brig_hypervisor::jail::audit::{Stage, differences};
use brig_hypervisor::launch::{LaunchOptions, VmmExit, VmmProcess, launch};
use brig_hypervisor::share::{Attributes, RootfsMount, Share, ShareError};

const MAX_FILES: u64 = 4321;

/// A launched probe and its control socket.
struct Jailed {
    control: Option<OwnedFd>,
    vmm: VmmProcess,
}

impl Jailed {
    fn start() -> (Self, Share) {
        Self::start_with(None)
    }

    fn start_with(netns: Option<OwnedFd>) -> (Self, Share) {
        let log = fs::File::options()
            .append(true)
            .open("/dev/stderr")
            .unwrap();
        let mut vmm = launch(LaunchOptions {
            vmm: std::env::var_os("BRIG_JAIL_PROBE")
                .unwrap_or_else(|| env!("CARGO_BIN_EXE_brig-jail-probe").into())
                .into(),
            netns,
            cgroup: None,
            cgroup_procs: Vec::new(),
            stderr: log.into(),
            max_files: MAX_FILES,
        })
        .unwrap();
        let control = vmm.take_control();
        let share = Share::new(&mut vmm).unwrap();
        (Self { control, vmm }, share)
    }

    fn ask(&self, request: &str) -> String {
        let control = self.control.as_ref().unwrap();
        nix::unistd::write(control, request.as_bytes()).unwrap();
        let mut buffer = vec![0u8; 64 * 1024];
        let length = nix::unistd::read(control, &mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    }

    fn node(&self, file: &str) -> String {
        fs::read_to_string(format!("/proc/{}/{file}", self.vmm.pid())).unwrap()
    }
}

/// The node's mount table, to be the same before and after.
fn node_mounts() -> String {
    fs::read_to_string("/proc/self/mountinfo").unwrap()
}

fn field<'a>(status: &'a str, name: &str) -> &'a str {
    status
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .unwrap()
        .trim()
}

#[test]
fn the_living_process_has_what_the_list_allows_and_no_more() {
    let (jailed, _share) = Jailed::start();

    let found = differences(jailed.vmm.pid(), Stage::Jailed).unwrap();
    assert!(found.is_empty(), "{}", found.join("\n"));
    let mut numbers: Vec<u32> = fs::read_dir(format!("/proc/{}/fd", jailed.vmm.pid()))
        .unwrap()
        .map(|entry| {
            entry
                .unwrap()
                .file_name()
                .to_string_lossy()
                .parse()
                .unwrap()
        })
        .collect();
    numbers.sort_unstable();
    assert_eq!(numbers, [0, 1, 2, 3]);
    assert!(jailed.node("status").contains("\nNSpid:\t"));
    let inner = jailed.ask("read /proc/self/status");
    assert_eq!(field(&inner, "Pid"), "1", "pid 1 of its own namespace");
    assert_eq!(jailed.ask("hostname"), "brig");
    assert_eq!(jailed.ask("limit"), format!("{MAX_FILES} {MAX_FILES}"));
    assert!(
        jailed
            .node("limits")
            .contains("Max core file size        0                    0")
    );
    // Landlock: nothing but /shared and /proc can even be listed.
    assert_eq!(jailed.ask("list /"), format!("error {}", libc::EACCES));
    let root = fs::read_dir(format!("/proc/{}/root/", jailed.vmm.pid())).unwrap();
    let mut names: Vec<_> = root.map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["proc", "shared"]);
    assert_eq!(jailed.ask("list /shared"), "");
}

#[test]
fn a_shared_directory_is_seen_in_the_jail_and_nowhere_else() {
    let node = node_mounts();
    let (jailed, share) = Jailed::start();
    let volume = tempfile::tempdir().unwrap();
    fs::write(volume.path().join("file"), "hello").unwrap();

    share
        .attach_dir(volume.path(), "volumes/one", Attributes::default())
        .unwrap();
    assert_eq!(jailed.ask("read /shared/volumes/one/file"), "hello");
    assert_eq!(jailed.ask("write /shared/volumes/one/new"), "written");
    assert!(volume.path().join("new").exists());
    assert_eq!(node_mounts(), node, "the node's mount table");
    let line = jailed
        .node("mountinfo")
        .lines()
        .find(|line| line.contains(" /shared/volumes/one "))
        .unwrap()
        .to_owned();
    for flag in allow::MOUNT_FLAGS {
        assert!(line.contains(flag), "{line}");
    }

    share.detach("volumes/one").unwrap();
    assert_eq!(
        jailed.ask("list /shared"),
        "",
        "the mount point is gone too"
    );
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
    share.detach("etc/hosts").unwrap();
}

#[test]
fn an_overlay_lives_in_the_jail_alone() {
    let node = node_mounts();
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
    assert_eq!(node_mounts(), node, "the node's mount table");

    assert_eq!(jailed.ask("hold /shared/c1/rootfs/one"), "held");
    assert!(matches!(
        share.detach("c1/rootfs"),
        Err(ShareError::Busy { .. })
    ));
    jailed.ask("release");
    share.detach("c1/rootfs").unwrap();
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
fn the_vmm_ends_with_its_control_socket_and_takes_its_mounts_along() {
    let (mut jailed, share) = Jailed::start();
    let volume = tempfile::tempdir_in("/dev/shm").unwrap();
    let mounted = volume.path().join("tmpfs");
    fs::create_dir(&mounted).unwrap();
    assert!(
        Command::new("mount")
            .args(["-t", "tmpfs", "brig-test"])
            .arg(&mounted)
            .status()
            .unwrap()
            .success()
    );
    share
        .attach_dir(&mounted, "v", Attributes::default())
        .unwrap();
    drop(jailed.control.take());
    assert_eq!(jailed.vmm.wait().unwrap(), VmmExit::Code(14));
    assert_eq!(jailed.vmm.exit_status(), Some(VmmExit::Code(14)));
    share.detach("v").unwrap();
    // Not lazily: this fails with EBUSY if anything still holds it.
    assert!(
        Command::new("umount")
            .arg(&mounted)
            .status()
            .unwrap()
            .success()
    );
}

#[test]
fn dropping_the_process_kills_and_reaps_it() {
    let (jailed, _share) = Jailed::start();
    let pid = jailed.vmm.pid();
    drop(jailed);
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
}

#[test]
fn mounts_below_a_shared_directory_go_with_it() {
    let (jailed, share) = Jailed::start();
    let volume = tempfile::tempdir_in("/dev/shm").unwrap();
    let below = volume.path().join("below");
    fs::create_dir(&below).unwrap();
    assert!(
        Command::new("mount")
            .args(["-t", "tmpfs", "brig-test"])
            .arg(&below)
            .status()
            .unwrap()
            .success()
    );
    fs::write(below.join("deep"), "d").unwrap();
    let recursive = Attributes {
        recursive: true,
        readonly: true,
        ..Attributes::default()
    };
    share.attach_dir(volume.path(), "v", recursive).unwrap();
    assert_eq!(jailed.ask("read /shared/v/below/deep"), "d");
    assert_eq!(
        jailed.ask("write /shared/v/below/x"),
        format!("error {}", libc::EROFS)
    );
    share.detach("v").unwrap();
    assert!(
        Command::new("umount")
            .arg(&below)
            .status()
            .unwrap()
            .success()
    );
}

/// (attempt, what the jail without seccomp may answer, what it answers under the file server's filter).
/// "allowed" in the first place only means that seccomp is the only wall, and harmless alone.
const ESCAPES: &[(&str, &[&str], &[&str])] = &[
    ("open /etc/passwd", &["ENOENT"], &["ENOENT"]),
    ("open /var/lib/containerd", &["ENOENT"], &["ENOENT"]),
    ("open /run/brig (other pods)", &["ENOENT"], &["ENOENT"]),
    ("open /dev/kvm", &["ENOENT"], &["ENOENT"]),
    ("write core_pattern", &["ENOENT"], &["ENOENT"]),
    ("write core_pattern by ..", &["ENOENT"], &["ENOENT"]),
    ("climb from the share by ..", &["ENOENT"], &["ENOENT"]),
    (
        "open another process's root",
        &["ENOENT", "EACCES"],
        &["ENOENT", "EACCES"],
    ),
    (
        "overwrite /proc/self/exe",
        &["EROFS", "ETXTBSY"],
        &["EROFS", "ETXTBSY"],
    ),
    ("read /proc/self/exe", &["EACCES"], &["EACCES"]),
    ("change the mode of /proc/self/exe", &["EROFS"], &["EROFS"]),
    ("change the owner of /proc/self/exe", &["EROFS"], &["EROFS"]),
    ("give /proc/self/exe an attribute", &["EROFS"], &["EROFS"]),
    ("change the mode of /dev/null", &["EROFS"], &["EROFS"]),
    ("read another process's memory file", &["EROFS"], &["EROFS"]),
    ("write a read-only share", &["EROFS"], &["EROFS"]),
    ("write the share's root", &["EROFS"], &["EROFS"]),
    ("open a device node of a volume", &["EACCES"], &["EACCES"]),
    ("make a device node", &["EPERM"], &["EPERM"]),
    (
        "follow a volume's link to the host",
        &["ENOENT"],
        &["ENOENT"],
    ),
    ("mount a tmpfs", &["EPERM"], &["SIGSYS"]),
    (
        "remount a read-only share writable",
        &["EPERM"],
        &["SIGSYS"],
    ),
    (
        "mount_setattr a read-only share writable",
        &["EPERM"],
        &["SIGSYS"],
    ),
    ("unmount a share", &["EPERM"], &["SIGSYS"]),
    ("fsopen proc", &["EPERM"], &["SIGSYS"]),
    ("clone a mount", &["EPERM"], &["SIGSYS"]),
    ("pivot_root", &["EPERM"], &["SIGSYS"]),
    ("chroot", &["EPERM"], &["SIGSYS"]),
    ("setns to the network namespace", &["EPERM"], &["SIGSYS"]),
    ("setns to pid 1's mounts", &["EPERM"], &["SIGSYS"]),
    ("unshare a user namespace", &["ENOSPC"], &["SIGSYS"]),
    ("unshare a mount namespace", &["EPERM"], &["SIGSYS"]),
    ("clone into a user namespace", &["ENOSPC"], &["SIGSYS"]),
    ("fork", &["allowed"], &["SIGSYS"]),
    ("execute a file of a volume", &["EACCES"], &["SIGSYS"]),
    ("map a file of a volume executable", &["EPERM"], &["SIGSYS"]),
    ("map executable memory", &["allowed"], &["SIGSYS"]),
    ("memfd_create", &["allowed"], &["SIGSYS"]),
    ("socket unix", &["allowed"], &["SIGSYS"]),
    ("socket packet", &["EPERM"], &["SIGSYS"]),
    ("socket netlink", &["allowed"], &["SIGSYS"]),
    (
        "io_uring_setup",
        &["allowed", "EPERM", "ENOSYS"],
        &["SIGSYS"],
    ),
    ("ptrace pid 1", &["EPERM"], &["SIGSYS"]),
    ("process_vm_readv pid 1", &["EPERM"], &["SIGSYS"]),
    ("steal a descriptor of pid 1", &["EPERM"], &["SIGSYS"]),
    ("signal a process of the node", &["ESRCH"], &["SIGSYS"]),
    ("bpf program", &["EPERM"], &["SIGSYS"]),
    ("add a key", &["allowed", "ENOSYS"], &["SIGSYS"]),
    (
        "keyctl: join the node's session",
        &["allowed", "ENOKEY", "EACCES", "ENOSYS"],
        &["SIGSYS"],
    ),
    ("open_by_handle_at", &["EPERM"], &["SIGSYS"]),
    (
        "userfaultfd for kernel faults",
        &["EPERM", "allowed", "ENOSYS"],
        &["SIGSYS"],
    ),
    (
        "perf_event_open of all CPUs",
        &["EACCES", "EPERM"],
        &["SIGSYS"],
    ),
    ("raise RLIMIT_NOFILE", &["EPERM"], &["SIGSYS"]),
    ("take every capability", &["EPERM"], &["EPERM"]),
    ("raise an ambient capability", &["EPERM"], &["SIGSYS"]),
    ("clear the securebits", &["EPERM"], &["SIGSYS"]),
    ("allow new privileges", &["EINVAL"], &["SIGSYS"]),
    ("become dumpable", &["allowed"], &["SIGSYS"]),
    ("set the host name", &["EPERM"], &["SIGSYS"]),
    ("set the clock", &["EPERM"], &["SIGSYS"]),
    ("load a module", &["EPERM", "ENOSYS"], &["SIGSYS"]),
    ("kexec", &["EPERM", "ENOSYS"], &["SIGSYS"]),
    ("reboot the node", &["EPERM"], &["SIGSYS"]),
    ("read the node's kernel log", &["EPERM"], &["SIGSYS"]),
    ("use I/O ports", &["EPERM", "ENOSYS"], &["SIGSYS"]),
    ("become a real-time process", &["EPERM"], &["SIGSYS"]),
];

#[test]
fn a_hostile_helper_in_the_jail_gets_nowhere() {
    let (jailed, share) = Jailed::start();
    let volume = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = |name: &str| volume.path().join(name);
    symlink("/etc/passwd", path("link")).unwrap();
    fs::write(path("program"), b"#!/bin/sh\n").unwrap();
    fs::set_permissions(
        path("program"),
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )
    .unwrap();
    let null = nix::sys::stat::makedev(1, 3);
    let mode = nix::sys::stat::Mode::from_bits_truncate(0o666);
    nix::sys::stat::mknod(&path("device"), nix::sys::stat::SFlag::S_IFCHR, mode, null).unwrap();
    share
        .attach_dir(volume.path(), "v", Attributes::default())
        .unwrap();
    let readonly = Attributes {
        readonly: true,
        ..Attributes::default()
    };
    share.attach_dir(volume.path(), "ro", readonly).unwrap();

    let table = jailed.ask("escapes");
    println!("{table}");
    let got: Vec<Vec<&str>> = table
        .lines()
        .map(|line| line.split('\t').collect())
        .collect();
    let names: Vec<&str> = got.iter().map(|line| line[0]).collect();
    let expected: Vec<&str> = ESCAPES.iter().map(|(name, _, _)| *name).collect();
    assert_eq!(names, expected, "every attempt has an expected refusal");
    let mut wrong = Vec::new();
    for (line, (name, bare, filtered)) in got.iter().zip(ESCAPES) {
        if !bare.contains(&line[1]) {
            wrong.push(format!(
                "{name}: {} without seccomp, expected one of {bare:?}",
                line[1]
            ));
        }
        if !filtered.contains(&line[2]) {
            wrong.push(format!(
                "{name}: {} with seccomp, expected one of {filtered:?}",
                line[2]
            ));
        }
        assert_ne!(line[2], "allowed", "{name}");
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
