//! Pods that go on from a template, as kubelet has them.

use std::path::Path;

use anyhow::{Context, Result};
use brig_tests::node::check::equal;
use serde_json::Value;

use super::handlers::Own;
use crate::node;
use crate::pod::{Pod, PodSpec};
use crate::suite::{Case, SLEEP, Suite, case, refused};

pub const CASES: &[Case] = &[case(
    "sandbox",
    "template: a pod that fails for a reason of its own leaves it to the others",
    stays,
)];

/// The template of a handler's file, made now and dropped at the end.
pub(super) struct Template(String);

impl Template {
    pub(super) fn of(file: &Path) -> Result<Self> {
        let file = file.display().to_string();
        let built = node::run("brig", &["template", "build", "--json", "--config", &file])?;
        let built: Value = serde_json::from_str(&built)?;
        let key = built["template"].as_str().context("a template's key")?;
        Ok(Self(key.to_owned()))
    }

    /// The pod goes on from it.
    pub(super) fn is_of(&self, pod: &Pod) -> Result<()> {
        let told = node::run("brig", &["inspect", "--json", &pod.id])?;
        let told: Value = serde_json::from_str(&told)?;
        equal(
            "what it goes on from",
            self.0.as_str(),
            told["shim"]["template"].as_str().unwrap_or("-"),
        )
    }
}

impl Drop for Template {
    fn drop(&mut self) {
        let _ = node::run("brig", &["template", "drop", &self.0]);
    }
}

fn stays(suite: &mut Suite) -> Result<()> {
    let own = Own::new(suite, "template = true\n", &[])?;
    let template = Template::of(own.file())?;
    // What a tenant can have as often as he likes.
    let wrong = PodSpec::new(Own::HANDLER, "template-wrong")
        .sysctl("net.ipv4.ip_local_port_range", "x")
        .run(&suite.cri);
    refused("a sysctl", wrong, &["net.ipv4.ip_local_port_range"])?;
    let pod = PodSpec::new(Own::HANDLER, "template-right").run(&suite.cri)?;
    template.is_of(&pod)?;
    pod.container("main", SLEEP).start()?.sh("true").map(drop)
}
