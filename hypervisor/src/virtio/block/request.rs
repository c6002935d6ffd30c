//! A request as the driver laid it out (virtio 1.3 §5.2.6): header, data, status byte.
//!
//! Hostile: types, sectors and lengths are checked against the disk before anything is done.

use crate::virtio::chain::{Buffers, Chain};

/// Bytes of a sector, whatever the disk's block size is (§5.2.5).
pub const SECTOR: u64 = 512;
/// Bytes of the serial number.
pub const SERIAL: usize = 20;
/// The most data one request may carry, in bytes; Linux stays far below.
pub const MAX_DATA: usize = 16 << 20;
/// The most ranges one discard or write-zeroes request may name.
pub const MAX_RANGES: u32 = 32;
/// The most sectors that all of them may have together: 1 GiB. A disk that cannot zero by itself is written that much.
pub const MAX_RANGE_SECTORS: u32 = 1 << 21;

/// Bytes that are discarded or zeroed by one call: between two of them it can be heard that the driver has reset the disk.
const PIECE: i64 = 64 << 20;

const HEADER: usize = 16;
const RANGE: usize = 16;

/// Types of request.
mod kind {
    pub const IN: u32 = 0;
    pub const OUT: u32 = 1;
    pub const FLUSH: u32 = 4;
    pub const GET_ID: u32 = 8;
    pub const DISCARD: u32 = 11;
    pub const WRITE_ZEROES: u32 = 13;
}

/// `VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP`.
const UNMAP: u32 = 1;

/// What became of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// Failed, or refused.
    IoError = 1,
    /// Not offered.
    Unsupported = 2,
}

/// A piece of the disk in bytes, inside its capacity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// Where it begins.
    pub offset: i64,
    /// Its length.
    pub length: i64,
    /// Whether it may be taken out of the file.
    pub unmap: bool,
}

/// What to do. Data stays in the request's buffers.
#[derive(Debug, PartialEq, Eq)]
pub enum Operation {
    /// Read from this offset in bytes into the writable buffers.
    Read(i64),
    /// Write the readable buffers from this offset in bytes.
    Write(i64),
    /// Make what was written durable.
    Flush,
    /// Write the serial number into the writable buffers.
    Serial,
    /// Forget these ranges.
    Discard(Vec<Range>),
    /// Make these ranges read as zero.
    WriteZeroes(Vec<Range>),
}

/// A request, apart from its header.
#[derive(Debug)]
pub struct Request<'m> {
    /// Head of its chain.
    pub head: u16,
    /// What to do, or why not.
    pub operation: Result<Operation, Status>,
    /// Data from the guest.
    pub readable: Buffers<'m>,
    /// Room for data to the guest.
    pub writable: Buffers<'m>,
    /// Where the status byte goes.
    pub status: Buffers<'m>,
}

/// What the disk allows.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Its capacity in sectors.
    pub sectors: u64,
    /// Refuse whatever changes it.
    pub readonly: bool,
}

/// The chain has no place for the status.
#[derive(Debug, PartialEq, Eq)]
pub struct NoStatus;

impl<'m> Request<'m> {
    /// Parses a chain.
    ///
    /// # Errors
    /// If there is nowhere to say how the request ended.
    pub fn parse(chain: Chain<'m>, limits: Limits) -> Result<Self, NoStatus> {
        let Chain {
            head,
            mut readable,
            writable: mut status,
        } = chain;
        let Some(room) = status.len().checked_sub(1) else {
            return Err(NoStatus);
        };
        let writable = status.split_to(room);
        let operation = match readable.copy_array::<HEADER>() {
            Some(header) => parse_operation(&header, &mut readable, &writable, limits),
            None => Err(Status::IoError),
        };
        Ok(Self {
            head,
            operation,
            readable,
            writable,
            status,
        })
    }
}

impl Range {
    /// It in pieces of at most [`PIECE`] bytes, in order. They meet where a disk has whole blocks, however large: what it has
    /// only parts of it would not forget.
    pub fn pieces(self) -> impl Iterator<Item = Self> {
        let end = self.offset + self.length;
        let mut at = self.offset;
        std::iter::from_fn(move || {
            let piece = Self {
                offset: at,
                length: (PIECE - at % PIECE).min(end - at),
                ..self
            };
            at += piece.length;
            (piece.length > 0).then_some(piece)
        })
    }
}

fn parse_operation(
    header: &[u8; HEADER],
    readable: &mut Buffers<'_>,
    writable: &Buffers<'_>,
    limits: Limits,
) -> Result<Operation, Status> {
    let kind = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
    let mut sector = [0; 8];
    sector.copy_from_slice(&header[8..]);
    let sector = u64::from_le_bytes(sector);
    let changes = matches!(kind, kind::OUT | kind::DISCARD | kind::WRITE_ZEROES);
    if changes && limits.readonly {
        return Err(Status::IoError);
    }
    match kind {
        kind::IN => data_offset(sector, writable.len(), limits).map(Operation::Read),
        kind::OUT => data_offset(sector, readable.len(), limits).map(Operation::Write),
        kind::FLUSH => Ok(Operation::Flush),
        kind::GET_ID => Ok(Operation::Serial),
        kind::DISCARD => ranges(readable, limits, false).map(Operation::Discard),
        kind::WRITE_ZEROES => ranges(readable, limits, true).map(Operation::WriteZeroes),
        _ => Err(Status::Unsupported),
    }
}

fn data_offset(sector: u64, length: usize, limits: Limits) -> Result<i64, Status> {
    let length = u64::try_from(length).map_err(|_| Status::IoError)?;
    if length % SECTOR != 0 || length > MAX_DATA as u64 {
        return Err(Status::IoError);
    }
    inside(sector, length / SECTOR, limits).map(|(offset, _)| offset)
}

/// Offset and length in bytes of sectors that lie on the disk.
fn inside(sector: u64, count: u64, limits: Limits) -> Result<(i64, i64), Status> {
    let end = sector.checked_add(count).ok_or(Status::IoError)?;
    if end > limits.sectors {
        return Err(Status::IoError);
    }
    let bytes = |sectors: u64| {
        sectors
            .checked_mul(SECTOR)
            .and_then(|bytes| i64::try_from(bytes).ok())
            .ok_or(Status::IoError)
    };
    Ok((bytes(sector)?, bytes(count)?))
}

fn ranges(
    readable: &mut Buffers<'_>,
    limits: Limits,
    unmap_allowed: bool,
) -> Result<Vec<Range>, Status> {
    let count = readable.len() / RANGE;
    if !readable.len().is_multiple_of(RANGE) || count == 0 || count > MAX_RANGES as usize {
        return Err(Status::IoError);
    }
    let mut all = Vec::with_capacity(count);
    let mut sum = 0u32;
    while let Some(range) = readable.copy_array::<RANGE>() {
        let mut sector = [0; 8];
        sector.copy_from_slice(&range[..8]);
        let sectors = u32::from_le_bytes([range[8], range[9], range[10], range[11]]);
        let flags = u32::from_le_bytes([range[12], range[13], range[14], range[15]]);
        // Reserved flags, and UNMAP in a discard, are unsupported (§5.2.6.2).
        let known = if unmap_allowed { UNMAP } else { 0 };
        if flags & !known != 0 {
            return Err(Status::Unsupported);
        }
        sum = sum.saturating_add(sectors);
        if sum > MAX_RANGE_SECTORS {
            return Err(Status::IoError);
        }
        let (offset, length) = inside(u64::from_le_bytes(sector), u64::from(sectors), limits)?;
        if length > 0 {
            all.push(Range {
                offset,
                length,
                unmap: flags & UNMAP != 0,
            });
        }
    }
    Ok(all)
}
