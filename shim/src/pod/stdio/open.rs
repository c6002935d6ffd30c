//! What containerd names as a process's streams, opened: FIFOs and devices, files, and streams of its own. Blocking: a file
//! system may take as long as it likes.

use std::fs::{self, File, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use brig_hypervisor::launch::open_sealed;
use nix::fcntl::OFlag;

use super::end::{End, Kept};
use super::streaming::{self, Claim, Streams};
use super::{copied, percent};
use crate::error::{Error, Result};

/// The scheme of a URI.
pub(super) fn scheme(uri: &str) -> Option<&str> {
    uri.split_once("://").map(|(scheme, _)| scheme)
}

/// A path that is to be opened; `None` for no stream.
fn path_of(uri: &str) -> Result<Option<&Path>> {
    let path = match uri.split_once("://") {
        Some(("fifo", path)) => path,
        Some((scheme, _)) => {
            return Err(Error::invalid(format!(
                "stdio scheme {scheme:?} is not supported; use a FIFO path, file://, binary:// or ttrpc+unix://"
            )));
        }
        None => uri,
    };
    Ok((!path.is_empty() && path != "/dev/null").then(|| Path::new(path)))
}

fn failed(path: &Path, error: &std::io::Error) -> Error {
    Error::io(format_args!("stdio {}", path.display()), error)
}

/// For ourselves.
pub(super) fn open(path: &Path, read: bool) -> Result<File> {
    OpenOptions::new()
        .read(read)
        .write(!read)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(|error| failed(path, &error))
}

/// For the VMM.
fn open_given(path: &Path, read: bool) -> Result<OwnedFd> {
    let access = if read {
        OFlag::O_RDONLY
    } else {
        OFlag::O_WRONLY
    };
    open_sealed(path, access | OFlag::O_NONBLOCK).map_err(|error| failed(path, &error))
}

fn file_type(path: &Path) -> Result<fs::FileType> {
    let metadata = fs::metadata(path).map_err(|error| failed(path, &error))?;
    Ok(metadata.file_type())
}

/// The stream of containerd's that a URI names, if it names one.
fn claim(uri: &str, streams: &Streams) -> Result<Option<Claim>> {
    if scheme(uri) != Some(streaming::uri::SCHEME) {
        return Ok(None);
    }
    let id = streaming::uri::stream_id(uri)?;
    streams.claim(&id).map(Some)
}

/// A pipe that could not be made.
pub(super) fn no_pipe(error: std::io::Error) -> Error {
    Error::io("cannot make a pipe for a stream", &error)
}

/// The opposite end of a FIFO.
fn opposite(path: &Path, read: bool) -> Result<Kept> {
    if !file_type(path)?.is_fifo() {
        return Ok(Kept::Nothing);
    }
    let _end = open(path, read)?.into();
    Ok(Kept::Opposite { _end })
}

/// Where standard input comes from; none without one.
pub(super) fn open_input(uri: &str, streams: &Streams) -> Result<Option<End>> {
    if let Some(claim) = claim(uri, streams)? {
        let (pump, given) = streaming::Input::start(claim).map_err(no_pipe)?;
        let kept = Kept::Input(pump);
        return Ok(Some(End { given, kept }));
    }
    let Some(path) = path_of(uri)? else {
        return Ok(None);
    };
    // The reader first: a writer alone cannot be opened without blocking.
    let given = open_given(path, true)?;
    let kept = opposite(path, false)?;
    Ok(Some(End { given, kept }))
}

/// Where an output goes; none without one.
pub(super) fn open_output(uri: &str, streams: &Streams) -> Result<Option<End>> {
    if let Some(claim) = claim(uri, streams)? {
        let (pump, given, delivered) = streaming::Output::start(claim).map_err(no_pipe)?;
        let kept = Kept::Output(pump, delivered);
        return Ok(Some(End { given, kept }));
    }
    let Some(path) = path_of(uri)? else {
        return Ok(None);
    };
    if file_type(path)?.is_file() {
        let (given, written) = copied::start(open_to_append(uri)?).map_err(no_pipe)?;
        let kept = Kept::Copied(written);
        return Ok(Some(End { given, kept }));
    }
    let kept = opposite(path, true)?;
    let given = open_given(path, false)?;
    Ok(Some(End { given, kept }))
}

/// Whether a regular file is named by its path alone.
pub(super) fn names_a_file(uri: &str) -> Result<bool> {
    match path_of(uri) {
        Ok(Some(path)) => Ok(file_type(path)?.is_file()),
        _ => Ok(false),
    }
}

/// A file that is there; what it has stays.
pub(super) fn open_to_append(uri: &str) -> Result<File> {
    let path = path_of(uri)?.unwrap_or(Path::new(uri));
    let opened = OpenOptions::new().append(true).open(path);
    opened.map_err(|error| failed(path, &error))
}

/// The file of a `file://` URI, which is made if it is not there.
pub(super) fn open_file(uri: &str) -> Result<File> {
    let rest = uri.strip_prefix("file://").unwrap_or(uri);
    let path = rest.split(['?', '#']).next().unwrap_or(rest);
    let path = percent::decode(path, false).filter(|path| path.starts_with('/'));
    let path = path.ok_or_else(|| {
        Error::invalid(format!(
            "stdio {uri:?} names no file by its full path; expected file:///PATH, percent-encoded"
        ))
    })?;
    let path = Path::new(&path);
    let failed = |error| Error::io(format_args!("log file {}", path.display()), &error);
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir).map_err(failed)?;
    }
    OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o644)
        .open(path)
        .map_err(failed)
}
