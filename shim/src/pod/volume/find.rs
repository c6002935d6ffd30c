//! What the bind mounts of a container are to its pod, and where in it. Blocking.

use std::io;
use std::path::{Path, PathBuf};

use brig_hypervisor::share::FileId;

use super::classify::{self, Class};
use super::feed::Source;
use super::mountinfo::MountTable;
use super::parts::Place;
use super::{direct, own, snapshot, view};
use crate::asked::spec::BindMount;
use crate::error::{Error, Result};
use crate::guest::vm::shown;
use crate::node::direct_volumes::mount_info::DirectVolume;
use crate::node::disk::{Numbers, Owner};

/// Bytes of the huge pages that a guest can have.
const HUGE_PAGE: u64 = 2 << 20;

/// Which host directory a volume shows, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Key {
    Live(FileId),
    Fixed(FileId),
    PodFile(FileId),
    Memory(FileId),
    Huge(FileId),
}

impl Key {
    /// Lives as long as the pod.
    pub(super) fn is_kept(self) -> bool {
        matches!(self, Self::PodFile(_) | Self::Memory(_) | Self::Huge(_))
    }
}

pub(super) type Classified = (BindMount, Place, Found);

pub(super) enum Found {
    Share,
    Device(String),
    Disk(Numbers, Owner),
    Volume {
        key: Key,
        source: Source,
        inside: PathBuf,
        memory: Option<PathBuf>,
    },
}

pub(super) type Direct = (BindMount, DirectVolume, PathBuf);

/// Blocking.
pub(super) fn classify_all(
    binds: Vec<BindMount>,
    direct: bool,
) -> Result<(Vec<Classified>, Vec<Direct>)> {
    let table =
        MountTable::read().map_err(|error| Error::io("cannot read the node's mounts", &error))?;
    let (mut classified, mut on_disk) = (Vec::new(), Vec::new());
    for bind in binds {
        // What is at the path on the node does not count, nor whether there is anything.
        if let Some((volume, inside)) = direct::find(&bind, &table, direct)? {
            on_disk.push((bind, volume, inside));
            continue;
        }
        let found = find(&bind, &table)?;
        let place = share_place(&bind, &table)?;
        classified.push((bind, place, found));
    }
    Ok((classified, on_disk))
}

/// A way in a volume as the agent is told it.
pub(super) fn told(inside: &Path, destination: &str) -> Result<String> {
    let text = inside.to_str().map(str::to_owned);
    text.ok_or_else(|| {
        Error::invalid(format!(
            "mount on {destination}: the sub-path {} is not UTF-8",
            shown(inside)
        ))
    })
}

fn share_place(bind: &BindMount, table: &MountTable) -> Result<Place> {
    let place = std::fs::canonicalize(&bind.source).and_then(|source| {
        let own = own::place(bind, &source, table);
        let (source, inside, key) = match own {
            Some(own) => {
                let identity = snapshot::identity(&own.top)?;
                let key = view::Key::of_own(identity, &own.mount, own.place);
                (own.top, own.inside, key)
            }
            None => {
                let identity = snapshot::identity(&source)?;
                let key = view::Key::of(bind, &source, identity, table);
                (source, String::new(), key)
            }
        };
        Ok(Place {
            key,
            source,
            inside,
            within: Vec::new(),
        })
    });
    place.map_err(|error| not_looked_at(bind, &error))
}

fn not_looked_at(bind: &BindMount, error: &io::Error) -> Error {
    let source = shown(&bind.source);
    Error::io(
        format_args!("mount on {}: source {source}", bind.destination),
        error,
    )
}

fn find(bind: &BindMount, table: &MountTable) -> Result<Found> {
    let failed = |error| not_looked_at(bind, &error);
    match classify::classify(bind, table)? {
        Class::Share => Ok(Found::Share),
        Class::Device(name) => Ok(Found::Device(name)),
        Class::Disk(numbers, owner) => Ok(Found::Disk(numbers, owner)),
        Class::Replica { top, file, live } => {
            let identity = snapshot::identity(&top).map_err(failed)?;
            let inside = PathBuf::from(file.clone().unwrap_or_default());
            let source = match file {
                Some(name) => Source::File { path: top, name },
                None => Source::Directory { top, identity },
            };
            let key = if live {
                Key::Live(identity)
            } else {
                Key::Fixed(identity)
            };
            Ok(Found::Volume {
                key,
                source,
                inside,
                memory: None,
            })
        }
        Class::PodFile(path) => {
            let identity = snapshot::identity(&path).map_err(failed)?;
            let name = "file".to_owned();
            Ok(Found::Volume {
                key: Key::PodFile(identity),
                inside: PathBuf::from(&name),
                source: Source::PodFile { path, name },
                memory: None,
            })
        }
        Class::Memory { inside, .. } if inside.to_str().is_none() => Ok(Found::Share),
        Class::Huge { top, inside } => {
            let identity = snapshot::identity(&top).map_err(failed)?;
            let limits = rustix::fs::statvfs(&top).map_err(|errno| failed(errno.into()))?;
            huge(bind, (top, identity), inside, &limits)
        }
        Class::Memory { top, inside } => {
            let identity = snapshot::identity(&top).map_err(failed)?;
            let limits = rustix::fs::statvfs(&top).map_err(|errno| failed(errno.into()))?;
            Ok(Found::Volume {
                key: Key::Memory(identity),
                source: Source::Memory {
                    top: top.clone(),
                    identity,
                    size: limits.f_blocks.saturating_mul(limits.f_frsize),
                },
                inside,
                memory: Some(top),
            })
        }
    }
}

/// An emptyDir of huge pages: its file system tells their size and its own.
fn huge(
    bind: &BindMount,
    (top, identity): (PathBuf, FileId),
    inside: PathBuf,
    limits: &rustix::fs::StatVfs,
) -> Result<Found> {
    if limits.f_bsize != HUGE_PAGE || inside.to_str().is_none() {
        return Err(Error::invalid(format!(
            "mount on {}: a VM has huge pages of {HUGE_PAGE} bytes, not of {}: use medium HugePages-2Mi",
            bind.destination, limits.f_bsize
        )));
    }
    Ok(Found::Volume {
        key: Key::Huge(identity),
        source: Source::Huge {
            top: top.clone(),
            identity,
            // 0 without a limit.
            size: limits.f_blocks.saturating_mul(limits.f_bsize),
        },
        inside,
        memory: Some(top),
    })
}
