//! The byte stream that the probe writes and the suite expects: any lost, doubled or swapped part
//! changes its checksum.

use std::fmt::Write as _;
use std::io::{self, Write};

use sha2::{Digest, Sha256};

use crate::sequence::Sequence;

/// Bytes produced at a time.
const BLOCK: usize = 64 * 1024;

/// An endless deterministic stream of bytes, the same for every reader.
pub struct Pattern {
    words: Sequence,
}

impl Default for Pattern {
    fn default() -> Self {
        Self {
            words: Sequence::new(1),
        }
    }
}

impl Pattern {
    /// Fills `buffer` with the next bytes.
    pub fn fill(&mut self, buffer: &mut [u8]) {
        for chunk in buffer.chunks_mut(8) {
            let word = self.words.draw().to_le_bytes();
            chunk.copy_from_slice(&word[..chunk.len()]);
        }
    }
}

/// Writes the first `bytes` bytes of the pattern.
///
/// # Errors
/// What the writer says.
pub fn write(out: &mut impl Write, bytes: u64) -> io::Result<()> {
    let mut pattern = Pattern::default();
    let mut block = vec![0u8; BLOCK];
    let mut left = bytes;
    while left > 0 {
        pattern.fill(&mut block);
        let now = usize::try_from(left).map_or(BLOCK, |left| left.min(BLOCK));
        out.write_all(&block[..now])?;
        left -= now as u64;
    }
    out.flush()
}

/// Counts and hashes what is written to it.
#[derive(Default)]
pub struct Checksum {
    hash: Sha256,
    /// Bytes so far.
    pub bytes: u64,
}

impl Checksum {
    /// The SHA-256 of everything written, as lower-case hex.
    #[must_use]
    pub fn hex(self) -> String {
        hex(&self.hash.finalize())
    }
}

impl Write for Checksum {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.hash.update(data);
        self.bytes += data.len() as u64;
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The checksum of the first `bytes` bytes of the pattern.
#[must_use]
pub fn checksum(bytes: u64) -> String {
    let mut sum = Checksum::default();
    // Writing to a checksum cannot fail.
    let _ = write(&mut sum, bytes);
    sum.hex()
}

/// Lower-case hex of `bytes`.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        let _ = write!(text, "{byte:02x}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pattern_is_the_same_however_it_is_cut() {
        let mut whole = Vec::new();
        write(&mut whole, 200_000).unwrap();
        let mut short = Vec::new();
        write(&mut short, 70_001).unwrap();
        assert_eq!(whole.len(), 200_000);
        assert_eq!(whole[..70_001], short[..]);
    }

    #[test]
    fn a_lost_block_changes_the_checksum() {
        let mut data = Vec::new();
        write(&mut data, 200_000).unwrap();
        data.drain(65_536..131_072);
        let mut sum = Checksum::default();
        sum.write_all(&data).unwrap();
        assert_ne!(sum.hex(), checksum(200_000 - 65_536));
    }
}
