//! A newc cpio writer: initramfs images for guests that are not Brig's agent.

use std::io::{self, Write};

/// One entry of the archive.
#[derive(Clone, Copy)]
pub enum Entry<'a> {
    /// A directory.
    Directory(&'a str),
    /// An executable file with its contents.
    Program(&'a str, &'a [u8]),
    /// A character device with its major and minor number.
    Device(&'a str, u32, u32),
}

fn header(
    out: &mut impl Write,
    name: &str,
    number: usize,
    mode: u32,
    data: &[u8],
    device: (u32, u32),
) -> io::Result<()> {
    let fields = [
        u32::try_from(number).unwrap_or(u32::MAX),
        mode,
        0,
        0,
        1,
        0,
        u32::try_from(data.len()).map_err(|_| io::ErrorKind::FileTooLarge)?,
        0,
        0,
        device.0,
        device.1,
        u32::try_from(name.len() + 1).map_err(|_| io::ErrorKind::InvalidInput)?,
        0,
    ];
    let mut record = b"070701".to_vec();
    for field in fields {
        write!(record, "{field:08X}")?;
    }
    record.extend_from_slice(name.as_bytes());
    record.push(0);
    pad(&mut record);
    out.write_all(&record)?;
    let mut data = data.to_vec();
    pad(&mut data);
    out.write_all(&data)
}

fn pad(data: &mut Vec<u8>) {
    data.resize(data.len().next_multiple_of(4), 0);
}

/// Writes an archive the kernel takes as its initramfs.
///
/// # Errors
/// What the writer says; `FileTooLarge` for a file of 4 GiB and more.
pub fn write(out: &mut impl Write, entries: &[Entry<'_>]) -> io::Result<()> {
    for (number, entry) in entries.iter().enumerate() {
        match entry {
            Entry::Directory(name) => header(out, name, number, 0o040_755, &[], (0, 0))?,
            Entry::Program(name, data) => header(out, name, number, 0o100_755, data, (0, 0))?,
            Entry::Device(name, major, minor) => {
                header(out, name, number, 0o020_600, &[], (*major, *minor))?;
            }
        }
    }
    header(out, "TRAILER!!!", 0, 0, &[], (0, 0))
}

/// An initramfs that runs one program as `/init`, with the device nodes it needs to start.
///
/// # Errors
/// As [`write`].
pub fn init(program: &[u8]) -> io::Result<Vec<u8>> {
    init_with(program, &[])
}

/// As [`init`], with further entries.
///
/// # Errors
/// As [`write`].
pub fn init_with(program: &[u8], further: &[Entry<'_>]) -> io::Result<Vec<u8>> {
    let mut entries = vec![
        Entry::Directory("dev"),
        Entry::Directory("proc"),
        Entry::Directory("sys"),
        Entry::Device("dev/null", 1, 3),
        Entry::Device("dev/console", 5, 1),
        Entry::Program("init", program),
    ];
    entries.extend_from_slice(further);
    let mut out = Vec::new();
    write(&mut out, &entries)?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_has_aligned_records_and_a_trailer() {
        let archive = init(b"abc").unwrap();
        assert_eq!(archive.len() % 4, 0);
        assert!(archive.starts_with(b"070701"));
        let text = String::from_utf8_lossy(&archive);
        assert_eq!(text.matches("070701").count(), 7);
        assert!(text.contains("TRAILER!!!"));
    }
}
