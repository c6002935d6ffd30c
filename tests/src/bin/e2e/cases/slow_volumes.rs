//! Volumes that hang: one whose file system waits for a server, and one whose disk answers nothing. They hold up who asks
//! them, and nobody else in the pod.

use std::fs::{self, File};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use brig_tests::node::check::{contains, equal, that};
use brig_tests::node::ctr::{Container, Run};
use brig_tests::node::hanging::{CONTENT, Hanging, file};
use brig_tests::node::process::Running;
use nix::mount::{MntFlags, umount2};

use super::root_disks::run;
use super::root_snapshotters::BUSYBOX;
use crate::suite::{Case, Suite, brig, patience};

pub const CASES: &[Case] = &[
    brig(
        "files",
        "a volume whose server has gone holds up no other volume, nor the image's own files",
        server,
    ),
    brig(
        "files",
        "a file that its server is slow to close is closed then, though nobody asks for anything else",
        closes,
    ),
    brig(
        "files",
        "a volume whose disk answers nothing holds up no other volume, nor the image's own files",
        disk,
    ),
];

const DIRECTORY: &str = "/var/lib/brig-e2e-slow";
/// More than one volume has helpers.
const READERS: usize = 6;

struct Directory;

impl Directory {
    fn new() -> Result<Self> {
        let _ = fs::remove_dir_all(DIRECTORY);
        fs::create_dir_all(format!("{DIRECTORY}/fast"))?;
        fs::write(format!("{DIRECTORY}/fast/file"), "fast\n")?;
        Ok(Self)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(DIRECTORY);
    }
}

/// A container with both volumes.
fn sleeper(suite: &Suite) -> Result<Container> {
    suite.import(BUSYBOX, "/host/assets/images/busybox.tar")?;
    let run = Run::new("slow", BUSYBOX, &["sleep", "100000"])
        .with("--mount", &volume("slow"))
        .with("--mount", &volume("fast"));
    suite.ctr.start(&run)
}

fn volume(name: &str) -> String {
    format!("type=bind,src={DIRECTORY}/{name},dst=/{name},options=rbind:rw")
}

/// What has to work while the other volume hangs: metadata, reads, writes that are synced, new files and their removal.
const WORK: &str = "ls -l / /fast /etc > /dev/null && cat /fast/file && echo new > /fast/new && sync /fast/new && \
                    rm /fast/new && echo own > /own && sync /own && cat /own && rm /own";

fn server(suite: &mut Suite) -> Result<()> {
    let _directory = Directory::new()?;
    let hanging = Hanging::mount(&Path::new(DIRECTORY).join("slow"))?;
    let container = sleeper(suite)?;
    let mut readers = Vec::new();
    let hung = while_it_hangs(&container, &hanging, &mut readers);
    // Whoever waits for it cannot be ended before.
    hanging.let_go();
    hung?;
    for reader in readers {
        let read = reader.finish(patience())?.success()?;
        equal("at last", CONTENT, read.text().as_str())?;
    }
    drop(container);
    Ok(())
}

fn closes(suite: &mut Suite) -> Result<()> {
    let _directory = Directory::new()?;
    let slow = Hanging::mount(&Path::new(DIRECTORY).join("slow"))?;
    slow.let_go();
    let container = sleeper(suite)?;
    // Longer than the file server's thread takes for what is put off.
    slow.close_in(Duration::from_millis(200));
    let script = format!(
        "for n in 1 2 3 4 5; do : < /slow/{}; done; echo closed",
        file(0)
    );
    let done = container.exec(&["sh", "-c", &script])?.success()?;
    equal("the shell goes on", "closed\n", done.text().as_str())?;
    drop(container);
    Ok(())
}

fn while_it_hangs(
    container: &Container,
    hanging: &Hanging,
    readers: &mut Vec<Running>,
) -> Result<()> {
    for number in 0..READERS {
        let path = format!("/slow/{}", file(number));
        readers.push(container.spawn(&format!("reader{number}"), &["cat", &path])?);
        // The node is asked by four of them, the others wait for these.
        hanging.wait_for((number + 1).min(4), patience())?;
    }
    let done = container.exec(&["sh", "-c", WORK])?.success()?;
    equal("while it hangs", "fast\nown\n", done.text().as_str())?;
    // Who waits has not been served meanwhile, so nothing waited for it.
    equal("reads that wait", 4, hanging.held())
}

/// An ext4 file system on a device-mapper device over a file.
struct Suspended;

const DEVICE: &str = "brig-e2e-slow";

impl Suspended {
    fn mount() -> Result<Self> {
        let image = format!("{DIRECTORY}/image");
        File::create(&image)?.set_len(32 << 20)?;
        run("mkfs.ext4", &["-q", "-F", &image])?;
        let attached = run("losetup", &["--find", "--show", &image])?;
        let suspended = Self;
        let table = format!("0 {} linear {} 0", (32 << 20) / 512, attached.trim());
        run("dmsetup", &["create", DEVICE, "--table", &table])?;
        fs::create_dir_all(format!("{DIRECTORY}/slow"))?;
        let place = format!("{DIRECTORY}/slow");
        run("mount", &[&format!("/dev/mapper/{DEVICE}"), &place])?;
        fs::write(format!("{place}/content"), CONTENT.repeat(1 << 17))?;
        run("sync", &["-f", &place])?;
        Ok(suspended)
    }

    fn resume() {
        let _ = run("dmsetup", &["resume", DEVICE]);
    }
}

impl Drop for Suspended {
    fn drop(&mut self) {
        Self::resume();
        let _ = umount2(format!("{DIRECTORY}/slow").as_str(), MntFlags::empty());
        let _ = run("dmsetup", &["remove", "--retry", DEVICE]);
        let image = format!("{DIRECTORY}/image");
        let flags = ["--noheadings", "--output", "NAME", "--associated", &image];
        if let Ok(device) = run("losetup", &flags) {
            let _ = run("losetup", &["--detach", device.trim()]);
        }
    }
}

fn disk(suite: &mut Suite) -> Result<()> {
    let _directory = Directory::new()?;
    run("modprobe", &["dm_mod"])?;
    let _suspended = Suspended::mount()?;
    let container = sleeper(suite)?;
    let path = "/slow/content".to_owned();
    // What the node knows of the file, and nothing of its content.
    container.exec(&["ls", "-l", "/slow"])?.success()?;
    fs::write("/proc/sys/vm/drop_caches", "1")?;
    run("dmsetup", &["suspend", "--noflush", "--nolockfs", DEVICE])?;
    let reader = container.spawn("reader", &["cat", &path])?;
    let vmm = super::devices::vmm_of(suite, &container.id)?;
    let mut writer = None;
    let hung = a_helper_waits(vmm).and_then(|()| {
        let script = "echo more > /slow/more; sync /slow/more; echo synced";
        writer = Some(container.spawn("writer", &["sh", "-c", script])?);
        beside_the_disk(&container)
    });
    // Whoever waits for it cannot be ended before.
    Suspended::resume();
    hung?;
    let read = reader.finish(patience())?.success()?;
    that("all of it, at last", read.text() == CONTENT.repeat(1 << 17))?;
    let wrote = writer.context("no writer")?.finish(patience())?.success()?;
    contains("at last", "synced", &wrote.text())?;
    drop(container);
    Ok(())
}

/// Waits until a helper of the file server waits for the disk, longer than others are to wait for it.
fn a_helper_waits(vmm: i32) -> Result<()> {
    let end = Instant::now() + patience();
    loop {
        for task in fs::read_dir(format!("/proc/{vmm}/task"))?.flatten() {
            let status = fs::read_to_string(task.path().join("status")).unwrap_or_default();
            if status.contains("fs-io") && status.contains("disk sleep") {
                std::thread::sleep(Duration::from_millis(200));
                return Ok(());
            }
        }
        ensure!(Instant::now() < end, "no helper waits for the disk");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn beside_the_disk(container: &Container) -> Result<()> {
    for _ in 0..3 {
        let done = container.exec(&["sh", "-c", WORK])?.success()?;
        equal("while it hangs", "fast\nown\n", done.text().as_str())?;
    }
    contains("the disk", "SUSPENDED", &run("dmsetup", &["info", DEVICE])?)
}
