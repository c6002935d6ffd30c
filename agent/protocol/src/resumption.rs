//! What a clone of a captured guest is told first. It reads it in the configuration space of its host bridge (0:0.0), and erases it by a write
//! there. It comes from the VMM, which the agent trusts.

/// Begins the bytes: a guest that is told nothing reads zeros there.
const MAGIC: [u8; 4] = *b"brig";
const NEW_DEVICES: u8 = 1;

/// What makes a clone another guest than its siblings.
#[derive(Clone, PartialEq, Eq)]
pub struct Resumption {
    /// There are devices on the bus that the captured guest did not have.
    pub new_devices: bool,
    /// Nanoseconds since the epoch.
    pub unix_time_ns: u64,
    /// Random bytes of the host's kernel, for this clone alone.
    pub seed: [u8; Self::SEED],
}

impl Resumption {
    /// Random bytes: what the guest's generator has for a key.
    pub const SEED: usize = 32;
    /// The first register.
    pub const REGISTER: u16 = 0x40;
    /// All of it.
    pub const BYTES: usize = 16 + Self::SEED;

    /// As the port gives it.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4] = u8::from(self.new_devices) * NEW_DEVICES;
        bytes[8..16].copy_from_slice(&self.unix_time_ns.to_le_bytes());
        bytes[16..].copy_from_slice(&self.seed);
        bytes
    }

    /// None if these are not the bytes of one.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; Self::BYTES]) -> Option<Self> {
        let mut time = [0; 8];
        time.copy_from_slice(&bytes[8..16]);
        let mut seed = [0; Self::SEED];
        seed.copy_from_slice(&bytes[16..]);
        (bytes[..4] == MAGIC).then_some(Self {
            new_devices: bytes[4] & NEW_DEVICES != 0,
            unix_time_ns: u64::from_le_bytes(time),
            seed,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read_and_registers_that_tell_nothing_are_none() {
        for new_devices in [false, true] {
            let told = Resumption {
                new_devices,
                unix_time_ns: 1_796_000_000_123_456_789,
                seed: std::array::from_fn(|at| u8::try_from(at).unwrap_or(0)),
            };
            assert!(Resumption::from_bytes(&told.to_bytes()) == Some(told));
        }
        assert!(Resumption::from_bytes(&[0; Resumption::BYTES]).is_none());
        assert!(Resumption::from_bytes(&[0xff; Resumption::BYTES]).is_none());
    }
}
