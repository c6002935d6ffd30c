//! `brig debug --dump-memory`: a guest's memory and what its CPUs have in their registers as an ELF core file. The memory
//! is read from the VMM, which knows nothing of it.
//!
//! The CPUs are stopped meanwhile, and the VMM. What the guest has in its memory is copied and never looked at.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use brig_hypervisor::arch::x86_64::layout;
use brig_hypervisor::control::Registers;
use brig_shim::asked::config::MIB;
use brig_shim::error::{Error, Kind, Result};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};

use super::memory::{DIRECT_MAP, GuestMemory, KERNEL_MAP, KERNEL_MAP_SIZE, Part};
use super::pod::Pod;
use super::registers::{PRSTATUS, prstatus};
use super::session::Session;
use crate::shims;

/// Bytes that are looked at, and read, at once.
const CHUNK: u64 = 2 << 20;
/// The longest that the VMM may take to stand still.
const STANDSTILL: Duration = Duration::from_secs(5);
/// Bytes of a kernel stack, which is aligned to them, and of a page (`THREAD_SIZE`, `PAGE_SIZE`).
const STACK: u64 = 16 << 10;
const PAGE: usize = 4096;
/// Where the kernel has stacks among other things (`VMALLOC_START`, 32 TiB).
const VMALLOC: Range<u64> = 0xffff_c900_0000_0000..0xffff_e900_0000_0000;
/// Sizes of an ELF64 header and of a program header.
const HEADER: u64 = 64;
const PROGRAM_HEADER: u64 = 56;
/// A note of a CPU: sizes of its name and of what it has, its kind (`NT_PRSTATUS`), the name.
const NOTE: [u8; 20] = *b"\x05\0\0\0\x50\x01\0\0\x01\0\0\0CORE\0\0\0\0";
const NOTE_SIZE: u64 = (NOTE.len() + PRSTATUS) as u64;
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
    /// CPUs whose registers it has.
    cpus: usize,
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
            "cpus": self.cpus,
        })
    }
}

impl fmt::Display for Dumped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{}: {} MiB of memory, of which {} MiB were in use, and the registers of {} CPU{}; it may hold secrets of the pod",
            self.file.display(),
            self.memory / MIB,
            self.copied / MIB,
            self.cpus,
            if self.cpus == 1 { "" } else { "s" }
        )?;
        if self.cpus == 0 {
            writeln!(
                f,
                "no registers: the pod was started by a version of Brig that does not tell them"
            )?;
        }
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
/// What the system says. No file is left then.
pub(super) fn dump(pod: &Pod, file: &Path) -> Result<Dumped> {
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
    write(pod, file, &core, failed).inspect_err(|_| {
        // The half of a dump is none.
        let _ = fs::remove_file(file);
    })
}

fn write(
    pod: &Pod,
    file: &Path,
    core: &File,
    failed: impl Fn(io::Error) -> Error,
) -> Result<Dumped> {
    // Whoever loses patience must not leave a VM that stands still for ever: these are taken, and end nothing.
    let runtime = shims::single_threaded().map_err(&failed)?;
    let taken = {
        let _guard = runtime.enter();
        [
            SignalKind::interrupt(),
            SignalKind::terminate(),
            SignalKind::hangup(),
            SignalKind::pipe(),
        ]
        .map(signal)
    };
    // Of a pod of a version that cannot be debugged there is the memory.
    let (session, cpus) = match Session::begin(&pod.socket) {
        Ok((session, stopped)) => (Some(session), stopped.cpus),
        Err(error) if error.kind == Kind::Unimplemented => (None, Vec::new()),
        Err(error) => return Err(error),
    };
    let written = copy(pod, &cpus, core).map_err(failed);
    drop((session, taken));
    let (copied, memory, left_out) = written?;
    Ok(Dumped {
        file: file.to_owned(),
        copied,
        memory,
        left_out,
        cpus: cpus.len(),
    })
}

/// Copies the memory that a VM was started with; tells the bytes copied, of memory, and left out.
fn copy(pod: &Pod, cpus: &[Registers], core: &File) -> io::Result<(u64, u64, u64)> {
    let _stopped = Stopped::stop(pod.vmm)?;
    let guest = GuestMemory::of(pod.vmm, pod.first)?;
    let mut segments = segments(&guest.parts);
    segments.extend(stacks(&guest, cpus));
    let data = data_start(segments.len(), cpus.len());
    (&*core).write_all(&header(&segments, cpus))?;
    let pagemap = fs::File::open(format!("/proc/{}/pagemap", pod.vmm))?;
    let (mut copied, mut at) = (0, data);
    let mut buffer = vec![0; usize::try_from(CHUNK).map_err(io::Error::other)?];
    for part in &guest.parts {
        for offset in (0..part.length).step_by(buffer.len()) {
            let length = CHUNK.min(part.length - offset);
            // Of a template's pages the VMM has no more than the guest has touched: all of it is read.
            if pod.template || is_there(&pagemap, part.host + offset, length)? {
                let chunk = &mut buffer[..usize::try_from(length).map_err(io::Error::other)?];
                guest.read_part(part, offset, chunk)?;
                core.write_all_at(chunk, at + offset)?;
                copied += length;
            }
        }
        at += part.length;
    }
    core.set_len(at)?;
    Ok((copied, at - data, guest.left_out))
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

/// What is left of the kernel stacks of the CPUs where only page tables say where they are: the same bytes once more.
fn stacks(guest: &GuestMemory, cpus: &[Registers]) -> Vec<Segment> {
    let mut pages = BTreeMap::new();
    for cpu in cpus {
        let first = cpu.rsp - cpu.rsp % layout::PAGE;
        let end = (cpu.rsp | (STACK - 1)).saturating_add(1);
        let places = (first..end).step_by(PAGE);
        for address in places.filter(|address| VMALLOC.contains(address)) {
            let found = guest
                .translate(cpu, address)
                .and_then(|(physical, _)| Some((physical, offset_of(&guest.parts, physical)?)));
            if let Some(found) = found {
                pages.insert(address, found);
            }
        }
    }
    let pages = pages.into_iter();
    pages
        .map(|(address, (physical, offset))| Segment {
            address,
            physical,
            offset,
            length: layout::PAGE,
        })
        .collect()
}

/// Where a page of memory is in the file, less the headers.
fn offset_of(parts: &[Part], physical: u64) -> Option<u64> {
    let mut before = 0;
    for part in parts {
        let offset = physical.wrapping_sub(part.guest);
        if offset < part.length {
            return Some(before + offset);
        }
        before += part.length;
    }
    None
}

/// Where the notes begin in a file with so many segments: one more describes them.
fn notes_start(segments: usize) -> u64 {
    HEADER + PROGRAM_HEADER * (segments as u64 + 1)
}

/// Where the memory begins in a file with so many segments and CPUs.
fn data_start(segments: usize, cpus: usize) -> u64 {
    (notes_start(segments) + NOTE_SIZE * cpus as u64).next_multiple_of(layout::PAGE)
}

/// An ELF header with its program headers, and the notes.
fn header(segments: &[Segment], cpus: &[Registers]) -> Vec<u8> {
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
    let count = u16::try_from(segments.len() + 1).unwrap_or(u16::MAX);
    u16s(&mut bytes, &[0, 0, 64, 56, count, 0, 0, 0]);
    let data = data_start(segments.len(), cpus.len());
    let notes = NOTE_SIZE * cpus.len() as u64;
    // PT_NOTE, readable.
    u16s(&mut bytes, &[4, 0, 4, 0]);
    u64s(
        &mut bytes,
        &[notes_start(segments.len()), 0, 0, notes, 0, 4],
    );
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
    for (cpu, registers) in cpus.iter().enumerate() {
        bytes.extend(NOTE);
        bytes.extend(prstatus(cpu, registers));
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

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
        let cpus = [0x11, 0x22].map(|rip| Registers {
            rip,
            ..Registers::default()
        });
        let mut bytes = header(&segments, &cpus);
        let data = data_start(segments.len(), cpus.len());
        assert!(bytes.len() as u64 <= data);
        bytes.resize(usize::try_from(data + 3 * MIB).unwrap(), 0);
        fs::write(&file, bytes).unwrap();
        let shown = Command::new("readelf")
            .args(["--wide", "--file-header", "--segments", "--notes"])
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
        let notes = text.matches("NT_PRSTATUS (prstatus structure)").count();
        assert_eq!(notes, 2, "{text}");
    }

    #[test]
    fn a_page_of_memory_is_found_in_the_file() {
        let part = |guest, length| Part {
            guest,
            host: 0,
            length,
        };
        let parts = [part(0, MIB), part(layout::HIGH_RAM, 2 * MIB)];
        assert_eq!(offset_of(&parts, 0x3000), Some(0x3000));
        let high = layout::HIGH_RAM + 0x1000;
        assert_eq!(offset_of(&parts, high), Some(MIB + 0x1000));
        for nowhere in [MIB, layout::HIGH_RAM - 1, layout::HIGH_RAM + 2 * MIB] {
            assert_eq!(offset_of(&parts, nowhere), None);
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
