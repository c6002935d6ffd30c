//! The mounts of the specification, masks and read-only paths.
//!
//! Every mount is made detached (fsopen, open_tree), gets its attributes, and is then attached to a
//! descriptor that was resolved inside the root: there is no moment at which a path is looked up
//! twice.
use std::{
    collections::BTreeMap,
    fs,
    os::fd::{AsFd as _, OwnedFd},
};

use rustix::fs::OFlags;

use super::{
    failure::{Context as _, Failure, Result},
    file_system::new_file_system,
    guest_devices,
    idmap::Ids,
    kernel_modules,
    mapped::Maps,
    null,
    options::{self, Options},
    place::Last,
    root::{Missing, Root},
};
use crate::{
    bundle,
    control::{Create, MountSource},
    detached::{attach_on, clone_from_share, clone_mount, empty_directory},
    mount_attr::{self, Change},
    spec::Mount,
    volume,
};

/// statfs(2) f_type of procfs.
pub const PROC_MAGIC: i64 = 0x9fa0;
/// What of procfs may be replaced, as lxcfs does.
const IN_PROC: [&str; 11] = [
    "/proc/cpuinfo",
    "/proc/diskstats",
    "/proc/meminfo",
    "/proc/stat",
    "/proc/swaps",
    "/proc/uptime",
    "/proc/loadavg",
    "/proc/slabinfo",
    "/proc/net/dev",
    "/proc/sys/kernel/ns_last_pid",
    "/proc/sys/crypto/fips_enabled",
];

/// Copies of the volumes that the container mounts, by index into `spec.mounts`.
pub fn clone_volumes(create: &Create) -> Result<BTreeMap<u32, OwnedFd>> {
    let mut volumes = BTreeMap::new();
    for (index, source) in &create.mount_sources {
        if let MountSource::Volume { id, path, .. } = source {
            let copy = volume::copy::for_container(&create.volumes, id, path)
                .during(format_args!("mounting {path:?} of the volume {id}"))?;
            volumes.insert(*index, copy);
        }
    }
    Ok(volumes)
}

/// What is left to be done when every mount is there.
pub struct Mounted {
    /// The helper has to fill /dev: not when the container brings one of its own.
    pub needs_devices: bool,
    /// File systems in which something may be made until then: places of later mounts, devices, the working
    /// directory.
    readonly: Vec<OwnedFd>,
}

impl Mounted {
    /// Makes those read-only that are to be, as runc does, when nothing of the container is made any more.
    pub fn finish(self) -> Result<()> {
        let change = Change {
            set: libc::MOUNT_ATTR_RDONLY,
            ..Change::default()
        };
        for tree in self.readonly {
            mount_attr::apply(tree.as_fd(), &change, false).during("mount options")?;
        }
        Ok(())
    }
}

/// Makes every mount of the specification, in order; `prepared` are those that were made before, detached, by index.
pub fn mount_all(
    create: &Create,
    root: &Root,
    mut prepared: BTreeMap<u32, OwnedFd>,
    (ids, maps): (&Ids, &Maps),
) -> Result<Mounted> {
    let mut mounted = Mounted {
        needs_devices: true,
        readonly: Vec::new(),
    };
    for (index, mount) in create.spec.mounts.iter().enumerate() {
        let index = u32::try_from(index).unwrap_or(u32::MAX);
        let source = create.mount_sources.get(&index);
        let prepared = prepared.remove(&index);
        let (bind, readonly_later) = mount_one(
            create,
            root,
            (index, mount),
            (source, prepared),
            (ids, maps),
        )
        .map_err(|e| {
            Failure(format!(
                "mounting {:?} at {}: {e}",
                mount.kind, mount.destination
            ))
        })?;
        mounted.needs_devices &= !(bind && is_dev(mount));
        mounted.readonly.extend(readonly_later);
    }
    Ok(mounted)
}

fn is_dev(mount: &Mount) -> bool {
    mount.destination.trim_end_matches('/') == "/dev"
}

/// The answer is whether it is a bind mount, and the tree if it has still to be made read-only.
fn mount_one(
    create: &Create,
    root: &Root,
    (index, mount): (u32, &Mount),
    (source, prepared): (Option<&MountSource>, Option<OwnedFd>),
    (ids, maps): (&Ids, &Maps),
) -> Result<(bool, Option<OwnedFd>)> {
    let mut options = options::parse(&mount.options);
    map_owner(&mount.kind, &mut options, ids)?;
    let bind = is_bind(mount, &options, source);
    let (tree, is_dir) = if bind {
        let recursive = options.bind.unwrap_or(true);
        let modules = kernel_modules::beside_the_nodes(create, mount, source, options.readonly)?;
        let (tree, is_dir) = match modules {
            Some(tree) => (tree, true),
            None => bind_source(create, mount, (source, prepared), recursive)?,
        };
        maps.apply(index, tree.as_fd())?;
        (tree, is_dir)
    } else if let Some(tree) = prepared {
        (tree, true)
    } else {
        if mount.kind == "tmpfs" {
            copy_mode(root, &mount.destination, &mut options)?;
        }
        (new_file_system(mount, &options)?, true)
    };
    if let Some(MountSource::Share {
        readonly_on_host: true,
        ..
    }) = source
    {
        options.own.set &= !libc::MOUNT_ATTR_RDONLY;
    }
    let later = !bind && options.readonly && (mount.kind == "tmpfs" || is_dev(mount));
    if later {
        options.own.set &= !libc::MOUNT_ATTR_RDONLY;
    }
    mount_attr::apply(tree.as_fd(), &options.own, false).during("mount options")?;
    mount_attr::apply(tree.as_fd(), &options.below, true).during("mount options")?;

    let destination = match mount.kind.as_str() {
        "proc" | "sysfs" if !bind => root.open_real_dir(&mount.destination)?,
        _ => {
            let missing = if is_dir {
                Missing::Directory
            } else {
                Missing::File
            };
            root.open_or_make(&mount.destination, missing)?
        }
    };
    if bind {
        check_place_in_proc(root, &mount.destination, &destination)?;
    }
    attach_on(&tree, destination.as_fd()).during("attaching")?;
    // After the attachment: it would make a mount shared again under a shared parent.
    for propagation in &options.propagation {
        let change = Change {
            propagation: propagation.flag,
            ..Change::default()
        };
        mount_attr::apply(tree.as_fd(), &change, propagation.recursive)
            .during("mount propagation")?;
    }
    Ok((bind, later.then_some(tree)))
}

fn is_bind(mount: &Mount, options: &Options, source: Option<&MountSource>) -> bool {
    options.bind.is_some() || mount.kind == "bind" || source.is_some()
}

/// Those mounts of the specification that are a procfs, by index, with their options.
pub fn procfs(create: &Create) -> impl Iterator<Item = (u32, &Mount, Options)> {
    let mounts = (0..).zip(&create.spec.mounts);
    mounts.filter_map(|(index, mount)| {
        let options = options::parse(&mount.options);
        let source = create.mount_sources.get(&index);
        let wanted = mount.kind == "proc" && !is_bind(mount, &options, source);
        wanted.then_some((index, mount, options))
    })
}

/// Refuses to hide what programs learn from procfs behind files of a volume, by whatever links the image leads
/// there; but for those that runc lets through.
fn check_place_in_proc(root: &Root, path: &str, place: &OwnedFd) -> Result<()> {
    let file_system = rustix::fs::fstatfs(place).during(path)?;
    if file_system.f_type != PROC_MAGIC {
        return Ok(());
    }
    let place = root.place(path, Last::Followed)?;
    if IN_PROC.iter().any(|known| place.path == **known) {
        return Ok(());
    }
    Err(Failure(format!(
        "{path}: cannot be mounted because it is inside /proc{}",
        place.why()
    )))
}

/// Owners in options are the container's ids; the mount is made with the guest's. A tmpfs belongs to
/// the container's root.
fn map_owner(kind: &str, options: &mut Options, ids: &Ids) -> Result<()> {
    if ids.is_identity() || !matches!(kind, "tmpfs" | "devpts") {
        return Ok(());
    }
    for (key, value) in &mut options.data {
        let Some(id) = value.as_deref().and_then(|v| v.parse().ok()) else {
            continue;
        };
        match key.as_str() {
            "uid" => *value = Some(ids.uid(id)?.to_string()),
            "gid" => *value = Some(ids.gid(id)?.to_string()),
            _ => {}
        }
    }
    let (uid, gid) = ids.root()?;
    for (key, id) in [("uid", uid), ("gid", gid)] {
        if kind == "tmpfs" && !options.data.iter().any(|(k, _)| k == key) {
            options.data.push((key.into(), Some(id.to_string())));
        }
    }
    Ok(())
}

/// What a bind mount shows, and whether that is a directory. Host paths mean nothing here: a source is
/// what the shim put into the share, or the sandbox's shared memory.
fn bind_source(
    create: &Create,
    mount: &Mount,
    (source, volume): (Option<&MountSource>, Option<OwnedFd>),
    recursive: bool,
) -> Result<(OwnedFd, bool)> {
    let tree = match source {
        Some(MountSource::Share { path, inside, .. }) => {
            let path = match inside.as_str() {
                "" => path.clone(),
                inside => format!("{path}/{inside}"),
            };
            clone_from_share(&create.share, &path, recursive)
                .during(format_args!("{path} in the share"))?
        }
        Some(MountSource::Volume { id, .. }) => {
            volume.ok_or_else(|| Failure(format!("the volume {id} was not prepared")))?
        }
        Some(MountSource::Device(name)) => {
            let node = guest_devices::open(name, &create.disks)?;
            clone_mount(node.as_fd(), false).during(format_args!("the guest's /dev/{name}"))?
        }
        Some(MountSource::Bundle(path)) => {
            bundle::clone(path, recursive).during(format_args!("{path} of the driver bundle"))?
        }
        None if mount.destination.trim_end_matches('/') == "/dev/shm" => {
            let shm = fs::File::open(&create.shm).during("the sandbox's /dev/shm")?;
            clone_mount(shm.as_fd(), false).during("the sandbox's /dev/shm")?
        }
        None => {
            return Err(Failure(format!(
                "the host path {} was not shared with the guest; only mounts the shim passes on can be bound",
                mount.source
            )));
        }
    };
    let is_dir =
        rustix::fs::fstat(&tree).during("mount source")?.st_mode & libc::S_IFMT == libc::S_IFDIR;
    Ok((tree, is_dir))
}

/// A tmpfs over a directory of the image keeps that directory's mode.
fn copy_mode(root: &Root, path: &str, options: &mut Options) -> Result<()> {
    if options.data.iter().any(|(key, _)| key == "mode") {
        return Ok(());
    }
    if let Ok(dir) = root.open(path, OFlags::PATH | OFlags::DIRECTORY) {
        let mode = rustix::fs::fstat(&dir).during(path)?.st_mode & 0o7777;
        options
            .data
            .push(("mode".into(), Some(format!("{mode:o}"))));
    }
    Ok(())
}

/// Hides each path: files behind a null device of the container's own, directories behind an empty read-only
/// tmpfs. Before the pivot, while those can still be made.
pub fn mask_paths(root: &Root, paths: &[String], ids: &Ids) -> Result<()> {
    let (mut empty, mut null): (Option<OwnedFd>, Option<OwnedFd>) = (None, None);
    for path in paths {
        let what = format_args!("masking {path}").to_string();
        let Some(target) = root.existing(path)? else {
            continue;
        };
        let is_dir =
            rustix::fs::fstat(&target).during(&what)?.st_mode & libc::S_IFMT == libc::S_IFDIR;
        // One for all masked directories of a container, and one for all files.
        let first = if is_dir { &mut empty } else { &mut null };
        let cover = match first {
            Some(first) => clone_mount(first.as_fd(), false).during(&what)?,
            None if is_dir => empty_directory().during(&what)?,
            None => null::mount(root, ids)?,
        };
        attach_on(&cover, target.as_fd()).during(&what)?;
        first.get_or_insert(cover);
    }
    Ok(())
}

/// Makes each path read-only by a bind mount of it on itself.
pub fn readonly_paths(root: &Root, paths: &[String]) -> Result<()> {
    for path in paths {
        let Some(target) = root.existing(path)? else {
            continue;
        };
        let copy = clone_mount(target.as_fd(), true).during(path)?;
        let change = Change {
            set: libc::MOUNT_ATTR_RDONLY,
            ..Change::default()
        };
        mount_attr::apply(copy.as_fd(), &change, true).during(path)?;
        attach_on(&copy, target.as_fd()).during(path)?;
    }
    Ok(())
}

/// `root.readonly`: the root mount alone, not the volumes on it.
pub fn make_root_readonly() -> Result<()> {
    let root = fs::File::open("/").during("/")?;
    let change = Change {
        set: libc::MOUNT_ATTR_RDONLY,
        ..Change::default()
    };
    mount_attr::apply(root.as_fd(), &change, false).during("root.readonly")
}
