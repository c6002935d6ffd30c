//! What takes long, and what must not wait for it.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

use nix::sys::stat::{Mode, umask};

use super::*;
use crate::sync::lock;

const FSYNC: u32 = 20;
const PATIENCE: Duration = Duration::from_secs(20);

/// What an FSYNC waits for.
#[derive(Default)]
struct Gate {
    arrived: AtomicUsize,
    open: Mutex<bool>,
    opened: Condvar,
}

impl Gate {
    fn of(client: &Client) -> Arc<Self> {
        let gate = Arc::new(Self::default());
        let inner = Arc::clone(&gate);
        let served = &client.handle.served;
        served.at_sync(Box::new(move || inner.wait()));
        gate
    }

    fn wait(&self) {
        self.arrived.fetch_add(1, Ordering::SeqCst);
        let mut open = lock(&self.open);
        while !*open {
            open = self.opened.wait(open).unwrap();
        }
    }

    fn wait_for(&self, count: usize) {
        let end = Instant::now() + PATIENCE;
        while self.arrived.load(Ordering::SeqCst) < count {
            assert!(Instant::now() < end, "not all of {count} have come");
            std::thread::yield_now();
        }
    }

    fn open(&self) {
        *lock(&self.open) = true;
        self.opened.notify_all();
    }
}

fn returned(client: &mut Client, wanted: usize) {
    let end = Instant::now() + PATIENCE;
    let mut count = 0;
    while count < wanted {
        assert!(Instant::now() < end, "{count} of {wanted}");
        client.harness.step(1).unwrap();
        count += client.harness.queues[usize::from(REQUEST)].used().len();
    }
    assert_eq!(count, wanted);
}

fn fsync(client: &mut Client, node: u64, handle: u64) -> u64 {
    client.send(FSYNC, node, &[handle.to_le_bytes(), [0; 8]].concat())
}

#[test]
fn syncs_that_hang_hold_up_nothing_else_and_all_are_answered_at_last() {
    let share = share();
    let mut client = Client::with_helpers(share.path());
    let gate = Gate::of(&client);
    let file = client.lookup(ROOT, "file").unwrap().node;
    let handle = client.open(OPEN, file, libc::O_RDWR).unwrap();
    let syncs: Vec<u64> = (0..10).map(|_| fsync(&mut client, file, handle)).collect();
    client.harness.run();
    gate.wait_for(4);
    for round in 0..3 {
        assert_eq!(
            client.read(READ, file, handle, 0, 4096).unwrap(),
            b"content"
        );
        client.lookup(ROOT, "dir").unwrap();
        client.write(file, handle, b"CON").unwrap();
        client.create(ROOT, &format!("new-{round}"), 0o600).unwrap();
        fs::write(share.path().join("file"), "content").unwrap();
        // The mount is a slow one by then.
        std::thread::sleep(Duration::from_millis(60));
    }
    assert_eq!(
        gate.arrived.load(Ordering::SeqCst),
        4,
        "as many as a lane has"
    );
    for place in &syncs {
        assert_eq!(client.harness.read(*place, 4), [0; 4], "no answer yet");
    }
    gate.open();
    returned(&mut client, syncs.len());
    for place in syncs {
        assert_eq!(u32_at(&client.harness.read(place, HEADER), 0), 16);
        assert_eq!(u32_at(&client.harness.read(place, HEADER), 4), 0);
    }
}

#[test]
fn a_first_look_that_hangs_holds_up_nothing_else_where_it_was_to_be_expected() {
    let Some(share) = mounted_share() else { return };
    let mut client = Client::with_helpers(share.path());
    let gate = Arc::new(Gate::default());
    let inner = Arc::clone(&gate);
    let served = &client.handle.served;
    served.at_first_look(Box::new(move |path| {
        if path == Path::new("v") {
            inner.wait();
        }
    }));
    client.handle.expect_remote("v");
    let looks: Vec<u64> = (0..2).map(|_| client.send(LOOKUP, ROOT, b"v\0")).collect();
    client.harness.run();
    gate.wait_for(2);
    // Beside it, and in another mount that is looked at for the first time.
    assert_eq!(client.walk("c/rootfs/same").size, 8);
    // What was forgotten meanwhile is not known afterwards.
    let handle = client.handle.clone();
    let began = Instant::now();
    handle.forget("c");
    assert!(began.elapsed() < Duration::from_millis(900));
    assert_eq!(client.walk("c/rootfs/same").size, 8);
    for place in &looks {
        assert_eq!(client.harness.read(*place, 4), [0; 4], "no answer yet");
    }
    gate.open();
    returned(&mut client, looks.len());
    let nodes: Vec<u64> = looks
        .into_iter()
        .map(|place| {
            let reply = client.harness.read(place, HEADER + 128);
            assert_eq!(u32_at(&reply, 4), 0);
            Found::parse(&reply[HEADER..]).node
        })
        .collect();
    assert_eq!(nodes[0], nodes[1], "one mount, whoever came first");
    // All that is in it goes to helpers from now on, and the answers are right.
    assert!(client.handle.served.is_remote(nodes[0]));
    client.handle.forget("");
    assert!(!client.handle.served.is_remote(ROOT));
}

#[test]
fn a_mount_that_is_forgotten_while_it_is_first_looked_at_is_free_afterwards() {
    let Some(share) = mounted_share() else { return };
    let mut client = Client::with_helpers(share.path());
    let gate = Arc::new(Gate::default());
    let inner = Arc::clone(&gate);
    let served = &client.handle.served;
    served.at_first_look(Box::new(move |_| inner.wait()));
    client.handle.expect_remote("v");
    let look = client.send(LOOKUP, ROOT, b"v\0");
    client.harness.run();
    gate.wait_for(1);
    let handle = client.handle.clone();
    let opener = Arc::clone(&gate);
    let forgotten = std::thread::spawn(move || {
        let opened = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            opener.open();
        });
        handle.forget("v");
        opened.join().unwrap();
    });
    returned(&mut client, 1);
    forgotten.join().unwrap();
    let reply = client.harness.read(look, HEADER);
    assert_eq!(u32_at(&reply, 4).cast_signed(), -libc::ESTALE);
    unmount(&share.path().join("v"));
}

#[test]
fn a_reset_waits_for_what_is_done_and_forgets_what_is_not() {
    let share = share();
    let mut client = Client::with_helpers(share.path());
    let gate = Gate::of(&client);
    let file = client.lookup(ROOT, "file").unwrap().node;
    let handle = client.open(OPEN, file, libc::O_RDWR).unwrap();
    let syncs: Vec<u64> = (0..6).map(|_| fsync(&mut client, file, handle)).collect();
    client.harness.run();
    gate.wait_for(4);
    let opener = Arc::clone(&gate);
    let opened = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        opener.open();
    });
    client.harness.deactivate();
    opened.join().unwrap();
    let answered = |place: &&u64| client.harness.read(**place, 4) != [0; 4];
    assert_eq!(syncs.iter().filter(answered).count(), 4);
    assert_eq!(gate.arrived.load(Ordering::SeqCst), 4);
}

#[test]
fn a_driver_with_more_requests_than_descriptors_is_stopped() {
    let share = share();
    let mut client = Client::with_helpers(share.path());
    let gate = Gate::of(&client);
    let file = client.lookup(ROOT, "file").unwrap().node;
    let handle = client.open(OPEN, file, libc::O_RDWR).unwrap();
    fsync(&mut client, file, handle);
    let queue = &client.harness.queues[usize::from(REQUEST)];
    let (head, size) = (queue.last_head(), usize::from(queue.size()));
    // The same descriptors again and again.
    let stopped = (0..4 * size).any(|_| {
        client.harness.queues[usize::from(REQUEST)].make_available(head);
        client.harness.queues[usize::from(REQUEST)].kick();
        client.harness.step(1).is_err()
    });
    assert!(stopped);
    gate.open();
    client.harness.deactivate();
}

#[test]
fn a_request_that_is_rewritten_after_it_was_handed_over_is_the_one_that_is_done() {
    let share = share();
    let mut client = Client::with_helpers(share.path());
    let gate = Gate::of(&client);
    let file = client.lookup(ROOT, "file").unwrap().node;
    let handle = client.open(OPEN, file, libc::O_RDWR).unwrap();
    for _ in 0..4 {
        fsync(&mut client, file, handle);
    }
    client.harness.run();
    gate.wait_for(4);
    let last = fsync(&mut client, file, handle);
    client.harness.run();
    // It waits, and becomes a GETATTR.
    client.harness.write(last - 128 + 4, &GETATTR.to_le_bytes());
    gate.open();
    returned(&mut client, 5);
    let reply = client.harness.read(last, HEADER + 88);
    assert_eq!(u32_at(&reply, 0), 16 + 104);
}

/// All that a guest asks, done by helpers: as the device's thread does it.
#[test]
fn helpers_make_files_as_their_caller_and_with_his_umask() {
    let share = share();
    if !jailed_credentials() {
        return;
    }
    let mut client = Client::by_helpers(share.path());
    let own = Mode::from_bits_truncate(0o027);
    umask(own);
    for (number, ids) in [(1000, 1000), (0, 0), (1000, 2000), (3000, 2000)]
        .into_iter()
        .cycle()
        .take(40)
        .enumerate()
    {
        client.ids = ids;
        let mask = [0o022, 0o077, 0][number % 3];
        let name = format!("file-{number}");
        let made = client.make(CREATE, ROOT, &name, libc::S_IFREG | 0o666, mask);
        made.unwrap();
        let made = fs::symlink_metadata(share.path().join(&name)).unwrap();
        assert_eq!((made.uid(), made.gid()), ids, "{number}");
        assert_eq!(made.mode() & 0o777, 0o666 & !mask, "{number}");
    }
    assert_eq!(
        umask(own),
        own,
        "nobody has set that of the device's thread"
    );
}

#[test]
fn helpers_read_write_list_and_remove() {
    let share = share();
    let mut client = Client::by_helpers(share.path());
    let file = client.lookup(ROOT, "file").unwrap().node;
    let handle = client.open(OPEN, file, libc::O_RDWR).unwrap();
    assert_eq!(client.write(file, handle, b"CON").unwrap(), 3);
    assert_eq!(
        client.read(READ, file, handle, 0, 4096).unwrap(),
        b"CONtent"
    );
    assert_eq!(client.read(READ, file, handle, 7, 4096).unwrap(), b"");
    assert_eq!(client.list(ROOT).len(), 5);
    assert_eq!(client.lookup(ROOT, "absent").unwrap_err(), libc::ENOENT);
}

#[test]
fn a_read_is_whole_wherever_it_ends() {
    let share = share();
    let mut client = Client::with_helpers(share.path());
    for size in [0usize, 1, 4095, 4096, 4097, 8192, 12_288, 20_000] {
        let content: Vec<u8> = (0..size)
            .map(|at| u8::try_from(at % 251).unwrap())
            .collect();
        let name = format!("of-{size}");
        fs::write(share.path().join(&name), &content).unwrap();
        let node = client.lookup(ROOT, &name).unwrap().node;
        let handle = client.open(OPEN, node, libc::O_RDONLY).unwrap();
        for offset in [0usize, 1, 4096, 5000, 8192] {
            for length in [1u32, 4096, 8192, 32_768] {
                let read = client
                    .read(READ, node, handle, offset as u64, length)
                    .unwrap();
                let from = &content[offset.min(size)..];
                let expected = &from[..from.len().min(length as usize)];
                assert!(read == expected, "{size} {offset} {length}: {}", read.len());
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Whatever is asked for at once is answered, each to who asked, and done.
    #[test]
    fn no_answer_is_lost_or_mixed_up_among_helpers(
        remote in any::<bool>(),
        asked in prop::collection::vec((0u8..5, 0u8..8), 1..60),
    ) {
        let share = share();
        let mut client = Client::with_helpers(share.path());
        if remote {
            client.handle.served.pretend_remote(ROOT);
        }
        fs::write(share.path().join("bytes"), [0; 60]).unwrap();
        let file = client.lookup(ROOT, "bytes").unwrap().node;
        let handle = client.open(OPEN, file, libc::O_RDWR).unwrap();
        let mut model = [0u8; 60];
        let mut sent = Vec::new();
        for (at, (what, value)) in asked.into_iter().enumerate() {
            let contents = |size: u32| {
                let offset = u64::try_from(at).unwrap();
                let mut body = [handle.to_le_bytes(), offset.to_le_bytes()].concat();
                body.extend(size.to_le_bytes());
                body.extend([0; 20]);
                body
            };
            let (length, place) = match what {
                0 => (16, fsync(&mut client, file, handle)),
                1 => (16 + 128, client.send(LOOKUP, ROOT, b"bytes\0")),
                2 => {
                    model[at] = value;
                    (16 + 8, client.send(WRITE, file, &[contents(1), vec![value]].concat()))
                }
                3 => (16 + 1, client.send(READ, file, &contents(1))),
                _ => (16 + 104, client.send(GETATTR, file, &[0; 16])),
            };
            sent.push((client.unique, length, place));
        }
        returned(&mut client, sent.len());
        for (unique, length, place) in sent {
            let reply = client.harness.read(place, HEADER);
            prop_assert_eq!((u32_at(&reply, 0), u32_at(&reply, 4)), (length, 0));
            prop_assert_eq!(u64_at(&reply, 8), unique);
        }
        prop_assert_eq!(fs::read(share.path().join("bytes")).unwrap(), model);
    }
}

/// Whoever closes a file waits for it, also when requests have paused until a server has closed its own.
#[test]
fn a_file_that_a_helper_closes_is_told_of() {
    let share = share();
    let mut client = Client::with_helpers(share.path());
    let file = client.lookup(ROOT, "file").unwrap().node;
    let handle = client.open(OPEN, file, libc::O_RDONLY).unwrap();
    client.handle.served.pretend_remote(file);
    client.harness.device.catch_up().unwrap();
    let interrupts = client.harness.interrupts.of(REQUEST);
    client.send(
        RELEASE,
        file,
        &[handle.to_le_bytes().as_slice(), &[0; 16]].concat(),
    );
    client.harness.run();
    client.harness.device.catch_up().unwrap();
    returned(&mut client, 1);
    let end = Instant::now() + PATIENCE;
    while client.harness.interrupts.of(REQUEST) == interrupts {
        assert!(Instant::now() < end, "the guest is not told");
        std::thread::yield_now();
    }
}
