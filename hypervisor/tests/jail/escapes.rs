//! The hostile helper inside the jail: every attempt has its expected refusal.

use std::os::unix::fs::symlink;

use super::*;

/// (attempt, what the jail without seccomp may answer, what it answers under the union of the filters).
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
    ("take every capability", &["EPERM"], &["SIGSYS"]),
    ("raise an ambient capability", &["EPERM"], &["SIGSYS"]),
    ("clear the securebits", &["EPERM"], &["SIGSYS"]),
    ("allow new privileges", &["EINVAL"], &["EINVAL"]),
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
