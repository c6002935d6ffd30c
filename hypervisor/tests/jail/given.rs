//! What a living VMM holds (docs/threat-model.md): with none of it can it change anything on the node but bytes
//! that are the guest's to change.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, FromRawFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use brig_hypervisor::control;
use brig_hypervisor::launch::open_sealed;
use nix::fcntl::OFlag;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::sys::stat::Mode;

use super::*;

/// How a descriptor is made, and whether the node finds the thing by a name.
struct Given {
    name: &'static str,
    fd: OwnedFd,
    path: Option<PathBuf>,
}

/// Everything about a file that outlives the VMM.
fn state(path: &Path) -> (u32, u32, u32, u64, i64, u64) {
    let metadata = fs::symlink_metadata(path).unwrap();
    let (mode, uid, gid) = (metadata.mode(), metadata.uid(), metadata.gid());
    let (size, changed) = (metadata.len(), metadata.mtime());
    (mode, uid, gid, size, changed, metadata.nlink())
}

fn sealed(name: &'static str, path: PathBuf, flags: OFlag) -> Given {
    let fd = open_sealed(&path, flags | OFlag::O_NONBLOCK).unwrap();
    let path = Some(path);
    Given { name, fd, path }
}

fn unnamed(name: &'static str, fd: OwnedFd) -> Given {
    let path = None;
    Given { name, fd, path }
}

fn ioctl(fd: &impl AsRawFd, request: libc::c_ulong, argument: libc::c_ulong) -> i32 {
    // SAFETY: the requests of these tests take a number or a pointer to a structure that outlives the call.
    unsafe { libc::ioctl(fd.as_raw_fd(), request, argument) }
}

/// A loop device over a file, as long as it lives.
struct Loop(PathBuf);

impl Loop {
    const SET_FD: libc::c_ulong = 0x4c00;
    const CLR_FD: libc::c_ulong = 0x4c01;
    const CTL_GET_FREE: libc::c_ulong = 0x4c82;

    /// `None` where the machine has none to give.
    fn over(file: &File) -> Option<Self> {
        let control = File::options()
            .read(true)
            .write(true)
            .open("/dev/loop-control");
        let control = control.ok()?;
        // Another may be faster.
        (0..10).find_map(|_| {
            let number = ioctl(&control, Self::CTL_GET_FREE, 0);
            let path = PathBuf::from(format!("/dev/loop{number}"));
            let device = File::options().read(true).write(true).open(&path).ok()?;
            let backing = libc::c_ulong::from(file.as_raw_fd().unsigned_abs());
            (ioctl(&device, Self::SET_FD, backing) == 0).then_some(Self(path))
        })
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        if let Ok(device) = File::open(&self.0) {
            ioctl(&device, Self::CLR_FD, 0);
        }
    }
}

/// An interface of a network namespace of its own, as the shim makes it; `None` where there is no such device.
fn tap() -> Option<OwnedFd> {
    const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
    /// `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`.
    const FLAGS: u16 = 0x0002 | 0x1000 | 0x4000;
    let made = std::thread::spawn(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        let tap = open_sealed("/dev/net/tun".as_ref(), OFlag::O_RDWR | OFlag::O_NONBLOCK).ok()?;
        let request = interface(FLAGS);
        let argument = request.as_ptr().addr() as libc::c_ulong;
        assert_eq!(ioctl(&tap, TUNSETIFF, argument), 0);
        Some(tap)
    });
    made.join().unwrap()
}

/// `struct ifreq`.
fn interface(flags: u16) -> [u8; 40] {
    let mut request = [0; 40];
    request[..6].copy_from_slice(b"tap-vm");
    request[16..18].copy_from_slice(&flags.to_ne_bytes());
    request
}

/// The interface of a tap as the kernel tells it: name and flags, among them whether it outlives its descriptor.
fn interface_of(tap: &OwnedFd) -> [u8; 40] {
    const TUNGETIFF: libc::c_ulong = 0x8004_54d2;
    let mut request = [0_u8; 40];
    let argument = request.as_mut_ptr().addr() as libc::c_ulong;
    assert_eq!(ioctl(tap, TUNGETIFF, argument), 0);
    request
}

/// A VM and a CPU of it, where KVM makes one.
fn machine(kvm: &OwnedFd) -> Option<[Given; 2]> {
    let descriptor = |number: i32| {
        // SAFETY: the kernel has just made it for us alone.
        (number >= 0).then(|| unsafe { OwnedFd::from_raw_fd(number) })
    };
    let vm = descriptor(ioctl(kvm, 0xae01, 0))?;
    let vcpu = descriptor(ioctl(&vm, 0xae41, 0))?;
    Some([unnamed("vm", vm), unnamed("vcpu", vcpu)])
}

impl Jailed {
    fn give(&self, request: &str, fds: &[Given]) {
        let control = self.control.as_ref().unwrap();
        let numbers: Vec<i32> = fds.iter().map(|given| given.fd.as_raw_fd()).collect();
        sendmsg::<()>(
            control.as_raw_fd(),
            &[IoSlice::new(request.as_bytes())],
            &[ControlMessage::ScmRights(&numbers)],
            MsgFlags::empty(),
            None,
        )
        .unwrap();
    }

    fn reply(&self) -> String {
        let mut buffer = vec![0u8; 256 * 1024];
        let length = nix::unistd::read(self.control.as_ref().unwrap(), &mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    }
}

/// What the filters let through and a device carries out, because the guest may have it done: (kind, attempt).
const THE_GUESTS: &[(&str, &str)] = &[
    // Its disk, which it may also overwrite.
    ("disk", "BLKDISCARD"),
    ("disk", "BLKZEROOUT"),
    ("disk", "map, and make that writable"),
    // Its interface's offloads.
    ("tap", "TUNSETOFFLOAD"),
    ("tap", "TUNSETVNETHDRSZ"),
    // What its rings are to be like, and that the node's kernel is to reach the memory of who asks, and nobody else's.
    ("vhost-net", "VHOST_SET_FEATURES"),
    ("vhost-net", "VHOST_SET_OWNER"),
    // A file server does to a volume what a container's root may.
    ("volume", "mode"),
    ("volume", "mode by its link"),
    ("volume", "owner by its link"),
    ("volume", "attribute by its link"),
    ("volume", "times"),
    ("volume", "FS_IOC_SETFLAGS"),
    ("volume", "FS_IOC_FSSETXATTR"),
];

/// Without seccomp: what a device's node or a volume's directory lets its user do, and an end of a pipe or socket,
/// which nobody knows by a name.
fn is_harmless_bare(kind: &Given, attempt: &str) -> bool {
    THE_GUESTS.contains(&(kind.name, attempt))
        || (kind.name == "volume" && ["owner", "attribute"].contains(&attempt))
}

#[test]
fn with_what_it_is_given_a_broken_vmm_changes_nothing_of_the_node() {
    let (jailed, share) = Jailed::start();
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    fs::write(path("kernel"), "an image").unwrap();
    fs::set_permissions(path("kernel"), PermissionsExt::from_mode(0o644)).unwrap();
    for name in ["stdin", "stdout"] {
        nix::unistd::mkfifo(&path(name), Mode::S_IRWXU).unwrap();
    }
    for name in ["volume", "read-only"] {
        fs::create_dir(path(name)).unwrap();
    }
    let readonly = Attributes {
        readonly: true,
        ..Attributes::default()
    };
    share
        .attach_dir(&path("volume"), "v", Attributes::default())
        .unwrap();
    share
        .attach_dir(&path("read-only"), "ro", readonly)
        .unwrap();
    let (_reader, log) = nix::unistd::pipe().unwrap();
    let (agent, _shim) = UnixStream::pair().unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let forwarded = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let mut given = vec![
        sealed("kernel", path("kernel"), OFlag::O_RDONLY),
        sealed("null", "/dev/null".into(), OFlag::O_RDWR),
        // The reader first: a writer alone cannot be opened without blocking.
        sealed("stdin", path("stdin"), OFlag::O_RDONLY),
    ];
    let _containerd = open_sealed(&path("stdout"), OFlag::O_RDONLY | OFlag::O_NONBLOCK).unwrap();
    given.push(sealed("stdout", path("stdout"), OFlag::O_WRONLY));
    let backing = File::options()
        .create_new(true)
        .read(true)
        .write(true)
        .open(path("image"));
    let backing = backing.unwrap();
    backing.set_len(SIZE).unwrap();
    let disk = Loop::over(&backing);
    if let Some(Loop(device)) = &disk {
        given.push(sealed("disk", device.clone(), OFlag::O_RDWR));
        given.push(sealed("read-only disk", device.clone(), OFlag::O_RDONLY));
    }
    if Path::new("/dev/kvm").exists() {
        given.push(sealed("kvm", "/dev/kvm".into(), OFlag::O_RDWR));
        given.extend(machine(&given[given.len() - 1].fd).into_iter().flatten());
    }
    let interface = tap();
    if let Some(tap) = &interface {
        given.push(sealed("tun", "/dev/net/tun".into(), OFlag::O_RDWR));
        given.push(unnamed("tap", tap.try_clone().unwrap()));
    }
    if Path::new("/dev/vhost-net").exists() {
        given.push(sealed("vhost-net", "/dev/vhost-net".into(), OFlag::O_RDWR));
    }
    given.push(unnamed("log", log));
    given.push(unnamed("agent", agent.into()));
    given.push(unnamed("port-forward", forwarded.into()));
    // What the probe opens by itself comes last.
    for (name, place) in [("volume", "v"), ("read-only volume", "ro")] {
        assert_eq!(jailed.ask(&format!("hold /shared/{place}")), "held");
        let fd = File::open(path(
            place.strip_prefix("r").map_or("volume", |_| "read-only"),
        ));
        given.push(unnamed(name, fd.unwrap().into()));
    }
    let own = given.len() - 2;
    let kinds: Vec<&str> = given.iter().map(|given| given.name).collect();
    println!("descriptors: {}", kinds.join(", "));

    let states = |given: &[Given]| -> Vec<_> {
        let named = given.iter().filter(|given| !given.name.ends_with("disk"));
        let mut paths: Vec<_> = named.filter_map(|given| given.path.clone()).collect();
        paths.push(path("read-only"));
        paths.iter().map(|path| state(path)).collect()
    };
    let (before, tap_before) = (states(&given), interface.as_ref().map(interface_of));
    jailed.give("given", &given[..own]);
    let table = jailed.reply();
    println!("{table}");
    let mut met = BTreeSet::new();
    let mut wrong = Vec::new();
    for line in table.lines() {
        let words: Vec<&str> = line.split('\t').collect();
        let [place, attempt, bare, filtered] = words[..] else {
            panic!("{line}");
        };
        let given = &given[place.parse::<usize>().unwrap()];
        met.insert((place.to_owned(), attempt.to_owned()));
        let guests = THE_GUESTS.contains(&(given.name, attempt));
        let on_a_number = given.path.is_none() && !given.name.contains("volume");
        // Pipes and sockets are known to nobody by a name, so there is nothing to change that lasts; what can be
        // asked of the thing behind by ioctl and fcntl counts.
        if filtered == "allowed" && !guests && !(on_a_number && bare != "-") {
            wrong.push(format!("{}: {attempt} is allowed", given.name));
        }
        if bare == "allowed" && !on_a_number && !is_harmless_bare(given, attempt) {
            wrong.push(format!(
                "{}: {attempt} is allowed without seccomp",
                given.name
            ));
        }
        // What the VMM's root could do to any file, a read-only mount forbids.
        let kept = ["mode", "owner", "attribute", "times"].contains(&attempt);
        let is_readonly = given.path.is_some() || given.name == "read-only volume";
        if kept && is_readonly && bare != "EROFS" {
            wrong.push(format!("{}: {attempt}: {bare}", given.name));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!(met.len(), given.len() * ATTEMPTS, "{table}");
    assert_eq!(states(&given), before);
    assert_eq!(backing.metadata().unwrap().len(), SIZE);
    assert_eq!(interface.as_ref().map(interface_of), tap_before);
    assert_eq!(fs::read_to_string(path("kernel")).unwrap(), "an image");
    assert!(fs::read_dir(path("read-only")).unwrap().next().is_none());
    drop(disk);
}

/// Bytes of the disk.
const SIZE: u64 = 8 << 20;
/// Attempts that the probe makes on each descriptor.
const ATTEMPTS: usize = 88;

#[test]
fn what_a_broken_vmm_hands_back_never_arrives() {
    let (jailed, _share) = Jailed::start();
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("kernel"), "an image").unwrap();
    let (_reader, log) = nix::unistd::pipe().unwrap();
    let given = [
        sealed("kernel", dir.path().join("kernel"), OFlag::O_RDONLY),
        unnamed("log", log),
    ];
    jailed.give("hand back", &given);
    let shim = jailed.control.as_ref().unwrap();
    for given in &given {
        let refused = control::receive_from_vmm(shim.as_fd());
        assert!(refused.is_err(), "{}: {refused:?}", given.name);
    }
    assert_eq!(jailed.reply(), "2", "it could send them");
}
