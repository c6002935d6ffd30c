//! The header before each frame (virtio 1.3 §5.1.6): which offload work is left to do.
//!
//! The guest's header is hostile: what it asks of the host's network stack must have been
//! negotiated and be within the frame.

/// Bytes of a header, `num_buffers` included.
pub const HEADER: usize = 12;
/// Where `num_buffers` is.
pub const NUM_BUFFERS: usize = 10;

/// Feature bits (§5.1.3).
pub mod feature {
    /// The device takes packets with partial checksums.
    pub const CSUM: u64 = 1 << 0;
    /// The driver takes packets with partial checksums.
    pub const GUEST_CSUM: u64 = 1 << 1;
    /// The configuration has an MTU.
    pub const MTU: u64 = 1 << 3;
    /// The configuration has a MAC address.
    pub const MAC: u64 = 1 << 5;
    /// The driver takes large TCP segments over IPv4.
    pub const GUEST_TSO4: u64 = 1 << 7;
    /// The driver takes large TCP segments over IPv6.
    pub const GUEST_TSO6: u64 = 1 << 8;
    /// The driver takes large segments with explicit congestion notification.
    pub const GUEST_ECN: u64 = 1 << 9;
    /// The device takes large TCP segments over IPv4.
    pub const HOST_TSO4: u64 = 1 << 11;
    /// The device takes large TCP segments over IPv6.
    pub const HOST_TSO6: u64 = 1 << 12;
    /// The device takes large segments with explicit congestion notification.
    pub const HOST_ECN: u64 = 1 << 13;
    /// A received frame may span several buffers.
    pub const MRG_RXBUF: u64 = 1 << 15;
    /// There is a control queue.
    pub const CTRL_VQ: u64 = 1 << 17;
    /// The driver may use several queue pairs.
    pub const MQ: u64 = 1 << 22;
    /// The driver takes large UDP datagrams that are to be cut, over IPv4.
    pub const GUEST_USO4: u64 = 1 << 54;
    /// The same over IPv6.
    pub const GUEST_USO6: u64 = 1 << 55;
    /// The device takes such datagrams over both.
    pub const HOST_USO: u64 = 1 << 56;
}

const F_NEEDS_CSUM: u8 = 1;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
const GSO_ECN: u8 = 0x80;

fn field(header: &[u8; HEADER], at: usize) -> usize {
    usize::from(u16::from_le_bytes([header[at], header[at + 1]]))
}

/// Whether the device may act on a header from the guest, before a frame of `frame` bytes.
#[must_use]
pub fn acceptable(header: &[u8; HEADER], frame: usize, features: u64) -> bool {
    let partial = header[0] & F_NEEDS_CSUM != 0;
    if partial {
        // The checksum field, two bytes, lies in the frame.
        let end = field(header, 6) + field(header, 8) + 2;
        if features & feature::CSUM == 0 || end > frame {
            return false;
        }
    }
    let kind = header[1] & !GSO_ECN;
    let wanted = match kind {
        GSO_NONE => return header[1] == GSO_NONE,
        GSO_TCPV4 => feature::HOST_TSO4,
        GSO_TCPV6 => feature::HOST_TSO6,
        // Congestion is TCP's to tell.
        GSO_UDP_L4 if header[1] == GSO_UDP_L4 => feature::HOST_USO,
        _ => return false,
    };
    let ecn = if header[1] & GSO_ECN == 0 {
        0
    } else {
        feature::HOST_ECN
    };
    // A segment needs a checksum for each of its parts (§5.1.6.2), and parts of some size.
    partial && features & (wanted | ecn) == wanted | ecn && field(header, 4) != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: u64 = feature::CSUM | feature::HOST_TSO4 | feature::HOST_ECN;

    fn header(flags: u8, gso: u8, size: u16, start: u16, offset: u16) -> [u8; HEADER] {
        let mut header = [0; HEADER];
        header[0] = flags;
        header[1] = gso;
        header[4..6].copy_from_slice(&size.to_le_bytes());
        header[6..8].copy_from_slice(&start.to_le_bytes());
        header[8..10].copy_from_slice(&offset.to_le_bytes());
        header
    }

    #[test]
    fn only_what_was_negotiated_is_acceptable() {
        assert!(acceptable(&header(0, 0, 0, 0, 0), 60, 0));
        assert!(acceptable(&header(1, 0, 0, 34, 16), 60, ALL));
        assert!(!acceptable(&header(1, 0, 0, 34, 16), 60, 0));
        assert!(acceptable(&header(1, 1, 1460, 34, 16), 9000, ALL));
        assert!(acceptable(&header(1, 0x81, 1460, 34, 16), 9000, ALL));
        assert!(!acceptable(&header(1, 4, 1460, 34, 16), 9000, ALL), "TSO6");
        assert!(
            !acceptable(&header(1, 3, 1460, 34, 16), 9000, u64::MAX),
            "UFO"
        );
        assert!(
            !acceptable(&header(0, 0x80, 0, 0, 0), 60, ALL),
            "ECN of nothing"
        );
    }

    #[test]
    fn a_checksum_outside_the_frame_is_not_acceptable() {
        assert!(acceptable(&header(1, 0, 0, 34, 16), 52, ALL));
        assert!(!acceptable(&header(1, 0, 0, 34, 16), 51, ALL));
        assert!(!acceptable(
            &header(1, 0, 0, u16::MAX, u16::MAX),
            65_550,
            ALL
        ));
    }

    #[test]
    fn datagrams_are_cut_where_that_was_negotiated_and_say_nothing_of_congestion() {
        let uso = feature::CSUM | feature::HOST_USO | feature::HOST_ECN;
        assert!(acceptable(&header(1, 5, 1200, 34, 6), 9000, uso));
        assert!(!acceptable(&header(1, 5, 1200, 34, 6), 9000, ALL));
        assert!(!acceptable(&header(1, 0x85, 1200, 34, 6), 9000, uso));
        assert!(!acceptable(&header(0, 5, 1200, 34, 6), 9000, uso));
        assert!(!acceptable(&header(1, 5, 0, 34, 6), 9000, uso));
        assert!(!acceptable(&header(1, 5, 1200, 34, 6), 36, uso));
    }

    #[test]
    fn segments_without_a_size_or_a_checksum_are_not_acceptable() {
        assert!(!acceptable(&header(1, 1, 0, 34, 16), 9000, ALL));
        assert!(!acceptable(&header(0, 1, 1460, 34, 16), 9000, ALL));
    }
}
