//! A root file system on disks, mounted in the container's own mount namespace: what becomes its root leaves with it, and
//! so do the layers below.
//!
//! What is on a disk is hostile: a directory in it is opened name by name, and no link in it is followed.
use std::{
    fs,
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{AtFlags, Gid, Mode, OFlags, ResolveFlags, Uid, chownat, mkdirat, openat, openat2},
    io::Errno,
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag,
        fsconfig_set_string, fsmount, fsopen,
    },
};

use super::{
    failure::{Context as _, Failure, Result},
    file_system::{complaint, new_file_system},
    idmap::Ids,
    mapped, options, verity,
};
use crate::{
    control::Create,
    detached::{attach_at, clone_from_share, clone_mount},
    mount_attr,
    root_disks::{Mount, Place},
    spec,
};

/// The file systems of the disks, by index into the mounts, attached nowhere, and their owners as they are to be seen. Before this process is
/// in the container's cgroup, whose device rules are for the container and know nothing of its root's disks, and before the container's own is
/// forked, as maps are made.
///
/// # Errors
/// What the kernel says, with the mount's type.
pub fn open_disks(create: &Create) -> Result<Vec<Option<OwnedFd>>> {
    let named = |mount: &Mount, failure: Failure| {
        Failure(format!("{} of the root file system: {failure}", mount.kind))
    };
    let open = |(index, mount): (usize, &Mount)| match mount.kind.as_str() {
        "overlay" | "bind" => Ok(None),
        _ => on_disk(mount, &format!("{}-{index}", create.id))
            .map(Some)
            .map_err(|failure| named(mount, failure)),
    };
    let disks: Vec<_> = (create.root.iter().enumerate().map(open)).collect::<Result<_>>()?;
    for (index, mount) in create.root.iter().enumerate() {
        map_owners(index, mount, &disks).map_err(|failure| named(mount, failure))?;
    }
    Ok(disks)
}

/// Has the owners of a mount's layers, or of the mount itself, seen through its map.
fn map_owners(index: usize, mount: &Mount, disks: &[Option<OwnedFd>]) -> Result<()> {
    let (users, groups) = &mount.map;
    if users.is_empty() {
        return Ok(());
    }
    let namespace = mapped::user_namespace(users, groups).during("a user namespace's map")?;
    let layers = mount.lower.iter().map(|place| place.mount);
    let mapped = if mount.lower.is_empty() {
        vec![Some(index)]
    } else {
        layers.collect()
    };
    for layer in mapped {
        let disk = layer.and_then(|index| disks.get(index)?.as_ref());
        let disk = disk.ok_or_else(|| Failure("only layers on disks can be mapped".into()))?;
        mount_attr::map_ids(disk.as_fd(), namespace.as_fd(), false)
            .during("mapping the owners of a layer")?;
    }
    Ok(())
}

/// Mounts all of them, below the container's directory; the last one, which is attached nowhere. `disks` are those of
/// [`open_disks`].
///
/// # Errors
/// What the kernel says, with the mount's type.
pub fn assemble(create: &Create, mut disks: Vec<Option<OwnedFd>>) -> Result<OwnedFd> {
    let base = create.root_mount.with_file_name("layers");
    let layers = Layers {
        create,
        base: &base,
    };
    let last_disk = disks.pop().flatten();
    let Some((last, others)) = create.root.split_last() else {
        return Err(Failure("a root file system of no mounts".into()));
    };
    for (index, (mount, disk)) in others.iter().zip(disks).enumerate() {
        let tree = layers.make(mount, disk)?;
        let at = layers.at(Some(index));
        fs::create_dir_all(&at).during("layers")?;
        attach_at(&tree, &at).during(&mount.kind)?;
    }
    layers.make(last, last_disk)
}

struct Layers<'a> {
    create: &'a Create,
    base: &'a Path,
}

impl Layers<'_> {
    /// Where a mount is; none: what the host shares.
    fn at(&self, mount: Option<usize>) -> PathBuf {
        match mount {
            Some(index) => self.base.join(index.to_string()),
            None => self.base.join("share"),
        }
    }

    fn make(&self, mount: &Mount, disk: Option<OwnedFd>) -> Result<OwnedFd> {
        let (users, groups) = &mount.map;
        let owner = Ids::new(users, groups).root()?;
        for (place, mode) in &mount.directories {
            self.make_directory(place, *mode, owner)?;
        }
        let made = match disk {
            Some(disk) => Ok(disk),
            None if mount.kind == "overlay" => self.overlay(mount),
            None => self.bind(mount),
        };
        made.map_err(|failure| {
            Failure(format!("{} of the root file system: {failure}", mount.kind))
        })
    }

    /// Opens the top of a mount.
    fn top(&self, mount: Option<usize>) -> Result<OwnedFd> {
        let at = self.at(mount);
        if mount.is_none() && !at.exists() {
            let Create { share, rootfs, .. } = self.create;
            let tree = clone_from_share(share, rootfs, true)
                .during(format_args!("{rootfs} in the share"))?;
            fs::create_dir_all(&at).during("layers")?;
            attach_at(&tree, &at).during(rootfs)?;
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        openat(rustix::fs::CWD, &at, flags, Mode::empty()).during("layers")
    }

    fn open(&self, place: &Place) -> Result<OwnedFd> {
        let top = self.top(place.mount)?;
        if place.path.is_empty() {
            return Ok(top);
        }
        below(&top, &place.path).during(&place.path)
    }

    /// `owner` is the guest's ids of who is the container's root.
    fn make_directory(&self, place: &Place, mode: u32, owner: (u32, u32)) -> Result<()> {
        let mut here = self.top(place.mount)?;
        let (user, group) = (Uid::from_raw(owner.0), Gid::from_raw(owner.1));
        for name in place.path.split('/').filter(|name| !name.is_empty()) {
            match mkdirat(&here, name, Mode::from_raw_mode(mode)) {
                Ok(()) => chownat(
                    &here,
                    name,
                    Some(user),
                    Some(group),
                    AtFlags::SYMLINK_NOFOLLOW,
                )
                .during(&place.path)?,
                Err(Errno::EXIST) => {}
                Err(error) => return Err(error).during(&place.path),
            }
            here = below(&here, name).during(&place.path)?;
        }
        Ok(())
    }

    fn overlay(&self, mount: &Mount) -> Result<OwnedFd> {
        let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).during("fsopen")?;
        // The kernel looks a path up; what is open it finds whatever lies there.
        let mut open = Vec::new();
        let mut set = |key: &str, place: &Place| {
            let directory = self.open(place)?;
            let path = format!("/proc/self/fd/{}", directory.as_raw_fd());
            open.push(directory);
            fsconfig_set_string(&context, key, path)
                .map_err(|error| Failure(format!("{key}: {}", complaint(&context, error))))
        };
        for place in &mount.lower {
            set("lowerdir+", place)?;
        }
        if let Some((upper, work)) = &mount.upper {
            set("upperdir", upper)?;
            set("workdir", work)?;
        }
        let parsed = options::parse(&mount.options);
        for (key, value) in &parsed.data {
            let set = match value {
                Some(value) => fsconfig_set_string(&context, key.as_str(), value.as_str()),
                None => fsconfig_set_flag(&context, key.as_str()),
            };
            set.map_err(|error| Failure(format!("option {key}: {}", complaint(&context, error))))?;
        }
        fsconfig_create(&context).map_err(|error| Failure(complaint(&context, error)))?;
        let flags = FsMountFlags::FSMOUNT_CLOEXEC;
        let tree = fsmount(&context, flags, MountAttrFlags::empty()).during("fsmount")?;
        mount_attr::apply(tree.as_fd(), &parsed.own, false).during("mount options")?;
        Ok(tree)
    }

    fn bind(&self, mount: &Mount) -> Result<OwnedFd> {
        let source = mount
            .lower
            .first()
            .ok_or_else(|| Failure("no source".into()))?;
        let tree = clone_mount(self.open(source)?.as_fd(), true).during("bind")?;
        let parsed = options::parse(&mount.options);
        mount_attr::apply(tree.as_fd(), &parsed.own, false).during("mount options")?;
        Ok(tree)
    }
}

/// Opens a directory below another, through no link and on the same file system.
fn below(top: &OwnedFd, path: &str) -> rustix::io::Result<OwnedFd> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat2(top, path, flags, Mode::empty(), resolve)
}

/// `name` is this mount's alone in the guest.
fn on_disk(mount: &Mount, name: &str) -> Result<OwnedFd> {
    let mut parsed = options::parse(&mount.options);
    let Some((source, further)) = mount.devices.split_first() else {
        return Err(Failure("no device".into()));
    };
    // Once mounted it stays as long as the mount.
    let checked = match &mount.verity {
        Some(verity) => Some(verity::checked(source, verity, name)?),
        None => None,
    };
    let source = checked.as_ref().map_or(source, |device| &device.node);
    let text = |path: &Path| path.display().to_string();
    for device in further {
        parsed.data.push(("device".to_owned(), Some(text(device))));
    }
    let plain = spec::Mount {
        kind: mount.kind.clone(),
        source: text(source),
        ..spec::Mount::default()
    };
    let tree = new_file_system(&plain, &parsed)?;
    mount_attr::apply(tree.as_fd(), &parsed.own, false).during("mount options")?;
    Ok(tree)
}
