//! What a living VMM holds (docs/threat-model.md): with none of it can it change anything on the node but bytes
//! that are the guest's to change.

use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

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
fn state(path: &Path) -> (u32, u32, u32, u64, i64) {
    let metadata = fs::symlink_metadata(path).unwrap();
    let (mode, uid, gid) = (metadata.mode(), metadata.uid(), metadata.gid());
    (mode, uid, gid, metadata.len(), metadata.mtime())
}

fn sealed(name: &'static str, path: PathBuf, flags: OFlag) -> Given {
    let fd = open_sealed(&path, flags | OFlag::O_NONBLOCK).unwrap();
    let path = Some(path);
    Given { name, fd, path }
}

impl Jailed {
    fn give(&self, request: &str, fds: &[Given]) -> String {
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
        let mut buffer = vec![0u8; 64 * 1024];
        let length = nix::unistd::read(control.as_fd(), &mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    }
}

#[test]
fn with_what_it_is_given_a_broken_vmm_changes_nothing_of_the_node() {
    let (jailed, _share) = Jailed::start();
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    fs::write(path("kernel"), "an image").unwrap();
    fs::set_permissions(path("kernel"), PermissionsExt::from_mode(0o644)).unwrap();
    for name in ["stdin", "stdout"] {
        nix::unistd::mkfifo(&path(name), Mode::S_IRWXU).unwrap();
    }
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
    for device in ["/dev/kvm", "/dev/net/tun"] {
        if Path::new(device).exists() {
            given.push(sealed(device, device.into(), OFlag::O_RDWR));
        }
    }
    let unnamed = |name, fd| {
        let path = None;
        Given { name, fd, path }
    };
    given.push(unnamed("log", log));
    given.push(unnamed("agent", agent.into()));
    given.push(unnamed("port-forward", forwarded.into()));

    let states = |given: &[Given]| -> Vec<_> {
        let paths = given.iter().filter_map(|given| given.path.as_deref());
        paths.map(state).collect()
    };
    let before = states(&given);
    let table = jailed.give("given", &given);
    println!("{table}");
    let mut tried = 0;
    for line in table.lines() {
        let words: Vec<&str> = line.split('\t').collect();
        let [place, attempt, bare, filtered] = words[..] else {
            panic!("{line}");
        };
        tried += 1;
        let given = &given[place.parse::<usize>().unwrap()];
        // Pipes and sockets are known to nobody by a name, so there is nothing to change that lasts.
        if given.path.is_none() {
            continue;
        }
        for outcome in [bare, filtered] {
            assert_ne!(outcome, "allowed", "{}: {attempt}", given.name);
        }
        // What the VMM's root could do to any file, a read-only mount forbids.
        if ["mode", "owner", "attribute", "times"].contains(&attempt) {
            assert_eq!(bare, "EROFS", "{}: {attempt}", given.name);
        }
    }
    assert_eq!(tried, given.len() * 10, "{table}");
    assert_eq!(states(&given), before);
    let content = fs::read_to_string(path("kernel")).unwrap();
    assert_eq!(content, "an image");
}
