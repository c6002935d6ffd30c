//! `/etc/hostname`, `/etc/hosts`, `/etc/resolv.conf` and the shared `/dev/shm` of a pod that was made through
//! the Sandbox API: with a sandbox container CRI makes them, here nobody does unless the runtime.
//!
//! They lie in the pod's own directory and each container that brings none of its own has them mounted, as CRI
//! mounts its: writable unless the root file system is read-only. What a container writes stays in the guest,
//! because the directory is in the node's memory: the guest has copies ([`is_one`]), one of each for all containers, as
//! long as the pod lives. Blocking code.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::asked::sandbox_config::{Dns, PodConfig};
use crate::error::{Error, Result};

/// The directory of the files in the pod's own, a name that nobody else gives to one.
pub const DIRECTORY: &str = "brig-sandbox-files";
/// Names in it, and below `/etc` in a container.
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
    let resolver = match &config.dns {
        None => of_node("/etc/resolv.conf").map_err(failed)?,
        Some(dns) => resolv_conf(dns).into_bytes(),
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

/// Whether a mount's source is one of these files, which the guest gets as a copy that is the pod's from then on.
#[must_use]
pub fn is_one(source: &Path) -> bool {
    let inside = source.parent().and_then(Path::file_name);
    let name = source.file_name().and_then(|name| name.to_str());
    inside.is_some_and(|inside| inside == DIRECTORY)
        && name.is_some_and(|name| NAMES.contains(&name))
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

/// Adds a mount of each file and of the memory that the containers of `sandbox` share to a container's
/// `config.json`, unless a volume is mounted there.
///
/// # Errors
/// `InvalidArgument` when it is no OCI spec.
pub fn mount(dir: &Path, sandbox: &str, spec: &[u8]) -> Result<Vec<u8>> {
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
    // By the source that CRI gives it, which is no file of the node to anybody here.
    let shared = dir.join("sandboxes").join(sandbox).join("shm");
    let is_shm = |mount: &Value| {
        let place = mount.get("destination").and_then(Value::as_str);
        place.is_some_and(|place| Path::new(place) == Path::new("/dev/shm"))
    };
    let own = |mount: &Value| mount.get("type").and_then(Value::as_str) == Some("tmpfs");
    mounts.retain(|mount| !(is_shm(mount) && own(mount)));
    if !mounts.iter().any(is_shm) {
        mounts.push(json!({
            "destination": "/dev/shm",
            "type": "bind",
            "source": shared,
            "options": ["rbind", "rprivate", "rw"],
        }));
    }
    serde_json::to_vec(&spec).map_err(|error| Error::internal(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::asked::sandbox_config::tests::{bytes, options};
    use crate::asked::spec::Spec;
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
        config.dns = Some(Dns::default());
        write(&files, &config).unwrap();
        assert_eq!(read("resolv.conf"), "");
        config.dns = Some(Dns {
            servers: vec!["10.0.0.10".into(), "fd00::a".into()],
            searches: vec!["a.svc".into(), "svc\nnameserver 6.6.6.6".into()],
            options: vec!["ndots:5".into()],
        });
        write(&files, &config).unwrap();
        assert_eq!(
            read("resolv.conf"),
            "search a.svc svc nameserver 6.6.6.6\nnameserver 10.0.0.10\nnameserver fd00::a\n\
             options ndots:5\n"
        );
    }

    #[test]
    fn a_container_gets_the_files_it_does_not_bring() {
        let dir = Path::new("/run/brig/n/s").join(DIRECTORY);
        let dir = dir.as_path();
        let spec = br#"{"root":{"path":"r","readonly":true},"x":{"y":1},
            "annotations":{"io.kubernetes.cri.sandbox-id":"s"},
            "mounts":[{"destination":"/etc/hosts","type":"bind","source":"/srv/hosts"}]}"#;
        let mounted = mount(dir, "s", spec).unwrap();
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
        let ours = |index: usize| is_one(&binds[index].source);
        assert!(!ours(0) && ours(1) && ours(2));
        assert!(!is_one(&dir.join("other")) && !is_one(Path::new("/srv/hosts")));
        let bare = br#"{"annotations":{"io.kubernetes.cri.sandbox-id":"s"}}"#;
        let mounted = mount(dir, "s", bare).unwrap();
        let binds = Spec::parse(&mounted).unwrap().bind_mounts().unwrap();
        assert!(binds.len() == 3 && binds.iter().all(|bind| !bind.readonly));
    }

    #[test]
    fn containers_share_the_pods_memory_unless_a_volume_is_there() {
        let spec = |shm: &str| {
            let spec = format!(
                r#"{{"annotations":{{"io.kubernetes.cri.sandbox-id":"s"}},"mounts":[{shm}]}}"#
            );
            let mounted = mount(Path::new("/f"), "s", spec.as_bytes()).unwrap();
            Spec::parse(&mounted).unwrap()
        };
        for shm in [
            "",
            r#"{"destination":"/dev/shm","type":"tmpfs","source":"shm"}"#,
        ] {
            let spec = spec(shm);
            assert_eq!(spec.sandbox_shm(), Some(Path::new("/f/sandboxes/s/shm")));
            // Not one of the node's.
            assert_eq!(spec.bind_mounts().unwrap().len(), 3);
        }
        let volume = r#"{"destination":"/dev/shm","type":"bind","source":"/srv/v"}"#;
        assert_eq!(spec(volume).sandbox_shm(), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_patched_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = mount(Path::new("/d"), "s", &bytes);
        }
    }
}
