//! A template: a guest that stood still, in one file, from which clones go on.
//!
//! The file is a page-aligned head ([`Head`], JSON behind a magic number, version and length), the pages of guest memory that
//! were not zero, one after another, and a record of those that clones touch first ([`working_set`]). A clone maps the pages privately:
//! what it writes is its own, and the file stays as it is.
//!
//! What is trusted: that the file was written by this VMM, for the same kind of machine, from a guest that had run nothing but the kernel
//! and the agent (the shim sees to that), and that nobody shortens it. Nothing else has to be: lengths and addresses are checked before
//! use, what devices are told goes through the doors that a hostile guest has, and KVM checks what a CPU is given. A head that is refused
//! costs its pod a cold start and no more.

pub mod cpu;
pub mod pages;
pub mod point;
pub mod registers;
pub mod working_set;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;

use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};
use vm_memory::GuestMemoryMmap;

use self::cpu::{CpuError, CpuState};
use self::pages::Extent;
use self::registers::{RegisterError, Write};
use self::working_set::WorkingSet;
use crate::arch::x86_64::layout::PAGE;

const MAGIC: [u8; 8] = *b"BRIGTMPL";
/// Of the head's form.
const VERSION: u32 = 1;
/// Magic number, version, length of the JSON.
const PREFIX: usize = 16;
/// A head has some 40 KiB.
const MAX_HEAD: u32 = 1 << 20;

/// A template could not be made or used.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The file is none.
    #[error("the template is damaged: {0}")]
    Damaged(String),
    /// It is of another machine.
    #[error("the template is of another machine: {0}")]
    Other(&'static str),
    /// The guest does not stand still enough.
    #[error(transparent)]
    Registers(#[from] RegisterError),
    /// KVM.
    #[error(transparent)]
    Cpu(#[from] CpuError),
    /// The file cannot be read or written.
    #[error("the template's file: {0}")]
    File(#[from] io::Error),
    /// Guest memory cannot be read.
    #[error("guest memory: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// What a guest has been told of its machine, and so a clone's must be the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shape {
    /// Bytes of RAM.
    pub ram_bytes: u64,
    /// Where more memory may come.
    pub growth: Range<u64>,
    /// The 64-bit MMIO window.
    pub mmio64: Range<u64>,
    /// CPUs that there may be.
    pub most_cpus: u8,
    /// The share's tag.
    pub share_tag: Option<String>,
}

/// All of a guest but its memory.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Head {
    /// Its machine.
    pub shape: Shape,
    /// Its one CPU.
    pub cpu: CpuState,
    /// Functions on its bus, from 0.
    pub functions: u8,
    /// What their drivers had told them.
    pub devices: Vec<Write>,
    /// What of its memory is in the file, in the order of addresses and of the file.
    pub extents: Vec<Extent>,
}

/// A template to go on from.
#[derive(Debug)]
pub struct Template {
    /// All but the memory.
    pub head: Head,
    file: File,
    /// Where the pages begin.
    pages: u64,
    working_set: WorkingSet,
}

impl Head {
    /// Writes the whole file; its length in bytes.
    ///
    /// # Errors
    /// [`TemplateError`].
    pub fn write(&self, memory: &GuestMemoryMmap, file: &File) -> Result<u64, TemplateError> {
        let json = serde_json::to_vec(self).map_err(io::Error::other)?;
        let length = u32::try_from(json.len()).ok();
        let length = length
            .filter(|length| *length <= MAX_HEAD)
            .ok_or_else(|| io::Error::other("the head is too long"))?;
        let mut bytes = Vec::with_capacity(PREFIX + json.len());
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(length.to_le_bytes());
        bytes.extend(json);
        file.write_all_at(&bytes, 0)?;
        pages::write(memory, &self.extents, file, pages_after(length))
    }
}

impl Template {
    /// Reads the head of a file.
    ///
    /// # Errors
    /// [`TemplateError::Damaged`], [`TemplateError::File`].
    pub fn open(file: File) -> Result<Self, TemplateError> {
        let damaged = |what: &str| TemplateError::Damaged(what.to_owned());
        let mut prefix = [0; PREFIX];
        file.read_exact_at(&mut prefix, 0)?;
        let word = |at: usize| {
            let mut word = [0; 4];
            word.copy_from_slice(&prefix[at..at + 4]);
            u32::from_le_bytes(word)
        };
        if prefix[..8] != MAGIC || word(8) != VERSION {
            return Err(damaged("it is none, or of another version"));
        }
        let length = word(12);
        if length > MAX_HEAD {
            return Err(damaged("its head is too long"));
        }
        let mut json = vec![0; usize::try_from(length).map_err(io::Error::other)?];
        file.read_exact_at(&mut json, PREFIX as u64)?;
        let head: Head = serde_json::from_slice(&json)
            .map_err(|error| TemplateError::Damaged(error.to_string()))?;
        let pages = pages_after(length);
        let length = file.metadata()?.len();
        let held = length.checked_sub(pages);
        let held = held.ok_or_else(|| damaged("it has no pages"))?;
        let sum = pages::check(&head.extents, head.shape.ram_bytes, held).map_err(damaged)?;
        let working_set = WorkingSet::read(&file, pages + sum, length, sum / PAGE)
            .map_err(|error| TemplateError::Damaged(error.to_string()))?;
        Ok(Self {
            head,
            file,
            pages,
            working_set,
        })
    }

    /// Lets guest RAM begin as the captured guest's was; `memory` is fresh and of the head's shape.
    ///
    /// # Errors
    /// What the host says; the memory is of no use then.
    pub fn map(&self, memory: &GuestMemoryMmap) -> io::Result<()> {
        pages::map(memory, &self.head.extents, &self.file, self.pages)?;
        self.working_set.populate(memory, &self.head.extents);
        Ok(())
    }

    /// Has KVM know at once the pages that clones touch first. The CPU is in the captured guest's state, and its VM has the memory.
    pub fn warm(&self, vcpu: &VcpuFd) {
        self.working_set.map(vcpu, &self.head.extents);
    }

    /// Adds the record of what `clone`, a process that has gone on from this template, has touched of it so far.
    ///
    /// # Errors
    /// What the host says; a template that has a record already.
    pub fn record(&self, clone: u32) -> io::Result<()> {
        let sum: u64 = self.head.extents.iter().map(|extent| extent.bytes).sum();
        let length = self.file.metadata()?.len();
        if length != self.pages + sum {
            return Err(io::Error::other("it has a record of touched pages already"));
        }
        WorkingSet::of_process(clone, &self.file, self.pages)?.append(&self.file, length)
    }
}

/// Where the pages are in a file whose head has so many bytes.
fn pages_after(head: u32) -> u64 {
    (PREFIX as u64 + u64::from(head)).next_multiple_of(PAGE)
}

#[cfg(test)]
mod tests;
