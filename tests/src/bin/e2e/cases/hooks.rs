//! OCI hooks on the node, as nerdctl sets a container's network up with them.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use anyhow::Result;
use brig_tests::node::check::{contains, that};
use brig_tests::node::ctr::Run;
use brig_tests::node::{clock, process};
use serde_json::{Value, json};

use super::network::answer_once;
use super::security;
use crate::suite::{Case, PROBE, PROBE_IMAGE, Suite, case};

const LINK: &str = "brige2eh";
const NODE: &str = "10.98.0.1";
const POD: &str = "10.98.0.2";
const STOPPED: &str = "/run/brig-e2e/hook.stopped";

pub const CASES: &[Case] = &[case(
    "hooks",
    "createRuntime makes the container's network, poststop is told of its end",
    network,
)];

fn script(name: &str, text: &str) -> Result<Value> {
    let path = Path::new("/run/brig-e2e").join(name);
    fs::write(&path, text)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(json!([{"path": path, "args": [name], "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]}]))
}

fn network(suite: &mut Suite) -> Result<()> {
    let root = security::rootfs()?;
    let _ = fs::remove_file(STOPPED);
    let made = format!(
        "#!/bin/sh\nset -e\npid=$(sed 's/.*\"pid\":\\([0-9]*\\).*/\\1/')\n\
         ip link add {LINK} type veth peer name eth0 netns $pid\n\
         ip address add {NODE}/24 dev {LINK}\nip link set {LINK} up\n\
         nsenter -t $pid -n ip address add {POD}/24 dev eth0\nnsenter -t $pid -n ip link set eth0 up\n"
    );
    let ended = format!("#!/bin/sh\ngrep -q '\"status\":\"stopped\"' && touch {STOPPED}\n");
    let mut spec: Value = serde_json::from_str(&suite.ctr.ok(&["oci", "spec"])?)?;
    spec["root"] = json!({"path": root, "readonly": true});
    spec["linux"]["cgroupsPath"] = json!("/brig-e2e/hooks");
    spec["hooks"] = json!({
        "createRuntime": script("hook.made", &made)?,
        "poststop": script("hook.ended", &ended)?,
    });
    let listener = TcpListener::bind(("0.0.0.0", 0))?;
    let target = format!("{NODE}:{}", listener.local_addr()?.port());
    spec["process"]["args"] = json!([PROBE, "connect", target]);
    let file = Path::new("/run/brig-e2e/hooks.json");
    fs::write(file, spec.to_string())?;
    let asked = answer_once(listener);

    let run = Run::new("hooks", PROBE_IMAGE, &[]);
    let mut command = suite
        .ctr
        .command(&["run", "--rm", "--runtime", &suite.ctr.runtime]);
    command.arg("--config").arg(file).arg(&run.id);
    let outcome = process::run(command, clock::seconds(12));
    if !matches!(&outcome, Ok(outcome) if outcome.code == 0) {
        suite.ctr.remove(&run.id);
    }
    let mut link = Command::new("ip");
    link.args(["link", "delete", LINK]);
    // It goes with the network namespace of the VM; this is for one that failed before.
    let _ = process::run(link, clock::seconds(3));
    contains(
        "the node's answer",
        &format!("hello {POD}"),
        &outcome?.success()?.text(),
    )?;
    let request = asked
        .join()
        .map_err(|_| anyhow::anyhow!("the listener panicked"))??;
    contains("the container's request", "GET /", &request)?;
    that("poststop was told of the end", Path::new(STOPPED).exists())
}
