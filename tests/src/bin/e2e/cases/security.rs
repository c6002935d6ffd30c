//! What a process may do, seen from inside by the probe: users, capabilities, seccomp, limits.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use brig_tests::node::check::{equal, field, that};
use brig_tests::node::ctr::{self, Run};
use serde_json::{Value, json};

use crate::suite::{Case, PROBE, PROBE_IMAGE, Suite, case, smoke};

/// Capabilities of containerd's default spec.
const DEFAULT_CAPS: &str = "00000000a80425fb";
/// The same without CAP_CHOWN (0) and with CAP_SYS_TIME (25).
const CHANGED_CAPS: &str = "00000000aa0425fa";
const CAP_NET_RAW: u64 = 1 << 13;

pub const CASES: &[Case] = &[
    smoke(
        "security",
        "a container has containerd's defaults and no more",
        defaults,
    ),
    case(
        "security",
        "flags of ctr hold for init and for an exec",
        restricted,
    ),
    case(
        "security",
        "setuid and setcap binaries gain what no_new_privs allows",
        set_id,
    ),
    case(
        "security",
        "a spec's limits, groups, masks and ambient capabilities hold",
        from_spec,
    ),
];

fn defaults(suite: &mut Suite) -> Result<()> {
    let facts = suite.shared()?.probe(&["facts"])?;
    for set in ["permitted", "effective", "bounding"] {
        field(&facts, &format!("/caps/{set}"), DEFAULT_CAPS)?;
    }
    field(&facts, "/caps/inheritable", "0000000000000000")?;
    field(&facts, "/caps/ambient", "0000000000000000")?;
    field(&facts, "/no_new_privs", true)?;
    field(&facts, "/seccomp", 0)?;
    field(&facts, "/uids", json!([0, 0, 0, 0]))?;
    field(&facts, "/root_write", "ok")?;
    field(&facts, "/rlimits/nofile", json!([1024, 1024]))?;
    for (path, state) in facts["masked"].as_object().context("no masked paths")? {
        that(
            &format!("{path} is masked, not {state}"),
            state == "empty" || state == "absent",
        )?;
    }
    for (path, readonly) in facts["readonly"]
        .as_object()
        .context("no read-only paths")?
    {
        that(
            &format!("{path} is read-only"),
            *readonly != Value::Bool(false),
        )?;
    }
    let devices = facts["devices"].to_string();
    for device in ["null", "zero", "full", "random", "urandom", "tty", "ptmx"] {
        that(
            &format!("/dev/{device} is there"),
            devices.contains(&format!("\"{device}\"")),
        )?;
    }
    for device in ["kvm", "mem", "vda", "port", "vsock", "kmsg"] {
        that(
            &format!("/dev/{device} is not there"),
            !devices.contains(&format!("\"{device}\"")),
        )?;
    }
    Ok(())
}

/// A seccomp profile that refuses two system calls with errno values of their own.
fn profile() -> Value {
    json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [
            {"names": ["keyctl"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95},
            {"names": ["personality"], "action": "SCMP_ACT_ERRNO"},
        ],
    })
}

fn scratch(name: &str) -> Result<PathBuf> {
    let dir = Path::new("/run/brig-e2e");
    fs::create_dir_all(dir)?;
    Ok(dir.join(name))
}

fn restricted(suite: &mut Suite) -> Result<()> {
    let file = scratch("seccomp.json")?;
    fs::write(&file, profile().to_string())?;
    let run = suite
        .probe("restricted", &["sleep"])
        .flag("--read-only")
        .flag("--seccomp")
        .with("--seccomp-profile", &file.to_string_lossy())
        .with("--cap-add", "CAP_SYS_TIME")
        .with("--cap-drop", "CAP_CHOWN")
        .with("--env", "BRIG_PROBE_MARK=1")
        .with("--cwd", "/work");
    let container = suite.ctr.start(&run)?;
    let facts = container.probe(&["facts"])?;
    field(&facts, "/root_write", "EROFS")?;
    field(&facts, "/caps/effective", CHANGED_CAPS)?;
    field(&facts, "/caps/bounding", CHANGED_CAPS)?;
    field(&facts, "/seccomp", 2)?;
    field(&facts, "/seccomp_effects/keyctl", "EOPNOTSUPP")?;
    field(&facts, "/seccomp_effects/personality", "EPERM")?;
    field(&facts, "/seccomp_effects/getppid", "ok")?;
    field(&facts, "/cwd", "/work")?;
    that(
        "the environment has what --env set",
        facts["env"].to_string().contains("BRIG_PROBE_MARK"),
    )?;
    // Init's own state, from its status.
    let status = container
        .exec(&[PROBE, "read", "/proc/1/status"])?
        .success()?;
    let text = status.text();
    for line in [
        "Seccomp:\t2".to_owned(),
        "NoNewPrivs:\t1".to_owned(),
        format!("CapEff:\t{CHANGED_CAPS}"),
    ] {
        that(
            &format!("init's status has '{line}'"),
            text.lines().any(|found| found == line),
        )?;
    }
    Ok(())
}

fn effective(facts: &Value) -> Result<u64> {
    let text = facts["caps"]["effective"]
        .as_str()
        .context("no capabilities")?;
    Ok(u64::from_str_radix(text, 16)?)
}

fn set_id(suite: &mut Suite) -> Result<()> {
    // `ctr run` of 1.6 knows no user: there only what is executed in the container has one, without its groups.
    let user_of_exec = suite.containerd.starts_with("1.6");
    let mut run = suite.probe("setid", &["sleep"]).flag("--allow-new-privs");
    if !user_of_exec {
        run = run.with("--user", "app");
    }
    let container = suite.ctr.start(&run)?;
    let probe = |args: &[&str]| -> Result<Value> {
        if user_of_exec {
            let all = [&[PROBE], args].concat();
            ctr::json(&container.exec_with(&["--user", "1000"], &all)?.success()?)
        } else {
            container.probe(args)
        }
    };
    let own = probe(&["facts"])?;
    field(&own, "/uids", json!([1000, 1000, 1000, 1000]))?;
    if !user_of_exec {
        field(&own, "/gids/0", 1000)?;
        that(
            "group extra (2000) is among the supplementary ones",
            own["groups"]
                .as_array()
                .is_some_and(|groups| groups.contains(&json!(2000))),
        )?;
    }
    field(&own, "/no_new_privs", false)?;
    equal("effective capabilities of a user", 0, effective(&own)?)?;
    let setuid = probe(&["privileges", "/bin/probe-setuid"])?;
    field(&setuid, "/uids", json!([1000, 0, 0, 0]))?;
    let setcap = probe(&["privileges", "/bin/probe-setcap"])?;
    field(&setcap, "/uids", json!([1000, 1000, 1000, 1000]))?;
    equal(
        "effective capabilities of the setcap binary",
        CAP_NET_RAW,
        effective(&setcap)?,
    )?;
    // The same binaries where no_new_privs holds.
    let shared = suite.shared()?;
    for binary in ["/bin/probe-setuid", "/bin/probe-setcap"] {
        let outcome = shared
            .exec_with(&["--user", "1000"], &[PROBE, "privileges", binary])?
            .success()?;
        let facts = ctr::json(&outcome)?;
        field(&facts, "/uids", json!([1000, 1000, 1000, 1000]))?;
        equal(binary, 0, effective(&facts)?)?;
    }
    Ok(())
}

/// A root file system in a directory of the node, for containers that come with a spec of their own.
pub fn rootfs() -> Result<PathBuf> {
    let root = scratch("rootfs")?;
    for directory in [
        "bin", "proc", "sys", "dev", "etc", "run", "tmp", "work", "masked",
    ] {
        fs::create_dir_all(root.join(directory))?;
    }
    fs::copy("/host/bin/brig-probe", root.join("bin/brig-probe"))?;
    fs::write(root.join("masked/secret"), "visible")?;
    fs::write(root.join("etc/passwd"), "root:x:0:0::/:/bin/brig-probe\n")?;
    Ok(root)
}

fn from_spec(suite: &mut Suite) -> Result<()> {
    let root = rootfs()?;
    let text = suite.ctr.ok(&["oci", "spec"])?;
    let mut spec: Value = serde_json::from_str(&text)?;
    spec["root"] = json!({"path": root, "readonly": true});
    spec["hostname"] = json!("from-spec");
    spec["process"]["args"] = json!([PROBE, "facts"]);
    spec["process"]["user"] =
        json!({"uid": 1234, "gid": 2345, "additionalGids": [10, 70000], "umask": 63});
    spec["process"]["oomScoreAdj"] = json!(500);
    spec["process"]["rlimits"] = json!([
        {"type": "RLIMIT_NOFILE", "soft": 333, "hard": 444},
        {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
        {"type": "RLIMIT_NPROC", "soft": 500, "hard": 600},
    ]);
    for set in [
        "bounding",
        "permitted",
        "effective",
        "inheritable",
        "ambient",
    ] {
        spec["process"]["capabilities"][set] = json!(["CAP_NET_BIND_SERVICE", "CAP_KILL"]);
    }
    spec["linux"]["maskedPaths"]
        .as_array_mut()
        .context("no masked paths")?
        .push(json!("/masked"));
    spec["linux"]["sysctl"] = json!({"net.ipv4.ip_unprivileged_port_start": "80"});
    spec["linux"]["cgroupsPath"] = json!("/brig-e2e/from-spec");
    let file = scratch("config.json")?;
    fs::write(&file, spec.to_string())?;

    let run = Run::new("spec", PROBE_IMAGE, &[]);
    let mut command = suite
        .ctr
        .command(&["run", "--rm", "--runtime", &suite.ctr.runtime]);
    command.arg("--config").arg(&file).arg(&run.id);
    let outcome = brig_tests::node::process::run(command, brig_tests::node::clock::seconds(12));
    if !matches!(&outcome, Ok(outcome) if outcome.code == 0) {
        suite.ctr.remove(&run.id);
    }
    let facts = ctr::json(&outcome?.success()?)?;
    // CAP_KILL is 5, CAP_NET_BIND_SERVICE 10.
    for set in [
        "bounding",
        "permitted",
        "effective",
        "inheritable",
        "ambient",
    ] {
        field(&facts, &format!("/caps/{set}"), "0000000000000420")?;
    }
    field(&facts, "/uids", json!([1234, 1234, 1234, 1234]))?;
    field(&facts, "/gids", json!([2345, 2345, 2345, 2345]))?;
    let groups = facts["groups"].to_string();
    that(
        &format!("supplementary groups have 10 and 70000, not {groups}"),
        groups.contains("10,") && groups.contains("70000"),
    )?;
    field(&facts, "/umask", "0077")?;
    field(&facts, "/oom_score_adj", "500")?;
    field(&facts, "/rlimits/nofile", json!([333, 444]))?;
    field(&facts, "/rlimits/core", json!([0, 0]))?;
    field(&facts, "/rlimits/nproc", json!([500, 600]))?;
    field(&facts, "/hostname", "from-spec")?;
    field(&facts, "/root_write", "EROFS")?;
    that("init is PID 1", facts["pid"] == 1)
}
