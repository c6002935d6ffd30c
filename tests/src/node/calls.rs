//! How many system calls processes make, counted by the kernel as they enter it (perf_event_open(2), the tracepoint
//! `raw_syscalls:sys_enter`). Nobody is stopped for it, unlike under strace.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::FromRawFd;

use anyhow::{Context, Result};

const TRACEFS: &str = "/sys/kernel/debug/tracing";
const PERF_TYPE_TRACEPOINT: u32 = 2;
/// The first bits of `perf_event_attr`: what a counted task starts is counted too.
const INHERIT: u64 = 1 << 1;

/// `struct perf_event_attr`, its first published length (`PERF_ATTR_SIZE_VER0`): what is after it is zero to the kernel.
#[repr(C)]
#[derive(Default)]
struct Attributes {
    kind: u32,
    size: u32,
    config: u64,
    sample_period: u64,
    sample_type: u64,
    read_format: u64,
    flags: u64,
    wakeup: u32,
    breakpoint: u32,
    config1: u64,
}

/// A count that goes on.
#[derive(Debug)]
pub struct Calls(Vec<File>);

fn open(thread: i32) -> Result<File> {
    let path = format!("{TRACEFS}/events/raw_syscalls/sys_enter/id");
    let number = fs::read_to_string(&path).with_context(|| path.clone())?;
    let attributes = Attributes {
        kind: PERF_TYPE_TRACEPOINT,
        size: u32::try_from(size_of::<Attributes>())?,
        config: number.trim().parse()?,
        flags: INHERIT,
        ..Attributes::default()
    };
    // SAFETY: the kernel reads `size` bytes at the pointer, which is a live structure of that length; the rest are integers.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_perf_event_open,
            &raw const attributes,
            thread,
            -1,
            -1,
            libc::c_ulong::from(8_u32),
        )
    };
    let fd = i32::try_from(fd)?;
    if fd < 0 {
        return Err(std::io::Error::last_os_error())
            .with_context(|| format!("cannot count the calls of thread {thread}"));
    }
    // SAFETY: the kernel has just given us this descriptor.
    Ok(unsafe { File::from_raw_fd(fd) })
}

impl Calls {
    /// Counts those of the calling thread, and of what it starts from now on.
    ///
    /// # Errors
    /// What the kernel says: it wants root, and tracefs at `/sys/kernel/debug/tracing`.
    pub fn of_this_thread() -> Result<Self> {
        Ok(Self(vec![open(0)?]))
    }

    /// Counts those of all threads of these processes, and of what they start from now on.
    ///
    /// # Errors
    /// As [`Self::of_this_thread`]; if a process is gone.
    pub fn of(processes: &[i32]) -> Result<Self> {
        let mut counters = Vec::new();
        for pid in processes {
            let threads = fs::read_dir(format!("/proc/{pid}/task"))
                .with_context(|| format!("process {pid}"))?;
            for thread in threads {
                let name = thread?.file_name();
                counters.push(open(name.to_string_lossy().parse()?)?);
            }
        }
        Ok(Self(counters))
    }

    /// How many until now.
    ///
    /// # Errors
    /// If a counter cannot be read.
    pub fn count(&self) -> Result<u64> {
        let mut sum = 0;
        for mut counter in &self.0 {
            let mut value = [0; 8];
            counter.read_exact(&mut value)?;
            sum += u64::from_ne_bytes(value);
        }
        Ok(sum)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_have_their_first_published_length() {
        assert_eq!(size_of::<Attributes>(), 64);
    }
}
