//! A root file system on disks: what the mounts of a request are in this guest, and the cutting of a disk into its pieces.
//!
//! A piece is a partition that the kernel is told of (BLKPG): no table of them is on the disk, and nothing parses one.
//! Trusts the host in meaning, not in form.
use std::{
    fs::{self, File},
    io,
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
};

use brig_agent_protocol::agent::{IdRange, RootDevice, RootDisk, RootMount, RootPlace};
use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result},
    id_map, modules, names, pci,
    spec::IdMapping,
};

/// `linux/fs.h`: `_IO(0x12, 93)`.
const BLKROSET: libc::Ioctl = 0x125d;
/// `linux/blkpg.h`: `_IO(0x12, 105)` and the operations.
const BLKPG: libc::Ioctl = 0x1269;
const ADD_PARTITION: libc::c_int = 1;
const DELETE_PARTITION: libc::c_int = 2;
/// What sysfs counts in, bytes.
const SECTOR: i64 = 512;
/// `DISK_MAX_PARTS` of the kernel, of which 0 is the disk.
const MAX_PIECES: usize = 255;
/// In bytes.
const ALIGNMENT: u64 = 4096;
/// Bytes of the longest hash that the kernel has.
const MAX_HASH: usize = 64;
/// A stacking of this many layers is what overlayfs takes (`OVL_MAX_STACK`), and some for those around it.
const MAX_MOUNTS: usize = 520;

/// One of the mounts that a root file system is made of.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Mount {
    /// File system type, "overlay" or "bind".
    pub kind: String,
    /// Nodes of the guest, of a file system; the first is its source.
    pub devices: Vec<PathBuf>,
    /// As in fstab.
    pub options: Vec<String>,
    /// Lower layers, the uppermost first; of a bind mount its source.
    pub lower: Vec<Place>,
    /// Upper and work directory.
    pub upper: Option<(Place, Place)>,
    /// To be made first, with their permissions.
    pub directories: Vec<(Place, u32)>,
    /// Users and groups of a user namespace as which the owners are seen, of an overlay or a bind mount those of what is in `lower`; empty: as they are.
    pub map: (Vec<IdMapping>, Vec<IdMapping>),
    /// Of a file system on one device: what its blocks are checked against.
    pub verity: Option<Verity>,
}

/// A tree of hashes behind the data of a device (dm-verity).
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Verity {
    /// The hash of its root.
    pub root_hash: Vec<u8>,
    /// Where its superblock lies on the device, in bytes.
    pub hash_offset: u64,
}

/// A directory of an earlier mount.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Place {
    /// Its index; none: what the host shares as the root file system.
    pub mount: Option<usize>,
    /// Below it.
    pub path: String,
}

/// What the mounts of a request are here. Cuts disks that are to be cut.
///
/// # Errors
/// `InvalidArgument` for what has no meaning, `NotFound` for a disk that is not there.
pub async fn resolve(mounts: &[RootMount], disks: &[RootDisk]) -> Result<Vec<Mount>> {
    if mounts.len() > MAX_MOUNTS {
        return Err(Error::InvalidArgument(format!(
            "a root file system of {} mounts is over the limit of {MAX_MOUNTS}",
            mounts.len()
        )));
    }
    if mounts.iter().any(|mount| mount.verity.is_some()) {
        let loaded = tokio::task::spawn_blocking(|| modules::load("dm-mod")).await;
        match loaded.map_err(|e| Error::Internal(e.to_string()))? {
            Ok(true) => {}
            Ok(false) => return Err(without_verity("none answers to dm-mod")),
            Err(failure) => return Err(without_verity(&failure.to_string())),
        }
    }
    let mut nodes = Vec::new();
    for disk in disks {
        let found = pci::nodes(disk.function).await?;
        let node = found.into_iter().find(|node| node.block).ok_or_else(|| {
            Error::NotFound(format!(
                "function {} of the guest's bus is no disk",
                disk.function
            ))
        })?;
        let pieces = ranges(disk.start, &disk.pieces)?;
        let path = Path::new("/dev").join(&node.name);
        let memory = disk.memory;
        let cut = tokio::task::spawn_blocking(move || {
            if memory {
                forbid_writing(&path)?;
            }
            cut(&path, &pieces)
        });
        let parts = cut.await.map_err(|e| Error::Internal(e.to_string()))?;
        nodes.push(parts.map_err(|e| Error::io(format_args!("cutting /dev/{}", node.name), e))?);
    }
    (0..)
        .zip(mounts)
        .map(|(index, mount)| {
            let mut resolved = one(index, mount, &nodes)?;
            let on_memory = |device: &RootDevice| {
                let index = usize::try_from(device.disk).ok();
                index
                    .and_then(|index| disks.get(index))
                    .is_some_and(|disk| disk.memory)
            };
            // What dm-verity checks is read through its device, which is a disk.
            let is_checked = resolved.verity.is_some();
            if mount.type_ == "erofs" && !is_checked && mount.devices.iter().all(on_memory) {
                // An image that cannot be read so is read as from any disk, which the kernel's log says.
                resolved.options.push("dax=always".to_owned());
            }
            Ok(resolved)
        })
        .collect()
}

fn without_verity(reason: &str) -> Error {
    Error::Internal(format!(
        "layers are to be checked by dm-verity, of which the guest's kernel has no module ({reason}): the handler's `modules` must be the image \
         that was built with its `kernel`"
    ))
}

/// Nothing that is mounted of it, and nobody who opens it, writes to it. The driver of memory thinks that it can.
fn forbid_writing(disk: &Path) -> io::Result<()> {
    let file = File::open(disk)?;
    let yes: libc::c_int = 1;
    // SAFETY: the kernel reads one number, which outlives the call.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), BLKROSET, &raw const yes) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Begin and length of each piece in bytes.
fn ranges(first: u64, lengths: &[u64]) -> Result<Vec<(i64, i64)>> {
    let wrong = || Error::InvalidArgument("the pieces of a disk have no meaning".into());
    if lengths.len() > MAX_PIECES {
        return Err(wrong());
    }
    let mut start = i64::try_from(first)
        .ok()
        .filter(|_| first.is_multiple_of(ALIGNMENT))
        .ok_or_else(wrong)?;
    let mut ranges = Vec::new();
    for length in lengths {
        let length = i64::try_from(*length)
            .ok()
            .filter(|_| *length > 0 && length.is_multiple_of(ALIGNMENT))
            .ok_or_else(wrong)?;
        ranges.push((start, length));
        start = start.checked_add(length).ok_or_else(wrong)?;
    }
    Ok(ranges)
}

/// The node of a disk and those of its pieces, which are made unless they are there: another container may have the
/// same disk. What the kernel has taken for a table of partitions in the first piece is none.
fn cut(disk: &Path, pieces: &[(i64, i64)]) -> io::Result<Vec<PathBuf>> {
    let mut nodes = vec![disk.to_owned()];
    if pieces.is_empty() {
        return Ok(nodes);
    }
    let file = File::open(disk)?;
    let name = disk.file_name().unwrap_or_default();
    let of_disk = Path::new("/sys/class/block").join(name);
    let there = partitions(&of_disk)?;
    let wanted = |number: i32| {
        let index = usize::try_from(number).ok()?.checked_sub(1)?;
        pieces.get(index).copied()
    };
    for (number, range) in &there {
        if wanted(*number) != Some(*range) {
            change_partition(&file, DELETE_PARTITION, *number, *range)?;
        }
    }
    for (number, range) in (1..).zip(pieces) {
        if !there.contains(&(number, *range))
            && let Err(error) = change_partition(&file, ADD_PARTITION, number, *range)
        {
            // Another container that has the disk may just have been quicker.
            if !partitions(&of_disk)?.contains(&(number, *range)) {
                return Err(error);
            }
        }
        nodes.push(piece_node(disk, number));
    }
    Ok(nodes)
}

/// The node of a partition, as the kernel names it: a name that ends in a digit has a letter between.
fn piece_node(disk: &Path, number: i32) -> PathBuf {
    let name = disk.display().to_string();
    let between = if name.ends_with(|last: char| last.is_ascii_digit()) {
        "p"
    } else {
        ""
    };
    PathBuf::from(format!("{name}{between}{number}"))
}

/// The partitions that the kernel has of a disk: number, and begin and length in bytes. `disk` is its directory in sysfs.
fn partitions(disk: &Path) -> io::Result<Vec<(i32, (i64, i64))>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(disk)? {
        let path = entry?.path();
        let figure = |file: &str| {
            let text = fs::read_to_string(path.join(file)).ok()?;
            text.trim().parse::<i64>().ok()
        };
        if let (Some(number), Some(start), Some(size)) =
            (figure("partition"), figure("start"), figure("size"))
        {
            let number = i32::try_from(number).map_err(io::Error::other)?;
            found.push((
                number,
                (start.saturating_mul(SECTOR), size.saturating_mul(SECTOR)),
            ));
        }
    }
    Ok(found)
}

/// `struct blkpg_partition`.
#[repr(C)]
struct Partition {
    start: libc::c_longlong,
    length: libc::c_longlong,
    number: libc::c_int,
    names: [u8; 128],
}

/// `struct blkpg_ioctl_arg`.
#[repr(C)]
struct Argument {
    operation: libc::c_int,
    flags: libc::c_int,
    length: libc::c_int,
    data: *const Partition,
}

fn change_partition(
    disk: &File,
    operation: libc::c_int,
    number: i32,
    (start, length): (i64, i64),
) -> io::Result<()> {
    let partition = Partition {
        start,
        length,
        number,
        names: [0; 128],
    };
    let argument = Argument {
        operation,
        flags: 0,
        length: i32::try_from(size_of::<Partition>()).map_err(io::Error::other)?,
        data: &raw const partition,
    };
    // SAFETY: the kernel reads both structures, which have its layout and outlive the call.
    let result = unsafe { libc::ioctl(disk.as_raw_fd(), BLKPG, &raw const argument) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn one(index: usize, mount: &RootMount, nodes: &[Vec<PathBuf>]) -> Result<Mount> {
    let invalid = |what: &str| {
        Error::InvalidArgument(format!("mount {index} of the root file system: {what}"))
    };
    let device = |device: &RootDevice| {
        let find = || {
            let disk = nodes.get(usize::try_from(device.disk).ok()?)?;
            disk.get(usize::try_from(device.piece).ok()?)
        };
        find().cloned().ok_or_else(|| invalid("it names no disk"))
    };
    let place = |place: &RootPlace| {
        if !place.path.is_empty() {
            names::share_path(&place.path)?;
        }
        let mount = usize::try_from(place.mount)
            .unwrap_or(usize::MAX)
            .checked_sub(1);
        if mount.is_some_and(|mount| mount >= index) {
            return Err(invalid("it names a later one"));
        }
        Ok(Place {
            mount,
            path: place.path.clone(),
        })
    };
    let upper = match (mount.upper.as_ref(), mount.work.as_ref()) {
        (Some(upper), Some(work)) => Some((place(upper)?, place(work)?)),
        (None, None) => None,
        _ => {
            return Err(invalid(
                "an upper directory and a work directory go together",
            ));
        }
    };
    let directories = mount.directories.iter().map(|directory| {
        let made = directory
            .place
            .as_ref()
            .ok_or_else(|| invalid("a directory without a place"))?;
        Ok((place(made)?, directory.mode & 0o7777))
    });
    let map = (ids(&mount.users), ids(&mount.groups));
    id_map::check_pair("a user namespace's map", &map.0, &map.1)
        .map_err(|reason| invalid(&reason))?;
    let verity = mount.verity.as_ref().map(|verity| Verity {
        root_hash: verity.root_hash.clone(),
        hash_offset: verity.hash_offset,
    });
    if let Some(verity) = &verity
        && (mount.devices.len() != 1 || !(1..=MAX_HASH).contains(&verity.root_hash.len()))
    {
        return Err(invalid("dm-verity checks one device against one hash"));
    }
    let resolved = Mount {
        kind: mount.type_.clone(),
        devices: mount.devices.iter().map(device).collect::<Result<_>>()?,
        options: mount.options.clone(),
        lower: mount.lower.iter().map(place).collect::<Result<_>>()?,
        upper,
        directories: directories.collect::<Result<_>>()?,
        map,
        verity,
    };
    match resolved.kind.as_str() {
        "overlay" if !resolved.lower.is_empty() => Ok(resolved),
        "bind" if resolved.lower.len() == 1 => Ok(resolved),
        "overlay" | "bind" => Err(invalid("it has no source")),
        _ if resolved.devices.is_empty() => Err(invalid("it has no device")),
        _ => Ok(resolved),
    }
}

fn ids(ranges: &[IdRange]) -> Vec<IdMapping> {
    let mapping = |range: &IdRange| IdMapping {
        container_id: range.inside,
        host_id: range.outside,
        size: range.size,
    };
    ranges.iter().map(mapping).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use brig_agent_protocol::agent::RootVerity;
    use proptest::prelude::*;

    fn nodes() -> Vec<Vec<PathBuf>> {
        let disk = |names: &[&str]| names.iter().map(PathBuf::from).collect();
        vec![
            disk(&["/dev/vda"]),
            disk(&["/dev/vdb", "/dev/vdb1", "/dev/vdb2"]),
        ]
    }

    fn mount(kind: &str) -> RootMount {
        RootMount {
            type_: kind.to_owned(),
            ..RootMount::default()
        }
    }

    fn place(mount: u32, path: &str) -> RootPlace {
        RootPlace {
            mount,
            path: path.to_owned(),
            ..RootPlace::default()
        }
    }

    #[test]
    fn devices_and_places_are_those_that_there_are() {
        let piece = |disk, piece| RootDevice {
            disk,
            piece,
            ..RootDevice::default()
        };
        let mut erofs = mount("erofs");
        erofs.devices = vec![piece(1, 1), piece(1, 2)];
        let resolved = one(0, &erofs, &nodes()).unwrap();
        assert_eq!(
            resolved.devices,
            [Path::new("/dev/vdb1"), Path::new("/dev/vdb2")]
        );
        for wrong in [piece(2, 0), piece(1, 3), piece(0, 1)] {
            erofs.devices = vec![wrong];
            assert!(one(0, &erofs, &nodes()).is_err());
        }
        assert!(one(0, &mount("ext4"), &nodes()).is_err());
        let mut overlay = mount("overlay");
        assert!(one(3, &overlay, &nodes()).is_err(), "no layer");
        overlay.lower = vec![place(2, ""), place(3, "")];
        overlay.upper = Some(place(1, "upper")).into();
        assert!(one(3, &overlay, &nodes()).is_err(), "no work directory");
        overlay.work = Some(place(1, "work")).into();
        let resolved = one(3, &overlay, &nodes()).unwrap();
        assert_eq!(resolved.lower[1].mount, Some(2));
        assert_eq!(resolved.upper.unwrap().0.path, "upper");
        // Itself, a later one, and a way out.
        for wrong in [place(4, ""), place(9, ""), place(1, "../x"), place(1, "/x")] {
            overlay.lower = vec![wrong];
            assert!(one(3, &overlay, &nodes()).is_err());
        }
        overlay.lower = vec![place(0, "fs")];
        assert_eq!(one(3, &overlay, &nodes()).unwrap().lower[0].mount, None);
    }

    #[test]
    fn one_device_is_checked_against_one_hash() {
        let device = RootDevice {
            disk: 1,
            piece: 1,
            ..RootDevice::default()
        };
        let verity = |length| RootVerity {
            root_hash: vec![1; length],
            hash_offset: 4096,
            ..RootVerity::default()
        };
        let mut erofs = mount("erofs");
        erofs.devices = vec![device.clone()];
        erofs.verity = Some(verity(32)).into();
        let resolved = one(0, &erofs, &nodes()).unwrap().verity.unwrap();
        assert_eq!((resolved.root_hash.len(), resolved.hash_offset), (32, 4096));
        for wrong in [0, 65] {
            erofs.verity = Some(verity(wrong)).into();
            assert!(one(0, &erofs, &nodes()).is_err(), "{wrong} bytes");
        }
        erofs.verity = Some(verity(32)).into();
        erofs.devices.push(device);
        assert!(one(0, &erofs, &nodes()).is_err(), "two devices");
    }

    #[test]
    fn users_and_groups_are_mapped_together_or_not_at_all() {
        let range = IdRange {
            inside: 1,
            outside: 65536,
            size: 9,
            ..IdRange::default()
        };
        let mut overlay = mount("overlay");
        overlay.lower = vec![place(1, "")];
        overlay.users = vec![range.clone()];
        assert!(one(1, &overlay, &nodes()).is_err());
        overlay.groups = vec![range.clone()];
        let (users, groups) = one(1, &overlay, &nodes()).unwrap().map;
        assert_eq!((users[0].host_id, groups.len()), (65536, 1));
        overlay.groups = vec![range; 341];
        assert!(
            one(1, &overlay, &nodes()).is_err(),
            "more than the kernel takes"
        );
    }

    #[test]
    fn the_nodes_of_partitions_are_named_as_the_kernel_does() {
        let node = |disk| piece_node(Path::new(disk), 3);
        assert_eq!(node("/dev/vda"), Path::new("/dev/vda3"));
        assert_eq!(node("/dev/pmem0"), Path::new("/dev/pmem0p3"));
    }

    #[test]
    fn the_partitions_of_a_disk_are_those_that_the_kernel_shows() {
        let disk = tempfile::tempdir().unwrap();
        let put = |name: &str, figures: &[(&str, &str)]| {
            fs::create_dir(disk.path().join(name)).unwrap();
            for (file, text) in figures {
                fs::write(disk.path().join(name).join(file), text).unwrap();
            }
        };
        put(
            "vda2",
            &[("partition", "2\n"), ("start", "8\n"), ("size", "16\n")],
        );
        put("queue", &[("size", "9")]);
        assert_eq!(partitions(disk.path()).unwrap(), [(2, (4096, 8192))]);
    }

    proptest! {
        #[test]
        fn pieces_lie_one_behind_the_other_or_are_refused(
            first in prop_oneof![any::<u64>(), (0u64..9).prop_map(|n| n * 4096)],
            lengths in prop::collection::vec(prop_oneof![any::<u64>(), (0u64..9).prop_map(|n| n * 4096)], 0..5),
        ) {
            if let Ok(ranges) = ranges(first, &lengths) {
                let mut end = i64::try_from(first).unwrap();
                prop_assert_eq!(end % 4096, 0);
                for (start, length) in ranges {
                    prop_assert!(start == end && length > 0 && length % 4096 == 0);
                    end = start.checked_add(length).unwrap();
                }
            }
        }
    }
}
