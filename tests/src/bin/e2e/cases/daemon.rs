//! What each containerd asks of the shim's binary: `start` and its answer, the socket's place, `-info`. The
//! suite plays the daemon (`brig_tests::node::daemon`), because the node has no package of 2.2 and later.

use std::fs;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use brig_tests::node::check::{contains, equal, that};
use brig_tests::node::daemon::Daemon;
use brig_tests::node::daemon::bundle::{Bundle, Place, spec};
use brig_tests::node::daemon::connection::Connection;
use brig_tests::node::daemon::generation::{Endpoint, Generation};
use brig_tests::node::leaks::Snapshot;
use brig_tests::node::process;
use containerd_shim_protos::bootstrap_api::Extension;
use protobuf::well_known_types::any::Any;
use protobuf::{Message as _, MessageField};
use serde_json::Value;

use crate::suite::{Case, Suite, brig, patience};

pub const CASES: &[Case] = &[
    Case {
        smoke: true,
        ..brig(
            "daemon",
            "every containerd from 1.6 to 2.4 accepts the answer to start, for the pod and for its containers",
            answers,
        )
    },
    brig(
        "daemon",
        "the socket lies in socket_dir and is removed with the shim, also one that was killed",
        socket_dir,
    ),
    brig(
        "daemon",
        "fields and extensions of BootstrapParams that are not known are ignored",
        unknown,
    ),
    brig(
        "daemon",
        "a standard input of start that no containerd sends is refused by a sentence",
        garbage,
    ),
    brig(
        "daemon",
        "-info is a RuntimeInfo with the OCI features and the handler's options",
        info,
    ),
];

/// A bundle of a pause container; nothing is created in it.
fn pause_bundle(daemon: &Daemon, id: &str) -> Result<Bundle> {
    let netns = Path::new("/proc/1/ns/net");
    daemon.bundle(id, Some(&spec(id, &["/pause"], Place::Pause { netns })))
}

/// A shim that was started and has no task yet is told to end.
fn end_idle(daemon: &Daemon, bundle: &Bundle, endpoint: &Endpoint) -> Result<()> {
    let servers = daemon.servers();
    equal("servers of the pod", 1, servers.len())?;
    let connection = Connection::open(endpoint)?;
    connection.shutdown(&bundle.id)?;
    drop(connection);
    for server in servers {
        that(
            "the shim ends at Shutdown when it has no task",
            process::exited(server, patience())?,
        )?;
    }
    daemon.delete(bundle).map(drop)
}

fn answers(suite: &mut Suite) -> Result<()> {
    for generation in Generation::ALL {
        let daemon = Daemon::new(generation, &suite.ctr.runtime, "answers")?;
        let before = Snapshot::take();
        let result = (|| {
            let bundle = pause_bundle(&daemon, "pod")?;
            let endpoint = daemon.start(&bundle)?;
            let version = if generation.sends_params() { 3 } else { 2 };
            equal("version", version, endpoint.version)?;
            equal("again", endpoint.clone(), daemon.start(&bundle)?)?;
            let place = Place::Member {
                sandbox: "pod",
                pid: 1,
            };
            let member = daemon.bundle("app", Some(&spec("app", &["/app"], place)))?;
            equal("of a container", endpoint.clone(), daemon.start(&member)?)?;
            let connection = Connection::open(&endpoint)?;
            let told = connection.connect("pod")?;
            equal("the task's pid before Create", 0, told.task_pid)?;
            that("the shim's pid is told", told.shim_pid > 0)?;
            drop(connection);
            end_idle(&daemon, &bundle, &endpoint)
        })();
        result.with_context(|| format!("{generation:?}"))?;
        before.nothing_left(patience())?;
    }
    Ok(())
}

/// A directory that containerd is configured to keep shims' sockets in.
struct SocketDir(PathBuf);

impl SocketDir {
    fn new() -> Result<Self> {
        let path = PathBuf::from("/run/brigd-sockets");
        let _ = fs::remove_dir_all(&path);
        fs::DirBuilder::new().mode(0o711).create(&path)?;
        Ok(Self(path))
    }

    fn entries(&self) -> Result<Vec<PathBuf>> {
        fs::read_dir(&self.0)?
            .map(|entry| Ok(entry?.path()))
            .collect()
    }
}

impl Drop for SocketDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn socket_dir(suite: &mut Suite) -> Result<()> {
    for generation in [Generation::V2_2, Generation::V2_3, Generation::V2_4] {
        let dir = SocketDir::new()?;
        let mut daemon = Daemon::new(generation, &suite.ctr.runtime, "sockets")?;
        daemon.socket_dir = Some(dir.0.clone());
        for killed in [false, true] {
            let bundle = pause_bundle(&daemon, "pod")?;
            let endpoint = daemon.start(&bundle)?;
            let socket = endpoint.address.trim_start_matches("unix://");
            that(
                &format!(
                    "{generation:?}: the socket {socket} is in {}",
                    dir.0.display()
                ),
                Path::new(socket).parent() == Some(&dir.0),
            )?;
            let mode = fs::metadata(socket)?.permissions().mode() & 0o777;
            that(
                &format!("nobody else may talk to the shim, mode {mode:o}"),
                mode & 0o077 == 0,
            )?;
            if killed {
                daemon.kill_servers()?;
                daemon.delete(&bundle)?;
            } else {
                end_idle(&daemon, &bundle, &endpoint)?;
            }
            equal("sockets left", Vec::<PathBuf>::new(), dir.entries()?)?;
        }
    }
    Ok(())
}

fn unknown(suite: &mut Suite) -> Result<()> {
    let daemon = Daemon::new(Generation::V2_4, &suite.ctr.runtime, "unknown")?;
    let mut params = daemon.params("pod");
    params.extensions.push(Extension {
        value: MessageField::some(Any {
            type_url: "containerd.io/nri.v9.PluginConfig".to_owned(),
            value: vec![0xff; 40],
            ..Any::default()
        }),
        ..Extension::default()
    });
    params.extensions.push(Extension::default());
    let mut input = params.write_to_bytes()?;
    // Fields 40 (bytes), 41 (a number) and 42 (eight bytes), and a level of logging of the future.
    input.extend_from_slice(&[0xc2, 0x02, 3, b'a', b'b', b'c', 0xc8, 0x02, 7]);
    input.extend_from_slice(&[0xd1, 0x02, 1, 2, 3, 4, 5, 6, 7, 8, 0x18, 99]);
    let bundle = pause_bundle(&daemon, "pod")?;
    let endpoint = daemon.start_with(&bundle, input)?;
    equal("version", 3, endpoint.version)?;
    end_idle(&daemon, &bundle, &endpoint)
}

fn garbage(suite: &mut Suite) -> Result<()> {
    let daemon = Daemon::new(Generation::V2_3, &suite.ctr.runtime, "garbage")?;
    let before = Snapshot::take();
    let params = daemon.input("pod")?;
    let truncated = params
        .get(..params.len() - 1)
        .context("params are empty")?
        .to_vec();
    for (what, input) in [
        ("truncated BootstrapParams", truncated),
        ("JSON", b"{\"version\": 3}".to_vec()),
        ("no protobuf", vec![0xff; 64]),
    ] {
        let bundle = pause_bundle(&daemon, "pod")?;
        let outcome = daemon.run_start(&bundle, input)?;
        that(
            &format!("{what}: start fails, it exits with {}", outcome.code),
            outcome.code != 0,
        )?;
        equal("what is printed as an answer", "", outcome.text())?;
        contains(what, "standard input", &outcome.stderr)?;
        equal("lines of stderr", 1, outcome.stderr.trim().lines().count())?;
        equal("servers left", Vec::<i32>::new(), daemon.servers())?;
    }
    before.nothing_left(patience())
}

fn info(suite: &mut Suite) -> Result<()> {
    let mut daemon = Daemon::new(Generation::V2_4, &suite.ctr.runtime, "info")?;
    let options = |name: &str, value: &[u8]| Any {
        type_url: name.to_owned(),
        value: value.to_vec(),
        ..Any::default()
    };
    for options in [
        None,
        Some(options("runtimeoptions.v1.Options", b"\x12\x00")),
        // The handler of another runtime.
        Some(options("containerd.runc.v1.Options", b"\x48\x01")),
    ] {
        daemon.options.clone_from(&options);
        let info = daemon.info()?;
        equal("name", "io.containerd.brig.v2", info.name.as_str())?;
        that("there is a version", !info.version.version.is_empty())?;
        equal("options", options.as_ref(), info.options.as_ref())?;
        let features = info.features.as_ref().context("there are no features")?;
        // The name that containerd's typeurl knows runtime-spec's Features by; any other fails its decoding.
        equal(
            "the features' type",
            "types.containerd.io/opencontainers/runtime-spec/1/features/Features",
            features.type_url.as_str(),
        )?;
        let features: Value = serde_json::from_slice(&features.value)?;
        let has = |list: &Value, word: &str| {
            list.as_array()
                .is_some_and(|list| list.iter().any(|entry| entry == word))
        };
        // CRI makes RecursiveReadOnlyMounts of the first and UserNamespaces of the second.
        that(
            "rro is a mount option",
            has(&features["mountOptions"], "rro"),
        )?;
        that(
            "user is a namespace",
            has(&features["linux"]["namespaces"], "user"),
        )?;
    }
    let outcome = daemon.run_info(vec![0xff; 32])?;
    that("unreadable options are refused", outcome.code != 0)?;
    contains("the refusal", "standard input", &outcome.stderr)?;
    Ok(())
}
