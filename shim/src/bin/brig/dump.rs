//! `brig dump`: a support bundle of one pod, living or not, to be handed to somebody else. There are no environments,
//! arguments, specifications or values of annotations in it, as none of its parts have any.

use std::fs::{File, Permissions};
use std::io::{self, Write};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use brig_shim::containerd::debug_service::Method;
use brig_shim::error::{Error, Kind, Result};
use brig_shim::log::rfc3339;
use brig_shim::node::journal::StateDir;
use serde_json::{Value, json};

use crate::cli;
use crate::inspect;
use crate::look;
use crate::pods;
use crate::shims;
use crate::terminal;

/// A file of the bundle.
type Part = (&'static str, Vec<u8>);

/// Writes a bundle of the pod to `into`, or to `brig-ID.tar` here, or to standard output for `-`. Says where it is.
///
/// # Errors
/// `NotFound` for a pod that is neither there nor remembered, `InvalidArgument` if several are meant, and what the file
/// system says.
pub fn dump(base: &Path, pod: &cli::Pod, into: Option<&Path>, as_json: bool) -> Result<String> {
    let (id, mut parts) = match pods::find_here(base, pod) {
        Ok(row) => (row.id.clone(), living(base, &row)?),
        Err(several) if several.kind != Kind::NotFound => return Err(several),
        Err(missing) => match pods::remembered(base, pod)? {
            Some(account) => (
                account["id"].as_str().unwrap_or("pod").to_owned(),
                gone(&account),
            ),
            None => return Err(missing),
        },
    };
    parts.insert(0, ("about.json", pretty(&about())));
    let failed = |path: &Path, error: &io::Error| {
        Error::io(format_args!("cannot write {}", path.display()), error)
    };
    if into == Some(Path::new("-")) {
        let mut bundle = Vec::new();
        let written = write(&mut bundle, &id, &parts);
        written.map_err(|error| Error::io("the bundle", &error))?;
        terminal::send(&bundle)?;
        return Ok(String::new());
    }
    let name = format!("brig-{id}.tar");
    let path = into.unwrap_or(Path::new(&name));
    let written = private(path).and_then(|file| write(file, &id, &parts));
    written.map_err(|error| failed(path, &error))?;
    let names: Vec<&str> = parts.iter().map(|(name, _)| *name).collect();
    Ok(if as_json {
        format!("{}\n", json!({ "file": path, "parts": names }))
    } else {
        format!("{}: {}\n", path.display(), names.join(", "))
    })
}

/// Root's alone, and never through a link that somebody has put there.
fn private(path: &Path) -> io::Result<File> {
    use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
    let mut options = File::options();
    options.write(true).create(true).truncate(true).mode(0o600);
    options.custom_flags(libc::O_NOFOLLOW);
    let file = options.open(path)?;
    if file.metadata()?.is_file() {
        // Also one that was there.
        file.set_permissions(Permissions::from_mode(0o600))?;
    }
    Ok(file)
}

fn living(base: &Path, row: &pods::Row) -> Result<Vec<Part>> {
    let dir = StateDir::new(base, &row.namespace, &row.id)?;
    let pod = cli::Pod {
        namespace: Some(row.namespace.clone()),
        id: row.id.clone(),
    };
    let mut parts = vec![("pod.json", pretty(&inspect::described(base, &pod)?))];
    if let Ok(timeline) = dir.read_timeline() {
        parts.push(("timeline.json", timeline));
    }
    let mut missing = Vec::new();
    if let Some(socket) = row.to_ask() {
        let mut add = |name: &'static str, answer: Result<Vec<u8>>| match answer {
            Ok(bytes) => parts.push((name, bytes)),
            // A pod in trouble is what bundles are for: the rest of it is worth having.
            Err(error) => missing.push(format!("{name}: {error}\n")),
        };
        let counters = shims::ask(&socket, Method::Counters, &Value::Null, shims::PATIENCE);
        add("counters.json", counters);
        let log = look::lines(&socket, 0);
        add(
            "log.txt",
            log.map(|lines| {
                let lines = lines.into_iter().map(|line| line.text + "\n");
                lines.collect::<String>().into_bytes()
            }),
        );
        for (name, word) in [
            ("dmesg.txt", "dmesg"),
            ("memory.txt", "free"),
            ("network.txt", "ip"),
        ] {
            add(name, look::bytes(&socket, &[word.to_owned()]));
        }
    }
    if !missing.is_empty() {
        parts.push(("missing.txt", missing.concat().into_bytes()));
    }
    Ok(parts)
}

fn gone(account: &Value) -> Vec<Part> {
    let mut rest = account.clone();
    let mut parts = Vec::new();
    if let Some(rest) = rest.as_object_mut() {
        if let Some(Value::Array(lines)) = rest.remove("log") {
            let lines = lines.iter().filter_map(Value::as_str);
            let log: String = lines.map(|line| format!("{line}\n")).collect();
            parts.push(("log.txt", log.into_bytes()));
        }
        if let Some(timeline) = rest
            .remove("timeline")
            .filter(|timeline| !timeline.is_null())
        {
            parts.push(("timeline.json", timeline.to_string().into_bytes()));
        }
    }
    parts.insert(0, ("pod.json", pretty(&rest)));
    parts
}

fn about() -> Value {
    let uname = rustix::system::uname();
    json!({
        "brig": env!("CARGO_PKG_VERSION"),
        "at": rfc3339(SystemTime::now()),
        "nodeKernel": uname.release().to_string_lossy(),
        "machine": uname.machine().to_string_lossy(),
    })
}

fn pretty(value: &Value) -> Vec<u8> {
    format!("{value:#}\n").into_bytes()
}

fn write(into: impl Write, id: &str, parts: &[Part]) -> io::Result<()> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.map_or(0, |since| since.as_secs());
    let mut archive = tar::Builder::new(into);
    for (name, bytes) in parts {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o600);
        header.set_mtime(now);
        header.set_size(u64::try_from(bytes.len()).map_err(io::Error::other)?);
        archive.append_data(&mut header, format!("brig-{id}/{name}"), bytes.as_slice())?;
    }
    archive.into_inner()?.flush()
}

#[cfg(test)]
mod tests {
    use super::*;
    use brig_shim::node::remains::Remains;
    use std::collections::BTreeMap;
    use std::io::Read as _;

    fn read(path: &Path) -> BTreeMap<String, String> {
        let mut archive = tar::Archive::new(File::open(path).unwrap());
        let entries = archive.entries().unwrap().map(|entry| {
            let mut entry = entry.unwrap();
            let name = entry.path().unwrap().display().to_string();
            let mut text = String::new();
            entry.read_to_string(&mut text).unwrap();
            (name, text)
        });
        entries.collect()
    }

    fn meant(id: &str) -> cli::Pod {
        cli::Pod {
            namespace: None,
            id: id.to_owned(),
        }
    }

    #[test]
    fn a_pod_that_has_failed_and_gone_is_dumped_by_id_or_name() {
        let root = tempfile::tempdir().unwrap();
        let base = root.path().join("brig");
        std::fs::create_dir(&base).unwrap();
        let remains = Remains::beside(&base);
        for (id, reason) in [
            ("abc1", "older"),
            ("abd2", "it panicked"),
            ("abc1", "newer"),
        ] {
            let account = json!({
                "namespace": "k8s.io", "id": id, "reason": reason, "log": ["one", "two"],
                "pod": { "namespace": "shop", "name": format!("web-{id}"), "uid": "u" },
                "timeline": { "marks": [] },
            });
            remains
                .keep(SystemTime::now(), "unavailable", &account)
                .unwrap();
        }
        let file = base.join("x.tar");
        for word in ["abd", "web-abd2", "shop/web-abd2"] {
            let said = dump(&base, &meant(word), Some(&file), false).unwrap();
            assert!(said.contains("pod.json, log.txt, timeline.json"), "{said}");
            let parts = read(&file);
            assert_eq!(parts["brig-abd2/log.txt"], "one\ntwo\n");
            assert!(parts["brig-abd2/pod.json"].contains("it panicked"));
        }
        dump(&base, &meant("abc"), Some(&file), false).unwrap();
        assert!(read(&file)["brig-abc1/pod.json"].contains("newer"));
        let error = dump(&base, &meant("ab"), Some(&file), false).unwrap_err();
        assert!(error.message.contains("which have failed"), "{error}");
        let error = dump(&base, &meant("nobody"), Some(&file), false).unwrap_err();
        assert!(error.message.contains("no pod nobody"), "{error}");
        // Other commands say where to look.
        let error = pods::find(&base, &meant("shop/web-abd2")).unwrap_err();
        assert!(
            error.message.contains("'brig dump abd2' has why"),
            "{error}"
        );
        let error = pods::find(&base, &meant("nobody")).unwrap_err();
        assert!(error.message.contains("no pod nobody"), "{error}");
        // Of living ones that may be meant none is passed over for one that is gone.
        pods::fake(&base, "k8s.io", "ab1");
        pods::fake(&base, "k8s.io", "ab2");
        let error = dump(&base, &meant("ab"), Some(&file), false).unwrap_err();
        assert!(error.message.contains("may be one of these:"), "{error}");
    }

    #[test]
    fn a_bundle_is_not_written_through_a_link() {
        let base = tempfile::tempdir().unwrap();
        pods::fake(base.path(), "default", "web");
        let (link, target) = (base.path().join("link"), base.path().join("target"));
        std::os::unix::fs::symlink(&target, &link).unwrap();
        assert!(dump(base.path(), &meant("web"), Some(&link), false).is_err());
        assert!(!target.exists());
        dump(base.path(), &meant("web"), Some(&target), false).unwrap();
        assert!(read(&target).contains_key("brig-web/pod.json"));
    }
}
