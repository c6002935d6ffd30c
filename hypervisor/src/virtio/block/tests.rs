//! The block device over files, through its queue.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::{Block, BlockError};
use crate::virtio::testing::{Harness, Part, any_descriptor};
use crate::virtio::{DeviceError, VirtioDevice};

mod helpers;
mod queues;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

struct Disk {
    harness: Harness<Block>,
    file: File,
    page: u64,
    data: u64,
}

/// A file of 256 sectors, each filled with its number.
fn sectors() -> File {
    let mut file = tempfile::tempfile().unwrap();
    let bytes: Vec<u8> = (0..=255u8).flat_map(|sector| [sector; 512]).collect();
    file.write_all(&bytes).unwrap();
    file
}

impl Disk {
    fn new(readonly: bool) -> Self {
        let file = sectors();
        let device =
            Block::new(file.try_clone().unwrap().into(), readonly, "disk-1", 512, 1).unwrap();
        Self::over(device, file)
    }

    fn over(device: Block, file: File) -> Self {
        let mut harness = Harness::new(device);
        let features = harness.device.features();
        harness.activate(features);
        let page = harness.alloc(0x1000);
        let data = harness.alloc(0x40000);
        Self {
            harness,
            file,
            page,
            data,
        }
    }

    /// Runs a request with these data parts; its status and the bytes written.
    fn request(&mut self, kind: u32, sector: u64, parts: &[Part]) -> (u8, u32) {
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        self.harness.write(self.page, &header);
        self.harness.write(self.page + 100, &[0xee]);
        let mut all = vec![(self.page, 16, false)];
        all.extend(parts);
        all.push((self.page + 100, 1, true));
        self.harness.queues[0].add(&all);
        self.harness.run();
        let used = self.harness.queues[0].used();
        assert_eq!(used.len(), 1);
        (self.harness.read(self.page + 100, 1)[0], used[0].1)
    }

    fn ranges(&mut self, kind: u32, ranges: &[(u64, u32, u32)]) -> u8 {
        let mut bytes = Vec::new();
        for (sector, count, flags) in ranges {
            bytes.extend(sector.to_le_bytes());
            bytes.extend(count.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
        }
        self.harness.write(self.data, &bytes);
        let length = u32::try_from(bytes.len()).unwrap();
        self.request(kind, 0, &[(self.data, length, false)]).0
    }

    fn sector(&mut self, sector: u64) -> Vec<u8> {
        let mut bytes = vec![0; 512];
        self.file.seek(SeekFrom::Start(sector * 512)).unwrap();
        self.file.read_exact(&mut bytes).unwrap();
        bytes
    }
}

#[test]
fn sectors_are_read_into_scattered_buffers() {
    let mut disk = Disk::new(false);
    let data = disk.data;
    let parts = [(data, 100, true), (data + 200, 924, true)];
    assert_eq!(disk.request(0, 7, &parts), (OK, 1025));
    assert_eq!(disk.harness.read(data, 100), [7; 100]);
    assert_eq!(disk.harness.read(data + 200, 412), [7; 412]);
    assert_eq!(disk.harness.read(data + 612, 512), [8; 512]);
    assert_eq!(disk.harness.read(data + 100, 100), [0; 100]);
}

#[test]
fn sectors_are_written_and_flushed() {
    let mut disk = Disk::new(false);
    let data = disk.data;
    disk.harness.write(data, &[0xaa; 1024]);
    assert_eq!(disk.request(1, 20, &[(data, 1024, false)]), (OK, 1));
    assert_eq!(disk.request(4, 0, &[]), (OK, 1));
    assert_eq!(disk.sector(19), [19; 512]);
    assert_eq!(disk.sector(20), [0xaa; 512]);
    assert_eq!(disk.sector(21), [0xaa; 512]);
    assert_eq!(disk.sector(22), [22; 512]);
}

#[test]
fn the_status_byte_may_share_a_buffer_with_data() {
    let mut disk = Disk::new(false);
    disk.harness.write(disk.page, &[0; 16]);
    let (page, data) = (disk.page, disk.data);
    disk.harness.queues[0].add(&[(page, 16, false), (data, 513, true)]);
    disk.harness.write(data + 512, &[9]);
    disk.harness.run();
    assert_eq!(disk.harness.queues[0].used()[0].1, 513);
    assert_eq!(disk.harness.read(data + 512, 1), [OK]);
}

#[test]
fn what_is_not_on_the_disk_is_an_error() {
    let mut disk = Disk::new(false);
    let data = disk.data;
    let part = |length, write| [(data, length, write)];
    assert_eq!(disk.request(0, 255, &part(512, true)).0, OK);
    for sector in [255, 256, u64::MAX, u64::MAX / 512, 1 << 55] {
        assert_eq!(disk.request(0, sector, &part(1024, true)).0, IOERR);
        assert_eq!(disk.request(1, sector, &part(1024, false)).0, IOERR);
    }
    assert_eq!(
        disk.request(0, 0, &part(511, true)).0,
        IOERR,
        "half a sector"
    );
    assert_eq!(disk.file.metadata().unwrap().len(), 256 * 512);
}

#[test]
fn a_file_that_has_become_shorter_is_an_error_of_io() {
    let mut disk = Disk::new(false);
    disk.file.set_len(600).unwrap();
    let data = disk.data;
    assert_eq!(disk.request(0, 0, &[(data, 512, true)]).0, OK);
    assert_eq!(disk.request(0, 1, &[(data, 512, true)]), (IOERR, 1));
}

#[test]
fn a_readonly_disk_refuses_every_change() {
    let mut disk = Disk::new(true);
    let data = disk.data;
    assert_eq!(disk.harness.device.features() & 1 << 5, 1 << 5);
    assert_eq!(disk.harness.device.features() & 3 << 13, 0);
    assert_eq!(disk.request(1, 0, &[(data, 512, false)]).0, IOERR);
    assert_eq!(disk.ranges(11, &[(0, 8, 0)]), IOERR);
    assert_eq!(disk.ranges(13, &[(0, 8, 0)]), IOERR);
    assert_eq!(disk.sector(0), [0; 512]);
    assert_eq!(disk.request(0, 1, &[(data, 512, true)]).0, OK);
    assert_eq!(disk.request(4, 0, &[]).0, OK);
}

#[test]
fn the_serial_number_is_told() {
    let mut disk = Disk::new(false);
    let data = disk.data;
    assert_eq!(disk.request(8, 0, &[(data, 20, true)]), (OK, 21));
    assert_eq!(
        disk.harness.read(data, 20),
        *b"disk-1\0\0\0\0\0\0\0\0\0\0\0\0\0\0"
    );
    assert_eq!(disk.request(8, 0, &[(data, 3, true)]), (OK, 4));
    let file = tempfile::tempfile().unwrap();
    file.set_len(512).unwrap();
    let long = "x".repeat(21);
    assert!(matches!(
        Block::new(file.into(), false, &long, 512, 1),
        Err(BlockError::Serial(21))
    ));
}

#[test]
fn ranges_are_zeroed_and_discarded() {
    let mut disk = Disk::new(false);
    let before = disk.file.metadata().unwrap().blocks();
    assert_eq!(disk.ranges(13, &[(8, 8, 0), (32, 8, 1)]), OK);
    for sector in [8, 15, 32, 39] {
        assert_eq!(disk.sector(sector), [0; 512]);
    }
    assert_eq!(disk.sector(7), [7; 512]);
    assert_eq!(disk.sector(16), [16; 512]);
    assert_eq!(disk.ranges(11, &[(64, 128, 0)]), OK);
    assert_eq!(disk.sector(64), [0; 512]);
    assert_eq!(disk.sector(192), [192; 512]);
    assert!(disk.file.metadata().unwrap().blocks() < before);
    assert_eq!(disk.file.metadata().unwrap().len(), 256 * 512);
}

#[test]
fn all_ranges_of_a_request_together_have_no_more_than_one_may_have() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(4 << 30).unwrap();
    let device = Block::new(file.try_clone().unwrap().into(), false, "disk-1", 512, 1).unwrap();
    let mut disk = Disk::over(device, file);
    let half = 1 << 20;
    for kind in [11, 13] {
        assert_eq!(disk.ranges(kind, &[(0, half, 0), (1 << 21, half, 0)]), OK);
        let more = [(0, half, 0), (1 << 21, half, 0), (1 << 22, 1, 0)];
        assert_eq!(disk.ranges(kind, &more), IOERR);
        // The same one often enough as well.
        assert_eq!(disk.ranges(kind, &[(0, half, 0); 32]), IOERR);
        assert_eq!(disk.ranges(kind, &[(0, u32::MAX, 0); 2]), IOERR);
    }
}

#[test]
fn bad_ranges_are_refused_as_a_whole() {
    let mut disk = Disk::new(false);
    assert_eq!(disk.ranges(13, &[(8, 8, 0), (250, 8, 0)]), IOERR);
    assert_eq!(disk.ranges(13, &[(u64::MAX, 2, 0)]), IOERR);
    assert_eq!(disk.ranges(11, &[(8, 8, 1)]), UNSUPP, "unmap in a discard");
    assert_eq!(disk.ranges(13, &[(8, 8, 2)]), UNSUPP, "an unknown flag");
    assert_eq!(disk.ranges(13, &[(0, 1, 0); 33]), IOERR, "too many");
    let data = disk.data;
    assert_eq!(disk.request(13, 0, &[(data, 15, false)]).0, IOERR);
    assert_eq!(disk.request(13, 0, &[]).0, IOERR);
    assert_eq!(disk.sector(8), [8; 512]);
}

#[test]
fn unknown_requests_are_unsupported() {
    let mut disk = Disk::new(false);
    for kind in [2, 3, 5, 10, 12, 14, u32::MAX] {
        assert_eq!(disk.request(kind, 0, &[]).0, UNSUPP);
    }
}

#[test]
fn data_in_the_wrong_direction_is_not_touched() {
    let mut disk = Disk::new(false);
    let data = disk.data;
    disk.harness.write(data, &[0x55; 512]);
    assert_eq!(
        disk.request(0, 3, &[(data, 512, false)]),
        (OK, 1),
        "reads nothing"
    );
    assert_eq!(disk.harness.read(data, 512), [0x55; 512]);
    assert_eq!(
        disk.request(1, 3, &[(data, 512, true)]),
        (OK, 1),
        "writes nothing"
    );
    assert_eq!(disk.sector(3), [3; 512]);
}

#[test]
fn a_short_header_is_an_error_and_no_status_stops_the_device() {
    let mut disk = Disk::new(false);
    let page = disk.page;
    disk.harness.queues[0].add(&[(page, 15, false), (page + 100, 1, true)]);
    disk.harness.run();
    assert_eq!(disk.harness.read(page + 100, 1), [IOERR]);
    disk.harness.queues[0].add(&[(page, 16, false)]);
    assert!(matches!(
        disk.harness.try_run(),
        Err(DeviceError::Guest { .. })
    ));
}

#[test]
fn more_requests_than_one_event_serves_are_all_served() {
    let mut disk = Disk::new(false);
    let (page, data) = (disk.page, disk.data);
    disk.harness.write(page, &[0; 16]);
    for _ in 0..80 {
        disk.harness.queues[0].add(&[(page, 16, false), (data, 512, true), (page + 100, 1, true)]);
    }
    disk.harness.run();
    assert_eq!(disk.harness.queues[0].used().len(), 80);
}

#[test]
fn the_configuration_is_laid_out_as_specified() {
    let disk = Disk::new(false);
    let mut config = [0xff; 64];
    disk.harness.device.config().read(0, &mut config);
    let word = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
    assert_eq!(config[..8], 256u64.to_le_bytes());
    assert_eq!(word(12), 254, "seg_max");
    assert_eq!(word(20), 512, "blk_size");
    assert_eq!(word(36), 1 << 21, "max_discard_sectors");
    assert_eq!(word(40), 32, "max_discard_seg");
    assert_eq!(word(44), 8, "discard_sector_alignment");
    assert_eq!(word(48), 1 << 21, "max_write_zeroes_sectors");
    assert_eq!(word(52), 32, "max_write_zeroes_seg");
    assert_eq!(config[56], 1, "write_zeroes_may_unmap");
}

#[test]
fn a_file_without_a_sector_is_refused() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(511).unwrap();
    assert!(matches!(
        Block::new(file.into(), false, "", 512, 1),
        Err(BlockError::Empty)
    ));
    let (reader, _writer) = nix::unistd::pipe().unwrap();
    assert!(matches!(
        Block::new(reader, false, "", 512, 1),
        Err(BlockError::Size(_))
    ));
}

#[test]
fn another_size_is_told_and_counts() {
    let mut disk = Disk::new(false);
    let data = disk.data;
    assert_eq!(disk.request(0, 256, &[(data, 512, true)]).0, IOERR);
    let config = disk.harness.device.config();
    let capacity = || {
        let mut bytes = [0; 8];
        config.read(0, &mut bytes);
        u64::from_le_bytes(bytes)
    };
    disk.harness.device.refresh().unwrap();
    assert_eq!(
        (config.generation(), disk.harness.interrupts.changes()),
        (0, 0)
    );
    disk.file.set_len(300 * 512).unwrap();
    disk.harness.device.refresh().unwrap();
    assert_eq!(capacity(), 300);
    assert_eq!(
        (config.generation(), disk.harness.interrupts.changes()),
        (1, 1)
    );
    assert_eq!(disk.request(0, 299, &[(data, 512, true)]).0, OK);
    disk.file.set_len(100).unwrap();
    disk.harness.device.refresh().unwrap();
    assert_eq!(capacity(), 0);
    assert_eq!(disk.request(0, 0, &[(data, 512, true)]).0, IOERR);
}

#[test]
fn a_block_has_the_size_that_was_asked_for() {
    let file = || {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        file.into()
    };
    let device = Block::new(file(), false, "", 4096, 1).unwrap();
    let mut size = [0; 4];
    device.config().read(20, &mut size);
    assert_eq!(u32::from_le_bytes(size), 4096);
    for wrong in [0, 511, 256, 8192] {
        assert!(matches!(
            Block::new(file(), false, "", wrong, 1),
            Err(BlockError::Blocks(_))
        ));
    }
}

/// A disk of 256 sectors with helpers, a flush of which waits at the gate if there is one.
fn helped(gate: Option<&Arc<Barrier>>) -> Disk {
    let file = sectors();
    let mut device = Block::new(file.try_clone().unwrap().into(), false, "helped", 512, 1).unwrap();
    if let Some(gate) = gate {
        device = device.gated(Arc::clone(gate));
    }
    Disk::over(device.with_helpers(), file)
}

impl Disk {
    /// Somebody finds that the driver has broken the rules, and the worker is told.
    fn is_stopped(&mut self) {
        let end = Instant::now() + Duration::from_secs(20);
        let error = loop {
            assert!(Instant::now() < end, "nobody told");
            if let Err(error) = self.harness.step(5) {
                break error;
            }
        };
        assert!(matches!(error, DeviceError::Guest { .. }));
    }

    /// Adds a request with its own header and status, at most 60 of them; returns where its status is.
    fn add(&mut self, number: u64, kind: u32, sector: u64, parts: &[Part]) -> u64 {
        self.add_to(0, number, kind, sector, parts)
    }

    fn add_to(&mut self, queue: usize, number: u64, kind: u32, sector: u64, parts: &[Part]) -> u64 {
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        let at = self.page + number * 64;
        self.harness.write(at, &header);
        self.harness.write(at + 32, &[0xee]);
        let mut all = vec![(at, 16, false)];
        all.extend(parts);
        all.push((at + 32, 1, true));
        self.harness.queues[queue].add(&all);
        at + 32
    }

    /// Serves until so many requests were returned; false when they are not in time.
    fn returned(&mut self, wanted: usize) -> bool {
        let end = Instant::now() + Duration::from_secs(20);
        let mut returned = 0;
        while Instant::now() < end {
            self.harness.step(5).unwrap();
            let queues = self.harness.queues.iter_mut();
            returned += queues.map(|queue| queue.used().len()).sum::<usize>();
            if returned == wanted {
                return true;
            }
        }
        false
    }
}

/// A file of so many bytes, each telling the file and its place.
fn piece(number: u8, size: usize) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&content(number, size)).unwrap();
    file
}

fn content(number: u8, size: usize) -> Vec<u8> {
    let byte = |at: usize| u8::try_from(at % 251).unwrap().wrapping_add(number);
    (0..size).map(byte).collect()
}

#[test]
fn pieces_must_have_the_lengths_that_they_are_said_to_have() {
    let of = |length| Block::of_pieces(vec![(piece(1, 5000).into(), length)], "", 1);
    assert!(of(8192).is_ok());
    for wrong in [0, 4096, 5000, 12288, u64::MAX, u64::MAX - 4095] {
        assert!(matches!(of(wrong), Err(BlockError::Pieces(_))), "{wrong}");
    }
    assert!(matches!(
        Block::of_pieces(Vec::new(), "", 1),
        Err(BlockError::Pieces(_))
    ));
}

/// Requests for one of the queues: read, write or flush, and the sector; and whether the device is reset after them.
type Round = (Vec<(usize, u32, u64)>, bool);

/// Asks for all of a round at once: all of it is done once, what is read is right, and each sector has what was written to
/// it last.
fn check_rounds(disk: &mut Disk, rounds: Vec<Round>) -> Result<(), TestCaseError> {
    let features = disk.harness.device.features();
    let mut model: Vec<u8> = (0..=255).collect();
    for (round, (requests, reset)) in (1u8..).zip(rounds) {
        let mut seen = std::collections::BTreeSet::new();
        let mut added = Vec::new();
        for (number, (queue, kind, sector)) in (0u64..).zip(requests) {
            // Two of one round for a sector have no order.
            if !seen.insert(sector) {
                continue;
            }
            let at = disk.data + number * 512;
            let byte = u8::try_from(sector)
                .unwrap()
                .wrapping_mul(3)
                .wrapping_add(round);
            disk.harness.write(at, &[byte; 512]);
            let status = match kind {
                0 => disk.add_to(queue, number, 0, sector, &[(at, 512, true)]),
                1 => disk.add_to(queue, number, 1, sector, &[(at, 512, false)]),
                _ => disk.add_to(queue, number, 4, 0, &[]),
            };
            if kind == 1 {
                model[usize::try_from(sector).unwrap()] = byte;
            }
            added.push((kind, sector, at, status));
        }
        prop_assert!(disk.returned(added.len()));
        for (kind, sector, at, status) in added {
            prop_assert_eq!(disk.harness.read(status, 1), [OK]);
            if kind == 0 {
                let wanted = [model[usize::try_from(sector).unwrap()]; 512];
                prop_assert_eq!(disk.harness.read(at, 512), wanted);
            }
        }
        if reset {
            disk.harness.deactivate();
            disk.harness.activate(features);
        }
    }
    for (sector, byte) in (0u64..).zip(&model) {
        prop_assert_eq!(disk.sector(sector), [*byte; 512]);
    }
    Ok(())
}

proptest! {
    /// Whatever is asked for at once, all of it is done, and each sector has what was written to it.
    #[test]
    fn nothing_is_lost_or_mixed_up_among_helpers(
        rounds in prop::collection::vec(prop::collection::vec((0u32..3, 0u64..60), 1..50), 1..6),
    ) {
        let by_the_queue = |requests: Vec<(u32, u64)>| {
            let requests = requests.into_iter().map(|(kind, sector)| (0, kind, sector));
            (requests.collect(), false)
        };
        check_rounds(&mut helped(None), rounds.into_iter().map(by_the_queue).collect())?;
    }

    /// A disk of pieces reads as the files one behind the other, each filled up with zeros, and changes none.
    #[test]
    fn pieces_read_as_one_disk(
        sizes in prop::collection::vec(1usize..20_000, 1..6),
        reads in prop::collection::vec((0u64..200, 1u32..60), 1..8),
    ) {
        let mut model = Vec::new();
        let mut files = Vec::new();
        for (number, size) in (0u8..).zip(&sizes) {
            model.extend(content(number, *size));
            model.resize(model.len().next_multiple_of(4096), 0);
            let length = u64::try_from(size.next_multiple_of(4096)).unwrap();
            files.push((OwnedFd::from(piece(number, *size)), length));
        }
        let device = Block::of_pieces(files, "layers", 1).unwrap();
        let mut disk = Disk::over(device, tempfile::tempfile().unwrap());
        let data = disk.data;
        for (sector, count) in reads {
            disk.harness.write(data, &vec![0xee; 60 * 512]);
            let (status, _) = disk.request(0, sector, &[(data, 512, true), (data + 512, (count - 1) * 512, true)][..if count > 1 { 2 } else { 1 }]);
            let range = usize::try_from(sector * 512).unwrap()..usize::try_from((sector + u64::from(count)) * 512).unwrap();
            match model.get(range) {
                Some(wanted) => {
                    prop_assert_eq!(status, OK);
                    prop_assert_eq!(disk.harness.read(data, wanted.len()), wanted);
                }
                None => prop_assert_eq!(status, IOERR),
            }
        }
        prop_assert_eq!(disk.request(1, 0, &[(data, 512, false)]).0, IOERR);
        prop_assert_eq!(disk.ranges(11, &[(0, 8, 0)]), IOERR);
    }

    /// No request changes anything beyond the sectors it names or the size of the file.
    #[test]
    fn requests_stay_on_the_disk(
        kind in prop_oneof![Just(0u32), Just(1), Just(4), Just(8), Just(11), Just(13), any::<u32>()],
        sector in prop_oneof![0u64..300, any::<u64>()],
        length in prop_oneof![(0u32..20).prop_map(|n| n * 512), 0u32..9000],
        write in any::<bool>(),
    ) {
        let mut disk = Disk::new(false);
        let data = disk.data;
        let bytes: Vec<u8> = (0..9000u32).map(|i| (i % 7).to_le_bytes()[0]).collect();
        disk.harness.write(data, &bytes);
        disk.request(kind, sector, &[(data, length, write)]);
        prop_assert_eq!(disk.file.metadata().unwrap().len(), 256 * 512);
        let touched = |at: u64| kind == 1 && at >= sector && at - sector < u64::from(length / 512);
        if kind <= 10 {
            for at in 0..256u64 {
                if !touched(at) {
                    let expected = [u8::try_from(at).unwrap(); 512];
                    prop_assert_eq!(disk.sector(at), expected);
                }
            }
        }
    }

    #[test]
    fn any_descriptors_are_survived(
        table in prop::collection::vec(any_descriptor(20), 1..8),
        heads in prop::collection::vec(0u16..20, 1..6),
    ) {
        let mut disk = Disk::new(false);
        disk.harness.raw_chains(0, &table, &heads);
        let _ = disk.harness.try_run();
        prop_assert_eq!(disk.file.metadata().unwrap().len(), 256 * 512);
    }
}
