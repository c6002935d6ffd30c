//! Copies between a process's pipes or terminal and the host's streams.
//!
//! What a process writes is hostile bytes and is only ever copied. A copy ends at the end of the
//! pipe, not at the exit of the process, so nothing is truncated; a grandchild that keeps a pipe
//! open keeps only that stream, and that until its process is deleted: then what is in the pipe is
//! the last of it.
use std::{
    io::{self, ErrorKind},
    os::fd::{AsFd as _, OwnedFd},
    process::Stdio,
    sync::{Arc, Mutex},
    time::Duration,
};

use brig_agent_protocol::agent;
use rustix::pipe::{PipeFlags, pipe_with};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, Interest, ReadHalf, WriteHalf, unix::AsyncFd},
    net::unix::pipe,
    sync::{Notify, watch},
    time::timeout,
};

use crate::{
    error::{Error, Result},
    readiness,
    stream::Stream,
    streams::Streams,
    sync::lock,
};

/// Bytes copied at a time.
const CHUNK: usize = 32 * 1024;
/// After `CloseStdin`, how long no byte may arrive before the pipe is closed: the request and the
/// bytes sent before it travel on different streams. And how long a terminal that is to be hung up must be silent.
const CLOSE_GRACE: Duration = Duration::from_millis(250);
/// The most that is still copied once a process is deleted or its terminal is hung up, in bytes: what a pipe holds.
const LAST: usize = 64 * 1024;
/// How long the host may take to acknowledge the end of an output stream.
const LINGER: Duration = Duration::from_secs(10);

/// The host's streams of one process, connected.
#[derive(Debug, Default)]
pub struct HostStreams {
    stdin: Option<Stream>,
    stdout: Option<Stream>,
    stderr: Option<Stream>,
}

impl HostStreams {
    /// Waits for the streams that `wanted` names.
    ///
    /// # Errors
    /// Those of [`Streams::take`], and `InvalidArgument` for a terminal with a stderr.
    pub async fn connect(streams: &Streams, wanted: &agent::Stdio) -> Result<Self> {
        if wanted.terminal && wanted.stderr != 0 {
            return Err(Error::InvalidArgument(
                "a process with a terminal has no stderr stream".into(),
            ));
        }
        let take = async |number| match number {
            0 => Ok(None),
            number => streams.take(number).await.map(Some),
        };
        let (stdin, stdout, stderr) =
            futures::try_join!(take(wanted.stdin), take(wanted.stdout), take(wanted.stderr))?;
        Ok(Self {
            stdin,
            stdout,
            stderr,
        })
    }
}

/// What the new process gets as descriptors 0, 1 and 2.
pub struct ChildEnds {
    /// Descriptor 0.
    pub stdin: Stdio,
    /// Descriptor 1.
    pub stdout: Stdio,
    /// Descriptor 2.
    pub stderr: Stdio,
}

impl ChildEnds {
    /// Three times /dev/null, for a process whose terminal is made later.
    pub fn null() -> Self {
        Self {
            stdin: Stdio::null(),
            stdout: Stdio::null(),
            stderr: Stdio::null(),
        }
    }
}

/// The agent's ends: nothing is copied until [`Pumps::start`] or [`Pumps::start_terminal`].
#[derive(Default)]
pub struct Pumps {
    host: HostStreams,
    stdin: Option<pipe::Sender>,
    stdout: Option<pipe::Receiver>,
    stderr: Option<pipe::Receiver>,
}

/// The master of a process's terminal; none without one, and when it was hung up.
type Master = Arc<Mutex<Option<Arc<AsyncFd<OwnedFd>>>>>;

/// What remains of a process's stdio once it runs.
#[derive(Default)]
pub struct Running {
    close_stdin: Arc<Notify>,
    terminal: Master,
    output_done: Option<watch::Receiver<()>>,
    /// Its end tells the copies of output that their process is deleted.
    _held: Option<watch::Sender<()>>,
}

impl Pumps {
    /// Makes the pipes of a process without a terminal.
    ///
    /// # Errors
    /// `Internal` when descriptors run out.
    pub fn with_pipes(host: HostStreams) -> Result<(Self, ChildEnds)> {
        let mut ends = ChildEnds::null();
        let mut pumps = Self::default();
        if host.stdin.is_some() {
            let (ours, theirs) = pipe_for(true)?;
            pumps.stdin =
                Some(pipe::Sender::from_owned_fd(ours).map_err(|e| Error::io("stdin pipe", e))?);
            ends.stdin = theirs.into();
        }
        if host.stdout.is_some() {
            let (ours, theirs) = pipe_for(false)?;
            pumps.stdout =
                Some(pipe::Receiver::from_owned_fd(ours).map_err(|e| Error::io("stdout pipe", e))?);
            ends.stdout = theirs.into();
        }
        if host.stderr.is_some() {
            let (ours, theirs) = pipe_for(false)?;
            pumps.stderr =
                Some(pipe::Receiver::from_owned_fd(ours).map_err(|e| Error::io("stderr pipe", e))?);
            ends.stderr = theirs.into();
        }
        pumps.host = host;
        Ok((pumps, ends))
    }

    /// Without pipes: the terminal comes with [`Pumps::start_terminal`].
    pub fn for_terminal(host: HostStreams) -> Self {
        Self {
            host,
            ..Self::default()
        }
    }

    /// Starts to copy, through `terminal` (a pty master) if there is one.
    ///
    /// # Errors
    /// `Internal` when the terminal cannot be watched.
    pub fn start(self, terminal: Option<OwnedFd>) -> Result<Running> {
        let mut running = Running::default();
        let (done, output_done) = watch::channel(());
        running.output_done = Some(output_done);
        let (held, deleted) = watch::channel(());
        running._held = Some(held);
        if let Some(master) = terminal {
            rustix::io::ioctl_fionbio(&master, true).map_err(|e| Error::io("terminal", e))?;
            let master = Arc::new(
                readiness::register(master, Interest::READABLE | Interest::WRITABLE)
                    .map_err(|e| Error::io("terminal", e))?,
            );
            *lock(&running.terminal) = Some(Arc::clone(&master));
            let silenced = Arc::new(Notify::new());
            if let Some(stream) = self.host.stdin {
                let (read, write) = tokio::io::split(stream);
                let copy = stdin_to_terminal(read, write, Arc::clone(&master));
                let (close, mut deleted) = (Arc::clone(&running.close_stdin), deleted.clone());
                let (kept, silenced) = (Arc::clone(&running.terminal), Arc::clone(&silenced));
                tokio::spawn(async move {
                    copy.await;
                    // The end of the stream alone is none of the terminal's.
                    tokio::select! {
                        () = close.notified() => {
                            lock(&kept).take();
                            silenced.notify_one();
                        }
                        _ = deleted.changed() => {}
                    }
                });
            }
            if let Some(stream) = self.host.stdout {
                tokio::spawn(async move {
                    terminal_to_stream(master, stream, deleted, &silenced).await;
                    drop(done);
                });
            }
            return Ok(running);
        }
        if let (Some(stream), Some(pipe)) = (self.host.stdin, self.stdin) {
            let close = Arc::clone(&running.close_stdin);
            let (read, write) = tokio::io::split(stream);
            tokio::spawn(stdin_to_pipe(read, write, pipe, close));
        }
        let outputs = [
            (self.host.stdout, self.stdout),
            (self.host.stderr, self.stderr),
        ];
        for (stream, pipe) in outputs {
            if let (Some(stream), Some(pipe)) = (stream, pipe) {
                let (done, deleted) = (done.clone(), deleted.clone());
                tokio::spawn(async move {
                    pipe_to_stream(pipe, stream, deleted).await;
                    drop(done);
                });
            }
        }
        Ok(running)
    }
}

impl Running {
    /// Closes the process's stdin once what arrived has been written. A terminal is hung up when the stream has ended
    /// too, and what the process had written by then is still copied.
    pub fn close_stdin(&self) {
        self.close_stdin.notify_one();
    }

    /// Sets the terminal's size in characters.
    ///
    /// # Errors
    /// `FailedPrecondition` without a terminal.
    pub fn resize(&self, rows: u32, columns: u32) -> Result<()> {
        let Some(terminal) = lock(&self.terminal).clone() else {
            return Err(Error::FailedPrecondition(
                "the process has no terminal to resize".into(),
            ));
        };
        let size = |n: u32| u16::try_from(n).unwrap_or(u16::MAX);
        set_window_size(terminal.get_ref(), size(rows), size(columns))
            .map_err(|e| Error::io("resize", e))
    }

    /// Resolves when every output stream has been copied to its end.
    pub fn output_done(&self) -> impl Future<Output = ()> + use<> {
        let receiver = self.output_done.clone();
        async move {
            if let Some(mut receiver) = receiver {
                while receiver.changed().await.is_ok() {}
            }
        }
    }
}

/// Sets a terminal's window size (tty_ioctl(4), TIOCSWINSZ).
///
/// # Errors
/// Those of the ioctl.
pub fn set_window_size(terminal: &OwnedFd, rows: u16, columns: u16) -> io::Result<()> {
    let size = rustix::termios::Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    rustix::termios::tcsetwinsize(terminal.as_fd(), size)?;
    Ok(())
}

/// A pipe: the agent's end first. `write` tells which end that is.
fn pipe_for(write: bool) -> Result<(OwnedFd, OwnedFd)> {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).map_err(|e| Error::io("pipe", e))?;
    let (ours, theirs) = if write {
        (writer, reader)
    } else {
        (reader, writer)
    };
    // Only the agent's end is non-blocking: the flag belongs to the open file, which each end has
    // for itself, and a program may not expect it.
    rustix::io::ioctl_fionbio(&ours, true).map_err(|e| Error::io("pipe", e))?;
    Ok((ours, theirs))
}

async fn stdin_to_pipe(
    mut stream: ReadHalf<Stream>,
    host: WriteHalf<Stream>,
    mut pipe: pipe::Sender,
    close: Arc<Notify>,
) {
    let mut buffer = vec![0; CHUNK];
    let mut closing = false;
    loop {
        let count = if closing {
            match timeout(CLOSE_GRACE, stream.read(&mut buffer)).await {
                Ok(Ok(n)) => n,
                _ => break,
            }
        } else {
            tokio::select! {
                read = stream.read(&mut buffer) => read.unwrap_or(0),
                () = close.notified() => { closing = true; continue }
                // The last reader has gone: what the host still sends has nowhere to go.
                _ = pipe.ready(Interest::ERROR) => break,
            }
        };
        if count == 0 || pipe.write_all(&buffer[..count]).await.is_err() {
            break;
        }
    }
    drop(pipe);
    // The host sees that nobody reads any more.
    let mut host = host;
    let _ = host.shutdown().await;
}

async fn stdin_to_terminal(
    mut stream: ReadHalf<Stream>,
    mut host: WriteHalf<Stream>,
    master: Arc<AsyncFd<OwnedFd>>,
) {
    let mut buffer = vec![0; CHUNK];
    'copy: while let Ok(count @ 1..) = stream.read(&mut buffer).await {
        let mut rest = &buffer[..count];
        while !rest.is_empty() {
            let written = master
                .async_io(Interest::WRITABLE, |fd| Ok(rustix::io::write(fd, rest)?))
                .await;
            match written {
                Ok(n) => rest = &rest[n..],
                Err(_) => break 'copy,
            }
        }
    }
    let _ = host.shutdown().await;
}

async fn pipe_to_stream(
    pipe: pipe::Receiver,
    mut stream: Stream,
    mut deleted: watch::Receiver<()>,
) {
    // The buffer lives only while there is something to copy: most streams are idle most of the time.
    'wait: loop {
        tokio::select! {
            biased;
            // Somebody may go on writing for ever.
            _ = deleted.changed() => {
                if copy_last(&pipe, &mut stream).await.is_err() {
                    return;
                }
                break;
            }
            ready = pipe.readable() => if ready.is_err() { break },
        }
        let mut buffer = vec![0; CHUNK];
        while deleted.has_changed().is_ok() {
            match pipe.try_read(&mut buffer) {
                Ok(0) => break 'wait,
                Ok(n) => {
                    if stream.write_all(&buffer[..n]).await.is_err() {
                        return;
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => continue 'wait,
                Err(_) => break 'wait,
            }
        }
    }
    finish(stream).await;
}

/// Copies what is in the pipe now, whether the runtime has heard of it or not.
async fn copy_last(pipe: &pipe::Receiver, stream: &mut Stream) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    let mut left = LAST;
    while left > 0 {
        let Ok(n @ 1..) = rustix::io::read(pipe, &mut *buffer) else {
            break;
        };
        stream.write_all(&buffer[..n]).await?;
        left = left.saturating_sub(n);
    }
    Ok(())
}

/// The master goes with the copy once it is `silenced`, by which the kernel hangs the terminal up.
async fn terminal_to_stream(
    master: Arc<AsyncFd<OwnedFd>>,
    mut stream: Stream,
    mut deleted: watch::Receiver<()>,
    silenced: &Notify,
) {
    let mut buffer = vec![0; CHUNK];
    let mut left = LAST;
    let mut last = false;
    while left > 0 {
        let read = master.async_io(Interest::READABLE, |fd| {
            Ok(rustix::io::read(fd, &mut *buffer)?)
        });
        let read = tokio::select! {
            biased;
            read = read => read,
            () = tokio::time::sleep(CLOSE_GRACE), if last => break,
            () = silenced.notified(), if !last => { last = true; continue }
            _ = deleted.changed() => break,
        };
        // EIO is how a pty master reports that the last slave was closed.
        match read {
            Ok(0) | Err(_) => break,
            Ok(n) => {
                // Somebody may go on writing for ever.
                if last || deleted.has_changed().is_err() {
                    left = left.saturating_sub(n);
                }
                if stream.write_all(&buffer[..n]).await.is_err() {
                    return;
                }
            }
        }
    }
    drop(master);
    finish(stream).await;
}

/// Ends an output stream so that the host has read all of it before the socket goes.
async fn finish(mut stream: Stream) {
    if stream.shutdown().await.is_ok() {
        let mut byte = [0; 64];
        let _ = timeout(LINGER, async {
            while let Ok(1..) = stream.read(&mut byte).await {}
        })
        .await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use tokio::net::UnixStream;

    fn file(stdio: OwnedFd) -> std::fs::File {
        stdio.into()
    }

    #[tokio::test]
    async fn output_is_copied_to_its_end_after_the_writer_is_gone() {
        let (ours, theirs) = pipe_for(false).unwrap();
        let (mut host, guest) = UnixStream::pair().unwrap();
        let writer = std::thread::spawn(move || file(theirs).write_all(&vec![7; 300_000]).unwrap());
        let receiver = pipe::Receiver::from_owned_fd(ours).unwrap();
        let (_held, deleted) = watch::channel(());
        let copy = tokio::spawn(pipe_to_stream(receiver, Stream::Unix(guest), deleted));
        let mut got = Vec::new();
        host.read_to_end(&mut got).await.unwrap();
        assert_eq!(got.len(), 300_000);
        drop(host);
        copy.await.unwrap();
        writer.join().unwrap();
    }

    #[tokio::test]
    async fn output_that_somebody_keeps_open_ends_when_its_process_is_deleted() {
        for endless in [false, true] {
            let (ours, theirs) = pipe_for(false).unwrap();
            let (mut host, guest) = UnixStream::pair().unwrap();
            let receiver = pipe::Receiver::from_owned_fd(ours).unwrap();
            let (held, deleted) = watch::channel(());
            let copy = tokio::spawn(pipe_to_stream(receiver, Stream::Unix(guest), deleted));
            let mut orphan = file(theirs);
            orphan.write_all(b"last words").unwrap();
            let mut words = [0; 10];
            host.read_exact(&mut words).await.unwrap();
            orphan.write_all(b"in the pipe").unwrap();
            let orphan = std::thread::spawn(move || {
                while endless && orphan.write_all(&[7; 4096]).is_ok() {}
                orphan
            });
            drop(held);
            let mut rest = Vec::new();
            let end = timeout(Duration::from_secs(10), host.read_to_end(&mut rest));
            end.await.expect("the stream goes on").unwrap();
            assert!(rest.starts_with(b"in the pipe"), "{endless}");
            drop(host);
            copy.await.unwrap();
            drop(orphan.join().unwrap());
        }
    }

    #[tokio::test]
    async fn close_stdin_writes_what_arrived_and_then_closes() {
        let (ours, theirs) = pipe_for(true).unwrap();
        let (mut host, guest) = UnixStream::pair().unwrap();
        host.write_all(b"last words").await.unwrap();
        let close = Arc::new(Notify::new());
        close.notify_one();
        let (read, write) = tokio::io::split(Stream::Unix(guest));
        stdin_to_pipe(
            read,
            write,
            pipe::Sender::from_owned_fd(ours).unwrap(),
            close,
        )
        .await;
        assert_eq!(io::read_to_string(file(theirs)).unwrap(), "last words");
    }

    #[tokio::test]
    async fn the_host_is_told_when_nobody_reads_stdin_any_more() {
        let (ours, theirs) = pipe_for(true).unwrap();
        let (mut host, guest) = UnixStream::pair().unwrap();
        let (read, write) = tokio::io::split(Stream::Unix(guest));
        let sender = pipe::Sender::from_owned_fd(ours).unwrap();
        let copy = tokio::spawn(stdin_to_pipe(read, write, sender, Arc::new(Notify::new())));
        tokio::task::yield_now().await;
        drop(theirs);
        let end = timeout(Duration::from_secs(5), host.read(&mut [0])).await;
        assert_eq!(end.unwrap().unwrap(), 0);
        copy.await.unwrap();
    }

    #[tokio::test]
    async fn half_closing_the_stream_closes_stdin() {
        let (ours, theirs) = pipe_for(true).unwrap();
        let (mut host, guest) = UnixStream::pair().unwrap();
        host.write_all(b"abc").await.unwrap();
        host.shutdown().await.unwrap();
        let (read, write) = tokio::io::split(Stream::Unix(guest));
        let sender = pipe::Sender::from_owned_fd(ours).unwrap();
        stdin_to_pipe(read, write, sender, Arc::new(Notify::new())).await;
        assert_eq!(io::read_to_string(file(theirs)).unwrap(), "abc");
    }
}
