//! A file system that hangs, as one over a network does whose server has gone: FUSE, of which the suite is the server.
//!
//! It has ten files, [`file`]. Who reads one waits until the test lets go, and a process that it is silent to with whatever
//! it asks. Speaks what the node's kernel asks of such a thing
//! and no more (linux/fuse.h).

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// Name of one of its files, from 0.
#[must_use]
pub fn file(number: usize) -> String {
    format!("{NAME}{number}")
}

const NAME: &str = "hangs-";
/// What is in each.
pub const CONTENT: &str = "at last\n";

const ROOT: u64 = 1;
/// That of the first file.
const FIRST: u64 = 2;
const HEADER: usize = 40;
/// `FOPEN_DIRECT_IO`: each read is asked.
const DIRECT: u32 = 1;

/// The file system, mounted.
pub struct Hanging {
    place: PathBuf,
    device: Arc<File>,
    state: Arc<Mutex<State>>,
    server: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct State {
    /// Those that wait: the request's number, and its answer.
    held: Vec<(u64, Reply)>,
    let_go: bool,
    /// A process that gets no answer at all.
    silent_to: Option<i32>,
    /// What the end of each open file takes.
    closing: Duration,
}

type Reply = std::result::Result<Vec<u8>, i32>;

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Hanging {
    /// Mounts it.
    ///
    /// # Errors
    /// If the node has no FUSE.
    pub fn mount(place: &Path) -> Result<Self> {
        fs::create_dir_all(place)?;
        let device = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/fuse")?;
        let device = Arc::new(device);
        let options = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0,allow_other",
            device.as_raw_fd()
        );
        mount(
            Some("hanging"),
            place,
            Some("fuse"),
            MsFlags::empty(),
            Some(options.as_str()),
        )
        .context("mounting FUSE")?;
        let state = Arc::new(Mutex::new(State::default()));
        let (served, of) = (Arc::clone(&device), Arc::clone(&state));
        Ok(Self {
            place: place.to_owned(),
            device,
            state,
            server: Some(std::thread::spawn(move || serve(&served, &of))),
        })
    }

    /// From now on a process gets no answer, whatever it asks, until the test lets go.
    pub fn be_silent_to(&self, process: i32) {
        lock(&self.state).silent_to = Some(process);
    }

    /// From now on who closes a file waits that long.
    pub fn close_in(&self, time: Duration) {
        lock(&self.state).closing = time;
    }

    /// Waits until so many requests wait.
    ///
    /// # Errors
    /// If they do not come in time.
    pub fn wait_for(&self, requests: usize, patience: Duration) -> Result<()> {
        let end = Instant::now() + patience;
        while self.held() < requests {
            ensure!(
                Instant::now() < end,
                "{} of {requests} requests have come",
                self.held()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// How many requests wait.
    #[must_use]
    pub fn held(&self) -> usize {
        lock(&self.state).held.len()
    }

    /// Answers all that wait, and those that come later.
    pub fn let_go(&self) {
        let mut state = lock(&self.state);
        state.let_go = true;
        for (unique, reply) in state.held.drain(..) {
            answer(&self.device, unique, reply);
        }
    }
}

impl Drop for Hanging {
    fn drop(&mut self) {
        self.let_go();
        // With the last mount of it the server's next read says that there is nothing to serve.
        let _ = umount2(&self.place, MntFlags::MNT_DETACH);
        if let Some(server) = self.server.take() {
            let _ = server.join();
        }
    }
}

fn content(begin: bool) -> Vec<u8> {
    if begin {
        CONTENT.as_bytes().to_vec()
    } else {
        Vec::new()
    }
}

fn serve(device: &File, state: &Mutex<State>) {
    let mut buffer = vec![0; 1 << 18];
    let mut device_reader = device;
    while let Ok(length) = device_reader.read(&mut buffer) {
        let Some(request) = buffer.get(..length).filter(|bytes| bytes.len() >= HEADER) else {
            return;
        };
        let word = |at: usize| -> u64 {
            let bytes = request.get(at..at + 8).and_then(|it| it.try_into().ok());
            bytes.map_or(0, u64::from_le_bytes)
        };
        let opcode = word(4) & 0xffff_ffff;
        let (unique, node) = (word(8), word(16));
        let thread = word(32) & 0xffff_ffff;
        let reply = match opcode {
            // FORGET, INTERRUPT, BATCH_FORGET: nobody waits.
            2 | 36 | 42 => continue,
            // LOOKUP
            1 => number_of(request).map(entry).ok_or(libc::ENOENT),
            // GETATTR
            3 => Ok([vec![0; 16], attributes(node)].concat()),
            // OPEN, OPENDIR
            14 | 27 => Ok(words(&[1, u64::from(DIRECT)])),
            // READ
            15 => {
                let reply = Ok(content(word(HEADER + 8) == 0));
                let mut state = lock(state);
                if !state.let_go {
                    state.held.push((unique, reply));
                    continue;
                }
                reply
            }
            // STATFS
            17 => Ok(vec![0; 80]),
            // FLUSH
            25 => {
                let closing = lock(state).closing;
                std::thread::sleep(closing);
                Ok(Vec::new())
            }
            // RELEASE, READDIR, RELEASEDIR
            18 | 28 | 29 => Ok(Vec::new()),
            // INIT: version 7.31, one page at a time.
            26 => Ok([words(&[7 | 31 << 32, 0, 4096 << 32, 1]), vec![0; 32]].concat()),
            _ => Err(libc::ENOSYS),
        };
        let mut state = lock(state);
        let silent = |process| Path::new(&format!("/proc/{process}/task/{thread}")).exists();
        if !state.let_go && state.silent_to.is_some_and(silent) {
            state.held.push((unique, reply));
            continue;
        }
        drop(state);
        answer(device, unique, reply);
    }
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn answer(mut device: &File, unique: u64, reply: Reply) {
    let (error, body) = match reply {
        Ok(body) => (0, body),
        Err(error) => (-error, Vec::new()),
    };
    let length = u32::try_from(16 + body.len()).unwrap_or(16);
    let mut bytes = length.to_le_bytes().to_vec();
    bytes.extend(error.to_le_bytes());
    bytes.extend(unique.to_le_bytes());
    bytes.extend(body);
    // The kernel refuses an answer that nobody waits for any more.
    let _ = device.write_all(&bytes);
}

/// `struct fuse_attr`.
fn attributes(node: u64) -> Vec<u8> {
    let (mode, size) = if node == ROOT {
        (0o40755u64, 0)
    } else {
        (0o100_644, CONTENT.len() as u64)
    };
    // Number, size, blocks, three times, their nanoseconds, mode with links, owners, the rest.
    let mut bytes = words(&[node, size, 1, 0, 0, 0]);
    bytes.extend([0; 12]);
    bytes.extend(words(&[mode | 1 << 32, 0, 4096 << 32]));
    bytes.extend([0; 4]);
    bytes
}

/// Which file a LOOKUP is for.
fn number_of(request: &[u8]) -> Option<u64> {
    let name = request.get(HEADER..)?.strip_suffix(&[0])?;
    let number = name.strip_prefix(NAME.as_bytes())?;
    let number: u64 = std::str::from_utf8(number).ok()?.parse().ok()?;
    (number < 10).then_some(FIRST + number)
}

/// `struct fuse_entry_out`.
fn entry(node: u64) -> Vec<u8> {
    [words(&[node, 0, 0, 0, 0]), attributes(node)].concat()
}
