//! `brig check`: what a VM needs of this node, each as one line with its fix.

mod containerd;
mod devices;
mod drivers;
mod finding;
mod handler;
mod linux;

use std::fs;
use std::path::{Path, PathBuf};

use brig_shim::asked::config::{Config, Netfilter};
use brig_shim::error::Error;
use brig_shim::guest::forward;
use brig_shim::guest::vm::host::{open_kernel, open_kvm};
use brig_shim::node::vfio::Node;
use brig_shim::node::{cgroup, network};

use containerd::Containerd;
use drivers::Drivers;

use crate::others;

pub use containerd::{files as containerd_files, merges as containerd_merges};
pub use finding::Finding;

/// Checks this node with the configuration of a handler, or the default one.
#[must_use]
pub fn node(checked: Option<&Path>) -> Vec<Finding> {
    let config = match Config::load(checked) {
        Ok(config) => config,
        Err(error) => {
            let finding = Finding::of("configuration", Err(error.message));
            return vec![
                finding.or("mend what it names: 'brig config default' explains every key"),
            ];
        }
    };
    let message = |error: Error| error.message;
    let user = (!rustix::process::geteuid().is_root()).then(|| {
        Finding::of("user", Err("not root, as the shim is".to_owned()))
            .or("run brig as root: what is said below may only hold for this user")
    });
    let kernel = open_kernel(&config.kernel).map(|_| config.kernel.display().to_string());
    let mut findings = vec![
        Finding::of(
            "configuration",
            Ok(format!(
                "{} vCPU, {} MiB",
                config.vcpus,
                config.memory / brig_shim::asked::config::MIB
            )),
        ),
        linux::finding(&rustix::system::uname().release().to_string_lossy()),
        Finding::of("kvm", kvm(&config.kvm)),
        Finding::of("kernel", kernel.map_err(message)),
        modules(&config.modules),
    ];
    findings.extend(config.driver_bundle.as_deref().map(driver_bundle));
    findings.extend([
        file("initramfs", &config.initramfs)
            .or("install Brig again, or set initramfs in its configuration"),
        file("brig-vmm", &config.vmm).or("install Brig again, or set vmm in its configuration"),
        Finding::of("user namespaces", user_namespaces())
            .or("set the sysctl user.max_user_namespaces above zero"),
        cgroups(),
        port_forward(),
        packet_filter(config.netfilter),
    ]);
    findings.splice(1..1, user);
    findings.extend(config.vhost_net.then(vhost_net));
    findings.extend(installations(&others::all()));
    let containerd = Containerd::find(Path::new("/proc"));
    findings.extend(containerd.findings());
    let node = Node::new();
    let survey = node.survey();
    let search = containerd.search();
    let mut drivers = Drivers::default();
    drivers.add(&config);
    for handler in containerd.handlers() {
        let told = handler::findings(handler, search.as_ref(), checked, &survey);
        findings.extend(told);
        if let Ok(config) = Config::load(handler.file.as_deref()) {
            drivers.add(&config);
        }
    }
    let process = containerd.process.as_ref();
    findings.extend(devices::findings(
        &config, &node, &survey, &drivers, process,
    ));
    findings
}

/// Several installations: pods get what containerd finds first, whichever is upgraded.
fn installations(all: &[PathBuf]) -> Option<Finding> {
    let [_, _, ..] = all else { return None };
    let places: Vec<_> = all
        .iter()
        .map(|place| place.display().to_string())
        .collect();
    let said = format!(
        "Brig is in {}: pods get the one that containerd finds first, whichever is upgraded",
        places.join(" and in ")
    );
    let fix = "remove all but one: PREFIX/current/bin/brig uninstall, or apt remove brig; what they share stays until the last";
    Some(Finding::of("installation", Err(said)).or(fix).noted())
}

/// What becomes of rules in a pod's network namespace that its guest cannot have.
fn packet_filter(policy: Netfilter) -> Finding {
    let result = match policy {
        Netfilter::Require => Ok("a pod whose namespace's rules its guest cannot have is refused"),
        Netfilter::Warn => Err(
            "netfilter = \"warn\": pods start without the rules of their namespace that their guest cannot have; the \
             shim's log names each",
        ),
        Netfilter::Ignore => Err(
            "netfilter = \"ignore\": rules in a pod's network namespace do not hold for the pod",
        ),
    };
    Finding::of(
        "packet filter",
        result.map(str::to_owned).map_err(str::to_owned),
    )
    .noted()
    .or("set netfilter = \"require\" in Brig's configuration, if pods need those rules")
}

/// Whether the node's kernel can move the frames of pods, where it is to.
fn vhost_net() -> Finding {
    let found = network::open_vhosts(1);
    Finding::of(
        "vhost-net",
        found.map(|_| "the node's kernel moves the frames of pods".to_owned()),
    )
    .noted()
    .or("modprobe vhost_net, or set vhost_net = false: until then the VMM moves them")
}

fn kvm(path: &Path) -> Result<String, String> {
    open_kvm(path).map_err(|error| error.message)?;
    brig_hypervisor::kvm::verdict().map_err(|error| error.to_string())?;
    Ok(path.display().to_string())
}

fn file(what: &'static str, path: &Path) -> Finding {
    let result = match fs::metadata(path) {
        Ok(metadata) if metadata.is_file() => Ok(path.display().to_string()),
        Ok(_) => Err(format!("{} is not a file", path.display())),
        Err(error) => Err(format!("{}: {error}", path.display())),
    };
    Finding::of(what, result)
}

/// Pods run without them.
fn modules(path: &Path) -> Finding {
    file("modules", path).noted().or(
        "install it, or set modules in Brig's configuration: until then pods have no kernel modules",
    )
}

/// Pods without devices of the node run without it.
fn driver_bundle(path: &Path) -> Finding {
    file("driver bundle", path).noted().or(
        "put it there, or set driver_bundle in the handler's configuration: until then containers that are given a device \
         are refused",
    )
}

/// The VMM's jail begins with one.
fn user_namespaces() -> Result<String, String> {
    let path = "/proc/sys/user/max_user_namespaces";
    let limit = fs::read_to_string(path).map_err(|error| format!("{path}: {error}"))?;
    if limit.trim() == "0" {
        return Err("switched off".to_owned());
    }
    Ok(format!("up to {}", limit.trim()))
}

fn cgroups() -> Finding {
    let result = cgroup::check().map(|()| "v2".to_owned());
    Finding::of("cgroup", result.map_err(|error| error.message))
}

/// Pods run without it.
fn port_forward() -> Finding {
    let result = forward::check().map(|()| "by BPF socket lookup".to_owned());
    Finding::of("port-forward", result.map_err(|error| error.to_string()))
        .noted()
        .or("run brig as root, on a kernel of 5.9 or later with BPF")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_installation_is_told() {
        let places = ["/opt/brig", "/usr/lib/brig"].map(PathBuf::from);
        assert!(installations(&places[..1]).is_none());
        let told = installations(&places).map(|finding| (finding.is_fatal(), finding.to_string()));
        let (is_fatal, told) = told.unwrap();
        assert!(
            !is_fatal && told.contains("/opt/brig and in /usr/lib/brig"),
            "{told}"
        );
    }

    #[test]
    fn what_is_missing_is_fatal_and_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.toml");
        fs::write(
            &path,
            "kernel = \"/nonexistent/vmlinux\"\nkvm = \"/nonexistent/kvm\"",
        )
        .unwrap();
        let findings = node(Some(&path));
        for what in ["kvm", "kernel"] {
            let finding = findings
                .iter()
                .find(|finding| finding.what == what)
                .unwrap();
            assert!(finding.is_fatal(), "{finding}");
            assert!(finding.to_string().contains("/nonexistent/"), "{finding}");
        }
        let modules = findings
            .iter()
            .find(|finding| finding.what == "modules")
            .unwrap();
        assert!(!modules.is_fatal(), "{modules}");
        fs::write(&path, "vcpus = 0").unwrap();
        assert!(node(Some(&path))[0].is_fatal());
        fs::write(&path, "devices = [\"ffff:ff:1f.7\"]").unwrap();
        let findings = node(Some(&path));
        let listed = findings.iter().find(|finding| finding.what == "devices");
        let said = listed.map(ToString::to_string).unwrap_or_default();
        assert!(
            said.contains("ffff:ff:1f.7 is on the list of the configuration"),
            "{said}"
        );
    }
}
