//! `brig debug --dump-memory`: a guest's memory as an ELF core file, read from its VMM, which knows nothing of it. No
//! registers: those are KVM's.
//!
//! The VMM is stopped meanwhile. What the guest has in its memory is copied and never looked at.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use brig_hypervisor::arch::x86_64::layout;
use brig_shim::asked::config::MIB;
use brig_shim::containerd::debug_service::Method;
use brig_shim::error::{Error, Result};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};

use crate::cli;
use crate::look;
use crate::pods;
use crate::processes::{Mapping, guest_memory};
use crate::shims;

/// Bytes that are looked at, and read, at once.
const CHUNK: u64 = 2 << 20;
/// The longest that the VMM may take to stand still.
const STANDSTILL: Duration = Duration::from_secs(5);
/// Where Linux has all memory in its address space (`page_offset_base` with four levels of page tables and no KASLR,
/// as Brig's guest kernel is built).
const DIRECT_MAP: u64 = 0xffff_8880_0000_0000;
/// Where its own image is, and how much of the memory's beginning is there (`__START_KERNEL_map`,
/// `KERNEL_IMAGE_SIZE`).
const KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;
const KERNEL_MAP_SIZE: u64 = 512 << 20;
/// Sizes of an ELF64 header and of a program header.
const HEADER: u64 = 64;
const PROGRAM_HEADER: u64 = 56;
/// `/proc/PID/pagemap`: an entry a page; one of these bits is set where there is any.
const PRESENT_OR_SWAPPED: u64 = 1 << 63 | 1 << 62;

/// What was written.
#[derive(Debug)]
pub struct Dumped {
    file: PathBuf,
    /// Bytes that were copied, and bytes of memory that the file shows.
    copied: u64,
    memory: u64,
    /// Bytes of memory that the VM grew by, which are not in it.
    left_out: u64,
}

impl Dumped {
    /// For programs.
    #[must_use]
    pub fn json(&self) -> Value {
        json!({
            "file": self.file,
            "memoryBytes": self.memory,
            "copiedBytes": self.copied,
            "leftOutBytes": self.left_out,
        })
    }
}

impl fmt::Display for Dumped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{}: {} MiB of memory, of which {} MiB were in use; it may hold secrets of the pod",
            self.file.display(),
            self.memory / MIB,
            self.copied / MIB
        )?;
        if self.left_out > 0 {
            writeln!(
                f,
                "not in it: {} MiB that the VM has grown by since its start",
                self.left_out / MIB
            )?;
        }
        Ok(())
    }
}

/// Writes the memory of a pod's guest to `file`, which is root's alone.
///
/// # Errors
/// `FailedPrecondition` for a pod whose handler has no `debug`, or that has no VM; what the system says. No file is
/// left then.
pub fn dump(base: &Path, pod: &cli::Pod, file: &Path) -> Result<Dumped> {
    let row = pods::find(base, pod)?;
    let told = shims::ask_json(&look::socket_of(&row)?, Method::Inspect, &Value::Null)?;
    if told["config"]["debug"]["value"] != true {
        return Err(Error::state(
            "a guest's memory is for handlers with debug = true in their configuration, for pods that start from then on",
        ));
    }
    let no_vm = || Error::state(format!("pod {} has no VM", row.id));
    let (_, pid) = row
        .processes()
        .find(|(name, _)| *name == "vmm")
        .ok_or_else(no_vm)?;
    let first = told["size"]["startedWithMiB"].as_u64().ok_or_else(no_vm)?;
    let failed = |error: io::Error| {
        Error::io(
            format_args!("cannot write the guest's memory to {}", file.display()),
            &error,
        )
    };
    let core = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(file)
        .map_err(failed)?;
    let written = shims::single_threaded()
        .and_then(|runtime| {
            let _guard = runtime.enter();
            // Of a template's pages the VMM has no more than the guest has touched: all of it is read.
            let template = !told["template"].is_null();
            write(pid, first * MIB, template, &core)
        })
        .map_err(failed);
    let (copied, memory, left_out) = written.inspect_err(|_| {
        // The half of a dump is none.
        let _ = fs::remove_file(file);
    })?;
    Ok(Dumped {
        file: file.to_owned(),
        copied,
        memory,
        left_out,
    })
}

/// Copies the memory that a VM was started with; tells the bytes copied, of memory, and left out.
fn write(vmm: u32, first: u64, all: bool, core: &File) -> io::Result<(u64, u64, u64)> {
    // Whoever loses patience must not leave a VM that stands still for ever: these are taken, and end nothing.
    let _taken = [
        SignalKind::interrupt(),
        SignalKind::terminate(),
        SignalKind::hangup(),
        SignalKind::pipe(),
    ]
    .map(signal);
    let _stopped = Stopped::stop(vmm)?;
    let mappings = guest_memory(&fs::read_to_string(format!("/proc/{vmm}/smaps"))?);
    let ram = layout::ram(first);
    let (parts, left_out) = places(&ram, &mappings).ok_or_else(|| {
        io::Error::other(
            "the VMM's memory is not laid out as its VM's is: is it of another version of Brig?",
        )
    })?;
    let segments = segments(&parts);
    let data = data_start(segments.len());
    (&*core).write_all(&header(&segments))?;
    let memory = fs::File::open(format!("/proc/{vmm}/mem"))?;
    let pagemap = fs::File::open(format!("/proc/{vmm}/pagemap"))?;
    let (mut copied, mut at) = (0, data);
    let mut buffer = vec![0; usize::try_from(CHUNK).map_err(io::Error::other)?];
    for part in &parts {
        for offset in (0..part.length).step_by(buffer.len()) {
            let length = CHUNK.min(part.length - offset);
            if all || is_there(&pagemap, part.host + offset, length)? {
                let chunk = &mut buffer[..usize::try_from(length).map_err(io::Error::other)?];
                memory.read_exact_at(chunk, part.host + offset)?;
                core.write_all_at(chunk, at + offset)?;
                copied += length;
            }
        }
        at += part.length;
    }
    core.set_len(at)?;
    Ok((copied, at - data, left_out))
}

/// A process that stands still as long as this lives.
struct Stopped(OwnedFd);

impl Stopped {
    fn stop(pid: u32) -> io::Result<Self> {
        let gone = || io::Error::other("the VM has just ended");
        let process = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let stopped = Self(pidfd_open(process.ok_or_else(gone)?, PidfdFlags::empty())?);
        pidfd_send_signal(&stopped.0, Signal::STOP)?;
        let since = Instant::now();
        while !stands_still(pid)? {
            if since.elapsed() > STANDSTILL {
                return Err(io::Error::other("the VM does not stand still"));
            }
            sleep(Duration::from_millis(1));
        }
        Ok(stopped)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = pidfd_send_signal(&self.0, Signal::CONT);
    }
}

/// Every thread has stopped.
fn stands_still(pid: u32) -> io::Result<bool> {
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let Ok(stat) = fs::read_to_string(task?.path().join("stat")) else {
            continue;
        };
        // The name, in parentheses, may hold anything.
        let state = stat
            .rsplit_once(") ")
            .and_then(|(_, rest)| rest.chars().next());
        if state != Some('T') {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Any of these bytes of a process's address space has a page.
fn is_there(pagemap: &File, address: u64, length: u64) -> io::Result<bool> {
    let mut entries =
        vec![0; usize::try_from(length / layout::PAGE * 8).map_err(io::Error::other)?];
    pagemap.read_exact_at(&mut entries, address / layout::PAGE * 8)?;
    let mut entries = entries.as_chunks::<8>().0.iter();
    Ok(entries.any(|entry| u64::from_le_bytes(*entry) & PRESENT_OR_SWAPPED != 0))
}

/// A part of the guest's memory: where the guest has it, where its VMM has it, and its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Part {
    guest: u64,
    host: u64,
    length: u64,
}

/// Where the VMM has the memory that its VM was started with, and the bytes that it has besides; nothing if a part of
/// it cannot be told from others.
fn places(ram: &[(u64, u64)], mappings: &[Mapping]) -> Option<(Vec<Part>, u64)> {
    let mut parts = Vec::new();
    for &(guest, length) in ram {
        let mut fitting = mappings.iter().filter(|mapping| mapping.length == length);
        let mapping = fitting.next()?;
        if fitting.next().is_some() {
            return None;
        }
        parts.push(Part {
            guest,
            host: mapping.start,
            length,
        });
    }
    let all: u64 = mappings.iter().map(|mapping| mapping.length).sum();
    let known: u64 = parts.iter().map(|part| part.length).sum();
    Some((parts, all - known))
}

/// A segment of the core file: the guest kernel's address, the guest's physical one, its place in the file less the
/// headers, its bytes.
struct Segment {
    address: u64,
    physical: u64,
    offset: u64,
    length: u64,
}

fn segments(parts: &[Part]) -> Vec<Segment> {
    let mut segments = Vec::new();
    let mut offset = 0;
    for part in parts {
        segments.push(Segment {
            address: DIRECT_MAP + part.guest,
            physical: part.guest,
            offset,
            length: part.length,
        });
        offset += part.length;
    }
    if let Some(low) = parts.first().filter(|part| part.guest == 0) {
        // The same bytes once more, where the kernel's symbols are.
        segments.push(Segment {
            address: KERNEL_MAP,
            physical: 0,
            offset: 0,
            length: low.length.min(KERNEL_MAP_SIZE),
        });
    }
    segments
}

/// Where the memory begins in a file with so many segments.
fn data_start(segments: usize) -> u64 {
    (HEADER + PROGRAM_HEADER * segments as u64).next_multiple_of(layout::PAGE)
}

/// An ELF header with its program headers.
fn header(segments: &[Segment]) -> Vec<u8> {
    let mut bytes = b"\x7fELF\x02\x01\x01".to_vec();
    bytes.resize(16, 0);
    let u16s = |bytes: &mut Vec<u8>, values: &[u16]| {
        bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    };
    let u64s = |bytes: &mut Vec<u8>, values: &[u64]| {
        bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    };
    // ET_CORE, EM_X86_64, EV_CURRENT; no entry point, no sections.
    u16s(&mut bytes, &[4, 62, 1, 0]);
    u64s(&mut bytes, &[0, HEADER, 0]);
    let count = u16::try_from(segments.len()).unwrap_or(u16::MAX);
    u16s(&mut bytes, &[0, 0, 64, 56, count, 0, 0, 0]);
    let data = data_start(segments.len());
    for segment in segments {
        // PT_LOAD, readable, writable and executable.
        u16s(&mut bytes, &[1, 0, 7, 0]);
        u64s(
            &mut bytes,
            &[
                data + segment.offset,
                segment.address,
                segment.physical,
                segment.length,
                segment.length,
                layout::PAGE,
            ],
        );
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn what_a_vm_was_started_with_is_told_from_what_it_grew_by() {
        let mapping = |start, length| Mapping {
            start,
            length,
            resident: 0,
        };
        let grown = [
            mapping(0x1000_0000, 2 * MIB),
            mapping(0x2000_0000, 64 * MIB),
        ];
        let (parts, left_out) = places(&[(0, 64 * MIB)], &grown).unwrap();
        let expected = Part {
            guest: 0,
            host: 0x2000_0000,
            length: 64 * MIB,
        };
        assert_eq!((parts, left_out), (vec![expected], 2 * MIB));
        assert_eq!(places(&[(0, 32 * MIB)], &grown), None);
        let twice = [mapping(0, 64 * MIB), mapping(0x2000_0000, 64 * MIB)];
        assert_eq!(places(&[(0, 64 * MIB)], &twice), None, "which of the two?");
    }

    #[test]
    fn binutils_read_the_file_as_a_core_of_the_guests_memory() {
        let parts = [
            Part {
                guest: 0,
                host: 0,
                length: MIB,
            },
            Part {
                guest: layout::HIGH_RAM,
                host: 0,
                length: 2 * MIB,
            },
        ];
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("core");
        let segments = segments(&parts);
        let mut bytes = header(&segments);
        assert!(bytes.len() as u64 <= data_start(segments.len()));
        bytes.resize(usize::try_from(data_start(3) + 3 * MIB).unwrap(), 0);
        fs::write(&file, bytes).unwrap();
        let shown = Command::new("readelf")
            .args(["--wide", "--file-header", "--segments"])
            .arg(&file)
            .output()
            .unwrap();
        let (text, warned) = (
            String::from_utf8_lossy(&shown.stdout),
            String::from_utf8_lossy(&shown.stderr),
        );
        assert_eq!(warned, "");
        assert!(
            text.contains("CORE (Core file)") && text.contains("X86-64"),
            "{text}"
        );
        for line in [
            "LOAD           0x001000 0xffff888000000000 0x0000000000000000 0x100000 0x100000 RWE 0x1000",
            "LOAD           0x101000 0xffff888100000000 0x0000000100000000 0x200000 0x200000 RWE 0x1000",
            "LOAD           0x001000 0xffffffff80000000 0x0000000000000000 0x100000 0x100000 RWE 0x1000",
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
    }

    #[test]
    fn a_process_stands_still_until_it_is_let_go() {
        let mut child = Command::new("sleep").arg("600").spawn().unwrap();
        let stopped = Stopped::stop(child.id()).unwrap();
        assert!(stands_still(child.id()).unwrap());
        drop(stopped);
        while stands_still(child.id()).unwrap() {
            sleep(Duration::from_millis(1));
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn pages_that_were_never_touched_are_known() {
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let touched = vec![1u8; 1 << 20];
        let address = (touched.as_ptr() as u64).next_multiple_of(layout::PAGE);
        assert!(is_there(&pagemap, address, layout::PAGE).unwrap());
        assert!(!is_there(&pagemap, 0, layout::PAGE).unwrap());
    }
}
