//! The header of a vsock packet (virtio 1.3 §5.10.6): plain bytes to plain numbers.
//!
//! Any 44 bytes are a header; what its numbers mean is checked where they are used.

/// Bytes of a header.
pub const HEADER: usize = 44;
/// The largest payload of one packet in bytes, in both directions.
pub const MAX_PAYLOAD: u32 = 64 * 1024;
/// `VIRTIO_VSOCK_TYPE_STREAM`.
pub const TYPE_STREAM: u16 = 1;

/// Operations (§5.10.6).
pub mod op {
    /// Open a connection.
    pub const REQUEST: u16 = 1;
    /// A connection is accepted.
    pub const RESPONSE: u16 = 2;
    /// A connection is gone, or was refused.
    pub const RST: u16 = 3;
    /// No more will be received or sent; see [`super::shutdown`].
    pub const SHUTDOWN: u16 = 4;
    /// Payload.
    pub const RW: u16 = 5;
    /// Tells the sender's credit.
    pub const CREDIT_UPDATE: u16 = 6;
    /// Asks for the receiver's credit.
    pub const CREDIT_REQUEST: u16 = 7;
}

/// Flags of a shutdown (§5.10.6.5).
pub mod shutdown {
    /// The sender of the packet will receive no more.
    pub const RECEIVE: u32 = 1;
    /// The sender of the packet will send no more.
    pub const SEND: u32 = 2;
    /// Both.
    pub const BOTH: u32 = RECEIVE | SEND;
}

/// One header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Header {
    /// Context id of the sender.
    pub src_cid: u64,
    /// Context id of the receiver.
    pub dst_cid: u64,
    /// Port of the sender.
    pub src_port: u32,
    /// Port of the receiver.
    pub dst_port: u32,
    /// Payload in bytes.
    pub length: u32,
    /// Socket type.
    pub kind: u16,
    /// Operation, see [`op`].
    pub op: u16,
    /// Flags of the operation.
    pub flags: u32,
    /// The sender's buffer for this connection in bytes.
    pub buf_alloc: u32,
    /// Bytes that left that buffer so far, modulo 2^32.
    pub fwd_cnt: u32,
}

fn take<const N: usize>(bytes: &[u8; HEADER], at: usize) -> [u8; N] {
    let mut field = [0; N];
    field.copy_from_slice(&bytes[at..at + N]);
    field
}

impl Header {
    /// Decodes a header.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; HEADER]) -> Self {
        Self {
            src_cid: u64::from_le_bytes(take(bytes, 0)),
            dst_cid: u64::from_le_bytes(take(bytes, 8)),
            src_port: u32::from_le_bytes(take(bytes, 16)),
            dst_port: u32::from_le_bytes(take(bytes, 20)),
            length: u32::from_le_bytes(take(bytes, 24)),
            kind: u16::from_le_bytes(take(bytes, 28)),
            op: u16::from_le_bytes(take(bytes, 30)),
            flags: u32::from_le_bytes(take(bytes, 32)),
            buf_alloc: u32::from_le_bytes(take(bytes, 36)),
            fwd_cnt: u32::from_le_bytes(take(bytes, 40)),
        }
    }

    /// Encodes a header.
    #[must_use]
    pub fn to_bytes(self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[0..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.length.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn fields_are_where_the_specification_puts_them() {
        let header = Header {
            src_cid: 3,
            dst_cid: 2,
            src_port: 0x0102_0304,
            dst_port: 1024,
            length: 5,
            kind: TYPE_STREAM,
            op: op::RW,
            flags: 6,
            buf_alloc: 7,
            fwd_cnt: 8,
        };
        let bytes = header.to_bytes();
        assert_eq!(bytes[0], 3);
        assert_eq!(bytes[8], 2);
        assert_eq!(bytes[16..20], [4, 3, 2, 1]);
        assert_eq!(bytes[20..24], [0, 4, 0, 0]);
        assert_eq!(bytes[24], 5);
        assert_eq!(bytes[28], 1);
        assert_eq!(bytes[30], 5);
        assert_eq!((bytes[32], bytes[36], bytes[40]), (6, 7, 8));
    }

    proptest! {
        #[test]
        fn any_bytes_survive_a_round_trip(low in any::<[u8; 32]>(), high in any::<[u8; 12]>()) {
            let mut bytes = [0; HEADER];
            bytes[..32].copy_from_slice(&low);
            bytes[32..].copy_from_slice(&high);
            prop_assert_eq!(Header::from_bytes(&bytes).to_bytes(), bytes);
        }
    }
}
