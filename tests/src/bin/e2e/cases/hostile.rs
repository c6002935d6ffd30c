//! A pod that attacks: from a container, and with a kernel of its own that drives the devices raw.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use brig_hypervisor::control::{Event, exit};
use brig_hypervisor::launch::VmmExit;
use brig_tests::cpio;
use brig_tests::node::check::that;
use brig_tests::node::clock;
use brig_tests::node::machine::{Boot, Machine, Next};

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

/// How the attacks went.
#[derive(Default)]
struct Story {
    /// By number: what became of it.
    outcomes: BTreeMap<usize, String>,
    done: bool,
}

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
    let mut boot = Boot::installed(&directory.join("hostile-vmm.log"));
    boot.initramfs = initramfs;
    boot.debug_console = true;

    let mut story = Story::default();
    let mut first = 0;
    for _ in 0..MAX_BOOTS {
        boot.cmdline = format!("quiet loglevel=1 brig.hostile={first}");
        let last = attack(&boot, &mut story)?;
        if story.done {
            break;
        }
        first = last + 1;
    }
    ensure!(story.done, "the attacks did not come to their end");
    for (number, outcome) in &story.outcomes {
        println!("      attack {number}: {outcome}");
    }
    that(
        "an honest driver is served, so that the attacks are read at all",
        story
            .outcomes
            .get(&0)
            .is_some_and(|outcome| outcome.ends_with("survived")),
    )?;
    let tried = story
        .outcomes
        .values()
        .filter(|outcome| !outcome.contains(" skip"))
        .count();
    that(
        &format!("most attacks could be tried, not {tried}"),
        tried * 4 >= story.outcomes.len() * 3,
    )?;
    // Nobody else noticed.
    let outcome = suite.shared()?.exec(&[PROBE, "echo", "unharmed"])?;
    outcome.says(0, "unharmed\n").context("the neighbour")
}

/// One boot, up to the end of the attacks or of the VMM; returns the last attack that began.
fn attack(boot: &Boot, story: &mut Story) -> Result<usize> {
    let mut machine = Machine::start(boot)?;
    let mut current: Option<(usize, String)> = None;
    loop {
        match machine.next(clock::seconds(12)) {
            Ok(Next::Event(Event::Console { line })) => {
                let Some(text) = line.split("hostile: ").nth(1) else {
                    continue;
                };
                if text.starts_with("failed") {
                    bail!("the hostile guest could not begin: {text}");
                }
                if text.starts_with("all done") {
                    story.done = true;
                    continue;
                }
                let mut words = text.splitn(3, ' ');
                let (Some(what), Some(number), Some(name)) =
                    (words.next(), words.next(), words.next())
                else {
                    continue;
                };
                let Ok(number) = number.parse::<usize>() else {
                    continue;
                };
                match what {
                    "begin" => current = Some((number, name.to_owned())),
                    "end" => {
                        story.outcomes.insert(number, format!("{name}: survived"));
                    }
                    _ => {
                        story.outcomes.insert(number, format!("{name}: skip"));
                    }
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
                story
                    .outcomes
                    .insert(number, format!("{name}: ended itself with {ended:?}"));
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
