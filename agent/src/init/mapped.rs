//! Mounts whose owners are seen through a map (runtime-spec config.md, "mounts": `uidMappings`,
//! `gidMappings`, `idmap`, `ridmap`), as pods with a user namespace have them.
//!
//! What is on the share was mapped by the host, because virtio-fs cannot be mapped in the guest. What
//! lives in the guest's memory is mapped here, by user namespaces that exist for nothing else. They are
//! made before the container's own process, while pids and /proc belong together. The specification is
//! trusted; validate.rs has refused what is no map.
use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    rc::Rc,
};

use nix::{
    errno::Errno,
    sys::{
        prctl,
        signal::{Signal, kill},
        wait::{WaitPidFlag, waitpid},
    },
    unistd::{Pid, pause},
};

use super::{
    failure::{Context as _, Result},
    idmap, options,
};
use crate::{
    control::{Create, MountSource},
    id_map::check_pair,
    mount_attr,
    spec::{IdMapping, Linux, Mount, Spec},
};

/// How one mount is to be mapped.
struct Map {
    namespace: Rc<OwnedFd>,
    /// The mounts below too (`ridmap`).
    recursive: bool,
}

/// The maps of a container's mounts, by index into `spec.mounts`.
#[derive(Default)]
pub struct Maps(BTreeMap<u32, Map>);

impl Maps {
    /// Makes what the container's mounts need. Before the container's process is forked.
    pub fn prepare(create: &Create) -> Result<Self> {
        let mut maps = BTreeMap::new();
        let mut made: Vec<((String, String), Rc<OwnedFd>)> = Vec::new();
        for (index, mount) in create.spec.mounts.iter().enumerate() {
            let index = u32::try_from(index).unwrap_or(u32::MAX);
            let Some(wanted) = wanted(mount, &create.spec.linux) else {
                continue;
            };
            if is_mapped(create.mount_sources.get(&index)) {
                continue;
            }
            let files = (
                idmap::map_file(wanted.users),
                idmap::map_file(wanted.groups),
            );
            let known = made.iter().find(|(known, _)| *known == files);
            let namespace = match known {
                Some((_, namespace)) => Rc::clone(namespace),
                None => {
                    let namespace = namespace(&files)
                        .during(format_args!("the id map of {}", mount.destination))?;
                    let namespace = Rc::new(namespace);
                    made.push((files, Rc::clone(&namespace)));
                    namespace
                }
            };
            let recursive = wanted.recursive;
            maps.insert(
                index,
                Map {
                    namespace,
                    recursive,
                },
            );
        }
        Ok(Self(maps))
    }

    /// Maps the detached copy `tree` that the mount at `index` shows, if it is to be mapped.
    pub fn apply(&self, index: u32, tree: BorrowedFd<'_>) -> Result<()> {
        let Some(map) = self.0.get(&index) else {
            return Ok(());
        };
        mount_attr::map_ids(tree, map.namespace.as_fd(), map.recursive).during("idmap")
    }
}

struct Wanted<'a> {
    users: &'a [IdMapping],
    groups: &'a [IdMapping],
    recursive: bool,
}

fn wanted<'a>(mount: &'a Mount, linux: &'a Linux) -> Option<Wanted<'a>> {
    let asked = options::parse(&mount.options).idmap;
    let (users, groups) = match mount.uid_mappings.is_empty() {
        false => (&mount.uid_mappings, &mount.gid_mappings),
        true if asked.is_some() => (&linux.uid_mappings, &linux.gid_mappings),
        true => return None,
    };
    Some(Wanted {
        users,
        groups,
        recursive: asked.unwrap_or(false),
    })
}

/// Whether the host has done it, or it is about a device, which belongs to nobody in particular.
fn is_mapped(source: Option<&MountSource>) -> bool {
    match source {
        Some(
            MountSource::Share { mapped_on_host, .. } | MountSource::Volume { mapped_on_host, .. },
        ) => *mapped_on_host,
        Some(MountSource::Device(_) | MountSource::Bundle(_)) => true,
        // The sandbox's own memory.
        None => false,
    }
}

/// Refuses half a map, one of a mount that is no bind mount, and `idmap` where there is none.
///
/// # Errors
/// A sentence naming the mount.
pub fn check(spec: &Spec) -> std::result::Result<(), String> {
    for mount in &spec.mounts {
        let at = &mount.destination;
        let (users, groups) = (&mount.uid_mappings, &mount.gid_mappings);
        let options = options::parse(&mount.options);
        check_pair(&format!("mounts {at}"), users, groups)?;
        if users.is_empty() && options.idmap.is_none() {
            continue;
        }
        if options.bind.is_none() && mount.kind != "bind" {
            return Err(format!(
                "mounts {at}: uidMappings, gidMappings and idmap are for bind mounts"
            ));
        }
        if users.is_empty() && spec.linux.uid_mappings.is_empty() {
            return Err(format!(
                "mounts {at}: idmap needs uidMappings and gidMappings, or a user namespace's"
            ));
        }
    }
    Ok(())
}

/// A user namespace with these maps, for what is to be seen through them. Before the container's process is forked.
///
/// # Errors
/// The kernel's, of a map that is none.
pub fn user_namespace(users: &[IdMapping], groups: &[IdMapping]) -> io::Result<OwnedFd> {
    namespace(&(idmap::map_file(users), idmap::map_file(groups)))
}

/// A user namespace with these contents of `uid_map` and `gid_map`; nothing runs in it.
fn namespace((users, groups): &(String, String)) -> io::Result<OwnedFd> {
    let holder = Holder::new()?;
    let of_holder = |file: &str| format!("/proc/{}/{file}", holder.0);
    fs::write(of_holder("uid_map"), users)?;
    fs::write(of_holder("gid_map"), groups)?;
    Ok(File::open(of_holder("ns/user"))?.into())
}

/// A process that keeps a new user namespace alive while its map is written.
struct Holder(Pid);

impl Holder {
    fn new() -> io::Result<Self> {
        let parent = nix::unistd::getpid();
        // SAFETY: without CLONE_VM and with a null stack this is fork; the process has one thread, so
        // no lock is held by another one in the child, which does nothing but prctl(2) and pause(2).
        let pid = unsafe {
            libc::syscall(
                libc::SYS_clone,
                libc::c_long::from(libc::CLONE_NEWUSER | libc::SIGCHLD),
                0,
                0,
                0,
                0,
            )
        };
        if pid == 0 {
            // It must not outlive the helper, however that ends; the helper may have ended just now.
            let bound = prctl::set_pdeathsig(Signal::SIGKILL);
            if bound.is_err() || nix::unistd::getppid() != parent {
                // SAFETY: _exit ends this process at once, without what a copy of the helper would do.
                unsafe { libc::_exit(1) };
            }
            loop {
                pause();
            }
        }
        let pid = Errno::result(pid)?;
        Ok(Self(Pid::from_raw(
            i32::try_from(pid).map_err(io::Error::other)?,
        )))
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = kill(self.0, Signal::SIGKILL);
        while waitpid(self.0, Some(WaitPidFlag::__WALL)) == Err(Errno::EINTR) {}
    }
}

/// Runs `make` as the container's root: a mapped volume takes nothing from a user that is in no map,
/// which the guest's root is not. It keeps the privileges it had.
///
/// # Errors
/// Those of `make`; `EPERM` if the guest cannot act as that user.
pub fn as_owner<T>(
    (uid, gid): (u32, u32),
    make: impl FnOnce() -> rustix::io::Result<T>,
) -> rustix::io::Result<T> {
    let _identity = Identity::take(uid, gid)?;
    make()
}

/// `SECBIT_NO_SETUID_FIXUP` (capabilities(7)).
const NO_SETUID_FIXUP: libc::c_int = 1 << 2;

/// The file system identity of somebody else, until it is dropped.
struct Identity {
    bits: libc::c_int,
}

impl Identity {
    fn take(uid: u32, gid: u32) -> rustix::io::Result<Self> {
        // SAFETY: prctl with these arguments only reads the securebits of this thread.
        let bits = unsafe { libc::prctl(libc::PR_GET_SECUREBITS) };
        if !set_bits(bits | NO_SETUID_FIXUP) {
            return Err(rustix::io::Errno::PERM);
        }
        let identity = Self { bits };
        nix::unistd::setfsgid(gid.into());
        nix::unistd::setfsuid(uid.into());
        // These calls never fail; one with an invalid id only tells the present one.
        let now = nix::unistd::setfsuid(nix::unistd::Uid::from_raw(u32::MAX));
        match now.as_raw() == uid {
            true => Ok(identity),
            false => Err(rustix::io::Errno::PERM),
        }
    }
}

impl Drop for Identity {
    fn drop(&mut self) {
        nix::unistd::setfsuid(nix::unistd::Uid::from_raw(0));
        nix::unistd::setfsgid(nix::unistd::Gid::from_raw(0));
        set_bits(self.bits);
    }
}

fn set_bits(bits: libc::c_int) -> bool {
    // SAFETY: prctl with these arguments only sets the securebits of this thread.
    unsafe { libc::prctl(libc::PR_SET_SECUREBITS, bits) == 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Whether a process runs; a zombie that nobody has waited for does not.
    fn runs(pid: i32) -> bool {
        fs::read_to_string(format!("/proc/{pid}/stat"))
            .is_ok_and(|stat| !stat.rsplit(')').next().unwrap().starts_with(" Z"))
    }

    #[test]
    fn the_holder_of_a_map_dies_with_the_helper() {
        use rustix::{
            event::{PollFd, PollFlags, Timespec, poll},
            process::{Pid, PidfdFlags, pidfd_open},
        };
        use std::{
            io::{Read as _, Write as _},
            os::unix::net::UnixStream,
        };
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        // SAFETY: the child makes only system calls until it is killed.
        match unsafe { nix::unistd::fork() }.unwrap() {
            nix::unistd::ForkResult::Child => {
                let holder = Holder::new().unwrap();
                theirs.write_all(&holder.0.as_raw().to_ne_bytes()).unwrap();
                loop {
                    pause();
                }
            }
            nix::unistd::ForkResult::Parent { child } => {
                let mut pid = [0; 4];
                ours.read_exact(&mut pid).unwrap();
                let pid = i32::from_ne_bytes(pid);
                let holder = pidfd_open(Pid::from_raw(pid).unwrap(), PidfdFlags::empty()).unwrap();
                assert!(runs(pid));
                kill(child, Signal::SIGKILL).unwrap();
                waitpid(child, None).unwrap();
                let mut ended = [PollFd::new(&holder, PollFlags::IN)];
                let ended = poll(
                    &mut ended,
                    Some(&Timespec {
                        tv_sec: 10,
                        tv_nsec: 0,
                    }),
                )
                .unwrap();
                assert_eq!(ended, 1, "the holder has outlived its helper");
                assert!(!runs(pid));
            }
        }
    }

    fn checked(mount: &serde_json::Value, user_namespace: bool) -> std::result::Result<(), String> {
        let map = json!([{"containerID": 0, "hostID": 200_000, "size": 65_536}]);
        let linux = match user_namespace {
            true => json!({"uidMappings": map, "gidMappings": map}),
            false => json!({}),
        };
        let spec = json!({"mounts": [mount], "linux": linux});
        check(&serde_json::from_value(spec).unwrap())
    }

    #[test]
    fn a_map_is_whole_and_of_a_bind_mount() {
        let map = json!([{"containerID": 0, "hostID": 1, "size": 1}]);
        let bind = |options: &[&str]| json!({"destination": "/v", "type": "bind", "options": options, "uidMappings": map, "gidMappings": map});
        assert_eq!(checked(&bind(&[]), false), Ok(()));
        assert_eq!(checked(&bind(&["ridmap"]), false), Ok(()));
        let plain = json!({"destination": "/v", "options": ["rbind", "idmap"]});
        assert_eq!(checked(&plain, true), Ok(()));
        for (mount, word) in [
            (plain, "needs uidMappings"),
            (
                json!({"destination": "/v", "type": "bind", "uidMappings": map}),
                "come together",
            ),
            (
                json!({"destination": "/v", "type": "tmpfs", "uidMappings": map, "gidMappings": map}),
                "bind mounts",
            ),
        ] {
            let refused = checked(&mount, false).unwrap_err();
            assert!(
                refused.contains(word) && refused.contains("/v"),
                "{refused}"
            );
        }
    }

    #[test]
    fn a_mounts_own_map_comes_before_the_containers() {
        let own = json!([{"containerID": 0, "hostID": 1, "size": 1}]);
        let of_container = json!([{"containerID": 0, "hostID": 9, "size": 1}]);
        let linux: Linux = serde_json::from_value(json!({"uidMappings": of_container})).unwrap();
        let first = |mount: serde_json::Value| {
            let mount: Mount = serde_json::from_value(mount).unwrap();
            wanted(&mount, &linux).map(|wanted| (wanted.users[0].host_id, wanted.recursive))
        };
        assert_eq!(first(json!({})), None);
        assert_eq!(first(json!({"options": ["idmap"]})), Some((9, false)));
        assert_eq!(
            first(json!({"uidMappings": own, "options": ["ridmap"]})),
            Some((1, true))
        );
    }
}
