//! One handler of containerd's for Brig: whether containerd finds its shim, and whether pods could start with its own
//! configuration. Its pods are concerned and no other's, so nothing here is fatal.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use brig_shim::node::vfio::Survey;
use serde_json::json;

use super::devices;
use super::finding::Finding;
use crate::configuration;
use crate::configured::Configured;

/// The runtime's name as it is to be.
const RUNTIME: &str = "io.containerd.brig.v2";

/// Where containerd looks for the program of a shim.
pub struct Search {
    /// Its PATH.
    pub path: OsString,
    /// The directory of its own program, where it looks last.
    pub beside: PathBuf,
}

impl Search {
    /// The first program of this name, as containerd finds it.
    fn find(&self, name: &str) -> Option<PathBuf> {
        // A directory that is not named from the root is passed over.
        let named = std::env::split_paths(&self.path).filter(|dir| dir.is_absolute());
        let mut places = named.chain([self.beside.clone()]);
        places.find_map(|dir| Some(dir.join(name)).filter(|path| is_program(path)))
    }
}

fn is_program(path: &Path) -> bool {
    let metadata = fs::metadata(path);
    metadata.is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}

/// All about a handler; `checked` is the configuration that is checked as a whole. Without `search` nothing is said of its
/// shim.
pub fn findings(
    handler: &Configured,
    search: Option<&Search>,
    checked: Option<&Path>,
    survey: &Survey<'_>,
) -> Vec<Finding> {
    let name = &handler.name;
    let whose = match &handler.file {
        Some(file) => format!("{name} ({})", file.display()),
        None => name.clone(),
    };
    let note = |(said, fix): (String, String)| {
        let finding = Finding::of("handler", Err(format!("{whose}: {said}")));
        finding.or(fix).noted()
    };
    let shim = search.map(|search| shim(handler, search)).transpose();
    let mut findings = Vec::new();
    findings.extend(shim.as_ref().err().cloned().map(note));
    if handler.file.as_deref() != checked {
        findings.extend(own_configuration(handler, &whose, survey, &note));
    }
    if findings.is_empty() {
        let by = match &shim {
            Ok(Some(shim)) => format!(": {}", shim.display()),
            _ => String::new(),
        };
        findings.push(Finding::of("handler", Ok(format!("{whose}{by}"))));
    }
    let parts = json!({
        "name": name,
        "configuration": handler.file,
        "shim": shim.ok().flatten(),
    });
    let about = |finding: Finding| finding.about("handler", parts.clone());
    findings.into_iter().map(about).collect()
}

/// The program that containerd starts for its pods.
fn shim(handler: &Configured, search: &Search) -> Result<PathBuf, (String, String)> {
    let runtime = Path::new(&handler.runtime);
    let named = handler.program.as_deref();
    let by_path = named.or(Some(runtime).filter(|path| path.is_absolute()));
    if let Some(path) = by_path {
        let key = if named.is_some() {
            "runtime_path"
        } else {
            "runtime_type"
        };
        if path.is_absolute() && is_program(path) {
            return Ok(path.to_owned());
        }
        let said = format!(
            "{key} is {}, and no program is there, so its pods are refused",
            path.display()
        );
        let fix = format!(
            "leave out runtime_path and let runtime_type be \"{RUNTIME}\", or name where the shim is"
        );
        return Err((said, fix));
    }
    let mut words = handler.runtime.rsplit('.');
    let version = words.next().unwrap_or_default();
    let kind = words.next().unwrap_or_default();
    let program = format!("containerd-shim-{kind}-{version}");
    search.find(&program).ok_or_else(|| {
        if handler.runtime == RUNTIME {
            let path = search.path.to_string_lossy();
            let said = format!("containerd finds no {program} in its PATH ({path}), so its pods are refused");
            let fix = "install Brig again, or name that program in the handler's runtime_path";
            (said, fix.to_owned())
        } else {
            let said = format!(
                "its runtime_type is {}, for which containerd finds no {program}, so its pods are refused",
                handler.runtime
            );
            (said, format!("let it be \"{RUNTIME}\""))
        }
    })
}

/// What is to be said of a configuration that is another one than what is checked as a whole.
fn own_configuration(
    handler: &Configured,
    whose: &str,
    survey: &Survey<'_>,
    note: &impl Fn((String, String)) -> Finding,
) -> Vec<Finding> {
    let file = handler.file.as_deref();
    let config = match configuration::usable(file) {
        Ok(config) => config,
        Err(error) => {
            let fix = "mend that: 'brig config default' explains every key";
            let said = format!("{}, so its pods are refused", error.message);
            return vec![note((said, fix.to_owned()))];
        }
    };
    let room = devices::room(&config);
    let mut findings = devices::listed(survey, &config, &room, &format!("handler {whose}"));
    if let Some(bundle) = config.driver_bundle.filter(|bundle| !bundle.is_file()) {
        let fix = "put it there, or set driver_bundle in that file: until then containers that are given a device are refused";
        let said = format!("its driver bundle {} is not there", bundle.display());
        findings.push(note((said, fix.to_owned())));
    }
    if let Some(socket) = config.pod_resources.filter(|socket| !socket.exists()) {
        let fix = "start kubelet, or set pod_resources in that file to where its socket is: until then its pods are refused";
        let said = format!(
            "kubelet's socket {} (pod_resources) is not there",
            socket.display()
        );
        findings.push(note((said, fix.to_owned())));
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::super::finding::said;
    use super::*;
    use brig_shim::node::vfio::Node;

    fn handler(name: &str, file: Option<&Path>) -> Configured {
        Configured {
            name: name.to_owned(),
            file: file.map(Path::to_owned),
            runtime: RUNTIME.to_owned(),
            program: None,
        }
    }

    fn program(path: &Path, mode: u32) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "").unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn a_handler_that_names_what_the_node_does_not_have_is_told_with_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("gpu.toml");
        let there = ["kernel", "initramfs", "vmm"].map(|key| {
            fs::write(dir.path().join(key), "").unwrap();
            format!("{key} = \"{}\"\n", dir.path().join(key).display())
        });
        let of = |text: &str| {
            fs::write(&file, format!("{text}{}", there.concat())).unwrap();
            let node = Node::new();
            let handler = handler("brig-gpu", Some(&file));
            said(&findings(&handler, None, None, &node.survey()))
        };
        let good = of("vcpus = 2\n");
        assert_eq!(
            good,
            format!("ok    handler          brig-gpu ({})\n", file.display())
        );
        let missing = of(
            "devices = [\"ffff:ff:1f.7\"]\ndriver_bundle = \"/nonexistent/b\"\npod_resources = \"/nonexistent/s\"\n",
        );
        for words in [
            "ffff:ff:1f.7 is on the list of handler brig-gpu (",
            "this node has no such device, so its pods are refused",
            "its driver bundle /nonexistent/b is not there",
            "kubelet's socket /nonexistent/s",
        ] {
            assert!(missing.contains(words), "{missing}");
        }
        let wrong = of("vcpu = 2\n");
        assert!(wrong.contains("so its pods are refused"), "{wrong}");
        fs::remove_file(dir.path().join("kernel")).unwrap();
        let wrong = of("vcpus = 2\n");
        assert!(wrong.contains("/kernel is not there"), "{wrong}");
        let node = Node::new();
        let gone = handler("brig-gpu", Some(Path::new("/nonexistent/x.toml")));
        let told = findings(&gone, None, None, &node.survey());
        assert_eq!(
            told[0].json()["handler"]["configuration"],
            "/nonexistent/x.toml"
        );
        assert!(
            said(&told).contains("/nonexistent/x.toml cannot be read"),
            "{}",
            said(&told)
        );
        // The configuration that is checked as a whole is not checked again.
        let told = said(&findings(&gone, None, gone.file.as_deref(), &node.survey()));
        assert!(told.starts_with("ok"), "{told}");
    }

    #[test]
    fn a_shim_is_looked_for_where_containerd_looks() {
        let dir = tempfile::tempdir().unwrap();
        let place = |path: &str| dir.path().join(path);
        let search = Search {
            path: std::env::join_paths([place("a"), "b".into(), place("c")]).unwrap(),
            beside: place("own"),
        };
        let node = Node::new();
        let survey = node.survey();
        let told = |handler: &Configured| findings(handler, Some(&search), None, &survey);
        let brig = handler("brig", None);
        let none = said(&told(&brig));
        let words = format!(
            "no containerd-shim-brig-v2 in its PATH ({}",
            place("a").display()
        );
        assert!(none.contains(&words), "{none}");
        // Neither a directory nor what nobody may execute.
        fs::create_dir_all(place("a/containerd-shim-brig-v2")).unwrap();
        program(&place("c/containerd-shim-brig-v2"), 0o644);
        assert!(said(&told(&brig)).starts_with("note"));
        for dir in ["own", "c"] {
            let path = place(dir).join("containerd-shim-brig-v2");
            program(&path, 0o755);
            let told = told(&brig);
            assert_eq!(
                told[0].json()["handler"]["shim"],
                path.display().to_string()
            );
            assert!(told[0].to_string().starts_with("ok"));
        }
        let other = Configured {
            runtime: "io.containerd.brig.v3".to_owned(),
            ..brig.clone()
        };
        let none = said(&told(&other));
        assert!(
            none.contains("no containerd-shim-brig-v3")
                && none.contains("let it be \"io.containerd.brig.v2\"")
        );
        let mut by_path = Configured {
            program: Some(place("c/containerd-shim-brig-v2")),
            ..other
        };
        assert!(said(&told(&by_path)).starts_with("ok"));
        by_path.program = Some(place("c/gone"));
        assert!(said(&told(&by_path)).contains("runtime_path is "));
        by_path.program = None;
        by_path.runtime = place("gone/containerd-shim-brig-v2").display().to_string();
        assert!(said(&told(&by_path)).contains("runtime_type is "));
    }
}
