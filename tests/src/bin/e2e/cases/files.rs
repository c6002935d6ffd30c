//! Files of a container, beside the same files under runc: every result, every error.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use anyhow::{Context, Result, bail};
use brig_tests::node::check::{clip, equal, field, that};
use brig_tests::node::ctr::{Container, Ctr, Run};
use brig_tests::node::process;
use brig_tests::node::{clock, leaks, strace};

use crate::suite::{Case, DEBIAN_IMAGE, PROBE, Suite, brig, case, not_here};

/// On the node's disk.
const DIRECTORY: &str = "/var/tmp/brig-e2e-files";
const MOUNTED: &str = "/mnt/a";
/// An emptyDir, in a container that has one beside [`MOUNTED`].
const OWN: &str = "/mnt/own";
/// Operations of a sequence.
const LENGTH: &str = "300";
/// How many sequences are compared: a longer run asks for more.
const SEQUENCES: &str = "BRIG_FILE_SEQUENCES";

pub const CASES: &[Case] = &[
    case(
        "files",
        "an ACL holds for everybody, and a default ACL decides instead of the umask",
        acls,
    ),
    case(
        "files",
        "an empty directory lists its dots, and a file without a name can be linked",
        gaps,
    ),
    brig(
        "files",
        "a file that is made and removed takes the file server few system calls",
        calls,
    ),
    brig(
        "files",
        "a program that has been run asks the file server once when it is run again, for its capabilities",
        again,
    ),
    case(
        "files",
        "what a file takes on the disk is right after it was written through a map that outlived its descriptor",
        mapped,
    ),
    brig(
        "files",
        "random sequences of file operations end as under runc",
        sequences,
    ),
    brig(
        "files",
        "stress-ng's file-system stressors end as under runc",
        stress,
    ),
];

fn fresh(name: &str) -> Result<String> {
    let path = format!("{DIRECTORY}-{name}");
    let _ = fs::remove_dir_all(&path);
    fs::create_dir_all(&path)?;
    Ok(path)
}

/// An empty directory where kubelet has emptyDirs.
fn empty_dir(name: &str) -> Result<String> {
    let path = format!("/var/lib/kubelet/pods/e2e-{name}/volumes/kubernetes.io~empty-dir/own");
    let _ = fs::remove_dir_all(&path);
    fs::create_dir_all(&path)?;
    Ok(path)
}

/// In the image's own files and in a volume.
fn everywhere(
    suite: &mut Suite,
    name: &str,
    check: fn(&serde_json::Value) -> Result<()>,
) -> Result<()> {
    let directory = fresh(name)?;
    let run = suite.probe(name, &["sleep"]).with(
        "--mount",
        &format!("type=bind,src={directory},dst={MOUNTED},options=rbind:rw"),
    );
    let container = suite.ctr.start(&run)?;
    for place in ["/work", MOUNTED] {
        let facts = container.probe(&["file-facts", place])?;
        check(&facts).with_context(|| format!("in {place}"))?;
    }
    Ok(())
}

fn acls(suite: &mut Suite) -> Result<()> {
    everywhere(suite, "acl", |facts| {
        field(facts, "/acl/named user", "ok")?;
        field(facts, "/acl/owning group", "EACCES")?;
        field(facts, "/acl/somebody", "EACCES")?;
        field(facts, "/acl/inherited mode", "660")?;
        field(facts, "/acl/inherits for the named user", "ok")
    })
}

fn gaps(suite: &mut Suite) -> Result<()> {
    everywhere(suite, "gaps", |facts| {
        field(facts, "/empty directory", ". Directory, .. Directory")?;
        field(facts, "/unnamed file, linked", "ok")?;
        field(facts, "/syncfs", "ok")?;
        field(facts, "/time of birth", "known")?;
        field(facts, "/immutable", "EPERM")
    })
}

/// Requests and host system calls of the file server for a file of the root file system that is made empty, closed and
/// removed, at most.
/// Its requests are LOOKUP, MKNOD and GETATTR of the directory, then that again, SETATTR with the time of change, UNLINK,
/// FORGET: the guest's kernel asks for each. Of calls each takes what it does, the wait for it, and the interrupt, but
/// FORGETs have no interrupt of their own, and no wait.
const MOST: Cost = Cost {
    requests: 73,
    calls: 205,
};

/// For 4 KiB that are written to an open file which is the pod's own.
const APPENDED: Cost = Cost {
    requests: 3,
    calls: 10,
};

/// What one file costs the file server, in tenths: other requests of the guest come between.
#[derive(Debug, Clone, Copy)]
struct Cost {
    requests: usize,
    calls: usize,
}

impl std::fmt::Display for Cost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let parts = |tenths| (tenths / 10, tenths % 10);
        let ((requests, r), (calls, c)) = (parts(self.requests), parts(self.calls));
        write!(f, "{requests}.{r} requests, {calls}.{c} system calls")
    }
}

/// How many files a step is measured with, the second less the first.
const FEW: usize = 10;
const MANY: usize = 60;

fn calls(suite: &mut Suite) -> Result<()> {
    let before = leaks::pids_of("brig-vmm");
    let directory = fresh("calls")?;
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o777))?;
    let own = empty_dir("calls")?;
    let mount =
        |source: &str, at: &str| format!("type=bind,src={source},dst={at},options=rbind:rw");
    let run = suite
        .probe("calls", &["sleep"])
        .with("--mount", &mount(&directory, MOUNTED))
        .with("--mount", &mount(&own, OWN));
    let container = suite.ctr.start(&run)?;
    let after = leaks::pids_of("brig-vmm");
    let vmm = after.iter().find(|pid| !before.contains(pid));
    let thread = file_server(*vmm.context("no VMM came")?)?;
    let namespace = suite.ctr.namespace.clone();
    let (empty, full) = (
        &["make", "remove"][..],
        &["write", "open", "stat", "list", "remove"][..],
    );
    let append = &["append"][..];
    for (what, user, place, groups) in [
        ("root file system", "0", "/work", &[empty, full, append][..]),
        ("volume", "0", MOUNTED, &[empty, full, append]),
        ("volume, by a user", "1000", MOUNTED, &[empty, append]),
        ("emptyDir", "0", OWN, &[empty, append]),
    ] {
        let step = |step: &str, count: usize| -> Result<()> {
            let arguments = [PROBE, "many", step, place, &count.to_string()];
            let done = container.exec_with(&["--user", user], &arguments)?;
            done.success().map(drop)
        };
        let measured = |name: &str, count: usize| -> Result<Cost> {
            let asked = requests(&namespace)?;
            let calls = strace::calls(thread, || step(name, count))?.lines().count();
            let requests = requests(&namespace)?.saturating_sub(asked);
            Ok(Cost { requests, calls })
        };
        // What is looked up once is known then.
        step("make", 2)?;
        step("remove", 2)?;
        let mut each = Vec::new();
        for names in groups.iter().copied() {
            let mut few = Vec::new();
            for name in names {
                few.push(measured(name, FEW)?);
            }
            for (name, few) in names.iter().zip(few) {
                let many = measured(name, MANY)?;
                let tenths = |many: usize, few: usize| many.saturating_sub(few) * 10 / (MANY - FEW);
                let cost = Cost {
                    requests: tenths(many.requests, few.requests),
                    calls: tenths(many.calls, few.calls),
                };
                eprintln!("brig-e2e: {what}: {name}: {cost}");
                each.push(cost);
            }
        }
        let [made, removed, .., appended] = each[..] else {
            bail!("nothing was measured");
        };
        // What one pod's guest alone writes it keeps until it is asked for.
        that(
            &format!(
                "{what}: 4 KiB more of a file, {appended}, are at most {APPENDED} where they are the pod's own"
            ),
            place == MOUNTED
                || appended.requests <= APPENDED.requests && appended.calls <= APPENDED.calls,
        )?;
        let both = Cost {
            requests: made.requests + removed.requests,
            calls: made.calls + removed.calls,
        };
        // Elsewhere it is asked again after a second, which on a slow node is often.
        if place == "/work" {
            that(
                &format!("{what}: {both} are at most {MOST}, and not none"),
                (10..=MOST.requests).contains(&both.requests)
                    && (10..=MOST.calls).contains(&both.calls),
            )?;
        }
    }
    Ok(())
}

/// As a probe that is executed every few seconds does: its libraries and the files it reads are in the guest.
fn again(suite: &mut Suite) -> Result<()> {
    suite.import(DEBIAN_IMAGE, "/host/assets/images/debian.tar")?;
    let run = Run::new("calls", DEBIAN_IMAGE, &["sleep", "1000000"]);
    let container = suite.ctr.start(&run)?;
    let probe = || -> Result<usize> {
        let asked = requests(&suite.ctr.namespace)?;
        let script = "cat /etc/passwd; perl -e 'print 1'";
        container.exec(&["bash", "-c", script])?.success()?;
        Ok(requests(&suite.ctr.namespace)? - asked)
    };
    let first = probe()?;
    that("the first time it reads", first > 10)?;
    probe()?;
    equal("requests of three programs again", 3, probe()?)
}

/// Blocks of a file between the close and the first store, and after the map has gone. Python's own map keeps the descriptor.
const MAPPED: &str = "
import ctypes, os
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
file = os.open('/mapped', os.O_RDWR | os.O_CREAT)
os.ftruncate(file, 1 << 20)
at = libc.mmap(None, 1 << 20, 3, 1, file, 0)
os.close(file)
before = os.stat('/mapped').st_blocks
ctypes.memset(at, 1, 1 << 20)
libc.munmap(at, 1 << 20)
print(before, os.stat('/mapped').st_blocks)
";

fn mapped(suite: &mut Suite) -> Result<()> {
    suite.import(DEBIAN_IMAGE, "/host/assets/images/debian.tar")?;
    let run = Run::new("mapped", DEBIAN_IMAGE, &["python3", "-c", MAPPED]);
    let outcome = suite.ctr.run(&run)?.success()?;
    equal("blocks", "0 2048", outcome.text().trim())
}

/// Requests of the guest's kernel to the file server so far.
fn requests(namespace: &str) -> Result<usize> {
    let mut command = Command::new("brig");
    command.args(["counters", "--namespace", namespace, "calls"]);
    let answer = process::run(command, clock::seconds(10))?.success()?.text();
    let counters: serde_json::Value = serde_json::from_str(&answer)?;
    let requests = counters["file_requests"].as_u64();
    let requests = requests.with_context(|| format!("no file_requests in {answer}"))?;
    Ok(usize::try_from(requests)?)
}

/// The file server's thread of a VMM.
fn file_server(vmm: i32) -> Result<i32> {
    for thread in fs::read_dir(format!("/proc/{vmm}/task"))? {
        let thread = thread?;
        if fs::read_to_string(thread.path().join("comm"))?.trim() == "fs" {
            return Ok(thread.file_name().to_string_lossy().parse()?);
        }
    }
    bail!("the VMM {vmm} has no file server")
}

/// How long each stressor runs, in seconds: without it there are none.
const STRESS: &str = "BRIG_STRESS_SECONDS";
const STRESS_IMAGE: &str = "docker.io/brig/stress:test";

/// stress-ng's stressors of files. Of its class `filesystem` these are not here: what is of /proc, of devices or of mounts,
/// and `fiemap` and `verity`, which FUSE has not.
const STRESSORS: &str = "access chattr chdir chmod chown copy-file dentry dir dirdeep dirmany dup fallocate fcntl \
    file-ioctl filename flock fpunch fsize fstat getdent handle hdd inode-flags inotify io iomix lease link locka lockf \
    lockofd mknod open rename symlink sync-file touch utime xattr";

fn stress(suite: &mut Suite) -> Result<()> {
    let Ok(seconds) = std::env::var(STRESS) else {
        return not_here(format!("{STRESS} says how long; make test-all does"));
    };
    suite.import(STRESS_IMAGE, "/host/assets/images/stress.tar")?;
    let runc = Ctr {
        runtime: "io.containerd.runc.v2".to_owned(),
        ..suite.ctr.clone()
    };
    let [expected, found] = [("runc", &runc), ("brig", &suite.ctr)].map(|(name, ctr)| {
        let directory = fresh(&format!("stress-{name}"))?;
        let id = format!("stress-{name}");
        let run = Run::new(&id, STRESS_IMAGE, &["sleep", "1000000"]).with(
            "--mount",
            &format!("type=bind,src={directory},dst={MOUNTED},options=rbind:rw"),
        );
        stressed(&ctr.start(&run)?, &seconds)
    });
    let (expected, found) = (expected?, found?);
    let mut worse = Vec::new();
    for ((name, runc, _), (_, brig, said)) in expected.iter().zip(&found) {
        eprintln!("brig-e2e: stress-ng --{name}: {runc} under runc, {brig} under Brig");
        if runc == PASSED && brig != PASSED {
            worse.push(format!("{name} ({brig}): {}", clip(said)));
        }
    }
    that(
        &format!("all that pass under runc pass: {}", worse.join("; ")),
        worse.is_empty(),
    )?;
    let passed = expected.iter().filter(|(_, end, _)| end == PASSED);
    that("most of them pass", passed.count() * 4 > expected.len() * 3)
}

/// How a stressor ends that could do its work.
const PASSED: &str = "passed";

/// Each stressor with its end and what it said.
fn stressed(container: &Container, seconds: &str) -> Result<Vec<(&'static str, String, String)>> {
    STRESSORS
        .split_whitespace()
        .map(|name| {
            let stressor = format!("--{name}");
            let arguments = [
                "stress-ng",
                &stressor,
                "1",
                "--timeout",
                seconds,
                "--temp-path",
                MOUNTED,
                "--verify",
                "--hdd-bytes",
                "8M",
                "--iomix-bytes",
                "8M",
                "--fallocate-bytes",
                "8M",
            ];
            let ended = container.exec(&arguments)?;
            let said = format!("{}{}", ended.text(), ended.stderr);
            // One that cannot do its work is skipped, with status 0.
            let end = match ended.code {
                0 if said.contains("passed: 1") => PASSED.to_owned(),
                0 => "skipped".to_owned(),
                code => format!("status {code}"),
            };
            let said = said
                .lines()
                .filter(|line| line.contains("fail") || line.contains("skip"));
            Ok((name, end, said.collect::<Vec<_>>().join(", ")))
        })
        .collect()
}

/// Where sequences are done: the image's own files, a volume, an emptyDir, and one that is mapped for a user namespace.
#[derive(Debug, Clone, Copy)]
enum Place {
    Root,
    Volume,
    Own,
    Mapped,
}

/// Where a user namespace has its ids on the node.
const MAP: &str = "0:200000:65536";

fn sequences(suite: &mut Suite) -> Result<()> {
    let count: u32 = match std::env::var(SEQUENCES) {
        Ok(text) => text
            .parse()
            .with_context(|| format!("{SEQUENCES}={text}"))?,
        Err(_) => 2,
    };
    let runc = Ctr {
        runtime: "io.containerd.runc.v2".to_owned(),
        ..suite.ctr.clone()
    };
    for place in [Place::Root, Place::Volume, Place::Own, Place::Mapped] {
        let expected = outputs(suite, &runc, "runc", place, count)?;
        let found = outputs(suite, &suite.ctr, "brig", place, count)?;
        for (seed, (expected, found)) in (1..).zip(expected.iter().zip(found.iter())) {
            compare(seed, expected, found).with_context(|| format!("{place:?}"))?;
        }
    }
    Ok(())
}

/// What each sequence prints under a runtime.
fn outputs(suite: &Suite, ctr: &Ctr, name: &str, place: Place, count: u32) -> Result<Vec<String>> {
    let name = format!("{name}-{place:?}").to_lowercase();
    let directory = match place {
        Place::Own => empty_dir(&name)?,
        _ => fresh(&name)?,
    };
    let run = suite.probe(&format!("files-{name}"), &["sleep"]);
    let mount = |source: &str, options: &str| {
        format!("type=bind,src={source},dst={MOUNTED},options=rbind:rw{options}")
    };
    let in_namespace = |run: Run| run.with("--uidmap", MAP).with("--gidmap", MAP);
    let mut mapped = None;
    let (run, parent) = match place {
        Place::Root => (run, "/work"),
        Place::Volume | Place::Own => (run.with("--mount", &mount(&directory, "")), MOUNTED),
        Place::Mapped if suite.ctr.runtime == ctr.runtime => {
            let run = run.with("--mount", &mount(&directory, ":idmap"));
            (in_namespace(run), MOUNTED)
        }
        // The node's runc maps no volumes: it is given one that is mapped already.
        Place::Mapped => {
            let mount_point = Mapped::new(&directory)?;
            let run = run.with("--mount", &mount(&mount_point.0, ""));
            mapped = Some(mount_point);
            (in_namespace(run), MOUNTED)
        }
    };
    let container = ctr.start(&run)?;
    let outputs = (1..=count)
        .map(|seed| {
            let place = format!("{parent}/{seed}");
            let seed = seed.to_string();
            let done = container.exec(&[PROBE, "operations", &seed, LENGTH, &place])?;
            Ok(done.success()?.text())
        })
        .collect();
    drop(container);
    drop(mapped);
    outputs
}

/// A directory that is mounted once more, mapped as [`MAP`] says, until this is dropped.
struct Mapped(String);

impl Mapped {
    fn new(directory: &str) -> Result<Self> {
        let place = format!("{directory}-mapped");
        fs::create_dir_all(&place)?;
        let mut command = Command::new("mount");
        let map = format!("X-mount.idmap={MAP}");
        command.args(["--bind", "-o", &map, directory, &place]);
        process::run(command, clock::seconds(10))?.success()?;
        Ok(Self(place))
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // What holds it a moment longer does so without it.
        let _ = nix::mount::umount2(self.0.as_str(), nix::mount::MntFlags::MNT_DETACH);
    }
}

/// Names the first operation that ended otherwise, with the ones before it.
fn compare(seed: u32, expected: &str, found: &str) -> Result<()> {
    let pairs = expected.lines().zip(found.lines());
    let Some((number, (runc, brig))) = pairs.enumerate().find(|(_, (one, other))| one != other)
    else {
        return equal(
            &format!("lines of sequence {seed}"),
            expected.lines().count(),
            found.lines().count(),
        );
    };
    let before: Vec<&str> = found
        .lines()
        .skip(number.saturating_sub(12))
        .take(12.min(number))
        .collect();
    bail!(
        "sequence {seed} differs: runc has \"{}\", Brig \"{}\", after:\n{}",
        clip(runc),
        clip(brig),
        before.join("\n")
    )
}
