//! `/etc/hostname`, `/etc/hosts` and `/etc/resolv.conf` of a pod that was made through the Sandbox API: with a
//! sandbox container CRI writes them, here nobody does unless the runtime.
//!
//! They lie in the pod's own directory and are mounted into each container that brings none of its own, as
//! CRI mounts its. Blocking code.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::sandbox_config::{Dns, PodConfig};

/// Names in the pod's directory, and below `/etc` in a container.
const NAMES: [&str; 3] = ["hostname", "hosts", "resolv.conf"];

/// Writes the files into `dir`, which is made.
///
/// # Errors
/// What the host says.
pub fn write(dir: &Path, config: &PodConfig) -> Result<()> {
    let failed = |error: io::Error| {
        Error::io(
            format_args!("cannot write the pod's files in {}", dir.display()),
            &error,
        )
    };
    let of_node = |path: &str| match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        result => result,
    };
    fs::create_dir_all(dir).map_err(failed)?;
    let resolver = if config.dns.is_empty() {
        of_node("/etc/resolv.conf").map_err(failed)?
    } else {
        resolv_conf(&config.dns).into_bytes()
    };
    let hostname = if config.hostname.is_empty() {
        of_node("/proc/sys/kernel/hostname").map_err(failed)?
    } else {
        format!("{}\n", config.hostname).into_bytes()
    };
    let contents = [hostname, of_node("/etc/hosts").map_err(failed)?, resolver];
    for (name, content) in NAMES.iter().zip(contents) {
        fs::write(dir.join(name), content).map_err(failed)?;
    }
    Ok(())
}

/// resolv.conf(5).
fn resolv_conf(dns: &Dns) -> String {
    let mut text = String::new();
    // One line each: a value of the pod's must not make more of them.
    let clean = |value: &String| value.replace(['\n', '\r'], " ");
    let joined = |values: &[String]| values.iter().map(clean).collect::<Vec<_>>().join(" ");
    if !dns.searches.is_empty() {
        text += &format!("search {}\n", joined(&dns.searches));
    }
    for server in &dns.servers {
        text += &format!("nameserver {}\n", clean(server));
    }
    if !dns.options.is_empty() {
        text += &format!("options {}\n", joined(&dns.options));
    }
    text
}

/// Adds a mount of each file to a container's `config.json`, unless something is mounted there already.
///
/// # Errors
/// `InvalidArgument` when it is no OCI spec.
pub fn mount(dir: &Path, spec: &[u8]) -> Result<Vec<u8>> {
    let invalid = |what: String| Error::invalid(format!("config.json is not an OCI spec: {what}"));
    let mut spec: Value = serde_json::from_slice(spec).map_err(|e| invalid(e.to_string()))?;
    let readonly = spec.pointer("/root/readonly") == Some(&Value::Bool(true));
    let object = spec.as_object_mut();
    let object = object.ok_or_else(|| invalid("it is no object".to_owned()))?;
    let mounts = object.entry("mounts").or_insert(Value::Null);
    if mounts.is_null() {
        *mounts = json!([]);
    }
    let mounts = mounts.as_array_mut();
    let mounts = mounts.ok_or_else(|| invalid("mounts is no list".to_owned()))?;
    for name in NAMES {
        let destination = PathBuf::from("/etc").join(name);
        let taken = mounts.iter().any(|mount| {
            let place = mount.get("destination").and_then(Value::as_str);
            place.is_some_and(|place| Path::new(place) == destination)
        });
        if !taken {
            mounts.push(json!({
                "destination": destination,
                "type": "bind",
                "source": dir.join(name),
                "options": ["rbind", "rprivate", if readonly { "ro" } else { "rw" }],
            }));
        }
    }
    serde_json::to_vec(&spec).map_err(|error| Error::internal(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox_config::tests::{bytes, options};
    use crate::spec::Spec;
    use proptest::prelude::*;

    #[test]
    fn a_pods_resolver_is_written_and_the_nodes_is_the_default() {
        let dir = tempfile::tempdir().unwrap();
        let files = dir.path().join("files");
        let mut config = PodConfig::parse(Some(&options(bytes(2, b"web-0")))).unwrap();
        write(&files, &config).unwrap();
        let read = |name: &str| fs::read_to_string(files.join(name)).unwrap();
        assert_eq!(read("hostname"), "web-0\n");
        let node = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
        assert_eq!(read("resolv.conf"), node);
        config.dns = Dns {
            servers: vec!["10.0.0.10".into(), "fd00::a".into()],
            searches: vec!["a.svc".into(), "svc\nnameserver 6.6.6.6".into()],
            options: vec!["ndots:5".into()],
        };
        write(&files, &config).unwrap();
        assert_eq!(
            read("resolv.conf"),
            "search a.svc svc nameserver 6.6.6.6\nnameserver 10.0.0.10\nnameserver fd00::a\n\
             options ndots:5\n"
        );
    }

    #[test]
    fn a_container_gets_the_files_it_does_not_bring() {
        let dir = Path::new("/run/brig/n/s/files");
        let spec = br#"{"root":{"path":"r","readonly":true},"x":{"y":1},
            "mounts":[{"destination":"/etc/hosts","type":"bind","source":"/srv/hosts"}]}"#;
        let mounted = mount(dir, spec).unwrap();
        let value: Value = serde_json::from_slice(&mounted).unwrap();
        assert_eq!(value["x"]["y"], 1);
        let binds = Spec::parse(&mounted).unwrap().bind_mounts().unwrap();
        let places: Vec<_> = binds
            .iter()
            .map(|bind| (bind.destination.as_str(), bind.readonly))
            .collect();
        assert_eq!(
            places,
            [
                ("/etc/hosts", false),
                ("/etc/hostname", true),
                ("/etc/resolv.conf", true)
            ]
        );
        assert_eq!(binds[0].source, Path::new("/srv/hosts"));
        assert_eq!(binds[1].source, dir.join("hostname"));
        let mounted = mount(dir, b"{}").unwrap();
        let binds = Spec::parse(&mounted).unwrap().bind_mounts().unwrap();
        assert!(binds.len() == 3 && binds.iter().all(|bind| !bind.readonly));
    }

    proptest! {
        #[test]
        fn any_bytes_are_patched_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = mount(Path::new("/d"), &bytes);
        }
    }
}
