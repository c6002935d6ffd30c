//! What `brig check` says of containerd and of its handlers is what becomes of their pods.

use std::process::Command;

use anyhow::{Context, Result, bail};
use brig_tests::node::check::{contains, equal, that};
use brig_tests::node::{clock, process};
use serde_json::{Value, json};

use super::handlers::Own;
use crate::node::{append_to_configuration, restart_and_reconnect};
use crate::pod::PodSpec;
use crate::suite::{Case, Suite, case};

pub const CASES: &[Case] = &[case(
    "sandbox",
    "what brig check says of containerd and its handlers is what becomes of their pods",
    handlers,
)];

/// All findings of `brig check`.
pub fn findings() -> Result<Vec<Value>> {
    let mut command = Command::new("brig");
    command.args(["check", "--json"]);
    // It ends with 1 where no pod can start, which is not asked here.
    let told = process::run(command, clock::seconds(10))?.text();
    let findings: Value = serde_json::from_str(&told).with_context(|| told.clone())?;
    Ok(findings.as_array().cloned().unwrap_or_default())
}

/// What is said of something, with what to do.
pub fn said(what: &str) -> Result<Vec<String>> {
    let findings = findings()?
        .into_iter()
        .filter(|finding| finding["check"] == what);
    Ok(findings
        .map(|finding| format!("{} {}", finding["detail"], finding["fix"]))
        .collect())
}

/// The finding for a handler, and what is said with it.
fn of(handler: &str) -> Result<(Value, String)> {
    let mut own = findings()?
        .into_iter()
        .filter(|finding| finding["handler"]["name"] == handler);
    let finding = own
        .next()
        .with_context(|| format!("nothing is said of {handler}"))?;
    let detail = finding["detail"].as_str().unwrap_or_default().to_owned();
    Ok((finding, detail))
}

/// Why a handler's pod is refused.
fn refusal(suite: &Suite, handler: &str) -> Result<String> {
    match PodSpec::new(handler, "checked").run(&suite.cri) {
        Ok(_) => bail!("a pod of {handler} was started"),
        Err(error) => Ok(format!("{error:#}")),
    }
}

fn runs(suite: &Suite, handler: &str) -> Result<()> {
    let pod = PodSpec::new(handler, "checked").run(&suite.cri);
    pod.with_context(|| format!("a pod of {handler}")).map(drop)
}

fn handlers(suite: &mut Suite) -> Result<()> {
    let own = Own::new(suite, "", &[])?;
    let containerd = &findings()?
        .into_iter()
        .find(|finding| finding["check"] == "containerd")
        .context("containerd")?;
    equal(
        "its outcome",
        "ok",
        containerd["outcome"].as_str().unwrap_or_default(),
    )?;
    let parts = &containerd["containerd"];
    equal(
        "its release",
        suite.containerd_release.trim_start_matches('v'),
        parts["release"].as_str().unwrap_or_default(),
    )?;
    let known = parts["handlers"].as_array().cloned().unwrap_or_default();
    that(
        &format!("its handlers: {known:?}"),
        known.contains(&json!("brig")) && known.contains(&json!(Own::HANDLER)),
    )?;
    let (finding, _) = of(Own::HANDLER)?;
    equal(
        "a good handler",
        "ok",
        finding["outcome"].as_str().unwrap_or_default(),
    )?;
    equal(
        "the shim of it",
        "/host/bin/containerd-shim-brig-v2",
        finding["handler"]["shim"].as_str().unwrap_or_default(),
    )?;
    runs(suite, Own::HANDLER)?;

    own.write("colour = 1\n")?;
    let (finding, detail) = of(Own::HANDLER)?;
    equal(
        "a wrong key",
        "note",
        finding["outcome"].as_str().unwrap_or_default(),
    )?;
    let sentence = "unknown key \"colour\"";
    contains("a wrong key, by check", sentence, &detail)?;
    contains("and by the pod", sentence, &refusal(suite, Own::HANDLER)?)?;
    own.remove()?;
    let (_, detail) = of(Own::HANDLER)?;
    let sentence = "own.toml cannot be read: No such file";
    contains("a file that is not there, by check", sentence, &detail)?;
    contains("and by the pod", sentence, &refusal(suite, Own::HANDLER)?)?;

    let late = |name: &str, version: u8| {
        format!(
            "[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.{name}]\n\
             runtime_type = \"io.containerd.brig.v{version}\"\n"
        )
    };
    append_to_configuration(&(late("brig-late", 2) + &late("brig-wrong", 3)))?;
    let told = said("containerd")?;
    that(
        &format!("a change after its start: {told:?}"),
        told.iter()
            .any(|line| line.contains("was started before /run/brig-node/config.toml was changed")),
    )?;
    let refused = refusal(suite, "brig-late")?;
    contains(
        "the handler that it does not know yet",
        "no runtime for \"brig-late\" is configured",
        &refused,
    )?;
    restart_and_reconnect(&suite.cri)?;
    let told = said("containerd")?;
    that(
        &format!("after a restart: {told:?}"),
        told.len() == 1 && told[0].ends_with("null"),
    )?;
    runs(suite, "brig-late")?;
    let (_, detail) = of("brig-wrong")?;
    let program = "containerd-shim-brig-v3";
    contains(
        "a shim that is not there, by check",
        &format!("finds no {program}"),
        &detail,
    )?;
    contains("and by the pod", program, &refusal(suite, "brig-wrong")?)
}
