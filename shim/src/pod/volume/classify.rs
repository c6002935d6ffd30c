//! What a bind mount of a spec is, and so how the guest gets it: shared by virtio-fs, copied and kept up to
//! date, in the guest's own memory, or refused with a reason.
//!
//! Trusted: containerd and kubelet, who name the sources. Blocking code.

use std::fs::{self, FileType, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Component, Path, PathBuf};

use super::mountinfo::MountTable;
use crate::asked::spec::BindMount;
use crate::error::{Error, Result};
use crate::guest::vm::shown;
use crate::node::disk::{self, Numbers, Owner};
use crate::node::sandbox_files;

/// Kubelet's plugins whose volumes it writes with its atomic writer, or as plain read-only files.
const REPLICATED: [&str; 4] = [
    "kubernetes.io~configmap",
    "kubernetes.io~secret",
    "kubernetes.io~projected",
    "kubernetes.io~downward-api",
];
/// sysfs's character devices, by number.
const DEVICES: &str = "/sys/dev/char";
pub(super) const EMPTY_DIR: &str = "kubernetes.io~empty-dir";

/// How the guest gets a mount's source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Class {
    /// By virtio-fs.
    Share,
    /// As a copy on a tmpfs of the guest.
    Replica {
        /// The host directory, or the single file.
        top: PathBuf,
        /// A single file: its name in the replica.
        file: Option<String>,
        /// Later changes are copied too.
        live: bool,
    },
    /// A file that was made for the pod, whose containers have it from then on.
    PodFile(PathBuf),
    /// A tmpfs of the guest, shared by the pod's containers.
    Memory {
        /// The host's tmpfs.
        top: PathBuf,
        /// What of it is mounted; empty for all.
        inside: PathBuf,
    },
    /// Huge pages of the guest, shared by the pod's containers.
    Huge {
        /// The host's hugetlbfs.
        top: PathBuf,
        /// What of it is mounted; empty for all.
        inside: PathBuf,
    },
    /// The guest's own character device of this name below /dev, if it has one.
    Device(String),
    /// A block device of the node, whose node has this owner: a disk of the guest.
    Disk(Numbers, Owner),
}

/// Decides for one mount.
///
/// # Errors
/// `InvalidArgument` with the reason for a source that is missing or that no guest can have.
pub fn classify(bind: &BindMount, table: &MountTable) -> Result<Class> {
    let refused = |error: io::Error| match error.kind() {
        // The container is not what is missing.
        io::ErrorKind::NotFound => Error::invalid(format!(
            "mount on {}: its source {} is missing on this node",
            bind.destination,
            shown(&bind.source)
        )),
        _ => Error::io(
            format_args!(
                "mount on {}: source {}",
                bind.destination,
                shown(&bind.source)
            ),
            &error,
        ),
    };
    let metadata = fs::metadata(&bind.source).map_err(refused)?;
    if let Some(class) = special(bind, &metadata)? {
        return Ok(class);
    }
    let source = fs::canonicalize(&bind.source).map_err(refused)?;
    if let Some(class) = memory(&source, table) {
        return Ok(class);
    }
    if table
        .of(&source)
        .is_some_and(|mounted| mounted.kind == "hugetlbfs")
    {
        return Err(Error::invalid(format!(
            "mount on {}: {} has huge pages of the node, which a VM cannot map; use an emptyDir of medium \
             HugePages-2Mi",
            bind.destination,
            shown(&bind.source)
        )));
    }
    Ok(replica(bind, &source, metadata.file_type()).unwrap_or(Class::Share))
}

/// Sockets, FIFOs and device nodes.
fn special(bind: &BindMount, metadata: &Metadata) -> Result<Option<Class>> {
    let kind = metadata.file_type();
    let refuse = |what: &str, why: &str| {
        Err(Error::invalid(format!(
            "mount on {}: {} is {what} of the node: {why}",
            bind.destination,
            shown(&bind.source)
        )))
    };
    if kind.is_socket() {
        return refuse(
            "a socket",
            "a program in a VM cannot connect to it; offer the service over the network (TCP or a Service) instead",
        );
    }
    if kind.is_fifo() {
        return refuse(
            "a named pipe",
            "the VM's kernel and the node's cannot share one; use a file or the network instead",
        );
    }
    if let Some((numbers, owner)) = disk::at(&bind.source) {
        return Ok(Some(Class::Disk(numbers, owner)));
    }
    if kind.is_char_device() {
        let number = (libc::major(metadata.rdev()), libc::minor(metadata.rdev()));
        return match device_name(Path::new(DEVICES), number, &bind.source) {
            Some(name) => Ok(Some(Class::Device(name))),
            None => refuse(
                "a device",
                "a VM has devices of its own; give the pod the device itself (VFIO, CDI) instead of a mount of its node",
            ),
        };
    }
    Ok(None)
}

/// The name that the node's kernel has for a character device, below /dev: under it the guest's kernel has the
/// same kind of device, if it has one. `devices` is sysfs's directory of character devices by number.
fn device_name(devices: &Path, (major, minor): (u32, u32), source: &Path) -> Option<String> {
    let event = fs::read_to_string(devices.join(format!("{major}:{minor}/uevent")));
    let name = match &event {
        Ok(event) => event
            .lines()
            .find_map(|line| line.strip_prefix("DEVNAME="))
            .map(str::to_owned),
        // Terminals are in no sysfs.
        Err(_) => {
            let path = fs::canonicalize(source).ok()?;
            path.strip_prefix("/dev").ok()?.to_str().map(str::to_owned)
        }
    }?;
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-/".contains(&byte);
    (!name.is_empty() && name.bytes().all(plain)).then_some(name)
}

/// An emptyDir of medium Memory or HugePages, or a directory in one.
fn memory(source: &Path, table: &MountTable) -> Option<Class> {
    let (mounted, inside) = table.place(source)?;
    if !matches!(mounted.kind.as_str(), "tmpfs" | "hugetlbfs") {
        return None;
    }
    let top = table
        .tops(mounted.device)
        .find(|top| volume(&top.point).is_some_and(|(plugin, _)| plugin == EMPTY_DIR))?;
    let top = top.point.clone();
    Some(match mounted.kind.as_str() {
        "tmpfs" => Class::Memory { top, inside },
        _ => Class::Huge { top, inside },
    })
}

fn replica(bind: &BindMount, source: &Path, kind: FileType) -> Option<Class> {
    let live = Class::Replica {
        top: source.to_owned(),
        file: None,
        live: true,
    };
    // What the container may write must reach the host.
    if volume_of_a_pod(&bind.source).is_some_and(|plugin| REPLICATED.contains(&plugin)) {
        return (bind.readonly && kind.is_dir()).then_some(live);
    }
    if sandbox_files::is_one(&bind.source) {
        return Some(Class::PodFile(source.to_owned()));
    }
    if let Some((pod, name)) = sub_path(&bind.source) {
        let of_replicated = REPLICATED
            .iter()
            .any(|plugin| pod.join("volumes").join(plugin).join(name).is_dir());
        if !of_replicated || !bind.readonly {
            return None;
        }
        // Kubelet has bound one generation's file or directory, which never changes.
        return Some(Class::Replica {
            top: source.to_owned(),
            file: (!kind.is_dir()).then(|| "file".to_owned()),
            live: false,
        });
    }
    // Nothing is told by what is in a directory: a container could have put it there.
    None
}

/// Plugin and name of the volume whose directory this is: `…/volumes/<plugin>/<name>`.
fn volume(path: &Path) -> Option<(&str, &str)> {
    let [volumes, plugin, name] = last(path)?;
    (volumes == "volumes" && plugin.starts_with("kubernetes.io~")).then_some((plugin, name))
}

/// Plugin of the volume that kubelet keeps there for one pod: `…/pods/<uid>/volumes/<plugin>/<name>`.
pub(super) fn volume_of_a_pod(path: &Path) -> Option<&str> {
    let [pods, _, _, _, _] = last(path)?;
    let (plugin, _) = volume(path)?;
    (pods == "pods").then_some(plugin)
}

/// The pod's directory and the volume's name of a place where kubelet binds sub-paths:
/// `…/pods/<uid>/volume-subpaths/<name>/<container>/<index>`.
pub(super) fn sub_path(path: &Path) -> Option<(&Path, &str)> {
    let [pods, _, sub_paths, name, _, _] = last(path)?;
    let pod = path.ancestors().nth(4)?;
    (pods == "pods" && sub_paths == "volume-subpaths").then_some((pod, name))
}

/// The last names of a path.
fn last<const N: usize>(path: &Path) -> Option<[&str; N]> {
    let mut names = [""; N];
    let mut components = path.components().rev();
    for place in names.iter_mut().rev() {
        match components.next()? {
            Component::Normal(name) => *place = name.to_str()?,
            _ => return None,
        }
    }
    Some(names)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;

    fn bind(source: &Path, readonly: bool) -> BindMount {
        BindMount {
            readonly,
            ..BindMount::plain(source)
        }
    }

    fn class(source: &Path, readonly: bool) -> Result<Class> {
        classify(&bind(source, readonly), &MountTable::default())
    }

    fn is_live(class: &Class) -> bool {
        matches!(
            class,
            Class::Replica {
                live: true,
                file: None,
                ..
            }
        )
    }

    #[test]
    fn kubelets_volumes_are_told_by_their_path() {
        let dir = tempfile::tempdir().unwrap();
        for plugin in REPLICATED {
            let path = dir.path().join("pods/u/volumes").join(plugin).join("v");
            fs::create_dir_all(&path).unwrap();
            assert!(is_live(&class(&path, true).unwrap()), "{plugin}");
            assert_eq!(class(&path, false).unwrap(), Class::Share, "{plugin}");
        }
        for other in ["kubernetes.io~empty-dir", "kubernetes.io~csi"] {
            let path = dir.path().join("pods/u/volumes").join(other).join("v");
            fs::create_dir_all(&path).unwrap();
            assert_eq!(class(&path, true).unwrap(), Class::Share, "{other}");
        }
    }

    #[test]
    fn what_a_container_puts_into_a_directory_does_not_make_it_a_copy() {
        let dir = tempfile::tempdir().unwrap();
        let places = [
            "pods/u/volumes/kubernetes.io~empty-dir/v",
            "host-path",
            // Below something that a container may write.
            "pods/u/volumes/kubernetes.io~empty-dir/v/volumes/kubernetes.io~configmap/x",
            "pods/u/volumes/kubernetes.io~empty-dir/v/volume-subpaths/x/c/0",
        ];
        for place in places {
            let path = dir.path().join(place);
            fs::create_dir_all(path.join("..2026_1")).unwrap();
            symlink("..2026_1", path.join("..data")).unwrap();
            assert_eq!(class(&path, true).unwrap(), Class::Share, "{place}");
        }
    }

    #[test]
    fn a_sub_path_of_a_replicated_volume_is_a_copy_that_stays() {
        let dir = tempfile::tempdir().unwrap();
        let pod = dir.path().join("pods/u");
        fs::create_dir_all(pod.join("volumes/kubernetes.io~secret/s")).unwrap();
        let bound = pod.join("volume-subpaths/s/main");
        fs::create_dir_all(&bound).unwrap();
        fs::write(bound.join("0"), "key").unwrap();
        let got = class(&bound.join("0"), true).unwrap();
        let wanted = Class::Replica {
            top: fs::canonicalize(bound.join("0")).unwrap(),
            file: Some("file".into()),
            live: false,
        };
        assert_eq!(got, wanted);
        assert_eq!(class(&bound.join("0"), false).unwrap(), Class::Share);
        let other = pod.join("volume-subpaths/disk/main/0");
        fs::create_dir_all(&other).unwrap();
        assert_eq!(class(&other, true).unwrap(), Class::Share);
    }

    #[test]
    fn a_memory_empty_dir_and_what_lies_in_it_are_found_by_the_mount_table() {
        let dir = tempfile::tempdir().unwrap();
        let base = fs::canonicalize(dir.path()).unwrap();
        let volume = base.join("pods/u/volumes/kubernetes.io~empty-dir/cache");
        let sub = base.join("pods/u/volume-subpaths/cache/main/0");
        let plain = base.join("scratch");
        for path in [&volume.join("a/b"), &sub, &plain] {
            fs::create_dir_all(path).unwrap();
        }
        let table = format!(
            "1 0 8:1 / / rw - ext4 x rw\n2 1 0:40 / {} rw - tmpfs t rw\n\
             3 1 0:40 /a/b {} rw - tmpfs t rw\n4 1 0:41 / {} rw - tmpfs t rw\n",
            volume.display(),
            sub.display(),
            plain.display()
        );
        let table = MountTable::parse(table.as_bytes());
        let inside = |path: &Path| match classify(&bind(path, false), &table).unwrap() {
            Class::Memory { top, inside } => {
                assert_eq!(top, volume);
                Some(inside)
            }
            Class::Share => None,
            other => panic!("{other:?}"),
        };
        assert_eq!(inside(&volume), Some(PathBuf::new()));
        assert_eq!(inside(&volume.join("a")), Some("a".into()));
        assert_eq!(inside(&sub), Some("a/b".into()));
        // Another tmpfs of the node is the node's.
        assert_eq!(inside(&plain), None);
        let huge = format!("2 1 0:40 / {} rw - hugetlbfs t rw\n", volume.display());
        let table = MountTable::parse(huge.as_bytes());
        assert_eq!(
            classify(&bind(&volume.join("a"), false), &table).unwrap(),
            Class::Huge {
                top: volume,
                inside: "a".into()
            }
        );
        // The node's own pool is nobody's volume.
        let huge = format!("4 1 0:41 / {} rw - hugetlbfs t rw\n", plain.display());
        let error = classify(&bind(&plain, false), &MountTable::parse(huge.as_bytes()));
        assert!(error.unwrap_err().message.contains("huge pages"));
    }

    #[test]
    fn sockets_pipes_and_devices_are_refused_with_the_reason() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let _listener = UnixListener::bind(&socket).unwrap();
        let fifo = dir.path().join("f");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        for (path, reason) in [
            (socket.as_path(), "is a socket of the node"),
            (&fifo, "is a named pipe of the node"),
        ] {
            let error = class(path, false).unwrap_err();
            assert_eq!(error.kind, Kind::InvalidArgument);
            assert!(error.message.contains(reason), "{error}");
            assert!(error.message.contains("/v"), "{error}");
        }
        let error = class(&dir.path().join("missing"), false).unwrap_err();
        assert_eq!(error.kind, Kind::InvalidArgument);
    }

    #[test]
    fn a_character_device_is_the_guests_of_the_same_name() {
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("link");
        symlink("/dev/null", &link).unwrap();
        for path in [Path::new("/dev/null"), &link] {
            let wanted = Class::Device("null".to_owned());
            assert_eq!(class(path, false).unwrap(), wanted);
        }
        let known = |number: &str, event: &str| {
            fs::create_dir(dir.path().join(number)).unwrap();
            fs::write(dir.path().join(number).join("uevent"), event).unwrap();
        };
        known("10:200", "MAJOR=10\nMINOR=200\nDEVNAME=net/tun\n");
        known("7:7", "MAJOR=7\n");
        known("7:8", "DEVNAME=a b\n");
        let name = |number, path| device_name(dir.path(), number, Path::new(path));
        assert_eq!(name((10, 200), "/any/where"), Some("net/tun".to_owned()));
        // What is in no sysfs goes by its path, if that is in /dev.
        assert_eq!(name((1, 3), "/dev/null"), Some("null".to_owned()));
        assert_eq!(name((1, 3), "/etc/passwd"), None);
        assert_eq!(name((7, 7), "/dev/null"), None);
        assert_eq!(name((7, 8), "/dev/null"), None);
    }

    #[test]
    fn a_link_is_followed_to_what_it_leads_to() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("real")).unwrap();
        symlink("real", dir.path().join("link")).unwrap();
        assert_eq!(
            class(&dir.path().join("link"), false).unwrap(),
            Class::Share
        );
    }
}
