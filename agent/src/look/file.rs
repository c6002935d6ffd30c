//! Files and directories of the guest.
use std::{
    fs::{self, File},
    io::Read,
    os::unix::fs::MetadataExt as _,
};

use brig_agent_protocol::MAX_LOOK;
use rustix::fs::{Mode, OFlags};

use super::bounded::{CUT, bounded};
use crate::error::{Error, Result};

/// The contents of files, one after the other.
///
/// # Errors
/// `InvalidArgument` for what is no file (reading a device may do something), and what the kernel says.
pub(super) fn contents(paths: &[&str]) -> Result<Vec<u8>> {
    let mut all = Vec::new();
    for path in paths {
        // A pipe or a file of /proc must not keep us waiting.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let kind = fs::metadata(path).map_err(|error| failed(path, error))?;
        if !kind.is_file() {
            return Err(Error::InvalidArgument(format!("{path} is no file")));
        }
        let file = rustix::fs::open(*path, flags, Mode::empty());
        let file = File::from(file.map_err(|error| failed(path, error.into()))?);
        let room = u64::try_from(MAX_LOOK + 1 - all.len().min(MAX_LOOK)).unwrap_or(0);
        file.take(room)
            .read_to_end(&mut all)
            .map_err(|error| failed(path, error))?;
        if all.len() > MAX_LOOK {
            all.truncate(MAX_LOOK - CUT.len());
            all.extend_from_slice(CUT);
            break;
        }
    }
    Ok(all)
}

/// What is in a directory: type, mode, owner, size and name, a line each.
///
/// # Errors
/// What the kernel says.
pub(super) fn names(path: &str) -> Result<Vec<u8>> {
    let mut lines = Vec::new();
    for entry in fs::read_dir(path).map_err(|error| failed(path, error))? {
        let entry = entry.map_err(|error| failed(path, error))?;
        let name = entry.file_name();
        // Gone since, most likely.
        let Ok(metadata) = entry.metadata() else {
            continue;
        };
        let kind = metadata.file_type();
        let (letter, target) = if kind.is_dir() {
            ('d', None)
        } else if kind.is_symlink() {
            ('l', fs::read_link(entry.path()).ok())
        } else if kind.is_file() {
            ('-', None)
        } else {
            ('s', None)
        };
        let arrow = target.map_or_else(String::new, |to| format!(" -> {}", to.display()));
        lines.push(format!(
            "{letter}{:04o} {:>5} {:>5} {:>10} {}{arrow}\n",
            metadata.mode() & 0o7777,
            metadata.uid(),
            metadata.gid(),
            metadata.size(),
            name.to_string_lossy()
        ));
        if lines.len() > MAX_LOOK / 32 {
            break;
        }
    }
    lines.sort_by(|a, b| a.get(29..).cmp(&b.get(29..)));
    Ok(bounded(lines.concat()))
}

fn failed(path: &str, error: std::io::Error) -> Error {
    match error.kind() {
        std::io::ErrorKind::NotFound => Error::NotFound(format!("{path}: {error}")),
        _ => Error::io(path, error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_file_is_not_read() {
        for path in ["/dev/null", "/proc", "/nonexistent"] {
            let error = contents(&[path]).unwrap_err();
            assert!(error.to_string().contains(path), "{error}");
        }
        let two = contents(&["/proc/version", "/proc/version"]).unwrap();
        assert_eq!(two[..two.len() / 2], two[two.len() / 2..]);
    }

    #[test]
    fn a_pipe_that_nobody_writes_to_is_refused_and_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("p");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(contents(&[pipe.to_str().unwrap()]).is_err());
    }

    #[test]
    fn a_directory_is_listed_with_types_and_targets() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("b"), "12345").unwrap();
        fs::create_dir(dir.path().join("a")).unwrap();
        std::os::unix::fs::symlink("b", dir.path().join("c")).unwrap();
        let text = names(dir.path().to_str().unwrap()).unwrap();
        let text = String::from_utf8(text).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert!(
            lines[0].starts_with('d') && lines[0].ends_with(" a"),
            "{text}"
        );
        assert!(lines[1].ends_with(" 5 b"), "{text}");
        assert!(
            lines[2].starts_with('l') && lines[2].ends_with("c -> b"),
            "{text}"
        );
    }
}
