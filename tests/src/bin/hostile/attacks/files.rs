//! A FUSE client that says what it is told (the kernel's fuse.h), and what it needs to see that the file
//! server still serves.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::health::PATIENCE;
use crate::dma::Page;
use crate::pci::Function;
use crate::port;
use crate::virtio::{NEXT, Ring, WRITE};

/// What the judge has put beside the share; whoever reads it has left the share.
const SECRET: &[u8] = b"beside-the-share-b1gf00t";
/// What the judge has put into the file `canary`.
const CANARY: &[u8] = b"still served";
/// The share's root.
pub const ROOT: u64 = 1;

/// Opcodes.
pub mod op {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const RELEASE: u32 = 18;
    pub const SETXATTR: u32 = 21;
    pub const GETXATTR: u32 = 22;
    pub const LISTXATTR: u32 = 23;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const CREATE: u32 = 35;
    pub const INTERRUPT: u32 = 36;
    pub const DESTROY: u32 = 38;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const READDIRPLUS: u32 = 44;
    pub const RENAME2: u32 = 45;
    pub const COPY_FILE_RANGE: u32 = 47;
    pub const TMPFILE: u32 = 51;
}

/// A file server that is up.
pub struct Files<'a> {
    pub function: &'a Function,
    pub hiprio: Ring,
    pub requests: Ring,
    pub request: Page,
    pub reply: Page,
    unique: u64,
}

/// Errors are numbers of errno.
pub type Answer = std::result::Result<Vec<u8>, i32>;

pub fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes
        .get(at..at + 8)
        .and_then(|bytes| bytes.try_into().ok())
        .map_or(0, u64::from_le_bytes)
}

pub fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..at + 4)
        .and_then(|bytes| bytes.try_into().ok())
        .map_or(0, u32::from_le_bytes)
}

/// Words of 32 bits, as most bodies consist of.
pub fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// A name and its zero.
pub fn name(name: &str) -> Vec<u8> {
    let mut bytes = name.as_bytes().to_vec();
    bytes.push(0);
    bytes
}

/// READ, READDIR and READDIRPLUS: handle, offset, size.
pub fn read_in(handle: u64, offset: u64, size: u32) -> Vec<u8> {
    let mut body = handle.to_le_bytes().to_vec();
    body.extend(offset.to_le_bytes());
    body.extend(words(&[size, 0, 0, 0, 0, 0]));
    body
}

impl<'a> Files<'a> {
    /// Resets the device and begins a session, of which it knows no more than INIT.
    pub fn open(function: &'a Function) -> Result<Self> {
        let mut files = Self::bare(function)?;
        files.init()?;
        Ok(files)
    }

    /// As [`Self::open`], without INIT.
    pub fn bare(function: &'a Function) -> Result<Self> {
        let mut rings = function.start()?.into_iter();
        Ok(Self {
            function,
            hiprio: rings.next().context("no queue for FORGET")?,
            requests: rings.next().context("no request queue")?,
            request: Page::new()?,
            reply: Page::new()?,
            unique: 1,
        })
    }

    pub fn init(&mut self) -> Result<()> {
        let answer = self.call(op::INIT, 0, &words(&[7, 31, 0x2_0000, !(1 << 30)]))?;
        ensure!(answer.is_ok(), "INIT: {answer:?}");
        Ok(())
    }

    /// The bytes of a request.
    pub fn message(&mut self, opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
        self.unique += 1;
        let length = u32::try_from(40 + body.len()).unwrap_or(u32::MAX);
        let mut bytes = words(&[length, opcode]);
        bytes.extend(self.unique.to_le_bytes());
        bytes.extend(node.to_le_bytes());
        bytes.extend([0; 16]);
        bytes.extend(body);
        bytes
    }

    /// Asks, and waits for the answer. One page holds the request, another the answer.
    pub fn call(&mut self, opcode: u32, node: u64, body: &[u8]) -> Result<Answer> {
        let bytes = self.message(opcode, node, body);
        self.raw(&bytes, 4096)?
            .with_context(|| format!("no answer to request {opcode}"))
    }

    /// As [`Self::call`] for what may go without an answer, as what is malformed does: it is taken at least.
    pub fn offer(&mut self, opcode: u32, node: u64, body: &[u8]) -> Result<()> {
        let bytes = self.message(opcode, node, body);
        self.raw(&bytes, 4096).map(drop)
    }

    /// As [`Self::call`], any bytes and room for so many of the answer; none if nothing came.
    pub fn raw(&mut self, bytes: &[u8], room: u32) -> Result<Option<Answer>> {
        self.request.write(0, bytes);
        self.reply.write(0, &[0; 16]);
        let length = u32::try_from(bytes.len().min(4096))?;
        self.requests
            .descriptor(0, self.request.address, length, NEXT, 1);
        self.requests
            .descriptor(1, self.reply.address, room, WRITE, 0);
        self.requests.offer(0);
        let position = self.requests.position();
        self.function.kick(1);
        ensure!(
            self.requests.wait_used(position, PATIENCE),
            "the file server no longer answers"
        );
        self.answer()
    }

    /// What the page of answers holds.
    pub fn answer(&self) -> Result<Option<Answer>> {
        let reply = self.reply.read(0, 4096);
        let length = usize::try_from(u32_at(&reply, 0))?;
        if length < 16 {
            return Ok(None);
        }
        let error = u32_at(&reply, 4).cast_signed();
        let data = reply.get(16..length.min(4096)).unwrap_or_default().to_vec();
        if data.windows(SECRET.len()).any(|part| part == SECRET) {
            port::say("hostile: escaped: a file beside the share was read");
            bail!("a file beside the share was read");
        }
        Ok(Some(if error == 0 { Ok(data) } else { Err(-error) }))
    }

    /// FORGET and what else has no answer, on the queue for it.
    pub fn tell(&mut self, opcode: u32, node: u64, body: &[u8]) -> Result<()> {
        let bytes = self.message(opcode, node, body);
        self.request.write(0, &bytes);
        let length = u32::try_from(bytes.len().min(4096))?;
        self.hiprio
            .descriptor(0, self.request.address, length, 0, 0);
        self.hiprio.offer(0);
        let position = self.hiprio.position();
        self.function.kick(0);
        ensure!(
            self.hiprio.wait_used(position, PATIENCE),
            "a FORGET is not taken"
        );
        Ok(())
    }

    /// A node by its name.
    pub fn lookup(&mut self, parent: u64, of: &str) -> Result<std::result::Result<u64, i32>> {
        Ok(self
            .call(op::LOOKUP, parent, &name(of))?
            .map(|found| u64_at(&found, 0)))
    }

    /// A node by names that are there.
    pub fn walk(&mut self, path: &[&str]) -> Result<u64> {
        let mut node = ROOT;
        for part in path {
            let found = self.lookup(node, part)?;
            node = found.ok().with_context(|| format!("{part}: {found:?}"))?;
        }
        Ok(node)
    }

    /// Opens a file or directory; its handle.
    pub fn opened(
        &mut self,
        opcode: u32,
        node: u64,
        flags: i32,
    ) -> Result<std::result::Result<u64, i32>> {
        let body = words(&[flags.cast_unsigned(), 0]);
        Ok(self
            .call(opcode, node, &body)?
            .map(|opened| u64_at(&opened, 0)))
    }

    /// A file is found, opened and read, and says what it should.
    pub fn canary(&mut self) -> Result<()> {
        let node = self.walk(&["vol", "canary"])?;
        let handle = match self.opened(op::OPEN, node, libc::O_RDONLY)? {
            // Where files are named by their numbers alone.
            Err(libc::ENOSYS) => 0,
            handle => handle.ok().with_context(|| format!("OPEN: {handle:?}"))?,
        };
        let data = self.call(op::READ, node, &read_in(handle, 0, 64))?;
        ensure!(data.as_deref() == Ok(CANARY), "READ: {data:?}");
        Ok(())
    }

    /// Waits until all that was offered has been used.
    pub fn settled(&self, within: Duration) -> bool {
        self.requests.wait_used(self.requests.position(), within)
    }
}
