//! A guest of a few lines on a tap: it answers ARP, IPv6 neighbour solicitations and UDP (as an echo).

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// The virtio header before each frame; nobody has asked for the longer one here.
const HEADER: usize = 10;
const ETHERNET: usize = 14;

pub struct Guest<'a> {
    tap: &'a OwnedFd,
    mac: [u8; 6],
}

impl<'a> Guest<'a> {
    pub fn new(tap: &'a OwnedFd, mac: [u8; 6]) -> Self {
        Self { tap, mac }
    }

    /// Answers while `work` runs.
    pub fn serve(&self, work: impl FnOnce()) {
        let done = Done(AtomicBool::new(false));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.0.load(Ordering::Relaxed) {
                    let mut fds = [PollFd::new(self.tap.as_fd(), PollFlags::POLLIN)];
                    if poll(&mut fds, PollTimeout::from(50_u8)).unwrap() > 0 {
                        self.answer().unwrap();
                    }
                }
            });
            // The thread must end, too, if the test fails.
            let _end = End(&done);
            work();
        });
    }

    /// Whether a frame to this Ethernet address comes within a moment; others before it are forgotten.
    pub fn hears(&self, address: [u8; 6]) -> bool {
        let mut buffer = [0; 2048];
        loop {
            let mut fds = [PollFd::new(self.tap.as_fd(), PollFlags::POLLIN)];
            if poll(&mut fds, PollTimeout::from(2000_u16)).unwrap() == 0 {
                return false;
            }
            match nix::unistd::read(self.tap, &mut buffer) {
                Ok(length) if buffer[HEADER..length].starts_with(&address) => return true,
                _ => {}
            }
        }
    }

    fn answer(&self) -> io::Result<()> {
        let mut buffer = [0; 2048];
        let length = match nix::unistd::read(self.tap, &mut buffer) {
            Ok(length) => length,
            Err(error) if io::Error::from(error).kind() == ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let frame = &buffer[HEADER..length];
        let kind = u16::from_be_bytes([frame[12], frame[13]]);
        let packet = frame[ETHERNET..].to_vec();
        let answer = match kind {
            0x0806 if packet[7] == 1 => self.arp(packet),
            0x0800 if packet[9] == 17 => echo(packet, 12, 4, usize::from(frame[ETHERNET] & 15) * 4),
            0x86dd if packet[6] == 17 => echo(packet, 8, 16, 40),
            0x86dd if packet[6] == 58 && packet[40] == 135 => self.neighbour(&packet),
            _ => return Ok(()),
        };
        let mut out = vec![0; HEADER];
        out.extend(&frame[6..12]);
        out.extend(self.mac);
        out.extend(&frame[12..14]);
        out.extend(answer);
        nix::unistd::write(self.tap, &out)?;
        Ok(())
    }

    fn arp(&self, request: Vec<u8>) -> Vec<u8> {
        let mut reply = request.clone();
        reply[7] = 2;
        reply[8..14].copy_from_slice(&self.mac);
        reply[14..18].copy_from_slice(&request[24..28]);
        reply[18..28].copy_from_slice(&request[8..18]);
        reply
    }

    /// A neighbour advertisement (RFC 4861 §4.4).
    fn neighbour(&self, request: &[u8]) -> Vec<u8> {
        let target = &request[48..64];
        let mut body = vec![136, 0, 0, 0, 0x60, 0, 0, 0];
        body.extend(target);
        body.extend([2, 1]);
        body.extend(self.mac);
        let mut reply = request[..40].to_vec();
        reply[4..6].copy_from_slice(&[0, 32]);
        reply[8..24].copy_from_slice(target);
        reply[24..40].copy_from_slice(&request[8..24]);
        let mut pseudo = reply[8..40].to_vec();
        pseudo.extend([0, 0, 0, 32, 0, 0, 0, 58]);
        pseudo.extend(&body);
        let sum = checksum(&pseudo);
        body[2..4].copy_from_slice(&sum.to_be_bytes());
        reply.extend(body);
        reply
    }
}

/// Swaps addresses and ports; no checksum changes by that.
fn echo(mut packet: Vec<u8>, addresses: usize, width: usize, ports: usize) -> Vec<u8> {
    let (source, destination) = packet[addresses..addresses + 2 * width].split_at_mut(width);
    source.swap_with_slice(destination);
    packet.swap(ports, ports + 2);
    packet.swap(ports + 1, ports + 3);
    packet
}

fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes
        .chunks(2)
        .map(|w| u32::from(u16::from_be_bytes([w[0], w[1]])));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap()
}

struct Done(AtomicBool);

struct End<'a>(&'a Done);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.0.store(true, Ordering::Relaxed);
    }
}
