//! A database of nothing but commits, which checks itself: what it has said to be committed must be there, whatever
//! happened since.
//!
//! A commit is a page, a record in a log that names the page's checksum, each synced, and now and then a file that is
//! renamed into place, with its directory synced.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};

const PAGE: usize = 4096;
const RECORD: usize = 24;
/// A file comes with each commit of this many.
const FILES: u64 = 10;

/// FNV-1a: tells a torn page from a whole one.
fn checksum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum, byte| {
        (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

fn page(number: u64) -> Vec<u8> {
    (0..PAGE as u64 / 8)
        .flat_map(|word| (number.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ word).to_le_bytes())
        .collect()
}

fn record(number: u64) -> [u8; RECORD] {
    let mut record = [0; RECORD];
    record[..8].copy_from_slice(&number.to_le_bytes());
    record[8..16].copy_from_slice(&checksum(&page(number)).to_le_bytes());
    let sum = checksum(&record[..16]);
    record[16..].copy_from_slice(&sum.to_le_bytes());
    record
}

/// How many commits there are. Those up to `said` must be there and whole; what is behind may be the beginning of one.
pub fn check(directory: &str, said: u64) -> Result<u64> {
    let directory = Path::new(directory);
    let mut log = Vec::new();
    if let Ok(mut file) = File::open(directory.join("log")) {
        file.read_to_end(&mut log)?;
    }
    let mut count = 0;
    for found in log.chunks_exact(RECORD) {
        if found != record(count + 1) {
            break;
        }
        count += 1;
    }
    ensure!(count >= said, "{count} of {said} commits are in the log");
    let pages = File::open(directory.join("pages"));
    for number in 1..=count {
        let mut found = vec![0; PAGE];
        let pages = pages.as_ref().ok().context("there are no pages")?;
        let at = number * PAGE as u64;
        let read = pages.read_exact_at(&mut found, at);
        ensure!(
            read.is_ok() && found == page(number),
            "the page of commit {number} is not what was written"
        );
        if number % FILES == 0 && number <= said {
            let name = format!("file-{number}");
            let text = fs::read_to_string(directory.join(&name)).context(name)?;
            ensure!(
                text == number.to_string(),
                "commit {number} has the file {text:?}"
            );
        }
    }
    Ok(count)
}

/// Commits, one number a line for each that is done, until it is killed.
pub fn run(directory: &str) -> Result<u8> {
    fs::create_dir_all(directory)?;
    let mut number = check(directory, 0)?;
    let directory = Path::new(directory);
    let open = |name: &str| {
        let mut options = OpenOptions::new();
        let path = directory.join(name);
        options.create(true).truncate(false).write(true).open(path)
    };
    let (pages, log) = (open("pages")?, open("log")?);
    File::open(directory)?.sync_all()?;
    let parent = directory.parent().context("no parent")?;
    File::open(parent)?.sync_all()?;
    // The last one may be in the log and not yet done.
    put_file(directory, number)?;
    loop {
        number += 1;
        pages.write_all_at(&page(number), number * PAGE as u64)?;
        pages.sync_data()?;
        log.write_all_at(&record(number), (number - 1) * RECORD as u64)?;
        log.sync_data()?;
        put_file(directory, number)?;
        println!("{number}");
    }
}

/// The file of a commit, if it has one.
fn put_file(directory: &Path, number: u64) -> Result<()> {
    if number == 0 || !number.is_multiple_of(FILES) {
        return Ok(());
    }
    let fresh = directory.join("fresh");
    let mut file = File::create(&fresh)?;
    file.write_all(number.to_string().as_bytes())?;
    file.sync_all()?;
    fs::rename(&fresh, directory.join(format!("file-{number}")))?;
    Ok(File::open(directory)?.sync_all()?)
}
