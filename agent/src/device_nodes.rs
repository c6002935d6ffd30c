//! The /dev of privileged containers follows the guest's devices while they run, as people expect of `losetup`
//! or a disk that is plugged in.
//!
//! The kernel's events are only a hint that something of a name has changed: what is there is looked up in the
//! guest's own devtmpfs. A container's /dev is its own tmpfs, held by a descriptor: nothing that is mounted or
//! linked in the container is on the way to it. Without a privileged container there is no socket and no task.
use std::{
    collections::HashMap,
    ffi::OsStr,
    fs, io,
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::fs::{MetadataExt as _, PermissionsExt as _},
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard},
};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};
use rustix::{
    fs::{
        AtFlags, FileType, Mode, OFlags, ResolveFlags, fstat, mkdirat, mknodat, openat, openat2,
        statat, unlinkat,
    },
    io::Errno,
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    task::JoinHandle,
};

use crate::readiness;
use crate::sync::lock;

/// The multicast group of the kernel's own events.
const KERNEL_EVENTS: u32 = 1;
/// Longest event (lib/kobject_uevent.c, UEVENT_BUFFER_SIZE and the header).
const MAX_EVENT: usize = 4096;
/// Nodes of loop devices that are there before their devices: a program opens the one that
/// `LOOP_CTL_GET_FREE` has just made at once, before an event can have been heard.
const LOOPS_AHEAD: u32 = 8;
/// Major number of loop devices.
const LOOP: u32 = 7;

/// The /dev directories to keep up to date. Cheap to clone.
#[derive(Clone)]
pub struct DeviceNodes {
    shared: Arc<Shared>,
}

struct Shared {
    /// The guest's devtmpfs.
    guest: PathBuf,
    state: Mutex<State>,
    logger: slog::Logger,
}

#[derive(Default)]
struct State {
    /// By container.
    directories: HashMap<String, OwnedFd>,
    follower: Option<JoinHandle<()>>,
}

impl DeviceNodes {
    /// Nothing to keep up to date yet; `guest` is the guest's devtmpfs.
    pub fn new(guest: PathBuf, logger: slog::Logger) -> Self {
        Self {
            shared: Arc::new(Shared {
                guest,
                state: Mutex::default(),
                logger,
            }),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.shared.state)
    }

    /// From now on `directory`, the /dev of container `id`, follows the guest's.
    pub fn follow(&self, id: &str, directory: OwnedFd) {
        let mut state = self.state();
        if state.follower.is_none() {
            match events() {
                Ok(events) => {
                    let nodes = self.clone();
                    state.follower = Some(tokio::spawn(async move { nodes.run(events).await }));
                }
                Err(error) => {
                    slog::warn!(self.shared.logger, "/dev of privileged containers stays as it is"; "error" => %error);
                }
            }
        }
        make_loops(&self.shared.guest, &directory, 0);
        state.directories.insert(id.to_owned(), directory);
    }

    /// The container is gone.
    pub fn forget(&self, id: &str) {
        let mut state = self.state();
        if state.directories.remove(id).is_some()
            && state.directories.is_empty()
            && let Some(follower) = state.follower.take()
        {
            follower.abort();
        }
    }

    async fn run(self, events: AsyncFd<OwnedFd>) {
        let mut event = vec![0; MAX_EVENT];
        loop {
            let received = events.async_io(Interest::READABLE, |socket| {
                Ok(recv(socket.as_raw_fd(), &mut event, MsgFlags::empty())?)
            });
            match received.await {
                Ok(length) => {
                    let name = changed(event.get(..length).unwrap_or_default());
                    if let Some(name) = name {
                        self.update(name);
                    }
                }
                // Too many at once: a device that was missed is found by its next event.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
                Err(error) => {
                    slog::warn!(self.shared.logger, "/dev of privileged containers stays as it is"; "error" => %error);
                    return;
                }
            }
        }
    }

    fn update(&self, name: &str) {
        for (id, directory) in &self.state().directories {
            if let Err(error) = update(&self.shared.guest, directory, name) {
                slog::info!(self.shared.logger, "a device is not shown"; "container" => id, "device" => name, "error" => %error);
            }
        }
    }
}

fn events() -> io::Result<AsyncFd<OwnedFd>> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Datagram,
        flags,
        SockProtocol::NetlinkKObjectUEvent,
    )?;
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, KERNEL_EVENTS))?;
    readiness::register(socket, Interest::READABLE)
}

/// The device that an event is about, by its name below /dev.
fn changed(event: &[u8]) -> Option<&str> {
    let name = event
        .split(|byte| *byte == 0)
        .find_map(|field| field.strip_prefix(b"DEVNAME="))?;
    let name = std::str::from_utf8(name).ok()?;
    let plain = !name.is_empty() && name.split('/').all(|part| !matches!(part, "" | "." | ".."));
    plain.then_some(name)
}

/// A device of the guest: type, number and mode.
fn lookup(guest: &Path, name: &str) -> Option<(FileType, u64, Mode)> {
    let found = fs::symlink_metadata(guest.join(name)).ok()?;
    let kind = FileType::from_raw_mode(found.mode());
    let is_device = matches!(kind, FileType::CharacterDevice | FileType::BlockDevice);
    is_device.then(|| {
        (
            kind,
            found.rdev(),
            Mode::from_raw_mode(found.mode() & 0o7777),
        )
    })
}

/// Makes one node of a container's /dev what it is in the guest's.
fn update(guest: &Path, directory: &OwnedFd, name: &str) -> io::Result<()> {
    let (parents, last) = name.rsplit_once('/').unwrap_or(("", name));
    let wanted = lookup(guest, name);
    let parent = match open_parent(directory, parents, wanted.is_some()) {
        Err(Errno::NOENT) if wanted.is_none() => return Ok(()),
        parent => parent?,
    };
    match wanted {
        Some((kind, number, mode)) => {
            make_node(&parent, last, (kind, number, mode))?;
            if kind == FileType::BlockDevice && rustix::fs::major(number) == LOOP {
                make_loops(guest, directory, rustix::fs::minor(number) + 1);
            }
            Ok(())
        }
        None => remove(&parent, last),
    }
}

/// Removes a node whose device is gone; those of loop devices are kept for the next.
fn remove(parent: &OwnedFd, name: &str) -> io::Result<()> {
    let Ok(stat) = statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) else {
        return Ok(());
    };
    let kind = FileType::from_raw_mode(stat.st_mode);
    let is_loop = kind == FileType::BlockDevice && rustix::fs::major(stat.st_rdev) == LOOP;
    match kind {
        FileType::CharacterDevice | FileType::BlockDevice if !is_loop => {
            Ok(unlinkat(parent, name, AtFlags::empty())?)
        }
        _ => Ok(()),
    }
}

/// Makes nodes for the next loop devices from number `first` on, where the guest has loop devices at all.
fn make_loops(guest: &Path, directory: &OwnedFd, first: u32) {
    if lookup(guest, "loop-control").is_none() {
        return;
    }
    for number in first..first.saturating_add(LOOPS_AHEAD) {
        let device = rustix::fs::makedev(LOOP, number);
        let node = (FileType::BlockDevice, device, Mode::from_raw_mode(0o660));
        // It fails for a full tmpfs only, and then there is nothing to be done.
        let _ = make_node(directory, &format!("loop{number}"), node);
    }
}

/// Makes a node, unless the container has something of that name there.
fn make_node(
    parent: &OwnedFd,
    name: &str,
    (kind, number, mode): (FileType, u64, Mode),
) -> io::Result<()> {
    match mknodat(parent, name, kind, mode, number) {
        Ok(()) => {}
        Err(Errno::EXIST) => return Ok(()),
        Err(error) => return Err(error.into()),
    }
    // The agent's umask has taken bits away. By a descriptor: the container may have put a link there by now.
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let node = openat(parent, name, flags, Mode::empty())?;
    if fstat(&node)?.st_rdev == number {
        let mode = fs::Permissions::from_mode(mode.as_raw_mode());
        fs::set_permissions(format!("/proc/self/fd/{}", node.as_raw_fd()), mode)?;
    }
    Ok(())
}

/// Opens a directory below a container's /dev, on the same file system and through no link.
fn open_parent(directory: &OwnedFd, path: &str, make: bool) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    let mut here = openat2(directory, ".", flags, Mode::empty(), resolve)?;
    for name in path.split('/').filter(|name| !name.is_empty()) {
        if make {
            match mkdirat(&here, OsStr::new(name), Mode::from_raw_mode(0o755)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(error),
            }
        }
        here = openat2(&here, name, flags, Mode::empty(), resolve)?;
    }
    Ok(here)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    struct Dirs {
        guest: tempfile::TempDir,
        container: tempfile::TempDir,
    }

    impl Dirs {
        fn new() -> Self {
            Self {
                guest: tempfile::tempdir().unwrap(),
                container: tempfile::tempdir().unwrap(),
            }
        }

        fn make(&self, name: &str, kind: FileType, numbers: (u32, u32)) {
            let path = self.guest.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            let number = rustix::fs::makedev(numbers.0, numbers.1);
            let mode = Mode::from_raw_mode(0o640);
            mknodat(rustix::fs::CWD, &path, kind, mode, number).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
        }

        fn update(&self, name: &str) {
            let directory = fs::File::open(self.container.path()).unwrap().into();
            update(self.guest.path(), &directory, name).unwrap();
        }

        fn shown(&self, name: &str) -> Option<(u32, u32, u32)> {
            let found = fs::symlink_metadata(self.container.path().join(name)).ok()?;
            let number = found.rdev();
            let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
            Some((major, minor, found.mode() & 0o777))
        }
    }

    #[test]
    fn an_event_names_a_device_or_nothing() {
        let event =
            b"add@/devices/virtual/block/loop0\0ACTION=add\0MAJOR=7\0DEVNAME=loop0\0SEQNUM=9\0";
        assert_eq!(changed(event), Some("loop0"));
        assert_eq!(changed(b"add@/x\0DEVNAME=net/tun\0"), Some("net/tun"));
        for bad in [
            &b"add@/devices/x\0ACTION=add\0"[..],
            b"DEVNAME=../etc/passwd\0",
            b"DEVNAME=/etc\0",
            b"DEVNAME=\0",
            b"DEVNAME=\xff\0",
            b"",
        ] {
            assert_eq!(changed(bad), None);
        }
    }

    #[test]
    fn nodes_come_and_go_with_the_guests() {
        let dirs = Dirs::new();
        dirs.make("vdz", FileType::BlockDevice, (254, 400));
        dirs.make("deep/er/x", FileType::CharacterDevice, (10, 1));
        for name in ["vdz", "deep/er/x", "never"] {
            dirs.update(name);
        }
        assert_eq!(dirs.shown("vdz"), Some((254, 400, 0o666)));
        assert_eq!(dirs.shown("deep/er/x"), Some((10, 1, 0o666)));
        fs::remove_file(dirs.guest.path().join("vdz")).unwrap();
        dirs.update("vdz");
        assert_eq!(dirs.shown("vdz"), None);
        // A file of the container's own is no device of the guest.
        fs::write(dirs.container.path().join("mine"), "").unwrap();
        dirs.update("mine");
        assert!(dirs.shown("mine").is_some());
    }

    #[test]
    fn loop_devices_have_their_nodes_before_they_are_made() {
        let dirs = Dirs::new();
        let directory = fs::File::open(dirs.container.path()).unwrap().into();
        make_loops(dirs.guest.path(), &directory, 0);
        assert_eq!(dirs.shown("loop0"), None);
        dirs.make("loop-control", FileType::CharacterDevice, (10, 237));
        make_loops(dirs.guest.path(), &directory, 0);
        assert_eq!(dirs.shown("loop7"), Some((7, 7, 0o660)));
        assert_eq!(dirs.shown("loop8"), None);
        dirs.make("loop4", FileType::BlockDevice, (7, 4));
        dirs.update("loop4");
        assert!(dirs.shown("loop12").is_some());
        fs::remove_file(dirs.guest.path().join("loop4")).unwrap();
        dirs.update("loop4");
        assert!(dirs.shown("loop4").is_some());
    }

    #[test]
    fn a_link_of_the_container_is_not_followed() {
        let dirs = Dirs::new();
        let outside = tempfile::tempdir().unwrap();
        symlink(outside.path(), dirs.container.path().join("net")).unwrap();
        dirs.make("net/tun", FileType::CharacterDevice, (10, 200));
        let directory = fs::File::open(dirs.container.path()).unwrap().into();
        assert!(update(dirs.guest.path(), &directory, "net/tun").is_err());
        assert!(fs::read_dir(outside.path()).unwrap().next().is_none());
    }

    #[tokio::test]
    async fn nobody_listens_without_a_privileged_container() {
        let logger = slog::Logger::root(slog::Discard, slog::o!());
        let dirs = Dirs::new();
        let nodes = DeviceNodes::new(dirs.guest.path().to_owned(), logger);
        assert!(nodes.state().follower.is_none());
        for id in ["a", "b"] {
            nodes.follow(id, fs::File::open(dirs.container.path()).unwrap().into());
        }
        assert!(nodes.state().follower.is_some());
        nodes.forget("a");
        nodes.forget("never");
        assert!(nodes.state().follower.is_some());
        nodes.forget("b");
        assert!(nodes.state().follower.is_none());
    }
}
