//! `brig check`: what a VM needs of this node, each as one line with its fix.

use std::fmt;
use std::fs;
use std::path::Path;

use brig_shim::asked::config::{Config, Netfilter};
use brig_shim::error::Error;
use brig_shim::guest::forward;
use brig_shim::guest::vm::host::{open_kernel, open_kvm};
use brig_shim::node::{cgroup, vfio};
use serde_json::{Value, json};

/// How a check came out.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    Good,
    Note,
    Fatal,
}

/// One line of the report.
#[derive(Debug)]
pub struct Finding {
    outcome: Outcome,
    what: &'static str,
    detail: String,
}

impl Finding {
    /// Whether no VM can start with it.
    #[must_use]
    pub fn is_fatal(&self) -> bool {
        self.outcome == Outcome::Fatal
    }

    /// For programs.
    #[must_use]
    pub fn json(&self) -> Value {
        let outcome = match self.outcome {
            Outcome::Good => "ok",
            Outcome::Note => "note",
            Outcome::Fatal => "fatal",
        };
        json!({ "check": self.what, "outcome": outcome, "detail": self.detail })
    }

    fn of(what: &'static str, result: Result<String, String>) -> Self {
        match result {
            Ok(detail) => Self {
                outcome: Outcome::Good,
                what,
                detail,
            },
            Err(detail) => Self {
                outcome: Outcome::Fatal,
                what,
                detail,
            },
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sign = match self.outcome {
            Outcome::Good => "ok  ",
            Outcome::Note => "note",
            Outcome::Fatal => "FAIL",
        };
        write!(f, "{sign}  {:<16} {}", self.what, self.detail)
    }
}

/// Checks this node with the configuration of a handler, or the default one.
#[must_use]
pub fn node(config: Option<&Path>) -> Vec<Finding> {
    let config = match Config::load(config) {
        Ok(config) => config,
        Err(error) => return vec![Finding::of("configuration", Err(error.message))],
    };
    let message = |error: Error| error.message;
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
        Finding::of("kvm", kvm(&config.kvm)),
        Finding::of("kernel", kernel.map_err(message)),
        modules(&config.modules),
    ];
    findings.extend(config.driver_bundle.as_deref().map(driver_bundle));
    findings.extend([
        file("initramfs", &config.initramfs),
        file("brig-vmm", &config.vmm),
        Finding::of("user namespaces", user_namespaces()),
        cgroups(),
        port_forward(),
        packet_filter(config.netfilter),
    ]);
    findings.extend(devices());
    findings
}

/// Each PCI device: whether a pod can have it. Pods run without.
fn devices() -> impl Iterator<Item = Finding> {
    vfio::Node::new()
        .survey()
        .into_iter()
        .map(|(what, verdict)| {
            let (outcome, said) = match verdict {
                Ok(said) => (Outcome::Good, said),
                Err(said) => (Outcome::Note, said),
            };
            Finding {
                outcome,
                what: "pci device",
                detail: format!("{what}: {said}"),
            }
        })
}

/// What becomes of rules in a pod's network namespace that its guest cannot have.
fn packet_filter(policy: Netfilter) -> Finding {
    let (outcome, detail) = match policy {
        Netfilter::Require => (
            Outcome::Good,
            "a pod whose namespace's rules its guest cannot have is refused",
        ),
        Netfilter::Warn => (
            Outcome::Note,
            "netfilter = \"warn\": pods start without the rules of their namespace that their guest cannot have; the \
             shim's log names each",
        ),
        Netfilter::Ignore => (
            Outcome::Note,
            "netfilter = \"ignore\": rules in a pod's network namespace do not hold for the pod",
        ),
    };
    Finding {
        outcome,
        what: "packet filter",
        detail: detail.to_owned(),
    }
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
    let mut finding = file("modules", path);
    if finding.is_fatal() {
        finding.outcome = Outcome::Note;
        finding.detail.push_str(
            "; pods have no kernel modules: install it or set modules in Brig's configuration",
        );
    }
    finding
}

/// Pods without devices of the node run without it.
fn driver_bundle(path: &Path) -> Finding {
    let mut finding = file("driver bundle", path);
    if finding.is_fatal() {
        finding.outcome = Outcome::Note;
        finding
            .detail
            .push_str("; containers that are given a device will be refused");
    }
    finding
}

/// The VMM's jail begins with one.
fn user_namespaces() -> Result<String, String> {
    let path = "/proc/sys/user/max_user_namespaces";
    let limit = fs::read_to_string(path).map_err(|error| format!("{path}: {error}"))?;
    if limit.trim() == "0" {
        return Err("switched off: set the sysctl user.max_user_namespaces above zero".to_owned());
    }
    Ok(format!("up to {}", limit.trim()))
}

fn cgroups() -> Finding {
    let v2 = cgroup::is_v2();
    Finding {
        outcome: if v2 { Outcome::Good } else { Outcome::Note },
        what: "cgroup",
        detail: if v2 {
            "v2"
        } else {
            "v1: pods are accounted by best effort"
        }
        .to_owned(),
    }
}

/// Pods run without it.
fn port_forward() -> Finding {
    let (outcome, detail) = match forward::check() {
        Ok(()) => (Outcome::Good, "by BPF socket lookup".to_owned()),
        Err(error) => (Outcome::Note, error.to_string()),
    };
    Finding {
        outcome,
        what: "port-forward",
        detail,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
    }
}
