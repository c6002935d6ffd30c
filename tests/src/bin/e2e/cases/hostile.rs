//! A pod that attacks: from a container, and with a kernel of its own that drives the devices raw.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use brig_hypervisor::control::{Event, exit};
use brig_hypervisor::launch::VmmExit;
use brig_tests::cpio;
use brig_tests::node::check::{equal, that};
use brig_tests::node::machine::{Boot, Machine, Next};
use brig_tests::node::{clock, memory, tap};
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};

use crate::suite::{Case, PROBE, Suite, brig};

/// A VMM that dies of every attack would boot this often.
const MAX_BOOTS: usize = 40;

pub const CASES: &[Case] = &[
    brig(
        "hostile",
        "a container reaches neither the host nor the agent over vsock",
        vsock,
    ),
    brig(
        "hostile",
        "a guest that drives the devices raw ends at most itself",
        devices,
    ),
];

fn vsock(suite: &mut Suite) -> Result<()> {
    // The host's agent port, other host ports, the agent's stream port by every name, and a stranger.
    let targets = [
        "2:1024",
        "2:1025",
        "2:1",
        "3:1025",
        "3:1024",
        "1:1025",
        "1:1024",
        "0:1025",
        "77:1024",
        "4294967295:1025",
    ];
    let mut args = vec!["vsock-dial"];
    args.extend_from_slice(&targets);
    let shared = suite.shared()?;
    let outcomes = shared.probe(&args)?;
    for target in targets {
        let outcome = outcomes[target].as_str().context("no outcome")?;
        that(
            &format!("a dial to {target} fails, not: {outcome}"),
            outcome != "connected",
        )?;
    }
    // The pod is none the worse.
    let outcome = shared.exec(&[PROBE, "exit", "0"])?;
    that("an exec still works", outcome.code == 0)
}

/// What must not grow in a VMM, whatever its guest does.
#[derive(Debug, Clone, Copy)]
struct Held {
    descriptors: usize,
    /// But for helpers.
    threads: usize,
    /// Threads for what takes long, which end when they have had nothing for a while.
    helpers: usize,
    /// Without guest RAM, in KiB.
    memory: u64,
    /// Bytes of its log.
    log: u64,
}

/// What heaps and page tables may take beyond what an honest guest needs, in KiB.
const MEMORY_SLACK: u64 = 8 << 10;
/// Of two disks and the share.
const MOST_HELPERS: usize = 2 * 4 + 48;
/// What one group of attacks may write to the log, in bytes.
const LOG_SLACK: u64 = 128 << 10;

impl Held {
    fn of(machine: &Machine, boot: &Boot) -> Result<Self> {
        let pid = i32::try_from(machine.pid())?;
        let count = |what: &str| -> Result<usize> {
            Ok(fs::read_dir(format!("/proc/{pid}/{what}"))?.count())
        };
        let tasks = fs::read_dir(format!("/proc/{pid}/task"))?.flatten();
        let names = tasks.map(|task| fs::read_to_string(task.path().join("comm")));
        let names: Vec<String> = names.filter_map(Result::ok).collect();
        let helpers = names.iter().filter(|name| name.trim().ends_with("-io"));
        let helpers = helpers.count();
        Ok(Self {
            descriptors: count("fd")?,
            threads: names.len() - helpers,
            helpers,
            memory: memory::of(pid, boot.memory >> 10)?.own(),
            log: fs::metadata(&boot.log)?.len(),
        })
    }

    /// `honest` was before any attack, `before` before this one.
    fn bounded(&self, honest: &Self, before: &Self) -> Result<()> {
        that(
            &format!(
                "descriptors stay {}, not {}",
                honest.descriptors, self.descriptors
            ),
            self.descriptors <= honest.descriptors,
        )?;
        that(
            &format!("threads stay {}, not {}", honest.threads, self.threads),
            self.threads <= honest.threads,
        )?;
        that(
            &format!("helpers are at most {MOST_HELPERS}, not {}", self.helpers),
            self.helpers <= MOST_HELPERS,
        )?;
        that(
            &format!(
                "own memory stays near {} KiB, not {}",
                honest.memory, self.memory
            ),
            self.memory <= honest.memory + MEMORY_SLACK,
        )?;
        that(
            &format!(
                "the log grows by at most {LOG_SLACK} bytes, not {}",
                self.log - before.log
            ),
            self.log <= before.log + LOG_SLACK,
        )
    }
}

/// What the guest may use, and what lies beside it.
struct Grounds {
    directory: PathBuf,
    disk: Vec<u8>,
}

/// What nobody may read; the guest knows it too.
const SECRET: &str = "beside-the-share-b1gf00t";
/// More than the VMM may have descriptors.
const MANY: usize = 3000;

impl Grounds {
    fn new(directory: &Path) -> Result<Self> {
        let _ = fs::remove_dir_all(directory);
        let (served, outside) = (directory.join("served"), directory.join("outside"));
        for made in ["dir", "many", "swap"] {
            fs::create_dir_all(served.join(made))?;
        }
        fs::create_dir_all(&outside)?;
        fs::write(outside.join("secret"), SECRET)?;
        fs::write(served.join("canary"), "still served")?;
        fs::write(served.join("file"), [b'x'; 5000])?;
        fs::write(served.join("dir/inner"), "inner")?;
        fs::write(served.join("swap/secret"), "harmless")?;
        for (link, target) in [
            ("link-to-dir", "../outside"),
            ("link-to-file", "../outside/secret"),
            ("link-to-root", "/"),
            ("link-to-proc", "/proc"),
            ("swap-link", "../outside"),
        ] {
            symlink(target, served.join(link))?;
        }
        for number in 0..MANY {
            fs::write(served.join(format!("many/f{number:04}")), "")?;
        }
        let mut disk = vec![0x5a; 128 << 10];
        let mark = b"brig-hostile-disk";
        disk[..mark.len()].copy_from_slice(mark);
        for name in ["disk", "readonly-disk", "memory"] {
            fs::write(directory.join(name), &disk)?;
        }
        Ok(Self {
            directory: directory.to_owned(),
            disk,
        })
    }

    /// A directory becomes a link that leads out, and a directory again, as long as this runs.
    fn swap(&self, stop: &AtomicBool) {
        let served = self.directory.join("served");
        while !stop.load(Ordering::Relaxed) {
            let _ = renameat2(
                AT_FDCWD,
                &served.join("swap"),
                AT_FDCWD,
                &served.join("swap-link"),
                RenameFlags::RENAME_EXCHANGE,
            );
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Nothing has changed that the guest had no right to.
    fn untouched(&self) -> Result<()> {
        let outside = self.directory.join("outside");
        let secret = fs::read_to_string(outside.join("secret"))?;
        that("what lies beside the share is as it was", secret == SECRET)?;
        equal("files beside the share", 1, fs::read_dir(&outside)?.count())?;
        let metadata = fs::metadata(outside.join("secret"))?;
        equal("its mode", 0o100_644, metadata.permissions().mode())?;
        equal("its owner", 0, metadata.uid())?;
        let readonly = fs::read(self.directory.join("readonly-disk"))?;
        that("a read-only disk is as it was", readonly == self.disk)?;
        let memory = fs::read(self.directory.join("memory"))?;
        that("a file that is memory is as it was", memory == self.disk)?;
        let length = fs::metadata(self.directory.join("disk"))?.len();
        equal("bytes of the disk", self.disk.len() as u64, length)?;
        let mut beside: Vec<_> = fs::read_dir(&self.directory)?
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect::<Result<_>>()?;
        beside.sort();
        equal(
            "what is beside the share",
            ["disk", "memory", "outside", "readonly-disk", "served"]
                .map(str::to_owned)
                .to_vec(),
            beside,
        )
    }
}

/// How the attacks went.
#[derive(Default)]
struct Story {
    /// Attacks after which the device was seen to work.
    survived: u32,
    /// What failed, in full.
    lost: Vec<String>,
    done: bool,
    honest: Option<Held>,
}

/// Attacks that the suite has to make; more is better, fewer means that some are gone.
const LEAST: u32 = 450;

fn devices(suite: &mut Suite) -> Result<()> {
    // The neighbour.
    suite.shared()?;
    let directory = Path::new("/run/brig-e2e");
    fs::create_dir_all(directory)?;
    let initramfs = directory.join("hostile.cpio");
    fs::write(
        &initramfs,
        cpio::init(&fs::read("/host/bin/brig-hostile-guest")?)?,
    )?;
    let grounds = Grounds::new(&directory.join("hostile"))?;
    let mut boot = Boot::installed(&directory.join("hostile-vmm.log"));
    boot.initramfs = initramfs;
    boot.debug_console = true;
    boot.vcpus = 2;
    boot.max_memory = boot.memory + (64 << 20);
    boot.volume = Some(grounds.directory.join("served"));
    boot.tap = Some(tap::open("brig-hostile0", "10.77.0.1/24")?);
    boot.memory_file = Some(grounds.directory.join("memory"));
    boot.disks = vec![
        (grounds.directory.join("disk"), false),
        (grounds.directory.join("readonly-disk"), true),
    ];

    let mut story = Story::default();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| grounds.swap(&stop));
        let result = all_attacks(&mut boot, &mut story);
        stop.store(true, Ordering::Relaxed);
        result
    })?;
    println!(
        "      {} attacks survived, {} not",
        story.survived,
        story.lost.len()
    );
    ensure!(story.lost.is_empty(), "{}", story.lost.join("\n"));
    that(
        &format!("at least {LEAST} attacks are made, not {}", story.survived),
        story.survived >= LEAST,
    )?;
    grounds.untouched()?;
    // Nobody else noticed.
    let outcome = suite.shared()?.exec(&[PROBE, "echo", "unharmed"])?;
    outcome.says(0, "unharmed\n").context("the neighbour")
}

fn all_attacks(boot: &mut Boot, story: &mut Story) -> Result<()> {
    let mut first = 0;
    for _ in 0..MAX_BOOTS {
        boot.cmdline = format!("quiet loglevel=1 brig.hostile={first}");
        let last = attack(boot, story)?;
        if story.done {
            return Ok(());
        }
        first = last + 1;
    }
    bail!("the attacks did not come to their end")
}

/// A line of the guest's.
enum Said {
    Begin(usize, String),
    End(usize, u32, String),
    Lost(usize, String),
    Done,
}

fn said(text: &str) -> Result<Option<Said>> {
    if text.starts_with("failed") {
        bail!("the hostile guest could not begin: {text}");
    }
    ensure!(!text.starts_with("escaped"), "{text}");
    if text.starts_with("all done") {
        return Ok(Some(Said::Done));
    }
    let (what, rest) = text.split_once(' ').unwrap_or((text, ""));
    let (number, rest) = rest.split_once(' ').unwrap_or((rest, ""));
    let Ok(number) = number.parse::<usize>() else {
        return Ok(None);
    };
    let counted = || -> Option<(u32, String)> {
        let (count, name) = rest.split_once(' ')?;
        Some((count.parse().ok()?, name.to_owned()))
    };
    Ok(match what {
        "begin" => Some(Said::Begin(number, rest.to_owned())),
        "end" => counted().map(|(count, name)| Said::End(number, count, name)),
        "lost" => Some(Said::Lost(number, rest.to_owned())),
        _ => None,
    })
}

/// One boot, up to the end of the attacks or of the VMM; returns the last attack that began.
fn attack(boot: &Boot, story: &mut Story) -> Result<usize> {
    let mut machine = Machine::start(boot)?;
    // The device for it is on the bus before the guest looks.
    machine.resize_memory(boot.max_memory)?;
    if let Some(file) = &boot.memory_file {
        machine.plug_pmem(file)?;
    }
    let mut current: Option<(usize, String)> = None;
    let mut before = Held::of(&machine, boot)?;
    loop {
        match machine.next(clock::seconds(30)) {
            Ok(Next::Event(Event::Console { line })) => {
                let Some(text) = line.split("hostile: ").nth(1) else {
                    continue;
                };
                match said(text)? {
                    Some(Said::Begin(number, name)) => current = Some((number, name)),
                    Some(Said::End(number, count, name)) => {
                        let held = Held::of(&machine, boot)?;
                        let honest = *story.honest.get_or_insert(held);
                        before = settled(&machine, boot, &honest, &before)
                            .with_context(|| format!("attack {number}, {name}"))?;
                        story.survived += count;
                        let outcome = format!("{name}: survived {count} times");
                        println!("      attack {number}: {outcome}");
                    }
                    Some(Said::Lost(number, what)) => {
                        println!("      attack {number} is LOST: {what}");
                        story.lost.push(format!("attack {number}: {what}"));
                    }
                    Some(Said::Done) => story.done = true,
                    None => {}
                }
            }
            Ok(Next::Event(_)) => {}
            Ok(Next::Ended(ended)) => {
                if story.done {
                    return Ok(current.map_or(0, |(number, _)| number));
                }
                let (number, name) =
                    current.with_context(|| format!("the VMM ended early: {ended:?}"))?;
                judge(&name, &ended)?;
                // In a way that is defined, but then the attack was not seen to its end.
                story.lost.push(format!(
                    "attack {number}, {name}: the VM ended with {ended:?}"
                ));
                return Ok(number);
            }
            Err(error) => {
                let (number, name) = current.context("the hostile guest said nothing")?;
                return Err(error.context(format!(
                    "attack {number} ({name}): the VMM neither went on nor ended"
                )));
            }
        }
    }
}

/// What a VMM holds once it is no more than it may. The guest does not wait for the judge: what its next attack holds
/// for a moment is let go again, and what an attack leaves behind is not.
fn settled(machine: &Machine, boot: &Boot, honest: &Held, before: &Held) -> Result<Held> {
    let deadline = Instant::now() + clock::seconds(5);
    loop {
        let held = Held::of(machine, boot)?;
        match held.bounded(honest, before) {
            Ok(()) => return Ok(held),
            Err(error) if Instant::now() > deadline => return Err(error),
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// A VMM may end itself, in a way that is defined; a crash or an error of its own is a failure.
fn judge(name: &str, ended: &VmmExit) -> Result<()> {
    let defined = [
        exit::POWER_OFF,
        exit::REBOOT,
        exit::PANIC,
        exit::GUEST_FAULT,
    ];
    match ended {
        VmmExit::Code(code) if defined.contains(code) => Ok(()),
        other => bail!("attack '{name}': the VMM ended with {other:?}, which no guest may cause"),
    }
}
