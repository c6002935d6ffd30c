//! `/lib/modules` of the node in a container: what programs look for there are the modules of the kernel they run on, so
//! those of the guest's kernel are shown beside the node's. Only where it is mounted to be read, and without maps of owners.
use std::{os::fd::OwnedFd, path::Path};

use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen,
};

use super::failure::{Context as _, Result};
use crate::{
    control::{Create, MountSource},
    modules,
    spec::Mount,
};

/// The directory, by the names that it has on nodes.
const PLACES: [&str; 2] = ["/lib/modules", "/usr/lib/modules"];

/// A detached mount of both, for such a mount of the specification; `None` for any other, and where the guest has no
/// modules.
pub fn beside_the_nodes(
    create: &Create,
    mount: &Mount,
    source: Option<&MountSource>,
    readonly: bool,
) -> Result<Option<OwnedFd>> {
    let Some(MountSource::Share {
        path,
        inside,
        mapped_on_host: false,
        ..
    }) = source
    else {
        return Ok(None);
    };
    // On the way to a part there may be a container's links, which the overlay would follow.
    if !inside.is_empty() || !readonly || !PLACES.contains(&mount.source.trim_end_matches('/')) {
        return Ok(None);
    }
    let Some(own) = modules::directory(&create.share) else {
        return Ok(None);
    };
    both(&own, &create.share.join(path)).map(Some)
}

fn both(own: &Path, node: &Path) -> Result<OwnedFd> {
    let what = "the modules of the guest's kernel beside the node's";
    let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).during(what)?;
    // Neither name has a colon: one is the agent's own, the other the shim's.
    let lower = format!("{}:{}", own.display(), node.display());
    fsconfig_set_string(&context, "lowerdir", lower.as_str()).during(what)?;
    fsconfig_set_flag(&context, "ro").during(what)?;
    fsconfig_create(&context).during(what)?;
    fsmount(
        &context,
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::MOUNT_ATTR_RDONLY,
    )
    .during(what)
}
