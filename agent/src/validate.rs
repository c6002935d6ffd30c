//! What the agent checks of a request before it starts anything: mount sources, and every field of the
//! specification that it cannot apply, refused by name (docs/runtime-spec.md).
use std::collections::BTreeMap;

use brig_agent_protocol::agent;

use crate::{
    control::MountSource,
    error::{Error, Result},
    init, names,
    spec::{Hooks, Mount, Process, Spec},
};

/// The sources of bind mounts by index into the specification's mounts.
///
/// # Errors
/// `InvalidArgument` for an index or path without meaning.
pub fn mount_sources(
    spec: &Spec,
    sources: &[agent::MountSource],
) -> Result<BTreeMap<u32, MountSource>> {
    let mut map = BTreeMap::new();
    for source in sources {
        let index = source.index;
        let exists = usize::try_from(index).is_ok_and(|i| i < spec.mounts.len());
        if !exists || map.insert(index, mount_source(source)?).is_some() {
            return Err(Error::InvalidArgument(format!(
                "mount source {index} names no mount, or one twice"
            )));
        }
    }
    Ok(map)
}

fn mount_source(source: &agent::MountSource) -> Result<MountSource> {
    if !source.volume.is_empty() {
        names::id(&source.volume)?;
        if !source.volume_path.is_empty() {
            names::share_path(&source.volume_path)?;
        }
        return Ok(MountSource::Volume {
            id: source.volume.clone(),
            path: source.volume_path.clone(),
            mapped_on_host: source.mapped_on_host,
        });
    }
    if !source.device.is_empty() {
        names::device(&source.device)?;
        return Ok(MountSource::Device(source.device.clone()));
    }
    names::share_path(&source.share_path)?;
    if !source.volume_path.is_empty() {
        names::share_path(&source.volume_path)?;
    }
    Ok(MountSource::Share {
        path: source.share_path.clone(),
        inside: source.volume_path.clone(),
        readonly_on_host: source.readonly_on_host,
        mapped_on_host: source.mapped_on_host,
        directory: source.directory,
    })
}

/// The specification of a container.
///
/// # Errors
/// `InvalidArgument` naming the first field that cannot be applied.
pub fn spec(spec: &Spec) -> Result<()> {
    check_spec(spec).map_err(Error::InvalidArgument)
}

/// A process to execute in a container.
///
/// # Errors
/// `InvalidArgument` naming the first field that cannot be applied.
pub fn process(process: &Process) -> Result<()> {
    init::check_process(process).map_err(Error::InvalidArgument)
}

fn check_spec(spec: &Spec) -> std::result::Result<(), String> {
    match &spec.process {
        Some(process) => init::check_process(process)?,
        None => return Err("the spec has no process".into()),
    }
    let foreign = [
        ("solaris", spec.solaris.is_some()),
        ("windows", spec.windows.is_some()),
        ("vm", spec.vm.is_some()),
        ("zos", spec.zos.is_some()),
        ("linux.intelRdt", spec.linux.intel_rdt.is_some()),
        ("linux.memoryPolicy", spec.linux.memory_policy.is_some()),
        ("linux.netDevices", !spec.linux.net_devices.is_empty()),
    ];
    if let Some((name, _)) = foreign.iter().find(|(_, present)| *present) {
        return Err(format!("{name} is not supported in a Brig guest"));
    }
    if let Some(hooks) = &spec.hooks {
        check_hooks(hooks)?;
    }
    for namespace in &spec.linux.namespaces {
        match namespace.kind.as_str() {
            "pid" | "mount" | "ipc" | "uts" | "network" | "cgroup" | "user" => {}
            "time" if namespace.path.is_empty() => {}
            other => {
                return Err(format!(
                    "linux.namespaces: a {other:?} namespace is not supported in a Brig guest"
                ));
            }
        }
    }
    init::check_user_namespace(&spec.linux)?;
    let has_time = spec.linux.namespaces.iter().any(|n| n.kind == "time");
    if !spec.linux.time_offsets.is_empty() && !has_time {
        return Err("linux.timeOffsets needs a time namespace".into());
    }
    for mount in &spec.mounts {
        if !mount.destination.starts_with('/') {
            return Err(format!(
                "mounts: destination {:?} is not an absolute path",
                mount.destination
            ));
        }
        check_bind(mount)?;
    }
    init::check_mount_maps(spec)?;
    init::check_sysctl(spec.linux.sysctl.keys())?;
    if let Some(seccomp) = &spec.linux.seccomp {
        init::check_seccomp(seccomp)?;
    }
    Ok(())
}

/// A bind mount shows a file system that is there: what is said to the file system would change nothing.
fn check_bind(mount: &Mount) -> std::result::Result<(), String> {
    let options = init::read_options(&mount.options);
    match options.of_file_system() {
        Some(option) if options.bind.is_some() || mount.kind == "bind" => Err(format!(
            "mounts: the option {option:?} is for a file system, and {} is a bind mount, which can have none",
            mount.destination
        )),
        _ => Ok(()),
    }
}

/// Hooks of the runtime's namespace are run by the shim, on the node.
fn check_hooks(hooks: &Hooks) -> std::result::Result<(), String> {
    let stages = [
        ("createContainer", &hooks.create_container),
        ("startContainer", &hooks.start_container),
    ];
    match stages
        .iter()
        .find_map(|(name, hooks)| Some((name, hooks.first()?)))
    {
        Some((name, hook)) => Err(format!(
            "hooks.{name} ({}) is not supported: it is a program of the host for the container's namespaces, which are in a guest",
            hook.path
        )),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn with(value: &serde_json::Value) -> std::result::Result<(), String> {
        let mut whole = json!({"process": {"args": ["x"], "cwd": "/"}});
        for (key, field) in value.as_object().unwrap() {
            whole[key] = field.clone();
        }
        check_spec(&serde_json::from_value(whole).unwrap())
    }

    #[test]
    fn what_cannot_be_applied_is_refused_by_name() {
        assert_eq!(with(&json!({})), Ok(()));
        let usual = [
            json!({"destination": "/x", "type": "bind", "options": ["rbind", "rro", "rslave", "sync", "lazytime"]}),
            json!({"destination": "/y", "type": "tmpfs", "options": ["size=1m"]}),
        ];
        assert_eq!(with(&json!({"mounts": usual})), Ok(()));
        for (value, word) in [
            (json!({"vm": {}}), "vm"),
            (json!({"windows": {}}), "windows"),
            (
                json!({"hooks": {"startContainer": [{"path": "/bin/h"}]}}),
                "hooks.startContainer (/bin/h)",
            ),
            (
                json!({"hooks": {"createContainer": [{"path": "/x"}]}}),
                "createContainer",
            ),
            (json!({"linux": {"intelRdt": {}}}), "intelRdt"),
            (json!({"linux": {"netDevices": {"eth1": {}}}}), "netDevices"),
            (
                json!({"linux": {"namespaces": [{"type": "user"}]}}),
                "uidMappings",
            ),
            (
                json!({"linux": {"namespaces": [{"type": "time", "path": "/x"}]}}),
                "time",
            ),
            (
                json!({"linux": {"timeOffsets": {"monotonic": {"secs": 1}}}}),
                "timeOffsets",
            ),
            (
                json!({"linux": {"sysctl": {"kernel.core_pattern": "x"}}}),
                "kernel.core_pattern",
            ),
            (
                json!({"linux": {"seccomp": {"defaultAction": "SCMP_ACT_NOTIFY"}}}),
                "SCMP_ACT_NOTIFY",
            ),
            (json!({"mounts": [{"destination": "x"}]}), "destination"),
            (
                json!({"mounts": [{"destination": "/x", "type": "bind", "options": ["ro", "size=1m"]}]}),
                "\"size\"",
            ),
            (
                json!({"mounts": [{"destination": "/x", "options": ["rbind", "frobnicate"]}]}),
                "frobnicate",
            ),
            (
                json!({"mounts": [{"destination": "/x", "uidMappings": [{"containerID": 0, "hostID": 1, "size": 1}]}]}),
                "uidMappings",
            ),
        ] {
            let refused = with(&value).unwrap_err();
            assert!(refused.contains(word), "{word}: {refused}");
        }
    }
}
