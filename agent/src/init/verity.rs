//! A layer whose blocks are checked as they are read (the kernel's dm-verity): against a tree of hashes that lies behind its data, whose
//! root the host has told.
//!
//! What the tree is made of, the superblock before it says (cryptsetup's dm-verity superblock, version 1). It is on the disk and proves nothing: with
//! any other numbers or salt the root hash does not come out, so it is bounded here and the kernel finds the rest.
use std::{fs::File, os::unix::fs::FileExt as _, path::Path};

use super::{
    device_mapper::Device,
    failure::{Context as _, Failure, Result},
};
use crate::root_disks::Verity;

const MAGIC: &[u8] = b"verity\0\0";
/// Bytes of the superblock.
const LENGTH: usize = 512;
const MAX_SALT: usize = 256;
/// What the kernel takes is no more than a page.
const MAX_BLOCK: u32 = 65_536;
/// What the device mapper counts in, bytes.
const SECTOR: u64 = 512;

/// The device that checks what is read of `data`. It goes when nobody has it open and this is dropped. `name` tells it from others in the
/// guest.
///
/// # Errors
/// Without a tree that can be; what the kernel says.
pub fn checked(data: &Path, verity: &Verity, name: &str) -> Result<Device> {
    let mut bytes = [0; LENGTH];
    File::open(data)
        .and_then(|file| file.read_exact_at(&mut bytes, verity.hash_offset))
        .during("reading dm-verity's superblock")?;
    let superblock = Superblock::parse(&bytes, verity.hash_offset).ok_or_else(|| {
        Failure(format!(
            "no superblock of dm-verity at {}",
            verity.hash_offset
        ))
    })?;
    let sectors = superblock.sectors();
    let table = superblock.table(data, verity);
    Device::read_only(name, "verity", sectors, &table).during("dm-verity")
}

/// What of a superblock counts.
#[derive(Debug, PartialEq, Eq)]
struct Superblock {
    hash_type: u32,
    algorithm: String,
    data_block: u32,
    hash_block: u32,
    data_blocks: u64,
    salt: Vec<u8>,
}

impl Superblock {
    /// `None` of what is none, or would reach beyond `end`, where it lies.
    fn parse(bytes: &[u8; LENGTH], end: u64) -> Option<Self> {
        let (magic, rest) = bytes.split_at_checked(MAGIC.len())?;
        let mut fields = Fields(rest);
        let (version, hash_type) = (fields.u32()?, fields.u32()?);
        fields.take(16)?;
        let algorithm = fields.take(32)?.split(|byte| *byte == 0).next()?;
        let (data_block, hash_block) = (fields.u32()?, fields.u32()?);
        let data_blocks = fields.u64()?;
        let salt_size = fields.u16()?.into();
        fields.take(6)?;
        let salt = fields.take(MAX_SALT)?.get(..salt_size)?;
        let is_name = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'-';
        let is_block = |size: u32| size.is_power_of_two() && (512..=MAX_BLOCK).contains(&size);
        let is_sound = magic == MAGIC
            && version == 1
            && hash_type <= 1
            && !algorithm.is_empty()
            && algorithm.iter().all(is_name)
            && is_block(data_block)
            && is_block(hash_block)
            && data_blocks > 0
            && data_blocks.checked_mul(data_block.into())? <= end
            && end.is_multiple_of(hash_block.into());
        is_sound.then(|| Self {
            hash_type,
            algorithm: String::from_utf8_lossy(algorithm).into_owned(),
            data_block,
            hash_block,
            data_blocks,
            salt: salt.to_vec(),
        })
    }

    fn sectors(&self) -> u64 {
        self.data_blocks * u64::from(self.data_block) / SECTOR
    }

    /// The target's parameters (Documentation/admin-guide/device-mapper/verity.rst). The tree begins with the block after the superblock.
    fn table(&self, data: &Path, verity: &Verity) -> String {
        let Self {
            hash_type,
            algorithm,
            data_block,
            hash_block,
            data_blocks,
            salt,
        } = self;
        let tree = verity.hash_offset / u64::from(*hash_block) + 1;
        let salt = match salt.is_empty() {
            true => "-".to_owned(),
            false => hex(salt),
        };
        format!(
            "{hash_type} {data} {data} {data_block} {hash_block} {data_blocks} {tree} {algorithm} {root} {salt}",
            data = data.display(),
            root = hex(&verity.root_hash),
        )
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Little-endian fields, one after the other.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }

    fn u16(&mut self) -> Option<u16> {
        Some(u16::from_le_bytes(self.take(2)?.try_into().ok()?))
    }

    fn u32(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(self.take(4)?.try_into().ok()?))
    }

    fn u64(&mut self) -> Option<u64> {
        Some(u64::from_le_bytes(self.take(8)?.try_into().ok()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// As veritysetup and containerd write it.
    fn superblock(salt: &[u8]) -> [u8; LENGTH] {
        let mut bytes = [0; LENGTH];
        let mut at = 0;
        let mut put = |field: &[u8], room: usize| {
            bytes[at..at + field.len()].copy_from_slice(field);
            at += room;
        };
        put(MAGIC, 8);
        put(&1u32.to_le_bytes(), 4);
        put(&1u32.to_le_bytes(), 4);
        put(&[7; 16], 16);
        put(b"sha256", 32);
        put(&4096u32.to_le_bytes(), 4);
        put(&4096u32.to_le_bytes(), 4);
        put(&5u64.to_le_bytes(), 8);
        put(&u16::try_from(salt.len()).unwrap().to_le_bytes(), 8);
        put(salt, MAX_SALT);
        bytes
    }

    #[test]
    fn a_superblock_is_the_table_of_the_kernels_target() {
        let parsed = Superblock::parse(&superblock(&[0, 0xab]), 5 * 4096).unwrap();
        assert_eq!(parsed.sectors(), 40);
        let verity = Verity {
            root_hash: vec![0x12, 0xff],
            hash_offset: 5 * 4096,
        };
        assert_eq!(
            parsed.table(Path::new("/dev/vdb1"), &verity),
            "1 /dev/vdb1 /dev/vdb1 4096 4096 5 6 sha256 12ff 00ab"
        );
        let without = Superblock::parse(&superblock(&[]), 5 * 4096).unwrap();
        assert!(
            without
                .table(Path::new("/dev/vdb"), &verity)
                .ends_with("12ff -")
        );
    }

    #[test]
    fn what_is_no_superblock_or_reaches_beyond_itself_is_refused() {
        let right = superblock(&[1]);
        assert_eq!(
            Superblock::parse(&right, 4 * 4096),
            None,
            "more data than there is"
        );
        assert_eq!(
            Superblock::parse(&right, 5 * 4096 + 512),
            None,
            "a tree between blocks"
        );
        // Magic, version, type, algorithm, sizes of blocks, number, salt.
        for at in [0, 8, 12, 32, 64, 68, 79, 81] {
            let mut wrong = right;
            wrong[at] = b' ';
            assert_eq!(Superblock::parse(&wrong, 5 * 4096), None, "byte {at}");
        }
    }

    proptest! {
        #[test]
        fn any_superblock_is_one_line_within_bounds(
            changes in prop::collection::vec((0usize..LENGTH, any::<u8>()), 0..6), end in any::<u64>(),
        ) {
            let mut bytes = superblock(&[3; 32]);
            for (at, byte) in changes {
                bytes[at] = byte;
            }
            let end = end & !0xfff;
            if let Some(parsed) = Superblock::parse(&bytes, end) {
                let verity = Verity { root_hash: vec![9; 32], hash_offset: end };
                let table = parsed.table(Path::new("/dev/vdb1"), &verity);
                prop_assert!(table.len() < 1024 && table.split(' ').count() == 10);
                prop_assert!(parsed.sectors() <= end / SECTOR);
            }
        }
    }
}
