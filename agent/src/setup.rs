//! `StartSandbox`: names, clock, shared memory, the share and the network, in one go.
use std::{fs, io, path::Path};

use brig_agent_protocol::agent::{StartSandboxRequest, StartSandboxResponse};
use brig_agent_protocol::{OWN_DIRECTORY, OWN_TAG};
use nix::mount::{MsFlags, mount};

use crate::{
    cgroup, clock,
    context::Context,
    error::{Error, Result},
    init, network, write_back,
};

/// /dev/shm of the sandbox when the host names no size, bytes.
const DEFAULT_SHM: u64 = 64 << 20;

/// Sets the sandbox up.
///
/// # Errors
/// `InvalidArgument` or `Internal` naming the part that failed.
pub async fn sandbox(
    context: &Context,
    request: StartSandboxRequest,
) -> Result<StartSandboxResponse> {
    if request.return_files {
        context.page_reporting.return_files();
    }
    init::check_sysctl(request.sysctls.keys()).map_err(Error::InvalidArgument)?;
    if request.max_pids > 0 {
        cgroup::limit_processes(&context.places.cgroup_base, request.max_pids)?;
    }
    if !request.hostname.is_empty() {
        nix::unistd::sethostname(&request.hostname).map_err(|e| Error::io("hostname", e))?;
    }
    if context.places.owns_machine && request.unix_time_ns != 0 {
        clock::set(request.unix_time_ns)?;
    }
    let shm_size = if request.shm_size == 0 {
        DEFAULT_SHM
    } else {
        request.shm_size
    };
    mount_shm(&context.places.run.join("shm"), shm_size)?;
    if context.places.owns_machine && !request.share_tag.is_empty() {
        let (tag, share) = (request.share_tag.clone(), context.places.share.clone());
        // The device answers this mount; a slow one must not hold up other requests.
        let mounted = tokio::task::spawn_blocking(move || {
            mount_share(&tag, &share)?;
            let own = share.join(OWN_DIRECTORY);
            mount_share(OWN_TAG, &own)?;
            write_back::settle(&own).map_err(|error| Error::io("the pod's own files", error))
        });
        let mounted = mounted.await;
        mounted.map_err(|e| Error::Internal(e.to_string()))??;
    }
    let owns_machine = context.places.owns_machine;
    let netfilter = network::apply(&request, owns_machine, &context.logger).await?;
    // The most that one of them may be has been set with the network's parameters.
    context.limits.set(&request.limits)?;
    for (key, value) in &request.sysctls {
        set_sysctl(key, value)?;
    }
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")
        .map_err(|e| Error::io("kernel release", e))?;
    slog::info!(context.logger, "sandbox started"; "sandbox" => &request.id, "interfaces" => request.interfaces.len());
    Ok(StartSandboxResponse {
        kernel_release: release.trim().to_owned(),
        netfilter_refused: netfilter.refused,
        netfilter_generation: netfilter.generation,
        ..Default::default()
    })
}

fn mount_shm(at: &Path, size: u64) -> Result<()> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let data = format!("size={size},mode=1777");
    mount(Some("shm"), at, Some("tmpfs"), flags, Some(data.as_str()))
        .map_err(|e| Error::io("/dev/shm of the sandbox", e))
}

fn mount_share(tag: &str, at: &Path) -> Result<()> {
    mount(
        Some(tag),
        at,
        Some("virtiofs"),
        MsFlags::empty(),
        None::<&str>,
    )
    .map_err(|e| Error::io(format_args!("the share {tag:?} (virtiofs)"), e))
}

fn set_sysctl(key: &str, value: &str) -> Result<()> {
    let path = init::sysctl_path(key);
    if path
        .split('/')
        .any(|c| c.is_empty() || c == "." || c == "..")
    {
        return Err(Error::InvalidArgument(format!(
            "sysctl {key:?} is not a name"
        )));
    }
    fs::write(Path::new("/proc/sys").join(path), value).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => {
            Error::InvalidArgument(format!("the guest kernel has no sysctl {key}"))
        }
        _ => Error::InvalidArgument(format!("sysctl {key} = {value:?}: {error}")),
    })
}
