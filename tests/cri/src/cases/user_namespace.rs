//! `hostUsers: false`: a pod whose ids mean others outside, and volumes whose owners are mapped.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};

use anyhow::Result;
use brig_tests::node::check::{contains_one, equal};
use k8s_cri::v1::{IdMapping, Int64Value, Mount, NamespaceMode, NamespaceOption, UserNamespace};

use super::config_volumes::Atomic;
use crate::container::{Container, ContainerSpec};
use crate::mounted::Mounted;
use crate::node::Directory;
use crate::pod::Pod;
use crate::suite::{Case, SLEEP, Suite, case, not_here, refused};

pub const CASES: &[Case] = &[
    case(
        "security",
        "user namespace: root inside is nobody outside",
        user_namespace,
    ),
    case(
        "security",
        "user namespace: a volume's files keep their owners",
        owners,
    ),
    case(
        "security",
        "user namespace: copies and memory have the owners of the node's",
        owners_in_memory,
    ),
    case(
        "security",
        "user namespace: what no pod can have is refused",
        impossible,
    ),
];

fn map() -> Vec<IdMapping> {
    vec![IdMapping {
        host_id: 200_000,
        container_id: 0,
        length: 65_536,
    }]
}

fn pod(suite: &Suite, name: &str) -> Result<Pod> {
    let ask = |namespaces: &mut NamespaceOption| {
        namespaces.userns_options = Some(UserNamespace {
            mode: NamespaceMode::Pod.into(),
            uids: map(),
            gids: map(),
        });
    };
    match suite.pod(name).namespaces(ask).run(&suite.cri) {
        // 1.6 does not know it, and 2.x asks the runtime's features: those of a newer runc.
        Err(error) if suite.containerd != "1.7" && format!("{error:#}").contains("not support") => {
            not_here(format!("{error:#}"))
        }
        other => other,
    }
}

fn impossible(suite: &mut Suite) -> Result<()> {
    if suite.containerd == "1.6" {
        return not_here("containerd 1.6 does not read the field");
    }
    let one = |container_id: u32, length: u32| IdMapping {
        host_id: 200_000,
        container_id,
        length,
    };
    for (what, mode, map) in [
        ("mode CONTAINER", NamespaceMode::Container, vec![]),
        ("mode TARGET", NamespaceMode::Target, vec![]),
        ("mode NODE with a map", NamespaceMode::Node, map()),
        ("mode POD without a map", NamespaceMode::Pod, vec![]),
        (
            "a map without root",
            NamespaceMode::Pod,
            vec![one(1, 65_536)],
        ),
        ("a map of no ids", NamespaceMode::Pod, vec![one(0, 0)]),
        (
            "a map of two lines",
            NamespaceMode::Pod,
            vec![one(0, 10), one(10, 10)],
        ),
    ] {
        let ask = |namespaces: &mut NamespaceOption| {
            namespaces.userns_options = Some(UserNamespace {
                mode: mode.into(),
                uids: map.clone(),
                gids: map,
            });
        };
        let name = format!("userns-{}", what.to_lowercase().replace(' ', "-"));
        let run = suite.pod(&name).namespaces(ask).run(&suite.cri);
        // By containerd, the shim, or runc: each has its own words.
        let words = ["user", "mapping", "mapped", "invalid argument"];
        refused(what, run, &words)?;
    }
    Ok(())
}

fn start(suite: &Suite, container: ContainerSpec<'_>) -> Result<Container> {
    match container.start() {
        // 2.x wants each volume idmapped, also its own three files, and asks the runtime first.
        Err(error)
            if !suite.is_brig() && format!("{error:#}").contains("idmap mounts not supported") =>
        {
            not_here(format!("this runc has no idmapped mounts: {error:#}"))
        }
        other => other,
    }
}

fn user_namespace(suite: &mut Suite) -> Result<()> {
    let pod = pod(suite, "user-namespace")?;
    let container = start(suite, pod.container("main", SLEEP))?;
    let script = "cat /proc/self/uid_map | awk '{ print $1, $2, $3 }'; id -u; touch /made && stat -c %u /made; touch /dev/shm/made";
    equal(
        "map, uid, owner of a file",
        "0 200000 65536\n0\n0",
        container.sh(script)?,
    )?;
    contains_one(
        "a mount of proc that only the node's root may",
        &["not permitted", "denied"],
        &container.sh_fails(
            "mount -t tmpfs none /mnt 2>&1 || mknod /dev/zz b 8 0 2>&1; mknod /zz b 8 0",
        )?,
    )
}

/// As kubelet asks for the volumes of such a pod.
fn mapped(mount: &mut Mount) {
    mount.uid_mappings = map();
    mount.gid_mappings = map();
}

fn since_2(suite: &Suite) -> Result<()> {
    match suite.containerd.starts_with("1.") {
        true => not_here("containerd maps a pod's volumes since 2.0"),
        false => Ok(()),
    }
}

fn as_app(container: ContainerSpec<'_>) -> ContainerSpec<'_> {
    container.security(|security| {
        security.run_as_user = Some(Int64Value { value: 1000 });
        security.run_as_group = Some(Int64Value { value: 1000 });
        security.supplemental_groups = vec![2000];
    })
}

fn owners(suite: &mut Suite) -> Result<()> {
    since_2(suite)?;
    let pod = pod(suite, "owners")?;
    let volume = Directory::new("owners")?;
    for (name, owner) in [("root", 0), ("app", 1000), ("stranger", 70_000)] {
        chown(volume.file(name, name)?, Some(owner), Some(owner))?;
    }
    // fsGroup: 2000.
    let group = Directory::new("owners-group")?;
    chown(&group.path, Some(0), Some(2000))?;
    fs::set_permissions(&group.path, fs::Permissions::from_mode(0o2770))?;
    let mount = |container: &str| {
        pod.container(container, SLEEP)
            .mount_with(&volume.path, "/v", mapped)
            .mount_with(&group.path, "/g", mapped)
    };
    let root = start(suite, mount("root"))?;
    equal(
        "owners as root sees them: its own, another's, one of no map",
        "0 1000 65534",
        root.sh("cd /v && echo $(stat -c %u root app stranger)")?,
    )?;
    root.sh("echo x > /v/made && mkdir /g/made && chown 1000:1000 /v/app && mv /v/app /v/moved && ln /v/made /v/hard")?;
    let app = start(suite, as_app(mount("app")))?;
    equal("what root has made", "0", app.sh("stat -c %u /v/made")?)?;
    app.sh("echo x > /g/file")?;
    contains_one(
        "a write to root's",
        &["denied"],
        &app.sh_fails("echo y > /v/made")?,
    )?;
    let owner = |path: std::path::PathBuf| -> Result<(u32, u32)> {
        let metadata = fs::metadata(path)?;
        Ok((metadata.uid(), metadata.gid()))
    };
    for (what, path, expected) in [
        ("root's file", volume.path.join("made"), (0, 0)),
        ("its hard link", volume.path.join("hard"), (0, 0)),
        ("the other's", volume.path.join("moved"), (1000, 1000)),
        ("root's in the group's", group.path.join("made"), (0, 2000)),
        ("a user's", group.path.join("file"), (1000, 2000)),
    ] {
        equal(&format!("on the node, {what}"), expected, owner(path)?)?;
    }
    Ok(())
}

fn owners_in_memory(suite: &mut Suite) -> Result<()> {
    since_2(suite)?;
    let pod = pod(suite, "owners-in-memory")?;
    let config = Atomic::new(
        "kubernetes.io~configmap",
        "owners-config",
        &[("color", "blue")],
    )?;
    let key = config.volume.path.join("color");
    chown(&key, Some(0), Some(2000))?;
    fs::set_permissions(&key, fs::Permissions::from_mode(0o640))?;
    let memory = Directory::volume("kubernetes.io~empty-dir", "owners-memory")?;
    let _tmpfs = Mounted::tmpfs(&memory.path, "size=4m,mode=2770,gid=2000")?;
    let container = pod
        .container("main", SLEEP)
        .mount_with(&config.volume.path, "/c", |mount| {
            mapped(mount);
            mount.readonly = true;
        })
        .mount_with(&memory.path, "/m", mapped);
    let container = start(suite, as_app(container))?;
    equal(
        "the key, read by the group",
        "0 2000 blue",
        container.sh("echo $(stat -Lc '%u %g' /c/color) $(cat /c/color)")?,
    )?;
    equal(
        "memory, and a file in it",
        "0 2000 1000 2000",
        container.sh("touch /m/f && echo $(stat -c '%u %g' /m /m/f)")?,
    )
}
