//! Devices that the kernel's device mapper makes of others (linux/dm-ioctl.h), by its control node.
//!
//! A device is asked for, used and given up by one helper: it goes with the last who has it open, however that ends.
use std::{
    fs::File,
    io,
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
};

use nix::errno::Errno;

/// Made by the kernel with its module `dm_mod`.
const CONTROL: &str = "/dev/mapper/control";
/// The interface's version that is asked for; the kernel takes any smaller one.
const VERSION: [u32; 3] = [4, 0, 0];
const DEV_CREATE: libc::Ioctl = number(3);
const DEV_REMOVE: libc::Ioctl = number(4);
const DEV_SUSPEND: libc::Ioctl = number(6);
const TABLE_LOAD: libc::Ioctl = number(9);
const READ_ONLY: u32 = 1;
const DEFERRED_REMOVE: u32 = 1 << 17;
/// Bytes of a request's head, of a target's, and the most that a target's parameters may be.
const HEAD: usize = size_of::<Head>();
const TARGET: usize = size_of::<Target>();
const MAX_PARAMETERS: usize = 4096;
/// As many devices of one name may be on their way out.
const ATTEMPTS: u32 = 64;

/// `_IOWR(0xfd, nr, struct dm_ioctl)`.
const fn number(nr: libc::Ioctl) -> libc::Ioctl {
    0xc138_fd00 | nr
}

/// `struct dm_ioctl`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Head {
    version: [u32; 3],
    data_size: u32,
    data_start: u32,
    target_count: u32,
    open_count: i32,
    flags: u32,
    event_nr: u32,
    padding: u32,
    dev: u64,
    name: [u8; 128],
    uuid: [u8; 129],
    data: [u8; 7],
}

/// `struct dm_target_spec`, with the parameters behind it.
#[repr(C)]
#[derive(Clone, Copy)]
struct Target {
    start: u64,
    sectors: u64,
    status: i32,
    next: u32,
    kind: [u8; 16],
}

/// A request with one target.
#[repr(C)]
struct Request {
    head: Head,
    target: Target,
    parameters: [u8; MAX_PARAMETERS],
}

/// A device of one target, read-only. Dropped, it goes as soon as nobody has it open.
pub struct Device {
    control: File,
    name: String,
    /// Its node.
    pub node: PathBuf,
}

impl Device {
    /// Makes one of `sectors` of 512 bytes, whose name begins with `name`. `kind` is the target's, `parameters` are its own.
    ///
    /// # Errors
    /// The kernel's: no device mapper, no such target, or parameters that it does not take.
    pub fn read_only(name: &str, kind: &str, sectors: u64, parameters: &str) -> io::Result<Self> {
        let control = File::options().read(true).write(true).open(CONTROL)?;
        let (name, dev) = create(&control, name)?;
        let device = Self {
            control,
            node: Path::new("/dev").join(format!("dm-{}", minor(dev))),
            name,
        };
        let mut load = request(&device.name)?;
        load.head.flags = READ_ONLY;
        load.head.target_count = 1;
        load.target.sectors = sectors;
        put(&mut load.target.kind, kind)?;
        put(&mut load.parameters, parameters)?;
        call(&device.control, TABLE_LOAD, &mut load)?;
        // Without the flag that suspends it resumes: the table is in force from here on.
        let mut resume = request(&device.name)?;
        resume.head.flags = READ_ONLY;
        call(&device.control, DEV_SUSPEND, &mut resume)?;
        Ok(device)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if let Ok(mut remove) = request(&self.name) {
            remove.head.flags = DEFERRED_REMOVE;
            let _ = call(&self.control, DEV_REMOVE, &mut remove);
        }
    }
}

/// The name that was free, and the number of the device.
fn create(control: &File, name: &str) -> io::Result<(String, u64)> {
    for attempt in 0..ATTEMPTS {
        let name = format!("{name}.{attempt}");
        let mut wanted = request(&name)?;
        match call(control, DEV_CREATE, &mut wanted) {
            Ok(()) => return Ok((name, wanted.head.dev)),
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
            Err(error) => return Err(error),
        }
    }
    Err(Errno::EBUSY.into())
}

/// Of `huge_encode_dev`.
fn minor(dev: u64) -> u64 {
    (dev & 0xff) | ((dev >> 12) & 0xfff00)
}

fn request(name: &str) -> io::Result<Box<Request>> {
    let size = u32::try_from(size_of::<Request>()).map_err(io::Error::other)?;
    let next = u32::try_from(TARGET + MAX_PARAMETERS).map_err(io::Error::other)?;
    let mut request = Box::new(Request {
        head: Head {
            version: VERSION,
            data_size: size,
            data_start: u32::try_from(HEAD).map_err(io::Error::other)?,
            target_count: 0,
            open_count: 0,
            flags: 0,
            event_nr: 0,
            padding: 0,
            dev: 0,
            name: [0; 128],
            uuid: [0; 129],
            data: [0; 7],
        },
        target: Target {
            start: 0,
            sectors: 0,
            status: 0,
            next,
            kind: [0; 16],
        },
        parameters: [0; MAX_PARAMETERS],
    });
    put(&mut request.head.name, name)?;
    Ok(request)
}

/// Puts a text into a field that ends with a zero.
fn put(field: &mut [u8], text: &str) -> io::Result<()> {
    let (last, room) = field.split_last_mut().ok_or(Errno::ENAMETOOLONG)?;
    let start = room.get_mut(..text.len()).ok_or(Errno::ENAMETOOLONG)?;
    start.copy_from_slice(text.as_bytes());
    *last = 0;
    Ok(())
}

fn call(control: &File, number: libc::Ioctl, request: &mut Request) -> io::Result<()> {
    // SAFETY: the request has the layout of the interface, says its true size, and is the kernel's to read and write for this call.
    let result = unsafe { libc::ioctl(control.as_raw_fd(), number, std::ptr::from_mut(request)) };
    Errno::result(result).map(drop).map_err(io::Error::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_have_the_kernels_layout() {
        assert_eq!((HEAD, TARGET), (312, 40));
        assert_eq!(std::mem::offset_of!(Head, dev), 40);
        assert_eq!(std::mem::offset_of!(Head, uuid), 176);
        assert_eq!(std::mem::offset_of!(Request, target), 312);
        assert_eq!(std::mem::offset_of!(Request, parameters), 352);
        assert_eq!(DEV_CREATE, 0xc138_fd03);
    }

    #[test]
    fn a_text_that_has_no_room_for_its_end_is_refused() {
        let mut field = [0; 4];
        put(&mut field, "abc").unwrap();
        assert_eq!(&field, b"abc\0");
        assert!(put(&mut field, "abcd").is_err());
        assert!(put(&mut field, "abcde").is_err());
    }

    #[test]
    fn a_number_beyond_255_is_told_in_two_parts() {
        assert_eq!(minor(253 << 8 | 7), 7);
        assert_eq!(minor(1 << 20 | 253 << 8 | 2), 258);
    }
}
