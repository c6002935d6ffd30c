//! `delete`: what containerd runs when the server is gone. Undoes what the journal tells of and prints
//! a DeleteResponse. Repeatable, and correct when there never was a server.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use containerd_shim_protos::api::DeleteResponse;
use protobuf::well_known_types::timestamp::Timestamp;
use protobuf::{Message, MessageField};

use super::args::Args;
use super::orderly;
use super::start::{ADDRESS_FILE, STATE_FILE};
use crate::asked::config::Config;
use crate::asked::spec::{self, Spec};
use crate::error::{Error, Result};
use crate::node::hooks::{ContainerHooks, Stage};
use crate::node::journal::{Ending, StateDir};
use crate::node::remains::Remains;
use crate::pod::account::{KILLED as KILLED_CODE, account_of_killed};

/// 128 + SIGKILL: what became of the container's processes.
const KILLED: u32 = 137;
/// For all that is waited for: containerd gives `delete` five seconds.
const TIMEOUT: Duration = Duration::from_secs(4);

/// Runs `delete`; returns what to print.
///
/// # Errors
/// When it cannot be known what there is of the pod; calling again is safe. What does not end in time is no error.
pub fn delete(args: &Args) -> Result<Vec<u8>> {
    let bundle = if args.bundle.as_os_str().is_empty() {
        Path::new(".")
    } else {
        &args.bundle
    };
    let names = (args.namespace.as_str(), args.id.as_str());
    let base = base(bundle);
    let dir = StateDir::new(&base, names.0, names.1)?;
    let cleaned = clean(&dir, names, Instant::now() + TIMEOUT)?;
    remove_socket(bundle);
    if cleaned.hooks_are_left {
        stopped_hooks(&args.id, bundle);
    }
    if let Some(error) = &cleaned.left {
        eprintln!("brig: cannot clean up after the shim yet: {error}");
        finish_later(&base, names);
    }
    respond(cleaned.pid, SystemTime::now())
}

/// What became of a pod's remains.
#[derive(Debug)]
struct Cleaned {
    /// The VMM's.
    pid: u32,
    /// There was something whose hooks have not been run.
    hooks_are_left: bool,
    /// Why some of it is still there.
    left: Option<io::Error>,
}

/// A VMM that waits for a disk or for a server of files ends when that answers, which may be in an hour. Its containers have
/// ended all the same, and containerd takes an error for an end with the status 255 of which it asks nobody again: so what is
/// left is left to a process that waits.
fn finish_later(base: &Path, (namespace, id): (&str, &str)) {
    let spawned = Command::new("/proc/self/exe")
        .arg(FINISH)
        .arg(base)
        .args([namespace, id])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .current_dir("/")
        .process_group(0)
        .spawn();
    if let Err(error) = spawned {
        eprintln!("brig: what is left stays: {error}");
    }
}

/// The word by which [`delete`] executes this program for [`finish`].
pub const FINISH: &str = "finish-delete";

/// Waits for the end of what was killed of the pod `id`, however long that takes, and undoes the rest.
///
/// # Errors
/// When something of the pod cannot be removed.
pub fn finish(base: &Path, namespace: &str, id: &str) -> Result<()> {
    let dir = StateDir::new(base, namespace, id)?;
    let Some(journal) = dir.read()? else {
        return Ok(());
    };
    journal.wait_for_end();
    // The names may be another pod's by now.
    if dir.read()?.as_ref() != Some(&journal) {
        return Ok(());
    }
    let undone = journal.undo(Instant::now() + TIMEOUT);
    undone.map_err(|error| Error::io("cannot clean up after the shim", &error))?;
    dir.remove_if_of(Some(journal.shim));
    Ok(())
}

/// Where the server of this bundle's pod had its directory; of a container in a pod, and of a server that died before it said so,
/// where those of the configuration have theirs.
fn base(bundle: &Path) -> PathBuf {
    match fs::read(bundle.join(STATE_FILE)) {
        Ok(path) if path.starts_with(b"/") => OsString::from_vec(path).into(),
        _ => Config::state_dir(),
    }
}

/// The server did not live to run them. Last, because containerd does not wait for long.
fn stopped_hooks(id: &str, bundle: &Path) {
    let hooks = || -> Result<()> {
        let bundle =
            std::fs::canonicalize(bundle).map_err(|error| Error::io(bundle.display(), &error))?;
        let spec = Spec::parse(&spec::read(&bundle.join("config.json"))?)?;
        match ContainerHooks::of(&spec, id, &bundle, None) {
            Some(hooks) => hooks.run(Stage::Stopped, 0),
            None => Ok(()),
        }
    };
    if let Err(error) = hooks() {
        eprintln!("brig: after {id}: {error}");
    }
}

/// Undoes what is left, until `end`.
fn clean(dir: &StateDir, names: (&str, &str), end: Instant) -> Result<Cleaned> {
    let (mut pid, mut hooks_are_left, mut left) = (0, false, None);
    let journal = dir.read()?;
    if let Some(journal) = &journal {
        hooks_are_left = journal.ending != Some(Ending::Emptied);
        pid = journal.vmm.map_or(0, |vmm| vmm.pid);
        if !orderly::ended(dir, journal)? {
            left = journal.undo(end).err();
        }
    }
    // A pod whose end had begun was not killed, however its shim ended.
    if let Some(journal) = journal.as_ref().filter(|journal| journal.ending.is_none()) {
        let at = SystemTime::now();
        let timeline = dir.read_timeline().unwrap_or_default();
        let account = account_of_killed(names, at, journal, &timeline);
        // For those who look: that it cannot be kept must not keep the pod's remains in place.
        let _ = Remains::beside(dir.base()).keep(at, KILLED_CODE, &account);
    }
    if left.is_none() {
        dir.remove_if_of(journal.map(|journal| journal.shim));
    }
    Ok(Cleaned {
        pid,
        hooks_are_left,
        left,
    })
}

/// A server killed before it wrote its journal is known by its bundle's address file alone.
fn remove_socket(bundle: &Path) {
    if let Ok(address) = fs::read_to_string(bundle.join(ADDRESS_FILE))
        && let Some(path) = address.trim().strip_prefix("unix://")
    {
        // A server that answers is the pod's, and the pod has more than this container.
        if UnixStream::connect(path).is_err() {
            let _ = fs::remove_file(path);
        }
    }
}

fn respond(pid: u32, now: SystemTime) -> Result<Vec<u8>> {
    DeleteResponse {
        pid,
        exit_status: KILLED,
        exited_at: MessageField::some(Timestamp::from(now)),
        ..DeleteResponse::default()
    }
    .write_to_bytes()
    .map_err(|error| Error::internal(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::identity::Identity;
    use crate::node::journal::Journal;
    use std::process::Command;

    const NAMES: (&str, &str) = ("ns", "c1");

    fn cleaned(dir: &StateDir) -> (u32, bool) {
        let cleaned = clean(dir, NAMES, Instant::now() + TIMEOUT).unwrap();
        assert!(cleaned.left.is_none(), "{cleaned:?}");
        (cleaned.pid, cleaned.hooks_are_left)
    }

    #[test]
    fn what_does_not_end_in_time_is_answered_for_and_undone_when_it_has_ended() {
        let root = tempfile::tempdir().unwrap();
        let dir = StateDir::new(root.path(), NAMES.0, NAMES.1).unwrap();
        dir.create().unwrap();
        let group = tempfile::tempdir().unwrap();
        let events = group.path().join("cgroup.events");
        fs::write(&events, "populated 1\n").unwrap();
        let mut vmm = Command::new("sleep").arg("60").spawn().unwrap();
        let gone = Identity {
            pid: vmm.id(),
            start_time: 0,
        };
        let cgroup = serde_json::json!({ "dirs": [group.path()], "parents": [], "home": null });
        let journal = Journal {
            vmm: Identity::of(vmm.id()),
            cgroup: Some(serde_json::from_value(cgroup).unwrap()),
            ..Journal::new(gone)
        };
        dir.write(&journal).unwrap();
        let cleaned = clean(&dir, NAMES, Instant::now()).unwrap();
        assert!(cleaned.left.is_some());
        assert_eq!((cleaned.pid, cleaned.hooks_are_left), (vmm.id(), true));
        assert_eq!(dir.read().unwrap(), Some(journal));
        fs::write(&events, "populated 0\n").unwrap();
        let reaped = std::thread::spawn(move || vmm.wait());
        finish(root.path(), NAMES.0, NAMES.1).unwrap();
        assert!(!reaped.join().unwrap().unwrap().success());
        assert_eq!(dir.read().unwrap(), None);
        finish(root.path(), NAMES.0, NAMES.1).unwrap();
    }

    #[test]
    fn a_left_vmm_is_killed_and_reported_and_a_second_delete_finds_nothing() {
        let root = tempfile::tempdir().unwrap();
        let base = root.path().join("brig");
        let dir = StateDir::new(&base, "ns", "c1").unwrap();
        dir.create().unwrap();
        let mut vmm = Command::new("sleep").arg("60").spawn().unwrap();
        let gone = Identity {
            pid: vmm.id(),
            start_time: 0,
        };
        let journal = Journal {
            vmm: Identity::of(vmm.id()),
            ..Journal::new(gone)
        };
        dir.write(&journal).unwrap();
        dir.write_timeline(b"{}").unwrap();
        assert_eq!(cleaned(&dir), (vmm.id(), true));
        assert!(!vmm.wait().unwrap().success());
        assert_eq!(cleaned(&dir), (0, false));
        let remains = Remains::beside(&base);
        let account = &remains.all()[0];
        assert_eq!(
            (&account["id"], &account["code"]),
            (&"c1".into(), &"killed".into())
        );
        assert_eq!(remains.failures().unwrap()["killed"], 1);
    }

    #[test]
    fn a_pod_is_looked_for_where_its_server_had_it() {
        let bundle = tempfile::tempdir().unwrap();
        let usual = base(bundle.path());
        assert_eq!(usual, Config::state_dir());
        fs::write(bundle.path().join(STATE_FILE), "/run/elsewhere").unwrap();
        assert_eq!(base(bundle.path()), Path::new("/run/elsewhere"));
        // Cut off by a full disk.
        fs::write(bundle.path().join(STATE_FILE), "").unwrap();
        assert_eq!(base(bundle.path()), usual);
    }

    #[test]
    fn of_a_pod_that_was_ending_no_account_is_kept_and_its_hooks_run_once() {
        for (ending, hooks_are_left) in [(Ending::Emptied, false), (Ending::Inhabited, true)] {
            let root = tempfile::tempdir().unwrap();
            let base = root.path().join("brig");
            let dir = StateDir::new(&base, "ns", "c1").unwrap();
            dir.create().unwrap();
            // It ends when it is told to, but not in order.
            let mut shim = Command::new("sleep").arg("60").spawn().unwrap();
            let mut vmm = Command::new("sleep").arg("60").spawn().unwrap();
            let journal = Journal {
                vmm: Identity::of(vmm.id()),
                ending: Some(ending),
                ..Journal::new(Identity::of(shim.id()).unwrap())
            };
            dir.write(&journal).unwrap();
            assert_eq!(cleaned(&dir), (vmm.id(), hooks_are_left));
            shim.wait().unwrap();
            assert!(!vmm.wait().unwrap().success());
            assert!(Remains::beside(&base).all().is_empty());
            assert_eq!(dir.read().unwrap(), None);
        }
    }

    #[test]
    fn a_socket_is_removed_only_when_nobody_answers() {
        let bundle = tempfile::tempdir().unwrap();
        let socket = bundle.path().join("s");
        fs::write(
            bundle.path().join(ADDRESS_FILE),
            format!("unix://{}", socket.display()),
        )
        .unwrap();
        let server = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        remove_socket(bundle.path());
        assert!(socket.exists());
        drop(server);
        remove_socket(bundle.path());
        assert!(!socket.exists());
    }

    #[test]
    fn the_response_says_killed() {
        let bytes = respond(7, SystemTime::now()).unwrap();
        let response = DeleteResponse::parse_from_bytes(&bytes).unwrap();
        assert_eq!((response.pid, response.exit_status), (7, 137));
        assert!(response.exited_at.seconds > 1_600_000_000);
    }
}
