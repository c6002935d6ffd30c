//! A hostile stand-in for brig-vmm, for tests/jail: it enters the jail as the VMM does, then does what
//! the test tells it over the control socket, and tries to get out.
//!
//! Requests and replies are words in one datagram each. Trusts the test.

#[path = "brig-jail-probe/escapes.rs"]
mod escapes;
#[path = "brig-jail-probe/given.rs"]
mod given;

use std::ffi::{CStr, CString};
use std::fs::{self, File};
use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::ExitCode;

use brig_hypervisor::control::{CONTROL_FD, exit};
use brig_hypervisor::jail;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

fn main() -> ExitCode {
    match jail::enter() {
        Ok(landlock) => eprintln!("jailed; landlock: {landlock:?}"),
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::from(15);
        }
    }
    // SAFETY: the launcher put the control socket at this number for us.
    let control = unsafe { OwnedFd::from_raw_fd(CONTROL_FD) };
    let mut held: Vec<File> = Vec::new();
    let mut buffer = vec![0u8; 64 * 1024];
    loop {
        let (length, mut given) = match receive(&control, &mut buffer) {
            Ok((0, _)) | Err(_) => return ExitCode::from(14),
            Ok(received) => received,
        };
        debug_assert_eq!(exit::STOPPED, 14);
        let request = String::from_utf8_lossy(&buffer[..length]).into_owned();
        let reply = match request.as_str() {
            "given" => {
                given.extend(held.drain(..).map(OwnedFd::from));
                given::table(&given)
            }
            "hand back" => given::hand_back(&given),
            request => answer(request, &mut held),
        };
        if nix::unistd::write(&control, reply.as_bytes()).is_err() {
            return ExitCode::from(14);
        }
    }
}

/// A request and the descriptors that came with it.
fn receive(control: &OwnedFd, buffer: &mut [u8]) -> nix::Result<(usize, Vec<OwnedFd>)> {
    let mut space = nix::cmsg_space!([i32; 64]);
    let mut slices = [IoSliceMut::new(buffer)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let received = recvmsg::<()>(control.as_raw_fd(), &mut slices, Some(&mut space), flags)?;
    let mut given = Vec::new();
    for message in received.cmsgs()? {
        if let ControlMessageOwned::ScmRights(numbers) = message {
            // SAFETY: the kernel has just installed these descriptors for us alone.
            given.extend(
                numbers
                    .iter()
                    .map(|fd| unsafe { OwnedFd::from_raw_fd(*fd) }),
            );
        }
    }
    Ok((received.bytes, given))
}

fn answer(request: &str, held: &mut Vec<File>) -> String {
    let (verb, path) = request.split_once(' ').unwrap_or((request, ""));
    let outcome = match verb {
        "read" => fs::read_to_string(path),
        "write" => fs::write(path, "written by the probe").map(|()| "written".into()),
        "list" => list(path),
        "links" => links(path),
        "hold" => File::open(path).map(|file| {
            held.push(file);
            "held".into()
        }),
        "release" => {
            held.clear();
            Ok("released".into())
        }
        "hostname" => nix::unistd::gethostname()
            .map(|name| name.to_string_lossy().into_owned())
            .map_err(io::Error::from),
        "limit" => nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE)
            .map(|(soft, hard)| format!("{soft} {hard}"))
            .map_err(io::Error::from),
        "climb" => climb(path),
        "escapes" => Ok(escapes::table()),
        "confine" => jail::seccomp::apply(jail::seccomp::ThreadKind::Fs)
            .map(|()| "confined".into())
            .map_err(io::Error::other),
        "die" => std::process::abort(),
        _ => Ok(format!("unknown request {verb}")),
    };
    outcome.unwrap_or_else(|error| format!("error {}", error.raw_os_error().unwrap_or(0)))
}

fn list(path: &str) -> io::Result<String> {
    let mut names = Vec::new();
    for entry in fs::read_dir(path)? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names.join(" "))
}

fn links(path: &str) -> io::Result<String> {
    let mut targets = Vec::new();
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if let Ok(target) = fs::read_link(entry.path()) {
            targets.push(format!(
                "{}={}",
                entry.file_name().to_string_lossy(),
                target.to_string_lossy()
            ));
        }
    }
    targets.sort();
    Ok(targets.join("\n"))
}

/// Walks `..` from a directory twenty times, and says where that leads.
fn climb(path: &str) -> io::Result<String> {
    let step = |from: i32, name: &CStr| {
        // SAFETY: openat with a C string; the result is checked.
        let fd = unsafe {
            libc::openat(
                from,
                name.as_ptr(),
                libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC,
            )
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: openat has just made this descriptor.
        Ok(unsafe { File::from_raw_fd(fd) })
    };
    let start = CString::new(path).map_err(io::Error::other)?;
    let mut directory = step(libc::AT_FDCWD, &start)?;
    for _ in 0..20 {
        directory = step(directory.as_raw_fd(), c"..")?;
    }
    let link = fs::read_link(format!("/proc/self/fd/{}", directory.as_raw_fd()))?;
    Ok(link.to_string_lossy().into_owned())
}
