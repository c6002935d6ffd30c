//! The jail, the launcher and the share as living processes. Needs root; nothing else of the node.
//! `BRIG_JAIL_PROBE` names the probe where it is not where it was built.

// Helpers are no #[test] to clippy, and may fail a test in the same way.
#![allow(clippy::unwrap_used)]

mod escapes;
mod given;
mod later_mounts;
mod share;

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use brig_hypervisor::jail::allow;
use brig_hypervisor::jail::audit::{Extent, differences, filters};
use brig_hypervisor::jail::seccomp::ThreadKind;
use brig_hypervisor::launch::{LaunchError, LaunchOptions, Stage, VmmExit, VmmProcess, launch};
use brig_hypervisor::share::{Attributes, FileSystems, Share, ShareError};
use share::{mount_tmpfs, unmount};

const MAX_FILES: u64 = 4321;

/// A launched probe and its control socket.
struct Jailed {
    control: Option<OwnedFd>,
    vmm: VmmProcess,
}

impl Jailed {
    fn start() -> (Self, Share) {
        Self::start_with(None, None)
    }

    fn start_with(netns: Option<OwnedFd>, cgroup: Option<OwnedFd>) -> (Self, Share) {
        let probe = std::env::var_os("BRIG_JAIL_PROBE")
            .unwrap_or_else(|| env!("CARGO_BIN_EXE_brig-jail-probe").into());
        let mut vmm = launch(LaunchOptions {
            netns,
            cgroup,
            ..options(Path::new(&probe))
        })
        .unwrap();
        let control = vmm.take_control();
        let share = Share::new(&mut vmm, FileSystems::default()).unwrap();
        (Self { control, vmm }, share)
    }

    fn ask(&self, request: &str) -> String {
        let control = self.control.as_ref().unwrap();
        nix::unistd::write(control, request.as_bytes()).unwrap();
        let mut buffer = vec![0u8; 64 * 1024];
        let length = nix::unistd::read(control, &mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    }

    /// The mount at `place` has all flags that keep what is on it from being more than files.
    fn has_flags(&self, place: &str) {
        let mounts = self.node("mountinfo");
        let place = format!(" {place} ");
        let line = mounts.lines().find(|line| line.contains(&place)).unwrap();
        for flag in allow::MOUNT_FLAGS {
            assert!(line.contains(flag), "{line}");
        }
    }

    fn node(&self, file: &str) -> String {
        fs::read_to_string(format!("/proc/{}/{file}", self.vmm.pid())).unwrap()
    }
}

fn options(vmm: &Path) -> LaunchOptions {
    let log = fs::File::options().append(true).open("/dev/stderr");
    LaunchOptions {
        vmm: vmm.to_owned(),
        netns: None,
        cgroup: None,
        stderr: log.unwrap().into(),
        max_files: MAX_FILES,
    }
}

/// Whether the node's mount table speaks of a path in any way: as mount point, root or layer. Other tests
/// mount things of their own meanwhile.
fn node_shows(path: &Path) -> bool {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let name = path.file_name().unwrap().to_string_lossy();
    table.contains(&*name)
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

    let found = differences(jailed.vmm.pid(), Extent::Jailed).unwrap();
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
    let ids: Vec<u32> = field(&inner, "Uid")
        .split_ascii_whitespace()
        .map(|id| id.parse().unwrap())
        .collect();
    assert!(ids[0] >= 0xff00_0000, "counted on its own account: {ids:?}");
    assert_eq!(ids[1..], [0; 3], "and root for files");
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
    assert_eq!(jailed.ask("list /shared"), ".own");
}

#[test]
fn a_living_threads_filter_is_that_of_its_list() {
    let (jailed, _share) = Jailed::start();
    let thread = jailed.vmm.pid().cast_signed();
    let check = |kind| filters::difference(thread, kind);
    match check(ThreadKind::Fs) {
        // The kernel cannot dump filters.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return,
        bare => assert!(bare.unwrap().unwrap().contains("no filter")),
    }
    assert_eq!(jailed.ask("confine"), "confined");
    assert_eq!(check(ThreadKind::Fs).unwrap(), None);
    assert!(check(ThreadKind::Worker).unwrap().is_some());
    assert_eq!(
        differences(jailed.vmm.pid(), Extent::Filtered).unwrap(),
        Vec::<String>::new()
    );
    assert_eq!(jailed.ask("hostname"), "brig", "and it runs on");
}

#[test]
fn the_vmm_ends_with_its_control_socket_and_takes_its_mounts_along() {
    let (mut jailed, share) = Jailed::start();
    let volume = tempfile::tempdir_in("/dev/shm").unwrap();
    let mounted = volume.path().join("tmpfs");
    fs::create_dir(&mounted).unwrap();
    mount_tmpfs(&mounted);
    share
        .attach_dir(&mounted, "v", Attributes::default())
        .unwrap();
    drop(jailed.control.take());
    assert_eq!(jailed.vmm.wait().unwrap(), VmmExit::Code(14));
    assert_eq!(jailed.vmm.exit_status(), Some(VmmExit::Code(14)));
    share.detach("v").unwrap();
    // Not lazily: this fails with EBUSY if anything still holds it.
    unmount(&mounted);
}

#[test]
fn a_vmm_is_born_in_the_pods_network_namespace_and_cgroup() {
    let netns = std::thread::spawn(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        fs::File::open("/proc/thread-self/ns/net").unwrap()
    })
    .join()
    .unwrap();
    let expected = netns.metadata().unwrap();
    // Hybrid hosts have version 2 beside version 1.
    let cgroup = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"]
        .iter()
        .map(Path::new)
        .filter(|root| root.join("cgroup.procs").exists())
        .map(|root| root.join(format!("brig-jail-test-{}", std::process::id())))
        .find(|path| fs::create_dir(path).is_ok());
    let directory = cgroup
        .as_ref()
        .map(|path| fs::File::open(path).unwrap().into());

    let (jailed, share) = Jailed::start_with(Some(netns.into()), directory);
    let its = fs::metadata(format!("/proc/{}/ns/net", jailed.vmm.pid())).unwrap();
    assert_eq!((its.dev(), its.ino()), (expected.dev(), expected.ino()));
    if let Some(path) = &cgroup {
        let name = path.file_name().unwrap().to_string_lossy();
        assert!(jailed.node("cgroup").contains(&format!("0::/{name}\n")));
    }
    drop((jailed, share));
    if let Some(path) = cgroup {
        fs::remove_dir(path).unwrap();
    }
}

#[test]
fn what_is_no_vmm_is_told_by_what_it_fails_at() {
    let text = tempfile::NamedTempFile::new().unwrap();
    fs::write(text.path(), "no program").unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(text.path(), mode).unwrap();
    let error = launch(options(text.path())).unwrap_err();
    assert!(
        matches!(
            &error,
            LaunchError::Child {
                stage: Stage::Execute,
                ..
            }
        ),
        "{error}"
    );

    let mut stranger = launch(options(Path::new("/bin/true"))).unwrap();
    assert!(matches!(
        Share::new(&mut stranger, FileSystems::default()),
        Err(ShareError::Jail(LaunchError::Jail(_)))
    ));
    assert_eq!(stranger.wait().unwrap(), VmmExit::Code(0));

    let error = launch(options(Path::new("/"))).unwrap_err();
    assert!(matches!(error, LaunchError::Binary { .. }), "{error}");
}

#[test]
fn dropping_the_process_kills_and_reaps_it() {
    let (jailed, _share) = Jailed::start();
    let pid = jailed.vmm.pid();
    drop(jailed);
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
}

/// Detaches, with patience: a child that another test is starting holds copies of this process's descriptors
/// until it executes its program.
fn detach(share: &Share, path: &str) {
    for _ in 0..200 {
        match share.detach(path) {
            Err(ShareError::Busy { .. }) => {
                std::thread::sleep(std::time::Duration::from_millis(10))
            }
            other => return other.unwrap(),
        }
    }
    panic!("{path} stays busy");
}
