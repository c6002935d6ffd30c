//! Using memory: too much of it, some and then none, or huge pages.

use std::fs::File;
use std::io::{self, BufRead, Write};
use std::num::NonZeroUsize;
use std::ptr::NonNull;

use anyhow::{Context, Result};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

const MIB: usize = 1024 * 1024;
const PAGE: usize = 4096;
const HUGE_PAGE: usize = 2 * MIB;

/// An anonymous mapping of which every page has been written.
struct Touched {
    start: NonNull<std::ffi::c_void>,
    length: usize,
}

impl Touched {
    fn new(mib: usize) -> Result<Self> {
        let length = mib.saturating_mul(MIB);
        let size = NonZeroUsize::new(length).context("nothing to allocate")?;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice.
        let start = unsafe {
            mmap_anonymous(
                None,
                size,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_PRIVATE,
            )
        }
        .context("cannot map memory")?;
        let touched = Self { start, length };
        let mut value = 0x5bu8;
        for offset in (0..length).step_by(PAGE) {
            value = value.wrapping_mul(31).wrapping_add(7);
            // SAFETY: offset is below the length of the mapping, which is writable and ours.
            unsafe {
                touched
                    .start
                    .as_ptr()
                    .cast::<u8>()
                    .add(offset)
                    .write_volatile(value | 1);
            }
        }
        Ok(touched)
    }
}

impl Drop for Touched {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and nothing refers to it any more.
        let _ = unsafe { munmap(self.start, self.length) };
    }
}

/// Touches `mib` MiB in steps, saying how far it got; the OOM killer may end it.
pub fn eat(mib: usize) -> Result<u8> {
    let mut held = Vec::new();
    let mut done = 0;
    while done < mib {
        let step = (mib - done).min(8);
        held.push(Touched::new(step)?);
        done += step;
        println!("ate {done}");
        io::stdout().flush()?;
    }
    Ok(0)
}

/// Touches `mib` MiB; a line on stdin makes it free them, another ends it.
pub fn touch_free(mib: usize) -> Result<u8> {
    let mut lines = io::stdin().lock().lines();
    let touched = Touched::new(mib)?;
    println!("touched");
    io::stdout().flush()?;
    let _ = lines.next();
    drop(touched);
    println!("freed");
    io::stdout().flush()?;
    let _ = lines.next();
    Ok(0)
}

/// Makes a file of `pages` huge pages at `path`, on a hugetlbfs, and touches each; the file stays.
pub fn huge(path: &str, pages: usize) -> Result<u8> {
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .with_context(|| format!("cannot make {path}"))?;
    let length = pages.saturating_mul(HUGE_PAGE);
    file.set_len(u64::try_from(length)?)
        .with_context(|| format!("cannot make {path} {length} bytes long"))?;
    let size = NonZeroUsize::new(length).context("nothing to map")?;
    // SAFETY: a new mapping at an address of the kernel's choice, of a file that nobody shortens.
    let start = unsafe {
        mmap(
            None,
            size,
            ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
            MapFlags::MAP_SHARED,
            &file,
            0,
        )
    }
    .with_context(|| format!("cannot map {pages} huge pages"))?;
    let touched = Touched { start, length };
    for page in 0..pages {
        // SAFETY: the offset is below the length of the mapping, which is writable and ours.
        unsafe {
            let byte = touched.start.as_ptr().cast::<u8>().add(page * HUGE_PAGE);
            byte.write_volatile(0x5b);
        }
    }
    println!("touched {pages}");
    Ok(0)
}
