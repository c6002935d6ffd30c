//! FUSE sessions from a grammar: opcodes with bodies of the right shape and any values, over nodes and
//! handles that the server gave and others that it did not. What lies beside the share is neither read
//! nor changed, and every descriptor is given back at the end.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use super::input::Input;
use crate::virtio::VirtioDevice as _;
use crate::virtio::fs::Fs;
use crate::virtio::testing::Harness;

const STEPS: usize = 40;
const HEADER: usize = 40;
const REPLY: u32 = 16 << 10;
/// What no reply may hold.
const SECRET: &[u8] = b"beside-the-share-b1gf00t";

/// A share with something beside it.
pub struct Share {
    base: PathBuf,
}

static NEXT: AtomicU64 = AtomicU64::new(0);

impl Share {
    pub fn new() -> Self {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("brig-fuzz-{}-{number}", std::process::id());
        let base = ["/dev/shm", "/tmp"]
            .iter()
            .map(|dir| PathBuf::from(dir).join(&name))
            .find(|base| fs::create_dir(base).is_ok())
            .expect("no place for the share");
        let share = Self { base };
        fs::create_dir(share.base.join("outside")).unwrap();
        fs::write(share.base.join("outside/secret"), SECRET).unwrap();
        fs::write(share.base.join("outside").join(ELSEWHERE), "").unwrap();
        let served = share.served();
        fs::create_dir(&served).unwrap();
        fs::write(served.join("file"), [b'x'; 5000]).unwrap();
        fs::create_dir_all(served.join("dir/sub")).unwrap();
        fs::write(served.join("dir/inner"), "inner").unwrap();
        symlink("../outside/secret", served.join("link")).unwrap();
        symlink("../outside", served.join("outside")).unwrap();
        share
    }

    pub fn served(&self) -> PathBuf {
        self.base.join("share")
    }

    /// Nothing beside the share has changed.
    pub fn check(&self) {
        let outside = self.base.join("outside");
        assert_eq!(fs::read(outside.join("secret")).unwrap(), SECRET);
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 2);
        assert_eq!(fs::read_dir(&self.base).unwrap().count(), 2);
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.base);
    }
}

/// Opcodes and the shape of their bodies: `w` 32 bits, `q` 64 bits, `h` a handle, `o` a node, `n` a name
/// and its zero, `d` data, `m` a mode.
const SHAPES: &[(u32, &str)] = &[
    (1, "n"),
    (1, "n"),
    (1, "n"),
    (3, "wwh"),
    (4, "wwhqqqqqwwwmwwww"),
    (5, ""),
    (6, "nn"),
    (8, "mwwwn"),
    (9, "mwn"),
    (10, "n"),
    (11, "n"),
    (12, "onn"),
    (13, "on"),
    (14, "ww"),
    (14, "ww"),
    (15, "hqwwqww"),
    (16, "hqwwqwwd"),
    (17, ""),
    (18, "hwwq"),
    (20, "hww"),
    (21, "wwnd"),
    (22, "wwn"),
    (23, "ww"),
    (24, "n"),
    (25, "hwwq"),
    (26, "wwww"),
    (27, "ww"),
    (28, "hqwwqww"),
    (29, "hwwq"),
    (30, "hww"),
    (31, "hqqqwwww"),
    (34, "ww"),
    (35, "wmwwn"),
    (36, "q"),
    (37, "qww"),
    (38, ""),
    (39, "hwwqww"),
    (40, "hqww"),
    (42, "wwoqoqoq"),
    (43, "hqqww"),
    (44, "hqwwqww"),
    (45, "owwnn"),
    (46, "hqww"),
    (47, "hqohqqq"),
    (48, "hqqqq"),
    (49, "wwqq"),
    (50, "q"),
    (51, "wmwwn"),
    (2, "q"),
];

/// A file beside the share whose name no guest gives to one of its own.
const ELSEWHERE: &str = "elsewhere";

const NAMES: &[&[u8]] = &[
    b"file",
    b"dir",
    b"inner",
    b"sub",
    b"link",
    b"outside",
    b"secret",
    b"new",
    b"newer",
    b"..",
    b".",
    b"",
    b"a/b",
    b"../outside/secret",
    b"/etc/passwd",
    b"user.a",
    b"security.capability",
    b"trusted.overlay.opaque",
    b"system.posix_acl_access",
    b"user.brig",
];

const MODES: &[u32] = &[
    0o644,
    0o755,
    0o4755,
    0o100_644,
    0o040_755,
    0o120_777,
    0o020_666,
    0o060_666,
    0o010_644,
    0o140_644,
    0,
    u32::MAX,
];

const LONGS: &[u64] = &[
    0,
    1,
    4095,
    4096,
    5000,
    1 << 16,
    1 << 20,
    1 << 40,
    i64::MAX.cast_unsigned(),
    1 << 63,
    u64::MAX,
    (1 << 32) - 1,
];

struct Session {
    harness: Harness<Fs>,
    request: u64,
    reply: u64,
    unique: u64,
    nodes: Vec<u64>,
    handles: Vec<u64>,
}

pub fn fuse_session(data: &[u8]) {
    let before = open_descriptors();
    let share = Share::new();
    {
        let (device, handle) = Fs::with_root("share", &share.served()).unwrap();
        let mut harness = Harness::new(device);
        harness.activate(0);
        let request = harness.alloc(0x4000);
        let reply = harness.alloc(u64::from(REPLY));
        let mut session = Session {
            harness,
            request,
            reply,
            unique: 1,
            nodes: vec![1],
            handles: vec![0],
        };
        let mut input = Input::new(data);
        session.init();
        for _ in 0..STEPS {
            if input.is_empty() {
                break;
            }
            if input.byte() == 255 {
                handle.forget(input.pick(&["dir", "dir/sub", "file", "..", "", "/", "absent"]));
            } else {
                session.step(&mut input);
            }
        }
        share.check();
        // A driver that begins again finds a server that works.
        fs::write(share.served().join("again"), "still here").unwrap();
        session.harness.deactivate();
        session.harness.activate(0);
        session.init();
        let found = session.call(1, 1, b"again\0").unwrap();
        let node = u64::from_le_bytes(found[..8].try_into().unwrap());
        let opened = session.call(14, node, &[0; 8]).unwrap();
        let mut body = opened[..8].to_vec();
        body.extend([0; 8]);
        body.extend(4096u32.to_le_bytes());
        body.extend([0; 20]);
        assert_eq!(session.call(15, node, &body).unwrap(), b"still here");
    }
    share.check();
    // Other tests of the process open and close their own.
    if !cfg!(test) {
        assert_eq!(open_descriptors(), before, "descriptors are left");
    }
}

fn open_descriptors() -> usize {
    if cfg!(test) {
        return 0;
    }
    fs::read_dir("/proc/self/fd").unwrap().count()
}

impl Session {
    fn init(&mut self) {
        let mut body = Vec::new();
        for word in [7u32, 31, 0x2_0000, !(1 << 30)] {
            body.extend(word.to_le_bytes());
        }
        assert!(self.call(26, 0, &body).is_ok(), "INIT");
    }

    fn step(&mut self, input: &mut Input<'_>) {
        let (opcode, shape) = SHAPES[input.below(SHAPES.len())];
        let node = self.node(input);
        let mut body = Vec::new();
        for field in shape.bytes() {
            match field {
                b'w' => body.extend(word(input).to_le_bytes()),
                b'm' => body.extend(input.pick(MODES).to_le_bytes()),
                b'q' => body.extend(long(input).to_le_bytes()),
                b'h' => body.extend(self.handle(input).to_le_bytes()),
                b'o' => body.extend(self.node(input).to_le_bytes()),
                b'n' => {
                    if input.byte() == 254 {
                        body.extend(vec![b'n'; usize::from(input.short()) % 5000]);
                    } else {
                        body.extend(input.pick(NAMES));
                    }
                    body.push(0);
                }
                _ => {
                    let length = usize::from(input.byte());
                    body.extend(vec![b'd'; length * 8]);
                }
            }
        }
        match input.byte() {
            // Cut short, or with more behind.
            250 => body.truncate(usize::from(input.byte())),
            251 => body.extend(input.take(64)),
            _ => {}
        }
        body.truncate(0x3000);
        let Ok(reply) = self.call(opcode, node, &body) else {
            return;
        };
        let long = |at: usize| {
            reply
                .get(at..at + 8)
                .map(|bytes| u64::from_le_bytes(bytes.try_into().unwrap()))
        };
        match opcode {
            1 | 6 | 8 | 9 | 13 => self.nodes.extend(long(0)),
            14 | 27 => self.handles.extend(long(0)),
            35 => {
                self.nodes.extend(long(0));
                self.handles.extend(long(128));
            }
            _ => {}
        }
        if opcode == 28 || opcode == 44 {
            // Names are checked, not contents: listing `outside` by its link would show it.
            let name = ELSEWHERE.as_bytes();
            assert!(
                !reply.windows(name.len()).any(|part| part == name),
                "a directory beside the share was listed"
            );
        }
    }

    fn node(&self, input: &mut Input<'_>) -> u64 {
        match input.byte() {
            253 => input.long(),
            which => self.nodes[usize::from(which) % self.nodes.len()],
        }
    }

    fn handle(&self, input: &mut Input<'_>) -> u64 {
        match input.byte() {
            253 => input.long(),
            which => self.handles[usize::from(which) % self.handles.len()],
        }
    }

    /// A request; an error, or what is behind the reply's header.
    fn call(&mut self, opcode: u32, node: u64, body: &[u8]) -> Result<Vec<u8>, i32> {
        self.unique += 1;
        let mut bytes = u32::try_from(HEADER + body.len())
            .unwrap()
            .to_le_bytes()
            .to_vec();
        bytes.extend(opcode.to_le_bytes());
        bytes.extend(self.unique.to_le_bytes());
        bytes.extend(node.to_le_bytes());
        bytes.extend([0; 16]);
        bytes.extend(body);
        self.harness.write(self.request, &bytes);
        let parts = [
            (self.request, u32::try_from(bytes.len()).unwrap(), false),
            (self.reply, REPLY, true),
        ];
        // FORGET and INTERRUPT have a queue of their own.
        let queue = usize::from(!matches!(opcode, 2 | 36 | 42));
        self.harness.queues[queue].add(&parts);
        self.harness.run();
        if queue == 0 {
            // While requests come they are put off until a pause.
            self.harness.device.catch_up().unwrap();
        }
        let used = self.harness.queues[queue].used();
        assert_eq!(used.len(), 1, "a request without an end");
        let written = usize::try_from(used[0].1).unwrap();
        assert!(written <= REPLY as usize);
        if written < 16 {
            return Err(0);
        }
        let reply = self.harness.read(self.reply, written);
        assert!(
            !reply.windows(SECRET.len()).any(|part| part == SECRET),
            "a file beside the share was read"
        );
        let number = |at: usize| u32::from_le_bytes(reply[at..at + 4].try_into().unwrap());
        assert_eq!(number(0) as usize, written, "the reply's length");
        match number(4).cast_signed() {
            0 => Ok(reply[16..].to_vec()),
            error => {
                assert!((-4095..0).contains(&error), "errno {error}");
                Err(-error)
            }
        }
    }
}

fn word(input: &mut Input<'_>) -> u32 {
    match input.byte() {
        byte @ 0..=127 => u32::from(byte),
        128..=200 => 1 << (u32::from(input.byte()) % 32),
        201..=230 => u32::from(input.short()),
        231..=240 => u32::MAX,
        _ => input.word(),
    }
}

/// Offsets and lengths: small ones, or so large that no file system of memory takes them as real.
fn long(input: &mut Input<'_>) -> u64 {
    match input.byte() {
        byte @ 0..=127 => u64::from(byte),
        128..=200 => input.pick(LONGS),
        _ => u64::from(input.word() & 0xf_ffff),
    }
}
