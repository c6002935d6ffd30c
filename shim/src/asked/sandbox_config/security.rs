//! The security context of a pod (`runtime.v1.LinuxSandboxSecurityContext`), and what of it containerd's own
//! sandbox controller, or runc for the pause container, refuses (docs/sandbox-api.md).
//!
//! There is no pause process here that would have a user, a profile or a label; a pod that cannot be had with
//! a pause container must not be had without one either, or a mistake shows only on another node.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use serde_json::Value as Json;

use super::user_namespace::UserNamespace;
use crate::asked::wire::namespace_mode::NODE;
use crate::asked::wire::{Value, each_field, push_numbers, text, wrapped};
use crate::error::{Error, Result};

/// The largest user or group id that can be given to a process by number; containerd takes a larger one for a
/// name.
const MAX_NUMBER: i64 = i32::MAX as i64;
/// The largest supplemental group: `u32::MAX` is "none".
const MAX_GROUP: i64 = u32::MAX as i64 - 1;
/// The largest seccomp profile in bytes; the default one has 15 KiB.
const MAX_PROFILE: u64 = 4 << 20;
/// What profiles by path are called, before `SecurityProfile` came.
const LOCALHOST: &str = "localhost/";

/// `SecurityProfile.ProfileType`.
mod profile_type {
    pub(super) const RUNTIME_DEFAULT: u64 = 0;
    pub(super) const UNCONFINED: u64 = 1;
    pub(super) const LOCALHOST: u64 = 2;
}

/// The security context, as far as it is judged.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Security {
    namespaces: Namespaces,
    selinux_level: String,
    user: Option<i64>,
    group: Option<i64>,
    groups: Vec<i64>,
    privileged: bool,
    seccomp_path: String,
    seccomp: Option<Profile>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Namespaces {
    network: u64,
    pid: u64,
    ipc: u64,
    user: Option<UserNamespace>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Profile {
    kind: u64,
    reference: String,
}

impl Security {
    pub(super) fn read(bytes: &[u8]) -> protobuf::Result<Self> {
        let mut read = Self::default();
        each_field(bytes, |number, value| {
            match (number, value) {
                (1, Value::Bytes(options)) => read.namespaces = Namespaces::read(options)?,
                (2, Value::Bytes(selinux)) => each_field(selinux, |number, value| {
                    if let (4, Value::Bytes(level)) = (number, value) {
                        read.selinux_level = text(level)?;
                    }
                    Ok(())
                })?,
                (3, Value::Bytes(user)) => read.user = Some(wrapped(user)?),
                (5, groups) => push_numbers(&mut read.groups, &groups)?,
                (6, Value::Number(privileged)) => read.privileged = privileged != 0,
                (7, Value::Bytes(path)) => read.seccomp_path = text(path)?,
                (8, Value::Bytes(group)) => read.group = Some(wrapped(group)?),
                (9, Value::Bytes(profile)) => read.seccomp = Some(Profile::read(profile)?),
                _ => {}
            }
            Ok(())
        })?;
        Ok(read)
    }

    /// Whether the pod has a user namespace of its own.
    pub(super) fn has_user_namespace(&self) -> bool {
        let user = self.namespaces.user.as_ref();
        user.is_some_and(UserNamespace::is_own)
    }

    /// The group outside of one of its user namespace's.
    pub(super) fn group_outside(&self, id: u32) -> Option<u32> {
        self.namespaces.user.as_ref()?.group_outside(id)
    }

    /// Refuses what cannot be had. Blocking: a seccomp profile is read.
    ///
    /// # Errors
    /// `InvalidArgument` that names the field and the fix.
    pub(super) fn check(&self) -> Result<()> {
        self.namespaces.check()?;
        if !is_level(&self.selinux_level) {
            return Err(Error::invalid(format!(
                "SELinux options of the pod: the format of 'level' {:?} is not correct; one is s0:c1,c2",
                self.selinux_level
            )));
        }
        if !self.privileged {
            self.check_seccomp()?;
        }
        self.check_ids()
    }

    fn check_ids(&self) -> Result<()> {
        if let (None, Some(group)) = (self.user, self.group) {
            return Err(Error::invalid(format!(
                "the pod's user group {group} is specified without user: set runAsUser too"
            )));
        }
        let namespace = self
            .namespaces
            .user
            .as_ref()
            .filter(|namespace| namespace.is_own());
        let users = self.user.iter().map(|id| ("runAsUser", *id, MAX_NUMBER));
        let group = self.group.iter().map(|id| ("runAsGroup", *id, MAX_NUMBER));
        let groups = self.groups.iter();
        let groups = groups.map(|id| ("supplementalGroups", *id, MAX_GROUP));
        for (field, id, largest) in users.chain(group).chain(groups) {
            let number = u64::try_from(id).ok().filter(|_| id <= largest);
            let Some(number) = number else {
                return Err(Error::invalid(format!(
                    "{field} {id} of the pod is no id: they go from 0 to {largest}"
                )));
            };
            let mapped = namespace.is_none_or(|namespace| match field {
                "runAsUser" => namespace.has_user(number),
                _ => namespace.has_group(number),
            });
            if !mapped {
                return Err(Error::invalid(format!(
                    "{field} {id} of the pod is not mapped in its user namespace: use one below its size"
                )));
            }
        }
        Ok(())
    }

    fn check_seccomp(&self) -> Result<()> {
        let refused =
            |why: String| Err(Error::invalid(format!("seccomp profile of the pod: {why}")));
        let by_path;
        let profile = match &self.seccomp {
            Some(profile) => profile,
            None => match self.seccomp_path.as_str() {
                "" | "runtime/default" | "docker/default" | "unconfined" => return Ok(()),
                path => match path.strip_prefix(LOCALHOST) {
                    Some(reference) => {
                        by_path = Profile {
                            kind: profile_type::LOCALHOST,
                            reference: reference.to_owned(),
                        };
                        &by_path
                    }
                    None => return refused(format!("invalid profile {path:?}")),
                },
            },
        };
        let reference = profile.reference.as_str();
        match profile.kind {
            profile_type::LOCALHOST => {
                let reference = reference.strip_prefix(LOCALHOST).unwrap_or(reference);
                // As for containerd, whose directory is the root.
                read_profile(&Path::new("/").join(reference)).or_else(refused)
            }
            profile_type::RUNTIME_DEFAULT | profile_type::UNCONFINED if reference.is_empty() => {
                Ok(())
            }
            profile_type::RUNTIME_DEFAULT | profile_type::UNCONFINED => refused(
                "localhost_ref must only be set if the profile type is Localhost".to_owned(),
            ),
            other => refused(format!("unknown profile type {other}")),
        }
    }
}

/// A profile that is not there, or is none, is the operator's mistake: better said of the pod than found out
/// by a container.
fn read_profile(path: &Path) -> std::result::Result<(), String> {
    let shown = path.display();
    let failed = |error: std::io::Error| format!("cannot load {shown}: {error}");
    // A FIFO would make it wait for a writer.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, Mode::empty());
    let file = File::from(file.map_err(|errno| failed(errno.into()))?);
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(format!("cannot load {shown}: it is no regular file"));
    }
    let mut bytes = Vec::new();
    file.take(MAX_PROFILE)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    let profile: Json = serde_json::from_slice(&bytes)
        .map_err(|error| format!("decoding {shown} failed: {error}"))?;
    let action = profile.get("defaultAction").and_then(Json::as_str);
    if action.is_some_and(|action| action.starts_with("SCMP_ACT_")) {
        Ok(())
    } else {
        Err(format!(
            "decoding {shown} failed: it has no defaultAction such as SCMP_ACT_ERRNO"
        ))
    }
}

impl Namespaces {
    fn read(bytes: &[u8]) -> protobuf::Result<Self> {
        let mut modes = Self::default();
        each_field(bytes, |number, value| {
            match (number, value) {
                (1, Value::Number(mode)) => modes.network = mode,
                (2, Value::Number(mode)) => modes.pid = mode,
                (3, Value::Number(mode)) => modes.ipc = mode,
                (5, Value::Bytes(user)) => modes.user = Some(UserNamespace::read(user)?),
                _ => {}
            }
            Ok(())
        })?;
        Ok(modes)
    }

    /// Refuses what a pod with a kernel of its own cannot share with the node, and user namespaces that
    /// cannot be.
    fn check(&self) -> Result<()> {
        for (mode, field, what) in [
            (self.network, "hostNetwork", "share the node's network"),
            (self.pid, "hostPID", "see the node's processes"),
            (self.ipc, "hostIPC", "share the node's IPC objects"),
        ] {
            if mode == NODE {
                return Err(Error::invalid(format!(
                    "{field} is not supported: a pod in a VM cannot {what}; drop {field}"
                )));
            }
        }
        self.user.as_ref().map_or(Ok(()), UserNamespace::check)
    }
}

impl Profile {
    fn read(bytes: &[u8]) -> protobuf::Result<Self> {
        let mut profile = Self::default();
        each_field(bytes, |number, value| {
            match (number, value) {
                (1, Value::Number(kind)) => profile.kind = kind,
                (2, Value::Bytes(reference)) => profile.reference = text(reference)?,
                _ => {}
            }
            Ok(())
        })?;
        Ok(profile)
    }
}

/// Whether an SELinux level is one: sensitivities `s0` or `s0-s3`, then categories such as `:c1.c5,c7`; or
/// there is none.
fn is_level(level: &str) -> bool {
    let numbered = |part: &str, letter: char, digits: std::ops::RangeInclusive<usize>| {
        part.strip_prefix(letter).is_some_and(|number| {
            digits.contains(&number.len()) && number.bytes().all(|byte| byte.is_ascii_digit())
        })
    };
    // One, or two with a mark between them.
    let range = |part: &str, mark: char, letter: char, digits: std::ops::RangeInclusive<usize>| {
        let ends: Vec<&str> = part.splitn(3, mark).collect();
        ends.len() <= 2 && ends.iter().all(|end| numbered(end, letter, digits.clone()))
    };
    let (sensitivity, categories) = match level.split_once(':') {
        Some((sensitivity, categories)) => (sensitivity, Some(categories)),
        None => (level, None),
    };
    let categories =
        categories.is_none_or(|list| list.split(',').all(|part| range(part, '.', 'c', 1..=4)));
    level.is_empty() || (range(sensitivity, '-', 's', 1..=1) && categories)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::asked::sandbox_config::tests::{bytes, varint};
    use crate::error::Kind;
    use proptest::prelude::*;

    fn check(fields: &[Vec<u8>]) -> Result<()> {
        Security::read(&fields.concat()).unwrap().check()
    }

    fn refused(fields: &[Vec<u8>], words: &str) {
        let error = check(fields).unwrap_err();
        assert_eq!(error.kind, Kind::InvalidArgument, "{error}");
        assert!(error.message.contains(words), "{words}: {error}");
    }

    fn line(container: i64, host: i64, length: i64) -> Vec<u8> {
        [varint(1, host), varint(2, container), varint(3, length)].concat()
    }

    /// A security context with this user namespace.
    fn users(mode: i64, users: &[Vec<u8>], groups: &[Vec<u8>]) -> Vec<u8> {
        let users = users.iter().map(|line| bytes(2, line));
        let groups = groups.iter().map(|line| bytes(3, line));
        let lines: Vec<u8> = users.chain(groups).flatten().collect();
        bytes(1, &bytes(5, &[varint(1, mode), lines].concat()))
    }

    fn id(field: u32, id: i64) -> Vec<u8> {
        bytes(field, &varint(1, id))
    }

    const USER: u32 = 3;
    const GROUP: u32 = 8;

    fn supplemental(groups: &[i64]) -> Vec<u8> {
        groups.iter().flat_map(|id| varint(5, *id)).collect()
    }

    #[test]
    fn a_user_namespace_has_one_whole_mapping_for_users_and_one_for_groups() {
        let good = line(0, 200_000, 65_536);
        let own = |map: &[Vec<u8>]| users(0, map, map);
        check(&[own(std::slice::from_ref(&good))]).unwrap();
        refused(&[own(&[])], "without UID and GID mappings");
        refused(
            &[users(0, std::slice::from_ref(&good), &[])],
            "a GID mapping",
        );
        refused(
            &[users(0, &[], std::slice::from_ref(&good))],
            "a UID mapping",
        );
        refused(
            &[own(&[good.clone(), line(65_536, 400_000, 1)])],
            "only one mapping line",
        );
        refused(
            &[users(
                0,
                std::slice::from_ref(&good),
                &[good.clone(), good.clone()],
            )],
            "GID mapping: only one",
        );
        refused(&[own(&[line(0, 200_000, 0)])], "invalid mapping length 0");
        refused(
            &[own(&[line(1, 200_000, 65_536)])],
            "container id 0 must be mapped",
        );
        refused(
            &[users(0, std::slice::from_ref(&good), &[line(1, 0, 9)])],
            "GID mapping begins at container id 1",
        );
        refused(&[own(&[line(0, 0, 1 << 32)])], "beyond the last id");
        refused(
            &[own(&[line(0, 4_294_967_000, 1000)])],
            "from host id 4294967000",
        );
    }

    #[test]
    fn a_user_namespace_is_the_pods_or_the_nodes() {
        let good = line(0, 200_000, 65_536);
        check(&[users(2, &[], &[])]).unwrap();
        refused(
            &[users(2, std::slice::from_ref(&good), &[])],
            "mode NODE cannot be used with mappings",
        );
        for map in [&[][..], &[good]] {
            refused(&[users(1, map, map)], "unsupported mode CONTAINER");
            refused(&[users(3, map, map)], "unsupported mode TARGET");
            refused(&[users(100, map, map)], "unsupported mode 100");
        }
    }

    #[test]
    fn what_belongs_to_the_node_is_refused_by_name() {
        for (field, name) in [(1, "hostNetwork"), (2, "hostPID"), (3, "hostIPC")] {
            refused(&[bytes(1, &varint(field, 2))], name);
            for mode in [0, 1, 3] {
                check(&[bytes(1, &varint(field, mode))]).unwrap();
            }
        }
    }

    #[test]
    fn a_group_needs_a_user_and_ids_are_ids() {
        check(&[id(USER, 1000), id(GROUP, 1000), supplemental(&[0, 2000])]).unwrap();
        check(&[id(USER, 0), id(GROUP, 0)]).unwrap();
        refused(
            &[id(GROUP, 1000)],
            "user group 1000 is specified without user",
        );
        for bad in [-1, 1 << 31, i64::MIN] {
            refused(&[id(USER, bad)], "runAsUser");
            refused(&[id(USER, 0), id(GROUP, bad)], "runAsGroup");
        }
        check(&[supplemental(&[u32::MAX.into(), 1][1..])]).unwrap();
        for bad in [-1, u32::MAX.into(), 1 << 40] {
            refused(&[supplemental(&[1, bad])], "supplementalGroups");
        }
        let packed = [varint(1, 7)[1..].to_vec(), varint(1, -1)[1..].to_vec()].concat();
        refused(&[bytes(5, &packed)], "supplementalGroups -1");
    }

    #[test]
    fn ids_are_mapped_in_the_pods_user_namespace() {
        let map = [line(0, 200_000, 1000)];
        let namespace = users(0, &map, &map);
        check(&[namespace.clone(), id(USER, 999), supplemental(&[999])]).unwrap();
        refused(
            &[namespace.clone(), id(USER, 1000)],
            "runAsUser 1000 of the pod is not mapped",
        );
        refused(
            &[namespace.clone(), id(USER, 1), id(GROUP, 1000)],
            "runAsGroup 1000",
        );
        refused(
            &[namespace, supplemental(&[1000])],
            "supplementalGroups 1000",
        );
        // The node's has every id.
        check(&[users(2, &[], &[]), id(USER, 1000)]).unwrap();
    }

    #[test]
    fn an_selinux_level_is_written_as_one() {
        for good in ["", "s0", "s0-s3", "s0:c1", "s0-s1:c1.c5,c7,c1000.c1023"] {
            assert!(is_level(good), "{good}");
        }
        for bad in [
            "s",
            "s10",
            "0",
            "s0-",
            "s0-s1-s2",
            "s0:",
            "s0:c",
            "s0:c12345",
            "s0:c1,",
            "s0:c1.c2.c3",
            "s0\n",
            "s0:c1:c2",
        ] {
            assert!(!is_level(bad), "{bad}");
            refused(&[bytes(2, &bytes(4, bad.as_bytes()))], "'level'");
        }
    }

    #[test]
    fn a_seccomp_profile_is_one_of_three_kinds_and_there() {
        let profile = |kind: i64, reference: &str| {
            bytes(
                9,
                &[varint(1, kind), bytes(2, reference.as_bytes())].concat(),
            )
        };
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str, content: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, content).unwrap();
            path.to_str().unwrap().to_owned()
        };
        let good = path("good.json", r#"{"defaultAction":"SCMP_ACT_ALLOW"}"#);
        check(&[bytes(9, &[])]).unwrap();
        check(&[bytes(9, &varint(1, 1))]).unwrap();
        check(&[profile(2, &good)]).unwrap();
        check(&[profile(2, &format!("localhost/{good}"))]).unwrap();
        refused(
            &[profile(2, "/nowhere/p.json")],
            "cannot load /nowhere/p.json",
        );
        let fifo = dir.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRUSR).unwrap();
        refused(
            &[profile(2, fifo.to_str().unwrap())],
            "it is no regular file",
        );
        refused(&[profile(2, "")], "cannot load /: it is no regular file");
        refused(&[profile(2, &path("text", "hello"))], "decoding");
        refused(&[profile(2, &path("empty.json", "{}"))], "defaultAction");
        refused(&[profile(0, &good)], "localhost_ref must only be set");
        refused(&[profile(1, &good)], "localhost_ref must only be set");
        refused(&[profile(3, "")], "unknown profile type 3");
        // The field of older kubelets; the newer one counts.
        let old = |path: &str| bytes(7, path.as_bytes());
        for fine in ["runtime/default", "docker/default", "unconfined"] {
            check(&[old(fine)]).unwrap();
        }
        check(&[old(&format!("localhost/{good}"))]).unwrap();
        refused(&[old("localhost/nowhere")], "cannot load /nowhere");
        refused(&[old("else")], "invalid profile");
        check(&[old("else"), bytes(9, &varint(1, 1))]).unwrap();
        // Which a privileged pod has not.
        check(&[profile(2, "/nowhere"), varint(6, 1)]).unwrap();
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(value in proptest::collection::vec(any::<u8>(), 0..256)) {
            if let Ok(security) = Security::read(&value) {
                let _ = security.namespaces.check();
                let _ = security.check_ids();
                let _ = is_level(&security.selinux_level);
            }
        }
    }
}
