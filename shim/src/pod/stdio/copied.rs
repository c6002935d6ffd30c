//! Output into a regular file of the node. The VMM is root to file permissions, so with a descriptor of the file
//! it could fill, empty or give another mode to what is the node's own; it gets a pipe, and the bytes are copied
//! here.
//!
//! By a thread of its own, because a file may take its time (NFS, a full disk), and no other container is to wait
//! for that. What cannot be written ends the output, as the end of a reader does.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::thread;

use rustix::pipe::{PipeFlags, pipe_with};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// Bytes copied at once.
const CHUNK: usize = 16 << 10;
/// The thread only reads and writes.
const STACK: usize = 64 << 10;

/// Starts to copy into `file`: the end for the VMM, and what ends when everything has been written.
///
/// # Errors
/// When the host has no pipe or no thread.
pub(super) fn start(file: File) -> io::Result<(OwnedFd, JoinHandle<()>)> {
    let (source, given) = pipe_with(PipeFlags::CLOEXEC)?;
    rustix::io::ioctl_fionbio(&given, true)?;
    let (written, ended) = oneshot::channel::<()>();
    thread::Builder::new()
        .name("output".to_owned())
        .stack_size(STACK)
        .spawn(move || {
            copy(source.into(), file);
            drop(written);
        })?;
    let delivered = tokio::spawn(async move {
        let _ = ended.await;
    });
    Ok((given, delivered))
}

fn copy(mut source: File, mut file: File) {
    let mut chunk = vec![0; CHUNK];
    loop {
        match source.read(&mut chunk) {
            Ok(0) => return,
            Ok(length) => {
                let bytes = chunk.get(..length).unwrap_or_default();
                if file.write_all(bytes).is_err() {
                    return;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}
