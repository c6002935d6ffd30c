//! What the server keeps of files that the guest has made, deleted and forgotten.

use super::*;

const MKNOD: u32 = 8;
const UNLINK: u32 = 10;
/// How many files the child churns through.
const FILES: &str = "BRIG_CHURN_FILES";

/// Bytes on the heap of this process.
fn heap() -> usize {
    // SAFETY: takes nothing and returns numbers.
    unsafe { libc::mallinfo2() }.uordblks
}

/// Makes and deletes so many files, each with an inode number of its own, and forgets them if told to; returns by
/// how much the heap grew.
fn churn(client: &mut Client, parent: u64, files: usize, forget: bool) -> usize {
    let one = |client: &mut Client, number: usize| {
        let name = format!("f{number}\0");
        let mut body = (libc::S_IFREG | 0o600).to_le_bytes().to_vec();
        body.extend([0; 12]);
        body.extend(name.as_bytes());
        let found = Found::parse(&client.call(MKNOD, parent, &body).unwrap());
        client.call(UNLINK, parent, name.as_bytes()).unwrap();
        if forget {
            let header = client.header(48, FORGET, found.node);
            let request = [header, 1u64.to_le_bytes().to_vec()].concat();
            assert_eq!(client.raw(&request, 0), 0);
        }
    };
    // What is made once and kept is no growth.
    (0..100).for_each(|number| one(client, number));
    let before = heap();
    (0..files).for_each(|number| one(client, number));
    heap().saturating_sub(before)
}

/// Alone in a process, because the heap is the process's. `BRIG_CHURN_FILES=1000000 cargo test --release
/// -p brig-hypervisor --lib churn_alone -- --ignored --nocapture` prints the figures.
#[test]
#[ignore = "run by forgotten_files_cost_nothing"]
fn churn_alone() {
    let files: usize = std::env::var(FILES).unwrap().parse().unwrap();
    let share = mounted_share().unwrap();
    // A mount below it: once a reason to remember every file there ever was.
    let below = share.path().join("v/below");
    fs::create_dir(&below).unwrap();
    mount_tmpfs(&below);
    let mut client = Client::new(share.path());
    for path in ["c/rootfs", "v"] {
        let parent = client.walk(path).node;
        println!("{path}: {} bytes", churn(&mut client, parent, files, true));
    }
    let kept = files.min(300);
    let parent = client.walk("v").node;
    println!("kept: {} bytes", churn(&mut client, parent, kept, false));
    client.handle.forget("");
}

#[test]
fn forgotten_files_cost_nothing() {
    if !brig_fixtures::needs::root() {
        return;
    }
    let child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["virtio::fs::tests::churn::churn_alone", "--exact"])
        .args(["--ignored", "--nocapture"])
        .env(FILES, "20000")
        .output()
        .unwrap();
    let output = String::from_utf8_lossy(&child.stdout);
    let grown = |what: &str| -> usize {
        let line = output.lines().find_map(|line| line.strip_prefix(what));
        let bytes = line.and_then(|line| line.split_ascii_whitespace().next());
        bytes.unwrap_or_else(|| panic!("{output}")).parse().unwrap()
    };
    for path in ["c/rootfs: ", "v: "] {
        assert!(grown(path) < 20_000, "{output}");
    }
    assert!(grown("kept: ") > 10_000, "the measure works: {output}");
}
