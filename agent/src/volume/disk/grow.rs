//! A mounted file system that grows to the end of its device, by its own ioctl.
use std::{io, os::fd::OwnedFd};

use rustix::{
    fs::fstatvfs,
    ioctl::{Getter, Opcode, Setter, ioctl, opcode},
};

/// `fs/ext4/ext4.h`: `EXT4_IOC_RESIZE_FS`.
const EXT4_RESIZE: Opcode = opcode::write::<u64>(b'f', 16);
/// `fs/xfs/libxfs/xfs_fs.h`: `XFS_IOC_FSGEOMETRY_V1`, `XFS_IOC_FSGROWFSDATA`.
const XFS_GEOMETRY: Opcode = opcode::read::<XfsGeometry>(b'X', 100);
const XFS_GROW: Opcode = opcode::write::<XfsGrowth>(b'X', 110);
/// `linux/btrfs.h`: `BTRFS_IOC_RESIZE`.
const BTRFS_RESIZE: Opcode = opcode::write::<BtrfsArguments>(0x94, 3);

/// `struct xfs_fsop_geom_v1`.
#[repr(C)]
struct XfsGeometry {
    block: u32,
    others: [u32; 6],
    most_inodes: u32,
    data_blocks: u64,
    rest: [u64; 9],
}

/// `struct xfs_growfs_data`.
#[repr(C)]
struct XfsGrowth {
    blocks: u64,
    most_inodes: u32,
    padding: u32,
}

/// `struct btrfs_ioctl_vol_args`.
#[repr(C)]
struct BtrfsArguments {
    fd: i64,
    name: [u8; 4088],
}

/// Lets what `top` is the top of, a file system of this type on a device of `size` bytes, have all of the device. One
/// that has it already is left as it is, and one of a type that never grows.
///
/// # Errors
/// The kernel's: it has its old size.
pub(super) fn to(kind: &str, top: &OwnedFd, size: u64) -> io::Result<()> {
    match kind {
        "ext2" | "ext3" | "ext4" => ext4(top, size),
        "xfs" => xfs(top, size),
        "btrfs" => btrfs(top),
        _ => Ok(()),
    }
}

fn ext4(top: &OwnedFd, size: u64) -> io::Result<()> {
    let found = fstatvfs(top)?;
    let block = found.f_frsize.max(1);
    let blocks = size / block;
    // Its own structures are no part of what it shows; the kernel compares again.
    if blocks <= found.f_blocks {
        return Ok(());
    }
    // SAFETY: the request reads one number of 64 bits.
    unsafe { ioctl(top, Setter::<EXT4_RESIZE, u64>::new(blocks)) }?;
    Ok(())
}

fn xfs(top: &OwnedFd, size: u64) -> io::Result<()> {
    // SAFETY: the request writes one such structure.
    let geometry = unsafe { ioctl(top, Getter::<XFS_GEOMETRY, XfsGeometry>::new()) }?;
    let blocks = size / u64::from(geometry.block.max(512));
    if blocks <= geometry.data_blocks {
        return Ok(());
    }
    let growth = XfsGrowth {
        blocks,
        most_inodes: geometry.most_inodes,
        padding: 0,
    };
    // SAFETY: the request reads one such structure.
    unsafe { ioctl(top, Setter::<XFS_GROW, XfsGrowth>::new(growth)) }?;
    Ok(())
}

fn btrfs(top: &OwnedFd) -> io::Result<()> {
    let mut arguments = BtrfsArguments {
        fd: 0,
        name: [0; 4088],
    };
    for (to, from) in arguments.name.iter_mut().zip(b"max") {
        *to = *from;
    }
    // SAFETY: the request reads one such structure.
    unsafe { ioctl(top, Setter::<BTRFS_RESIZE, BtrfsArguments>::new(arguments)) }?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As the kernel's headers make them, from the sizes of the structures.
    #[test]
    fn the_requests_have_the_kernels_numbers() {
        assert_eq!(EXT4_RESIZE, 0x4008_6610);
        assert_eq!(XFS_GEOMETRY, 0x8070_5864);
        assert_eq!(XFS_GROW, 0x4010_586e);
        assert_eq!(BTRFS_RESIZE, 0x5000_9403);
    }
}
