//! ConfigMap, Secret, projected and downward-API volumes: directories that kubelet's atomic writer
//! replaces, generation by generation, under a running container.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::PathBuf;

use anyhow::Result;
use brig_tests::node::check::{contains, equal};
use brig_tests::node::clock;

use crate::container::{Container, eventually};
use crate::mounted::Mounted;
use crate::node::{Directory, PROBE};
use crate::suite::{Case, SLEEP, Suite, case, smoke};

pub const CASES: &[Case] = &[
    smoke(
        "volumes",
        "ConfigMap: read-only, updated atomically and live",
        config_map,
    ),
    smoke(
        "volumes",
        "ConfigMap: an update raises inotify in the container",
        inotify,
    ),
    case(
        "volumes",
        "projected and downward-API volumes are updated live",
        projected,
    ),
    case(
        "volumes",
        "ConfigMap by subPath: one file, as it was at the start",
        sub_path,
    ),
    case(
        "volumes",
        "Secret: modes are kept and a user may read it",
        secret,
    ),
    case(
        "volumes",
        "ConfigMap: files have the node's times, also when a container is started again",
        times,
    ),
];

/// A volume of one of these kinds, with the keys `color` and `shape`.
pub struct Atomic {
    /// The directory that is mounted.
    pub volume: Directory,
    generation: u32,
}

impl Atomic {
    /// Makes it, in its first generation.
    pub fn new(kind: &str, name: &str, keys: &[(&str, &str)]) -> Result<Self> {
        let volume = Directory::volume(kind, name)?;
        let mut atomic = Self {
            volume,
            generation: 0,
        };
        atomic.write(keys)?;
        for (key, _) in keys {
            symlink(format!("..data/{key}"), atomic.volume.path.join(key))?;
        }
        Ok(atomic)
    }

    fn directory(&self) -> PathBuf {
        self.volume.path.join(format!("..2026_{}", self.generation))
    }

    /// Writes a new generation as kubelet does: `..data` is a symbolic link that a rename replaces;
    /// the old generation goes.
    pub fn write(&mut self, keys: &[(&str, &str)]) -> Result<()> {
        let old = self.directory();
        self.generation += 1;
        let new = self.directory();
        fs::create_dir(&new)?;
        for (key, text) in keys {
            fs::write(new.join(key), text)?;
        }
        let next = self.volume.path.join("..data_tmp");
        symlink(new.file_name().unwrap_or_default(), &next)?;
        fs::rename(&next, self.volume.path.join("..data"))?;
        if self.generation > 1 {
            fs::remove_dir_all(old)?;
        }
        Ok(())
    }
}

const FIRST: &[(&str, &str)] = &[("color", "red 1\n"), ("shape", "round 1\n")];
const SECOND: &[(&str, &str)] = &[("color", "blue 2\n"), ("shape", "square 2\n")];

fn sees(container: &Container, directory: &str, text: &str) -> Result<()> {
    eventually("the update is seen", clock::seconds(3), || {
        let color = format!("{directory}/color");
        let shape = format!("{directory}/shape");
        let said = container.exec(&["cat", &color, &shape])?.text();
        Ok((said == text).then_some(()))
    })
}

fn config_map(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let mut map = Atomic::new("kubernetes.io~configmap", "settings", FIRST)?;
    let container = shared
        .pod
        .container("config-map", SLEEP)
        .mount_readonly(&map.volume.path, "/config")
        .start()?;
    equal(
        "listing and key",
        "color\nshape\nred 1",
        container.sh("ls /config; cat /config/color")?,
    )?;
    for script in [
        "echo x > /config/color",
        "touch /config/new",
        "rm /config/shape",
    ] {
        contains(
            script,
            "Read-only file system",
            &container.sh_fails(script)?,
        )?;
    }
    map.write(SECOND)?;
    sees(&container, "/config", "blue 2\nsquare 2")?;
    // A second container, made after the update, and gone before the next.
    let (_later, status) = shared
        .pod
        .container("later", &["grep", "-q", "blue 2", "/config/color"])
        .mount_readonly(&map.volume.path, "/config")
        .finish()?;
    equal("exit code of a later container", 0, status.exit_code)?;
    map.write(FIRST)?;
    sees(&container, "/config", "red 1\nround 1")
}

fn inotify(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let mut map = Atomic::new("kubernetes.io~configmap", "watched", FIRST)?;
    suite.image(PROBE)?;
    let container = shared
        .pod
        .container(
            "watcher",
            &["/bin/brig-probe", "watch", "/config", "..data"],
        )
        .image(PROBE.0)
        .mount_readonly(&map.volume.path, "/config")
        .start()?;
    container.wait_line("ready")?;
    map.write(SECOND)?;
    equal("exit code", 0, container.wait()?.exit_code)?;
    container.wait_line("AddWatchFlags(IN_MOVED_TO) ..data")
}

fn projected(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let mut token = Atomic::new("kubernetes.io~projected", "token", FIRST)?;
    let mut labels = Atomic::new("kubernetes.io~downward-api", "labels", FIRST)?;
    let container = shared
        .pod
        .container("projected", SLEEP)
        .mount_readonly(&token.volume.path, "/token")
        .mount_readonly(&labels.volume.path, "/labels")
        .start()?;
    sees(&container, "/token", "red 1\nround 1")?;
    sees(&container, "/labels", "red 1\nround 1")?;
    token.write(SECOND)?;
    labels.write(SECOND)?;
    sees(&container, "/token", "blue 2\nsquare 2")?;
    sees(&container, "/labels", "blue 2\nsquare 2")
}

fn sub_path(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let mut map = Atomic::new("kubernetes.io~configmap", "one-key", FIRST)?;
    // Kubelet binds what the key is at the start, its links resolved.
    let bound = map.volume.sub_path()?;
    fs::write(&bound, "")?;
    let key = fs::canonicalize(map.volume.path.join("color"))?;
    let _bound = Mounted::bind(&key, &bound)?;
    let container = shared
        .pod
        .container("config-sub-path", SLEEP)
        .mount_readonly(&bound, "/etc/app/color")
        .start()?;
    map.write(SECOND)?;
    equal(
        "listing and key",
        "color\nred 1",
        container.sh("ls /etc/app; cat /etc/app/color")?,
    )
}

fn secret(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let secret = Directory::volume("kubernetes.io~secret", "secret")?;
    let volume = &secret.path;
    let _tmpfs = Mounted::tmpfs(volume, "size=1m,mode=1777")?;
    fs::write(volume.join("token"), "sesame\n")?;
    chown(volume.join("token"), Some(0), Some(3000))?;
    fs::set_permissions(volume.join("token"), fs::Permissions::from_mode(0o440))?;
    let user = |groups: Vec<i64>| {
        move |security: &mut k8s_cri::v1::LinuxContainerSecurityContext| {
            security.run_as_user = Some(k8s_cri::v1::Int64Value { value: 1000 });
            security.supplemental_groups = groups;
        }
    };
    let container = shared
        .pod
        .container("secret", SLEEP)
        .mount_readonly(volume, "/run/secrets/token")
        .security(user(vec![3000]))
        .start()?;
    equal(
        "mode and text",
        "440\nsesame",
        container.sh("stat -c %a /run/secrets/token/token; cat /run/secrets/token/token")?,
    )?;
    let stranger = ["cat", "/run/secrets/token/token"];
    let (_stranger, status) = shared
        .pod
        .container("stranger", &stranger)
        .mount_readonly(volume, "/run/secrets/token")
        .security(user(Vec::new()))
        .finish()?;
    equal("exit code of one without the group", 1, status.exit_code)
}

fn times(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let mut map = Atomic::new("kubernetes.io~configmap", "times", FIRST)?;
    let names = [
        ".",
        "..data",
        "color",
        "..data/",
        "..data/color",
        "..data/shape",
    ];
    let same = |attempt: &str, map: &Atomic, names: &[&str]| -> Result<Container> {
        let container = shared
            .pod
            .container(&format!("times-{attempt}"), SLEEP)
            .mount_readonly(&map.volume.path, "/config")
            .start()?;
        for name in names {
            let stat = fs::symlink_metadata(map.volume.path.join(name))?;
            equal(
                name,
                stat.mtime().to_string(),
                container.sh(&format!("stat -c %Y /config/{name}"))?,
            )?;
        }
        Ok(container)
    };
    // A copy's own time would be another second.
    std::thread::sleep(clock::seconds(2));
    for attempt in ["first", "again"] {
        same(attempt, &map, &names)?.remove()?;
        std::thread::sleep(clock::seconds(2));
    }
    let container = same("updated", &map, &names)?;
    map.write(SECOND)?;
    sees(&container, "/config", "blue 2\nsquare 2")?;
    let stat = fs::metadata(map.volume.path.join("color"))?;
    equal(
        "after an update",
        stat.mtime().to_string(),
        container.sh("stat -L -c %Y /config/color")?,
    )
}
