//! The probe as a guest's init, in the place of Brig's agent: waits, or serves one device test.
//! What it has to say goes to /dev/kmsg at level 0, which the VMM passes on.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::TcpListener;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result};
use brig_tests::pattern::{self, Checksum};
use nix::mount::{MsFlags, mount};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, VsockAddr, connect, socket};

/// The host's context.
const HOST: u32 = 2;
/// Where an agent dials.
const AGENT_PORT: u32 = 1024;

/// What the command line asks for by `brig.probe=`; anything else waits for ever.
pub fn run() -> Result<u8> {
    for (kind, target) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        mount(
            Some(kind),
            target,
            Some(kind),
            MsFlags::empty(),
            None::<&str>,
        )
        .with_context(|| format!("cannot mount {target}"))?;
    }
    let cmdline = fs::read_to_string("/proc/cmdline")?;
    let word = cmdline
        .split_whitespace()
        .find_map(|word| word.strip_prefix("brig.probe="));
    let outcome = match word {
        Some("net") => serve_tcp(),
        Some("disk") => disks(),
        Some("commands") => commands(),
        _ => Ok(()),
    };
    if let Err(error) = outcome {
        say(&format!("failed: {error:#}"));
    }
    crate::actions::sleep(None)
}

/// Runs what the host asks for, which listens where it listens for an agent.
fn commands() -> Result<()> {
    let socket = socket(
        AddressFamily::Vsock,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    connect(socket.as_raw_fd(), &VsockAddr::new(HOST, AGENT_PORT)).context("vsock")?;
    let stream = File::from(socket);
    crate::commands::serve(stream.try_clone()?, stream).map(drop)
}

fn say(text: &str) {
    if let Ok(mut kmsg) = fs::OpenOptions::new().write(true).open("/dev/kmsg") {
        let _ = kmsg.write_all(format!("<0>probe: {text}\n").as_bytes());
    }
}

/// Says the checksum of what each TCP connection brings, and sends the pattern back.
fn serve_tcp() -> Result<()> {
    configure("eth0", [10, 77, 0, 2])?;
    let listener = TcpListener::bind("0.0.0.0:7777")?;
    say("listening");
    let (mut stream, _) = listener.accept()?;
    let mut sum = Checksum::default();
    io::copy(&mut (&stream).take(4 << 20), &mut sum)?;
    say(&format!("received {}", sum.hex()));
    pattern::write(&mut stream, 4 << 20)?;
    Ok(())
}

/// Sets a /24 address and brings the interface up.
fn configure(name: &str, address: [u8; 4]) -> Result<()> {
    // SAFETY: a zeroed ifreq is valid: plain integers and bytes.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (slot, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *slot = libc::c_char::try_from(byte).context("an interface name is ASCII")?;
    }
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    let call = |number: libc::Ioctl, request: &mut libc::ifreq, what: &str| -> Result<()> {
        // SAFETY: these ioctls read and write one ifreq, which lives for the call.
        let result = unsafe { libc::ioctl(socket.as_raw_fd(), number, &raw mut *request) };
        if result < 0 {
            return Err(io::Error::last_os_error()).with_context(|| format!("{name}: {what}"));
        }
        Ok(())
    };
    let internet = |octets: [u8; 4]| -> libc::sockaddr {
        let [a, b, c, d] = octets.map(|octet| libc::c_char::from_ne_bytes([octet]));
        let family = libc::sa_family_t::try_from(libc::AF_INET).unwrap_or(2);
        libc::sockaddr {
            sa_family: family,
            sa_data: [0, 0, a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0],
        }
    };
    request.ifr_ifru.ifru_addr = internet(address);
    call(libc::SIOCSIFADDR, &mut request, "address")?;
    request.ifr_ifru.ifru_netmask = internet([255, 255, 255, 0]);
    call(libc::SIOCSIFNETMASK, &mut request, "netmask")?;
    request.ifr_ifru.ifru_flags = i16::try_from(libc::IFF_UP | libc::IFF_RUNNING)?;
    call(libc::SIOCSIFFLAGS, &mut request, "up")
}

/// Writes the pattern to the first disk and syncs it; reads the second, which is read-only.
fn disks() -> Result<()> {
    let serial = |name: &str| {
        fs::read_to_string(format!("/sys/block/{name}/serial"))
            .map(|text| text.trim().to_owned())
            .unwrap_or_default()
    };
    say(&format!("serials {} {}", serial("vda"), serial("vdb")));
    let mut sum = Checksum::default();
    io::copy(&mut File::open("/dev/vdb")?, &mut sum)?;
    say(&format!("read {}", sum.hex()));
    let refused = fs::OpenOptions::new()
        .write(true)
        .open("/dev/vdb")
        .and_then(|file| file.write_all_at(b"x", 0).and_then(|()| file.sync_all()));
    say(match refused {
        Ok(()) => "the read-only disk took a write",
        Err(_) => "the read-only disk refused a write",
    });
    let mut disk = fs::OpenOptions::new().write(true).open("/dev/vda")?;
    pattern::write(&mut disk, 8 << 20)?;
    disk.sync_all()?;
    say("synced");
    Ok(())
}
