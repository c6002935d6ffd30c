//! A FUSE client over fake queues: what a guest kernel sends, and what it never would.

use std::ffi::CString;
use std::path::Path;
use std::time::{Duration, Instant};

use super::super::{Fs, FsHandle, HIPRIO, REQUEST};
use crate::virtio::testing::Harness;

pub(super) const LOOKUP: u32 = 1;
pub(super) const FORGET: u32 = 2;
pub(super) const GETATTR: u32 = 3;
pub(super) const MKDIR: u32 = 9;
pub(super) const LINK: u32 = 13;
pub(super) const OPEN: u32 = 14;
pub(super) const RELEASE: u32 = 18;
pub(super) const READ: u32 = 15;
pub(super) const WRITE: u32 = 16;
pub(super) const SETXATTR: u32 = 21;
pub(super) const GETXATTR: u32 = 22;
pub(super) const LISTXATTR: u32 = 23;
pub(super) const INIT: u32 = 26;
/// A flag of INIT: there is a second word of them.
pub(super) const INIT_EXT: u32 = 1 << 30;
pub(super) const OPENDIR: u32 = 27;
pub(super) const READDIR: u32 = 28;
pub(super) const CREATE: u32 = 35;
pub(super) const IOCTL: u32 = 39;
pub(super) const READDIRPLUS: u32 = 44;
pub(super) const RENAME2: u32 = 45;
pub(super) const SYNCFS: u32 = 50;
pub(super) const TMPFILE: u32 = 51;
pub(super) const STATX: u32 = 52;

pub(super) const HEADER: usize = 16;
pub(super) const ROOT: u64 = 1;

/// A request's reply: a negative errno, or the bytes after the header.
pub(super) type Reply = Result<Vec<u8>, i32>;

pub(super) struct Client {
    pub(super) harness: Harness<Fs>,
    pub(super) handle: FsHandle,
    pub(super) request: u64,
    pub(super) reply: u64,
    pub(super) unique: u64,
    pub(super) ids: (u32, u32),
}

pub(super) const BUFFER: u32 = 64 << 10;

/// What LOOKUP answers.
#[derive(Debug, Clone, Copy)]
pub(super) struct Found {
    pub(super) node: u64,
    pub(super) entry_seconds: u64,
    pub(super) ino: u64,
    pub(super) size: u64,
    pub(super) mode: u32,
    pub(super) uid: u32,
    /// Of the attributes: whether it is a submount.
    pub(super) flags: u32,
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

impl Found {
    pub(super) fn parse(bytes: &[u8]) -> Self {
        Self {
            node: u64_at(bytes, 0),
            entry_seconds: u64_at(bytes, 16),
            ino: u64_at(bytes, 40),
            size: u64_at(bytes, 48),
            mode: u32_at(bytes, 40 + 60),
            uid: u32_at(bytes, 40 + 68),
            flags: u32_at(bytes, 40 + 84),
        }
    }
}

impl Client {
    pub(super) fn bare(root: &Path) -> Self {
        let (device, handle) = Fs::with_root("share", root).unwrap();
        Self::of(device, handle)
    }

    /// Of a device that serves what is one pod's own.
    pub(super) fn of_own(root: &Path) -> Self {
        let (device, handle) = Fs::serving("own", root, true).unwrap();
        let mut client = Self::of(device, handle);
        client.begin(&[!INIT_EXT]);
        client
    }

    /// Of a device with helpers, which do all that is asked of the share's own files.
    pub(super) fn by_helpers(root: &Path) -> Self {
        let client = Self::with_helpers(root);
        client.handle.served.pretend_remote(ROOT);
        client
    }

    /// Of a device with helpers.
    pub(super) fn with_helpers(root: &Path) -> Self {
        let (device, handle) = Fs::with_root("share", root).unwrap();
        let mut client = Self::of(device.with_helpers(), handle);
        client.begin(&[!INIT_EXT]);
        client
    }

    fn of(device: Fs, handle: FsHandle) -> Self {
        // The umask is the process's, and each of its tests has a file server.
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS).unwrap();
        let mut harness = Harness::new(device);
        harness.activate(0);
        let request = harness.alloc(u64::from(BUFFER));
        let reply = harness.alloc(u64::from(BUFFER));
        Self {
            harness,
            handle,
            request,
            reply,
            unique: 1,
            ids: (0, 0),
        }
    }

    pub(super) fn new(root: &Path) -> Self {
        // Every flag but INIT_EXT.
        Self::offering(root, &[!INIT_EXT])
    }

    /// A guest of 7.31 whose INIT has these words of flags.
    pub(super) fn offering(root: &Path, flags: &[u32]) -> Self {
        let mut client = Self::bare(root);
        client.begin(flags);
        client
    }

    fn begin(&mut self, flags: &[u32]) {
        let mut body = Vec::new();
        for word in [7u32, 31, 0x2_0000].iter().chain(flags) {
            body.extend(word.to_le_bytes());
        }
        let reply = self.call(INIT, 0, &body).unwrap();
        assert_eq!(u32_at(&reply, 0), 7);
    }

    pub(super) fn header(&self, length: u32, opcode: u32, node: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(length.to_le_bytes());
        bytes.extend(opcode.to_le_bytes());
        bytes.extend(self.unique.to_le_bytes());
        bytes.extend(node.to_le_bytes());
        bytes.extend(self.ids.0.to_le_bytes());
        bytes.extend(self.ids.1.to_le_bytes());
        bytes.extend([0; 8]);
        bytes
    }

    pub(super) fn call(&mut self, opcode: u32, node: u64, body: &[u8]) -> Reply {
        self.unique += 1;
        let mut bytes = self.header(u32::try_from(40 + body.len()).unwrap(), opcode, node);
        bytes.extend(body);
        let written = self.raw(&bytes, BUFFER);
        let reply = self.harness.read(self.reply, written.max(HEADER));
        assert!(written >= HEADER, "no reply to {opcode}");
        assert_eq!(u64_at(&reply, 8), self.unique);
        assert_eq!(u32_at(&reply, 0) as usize, written);
        match u32_at(&reply, 4).cast_signed() {
            0 => Ok(reply[HEADER..].to_vec()),
            error => Err(-error),
        }
    }

    /// FORGET by the queue that is for it.
    pub(super) fn forget_on_hiprio(&mut self, node: u64, count: u64) {
        let request = [self.header(48, FORGET, node), count.to_le_bytes().to_vec()].concat();
        // Each has its own place: it may be read later.
        let place = self.harness.alloc(48);
        self.harness.write(place, &request);
        self.harness.queues[usize::from(HIPRIO)].add(&[(place, 48, false)]);
        self.harness.run();
    }

    /// Sends any bytes; returns how many came back.
    pub(super) fn raw(&mut self, bytes: &[u8], room: u32) -> usize {
        self.harness.write(self.request, bytes);
        let mut parts = vec![(self.request, u32::try_from(bytes.len()).unwrap(), false)];
        if room > 0 {
            parts.push((self.reply, room, true));
        }
        let head = self.harness.queues[usize::from(REQUEST)].add(&parts);
        self.harness.run();
        let mut used = self.harness.queues[usize::from(REQUEST)].used();
        // A helper's answer comes by itself.
        let end = Instant::now() + Duration::from_secs(20);
        while used.is_empty() && self.harness.device.helpers.is_some() && Instant::now() < end {
            std::thread::yield_now();
            used = self.harness.queues[usize::from(REQUEST)].used();
        }
        assert_eq!(used.len(), 1);
        assert_eq!(used[0].0, head);
        used[0].1 as usize
    }

    /// Sends a request of its own place, at most 40 bytes behind its header, and does not wait; its reply's place.
    pub(super) fn send(&mut self, opcode: u32, node: u64, body: &[u8]) -> u64 {
        self.unique += 1;
        let length = u32::try_from(40 + body.len()).unwrap();
        let bytes = [self.header(length, opcode, node), body.to_vec()].concat();
        let place = self.harness.alloc(128 + u64::from(BUFFER));
        self.harness.write(place, &bytes);
        let reply = place + 128;
        self.harness.write(reply, &[0; HEADER]);
        let parts = [(place, length, false), (reply, BUFFER, true)];
        self.harness.queues[usize::from(REQUEST)].add(&parts);
        reply
    }

    pub(super) fn lookup(&mut self, parent: u64, name: &str) -> Result<Found, i32> {
        let name = CString::new(name).unwrap();
        self.call(LOOKUP, parent, name.as_bytes_with_nul())
            .map(|bytes| Found::parse(&bytes))
    }

    pub(super) fn walk(&mut self, path: &str) -> Found {
        let mut found = None;
        for name in path.split('/') {
            let parent = found.map_or(ROOT, |found: Found| found.node);
            found = Some(self.lookup(parent, name).unwrap());
        }
        found.unwrap()
    }

    pub(super) fn open(&mut self, opcode: u32, node: u64, flags: i32) -> Result<u64, i32> {
        let mut body = flags.to_le_bytes().to_vec();
        body.extend([0; 4]);
        self.call(opcode, node, &body)
            .map(|bytes| u64_at(&bytes, 0))
    }

    pub(super) fn read(
        &mut self,
        opcode: u32,
        node: u64,
        handle: u64,
        offset: u64,
        size: u32,
    ) -> Reply {
        let mut body = handle.to_le_bytes().to_vec();
        body.extend(offset.to_le_bytes());
        body.extend(size.to_le_bytes());
        body.extend([0; 20]);
        self.call(opcode, node, &body)
    }

    pub(super) fn write(&mut self, node: u64, handle: u64, data: &[u8]) -> Result<u32, i32> {
        let mut body = handle.to_le_bytes().to_vec();
        body.extend(0u64.to_le_bytes());
        body.extend(u32::try_from(data.len()).unwrap().to_le_bytes());
        body.extend([0; 4]);
        body.extend(0u64.to_le_bytes());
        body.extend(libc::O_RDWR.to_le_bytes());
        body.extend([0; 4]);
        body.extend(data);
        self.call(WRITE, node, &body).map(|bytes| u32_at(&bytes, 0))
    }

    pub(super) fn create(&mut self, parent: u64, name: &str, mode: u32) -> Result<Found, i32> {
        self.make(CREATE, parent, name, mode, 0)
            .map(|bytes| Found::parse(&bytes))
    }

    /// CREATE or TMPFILE with a umask.
    pub(super) fn make(
        &mut self,
        opcode: u32,
        parent: u64,
        name: &str,
        mode: u32,
        umask: u32,
    ) -> Reply {
        let name = CString::new(name).unwrap();
        let mut body = (libc::O_RDWR | libc::O_CREAT).to_le_bytes().to_vec();
        body.extend(mode.to_le_bytes());
        body.extend(umask.to_le_bytes());
        body.extend([0; 4]);
        body.extend(name.as_bytes_with_nul());
        self.call(opcode, parent, &body)
    }

    pub(super) fn set_attribute(&mut self, node: u64, name: &str, value: &[u8]) -> Result<(), i32> {
        self.set_attribute_with(node, name, value, 0)
    }

    /// With `fuse_setxattr_in.setxattr_flags`.
    pub(super) fn set_attribute_with(
        &mut self,
        node: u64,
        name: &str,
        value: &[u8],
        more: u32,
    ) -> Result<(), i32> {
        let mut body = u32::try_from(value.len()).unwrap().to_le_bytes().to_vec();
        body.extend([0; 4]);
        body.extend(more.to_le_bytes());
        body.extend([0; 4]);
        body.extend(name.as_bytes());
        body.push(0);
        body.extend(value);
        self.call(SETXATTR, node, &body).map(drop)
    }

    pub(super) fn attributes(&mut self, node: u64) -> String {
        let mut body = 4096u32.to_le_bytes().to_vec();
        body.extend([0; 4]);
        String::from_utf8(self.call(LISTXATTR, node, &body).unwrap()).unwrap()
    }

    pub(super) fn attribute(&mut self, node: u64, name: &str) -> Reply {
        let mut body = 4096u32.to_le_bytes().to_vec();
        body.extend([0; 4]);
        body.extend(name.as_bytes());
        body.push(0);
        self.call(GETXATTR, node, &body)
    }

    /// (name, inode number of the entry, that of its attributes).
    pub(super) fn list(&mut self, node: u64) -> Vec<(String, u64, u64)> {
        let handle = self.open(OPENDIR, node, 0).unwrap();
        let bytes = self.read(READDIRPLUS, node, handle, 0, 32 << 10).unwrap();
        let mut names = Vec::new();
        let mut at = 0;
        while at + 152 <= bytes.len() {
            let found = Found::parse(&bytes[at..]);
            let ino = u64_at(&bytes, at + 128);
            let length = u32_at(&bytes, at + 144) as usize;
            let name = String::from_utf8(bytes[at + 152..at + 152 + length].to_vec()).unwrap();
            names.push((name, ino, found.ino));
            at += (152 + length).next_multiple_of(8);
        }
        names.sort();
        names
    }
}
