//! `brig direct-volume`: the volumes whose devices storage drivers hand over, for drivers and people. How full one is, and
//! that it has grown, is its guest's word.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use brig_shim::containerd::debug_service::Method;
use brig_shim::error::{Error, Result};
use brig_shim::node::direct_volumes::mount_info::{DirectVolume, is_large_enough};
use brig_shim::node::direct_volumes::{DirectVolumes, volume_path};
use brig_shim::node::disk;
use serde_json::{Value, json};

use crate::cli::direct_volume::DirectVolumeCommand;
use crate::file_systems;
use crate::look;
use crate::pods::{self, Row};
use crate::shims;
use crate::terminal;

/// How long one pod may keep a search for who has a volume waiting.
const PATIENCE: Duration = Duration::from_secs(3);
/// How long a file system may take to grow.
const GROWTH: Duration = Duration::from_secs(120);
/// `VolumeUsage.Unit` of the CSI specification.
const BYTES: u32 = 1;
const INODES: u32 = 2;

/// Does it; what is to be printed.
///
/// # Errors
/// What is wrong with what was given, or in the way.
pub fn run(base: &Path, command: &DirectVolumeCommand) -> Result<String> {
    let volumes = DirectVolumes::of_node();
    match command {
        DirectVolumeCommand::Add {
            volume,
            mount_info,
            output,
        } => {
            let path = volume_path(volume.given())?;
            let file = volumes.add(&path, &mount_info.text())?;
            let text = format!("{} is a direct volume\n", path.display());
            Ok(output.tell(&json!({ "added": path, "file": file }), text))
        }
        DirectVolumeCommand::Remove { volume, output } => {
            let path = volume_path(volume.given())?;
            if let Some(used) = used(base)?.into_iter().find(|used| used.path == path) {
                return Err(Error::state(format!(
                    "{} is mounted in pod {}: its next container would write into the empty directory that kubelet \
                     has there; remove it when the pod's containers have ended",
                    path.display(),
                    used.row.id
                )));
            }
            let was_there = volumes.remove(&path)?;
            let shown = path.display();
            let text = if was_there {
                format!("{shown} is no direct volume any more\n")
            } else {
                format!("there is no direct volume {shown}\n")
            };
            Ok(output.tell(&json!({ "path": path, "removed": was_there }), text))
        }
        DirectVolumeCommand::List { output } => list(&volumes, base, output.json),
        DirectVolumeCommand::Stats { volume, output } => {
            let path = volume_path(volume.given())?;
            let used = user(&volumes, base, &path)?.ok_or_else(|| {
                Error::state(format!(
                    "no running pod has {} mounted, and only its guest can tell how full it is",
                    path.display()
                ))
            })?;
            let figures = used.figures()?;
            Ok(output.tell(
                &json!({ "usage": usage(&figures) }),
                format!("{}\n", file_systems::line(&figures)),
            ))
        }
        DirectVolumeCommand::Resize {
            volume,
            size,
            output,
        } => {
            let path = volume_path(volume.given())?;
            resize(&volumes, base, &path, size.least()).map(|grown| {
                let figures = grown.figures.as_ref();
                output.tell(
                    &json!({
                        "path": path,
                        "deviceBytes": grown.device,
                        "fileSystemBytes": figures.map(|figures| figures["bytes"].clone()),
                    }),
                    match figures {
                        Some(figures) => format!("{}\n", file_systems::line(figures)),
                        None => format!(
                            "no running pod has {} mounted: its file system has all {} bytes of the device when one \
                             mounts it\n",
                            path.display(),
                            grown.device
                        ),
                    },
                )
            })
        }
    }
}

/// A volume that a pod has mounted.
struct Used {
    path: PathBuf,
    row: Row,
    /// What its shim tells.
    shim: Value,
}

impl Used {
    /// The guest's figures of it.
    fn figures(&self) -> Result<Value> {
        let answer = look::bytes(&look::socket_of(&self.row)?, &["df".to_owned()])?;
        let rows = file_systems::rows(&answer, &self.shim);
        let path = self.path.to_str();
        let row = rows
            .into_iter()
            .find(|row| row["of"] == "volume" && row["path"].as_str() == path);
        row.ok_or_else(|| {
            Error::state(format!(
                "the guest of pod {} does not tell how full {} is: see 'brig dmesg {}'",
                self.row.id,
                self.path.display(),
                self.row.id
            ))
        })
    }
}

/// All that running pods have mounted. One that does not answer has none that is known.
fn used(base: &Path) -> Result<Vec<Used>> {
    let rows = pods::rows(base);
    let sockets = rows.iter().map(Row::to_ask).collect();
    let told = shims::ask_all_json(sockets, Method::Inspect, PATIENCE)?;
    let mut all = Vec::new();
    for (row, shim) in rows.into_iter().zip(told) {
        let Some(shim) = shim else { continue };
        let volumes = shim["volumes"].as_array().into_iter().flatten();
        let paths = volumes.filter_map(|volume| volume["path"].as_str());
        all.extend(paths.map(|path| Used {
            path: PathBuf::from(path),
            row: row.clone(),
            shim: shim.clone(),
        }));
    }
    Ok(all)
}

/// Who has a volume mounted, which is one that there is.
fn user(volumes: &DirectVolumes, base: &Path, path: &Path) -> Result<Option<Used>> {
    let used = used(base)?.into_iter().find(|used| used.path == path);
    if used.is_none() && volumes.file(path).is_none() {
        return Err(Error::not_found(format!(
            "there is no direct volume {}: see 'brig direct-volume list'",
            path.display()
        )));
    }
    Ok(used)
}

/// As of `VolumeUsage` of the CSI specification.
fn usage(figures: &Value) -> Value {
    let of = |unit: u32, total: &str, used: &str, available: &str| {
        json!({
            "available": figures[available],
            "total": figures[total],
            "used": figures[used],
            "unit": unit,
        })
    };
    json!([
        of(BYTES, "bytes", "usedBytes", "availableBytes"),
        of(INODES, "files", "usedFiles", "availableFiles"),
    ])
}

/// What a volume has come to.
struct Grown {
    /// Bytes of its device.
    device: u64,
    /// Of a guest that has it mounted.
    figures: Option<Value>,
}

fn resize(volumes: &DirectVolumes, base: &Path, path: &Path, least: u64) -> Result<Grown> {
    if let Some(used) = user(volumes, base, path)? {
        let request = json!({ "volume": path, "least": least });
        let socket = look::socket_of(&used.row)?;
        let answer = shims::ask(&socket, Method::Grow, &request, GROWTH)?;
        let answer: Value = serde_json::from_slice(&answer)
            .map_err(|error| Error::internal(format!("the shim's answer is no JSON: {error}")))?;
        return Ok(Grown {
            device: answer["deviceBytes"].as_u64().unwrap_or(0),
            figures: Some(used.figures()?),
        });
    }
    let shown = path.display();
    let refused = |why: String| Error::state(format!("volume {shown}: {why}"));
    let file = volumes.file(path).unwrap_or_default();
    let volume = volumes.read(path, &file).map_err(refused)?;
    let device = bytes_of(&volume.device).map_err(refused)?;
    is_large_enough(&volume.device, device, least).map_err(refused)?;
    Ok(Grown {
        device,
        figures: None,
    })
}

/// Of a block device or a file.
fn bytes_of(device: &Path) -> std::result::Result<u64, String> {
    let failed =
        |error: &dyn std::fmt::Display| format!("its device {}: {error}", device.display());
    match disk::at(device) {
        Some((numbers, _)) => {
            disk::size(numbers).ok_or_else(|| failed(&"it is gone from the node"))
        }
        None => fs::metadata(device)
            .map(|found| found.len())
            .map_err(|error| failed(&error)),
    }
}

fn list(volumes: &DirectVolumes, base: &Path, as_json: bool) -> Result<String> {
    let used = used(base)?;
    let all = volumes.all()?.into_iter().map(|(path, file)| {
        let user = used.iter().find(|used| used.path == path);
        let read = volumes.read(&path, &file);
        (path, read, user)
    });
    if as_json {
        let rows = all.map(|(path, read, user)| described(&path, &read, user));
        return Ok(format!("{}\n", rows.collect::<Value>()));
    }
    let dash = || "-".to_owned();
    let rows: Vec<Vec<String>> = all
        .map(|(path, read, user)| {
            let volume = read.as_ref().ok();
            vec![
                path.display().to_string(),
                volume.map_or_else(dash, |volume| volume.device.display().to_string()),
                volume.map_or_else(dash, |volume| volume.file_system.clone()),
                user.map_or_else(dash, |used| used.row.id.clone()),
                match &read {
                    Ok(volume) if volume.options.is_empty() => dash(),
                    Ok(volume) => volume.options.join(","),
                    Err(why) => format!("cannot be had: {why}"),
                },
            ]
        })
        .collect();
    let head = ["VOLUME PATH", "DEVICE", "TYPE", "POD", "OPTIONS"];
    Ok(terminal::table(&head, &rows))
}

fn described(
    path: &Path,
    read: &std::result::Result<DirectVolume, String>,
    user: Option<&Used>,
) -> Value {
    let volume = read.as_ref().ok();
    json!({
        "path": path.display().to_string(),
        "device": volume.map(|volume| volume.device.display().to_string()),
        "fileSystem": volume.map(|volume| &volume.file_system),
        "options": volume.map(|volume| &volume.options),
        "fsGroup": volume.and_then(|volume| volume.group).map(|group| group.gid),
        "problem": read.as_ref().err(),
        "pod": user.map(|used| json!({ "namespace": used.row.namespace, "id": used.row.id, "name": used.row.pod })),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usage_is_as_csi_wants_it() {
        let figures = json!({ "bytes": 8192, "usedBytes": 2048, "availableBytes": 6144,
            "files": 20, "usedFiles": 1, "availableFiles": 19 });
        assert_eq!(
            usage(&figures),
            json!([
                { "unit": 1, "total": 8192, "used": 2048, "available": 6144 },
                { "unit": 2, "total": 20, "used": 1, "available": 19 },
            ])
        );
    }

    #[test]
    fn a_volume_that_no_pod_has_is_as_large_as_its_device_has_become() {
        let dir = tempfile::tempdir().unwrap();
        let (base, image) = (dir.path().join("pods"), dir.path().join("image"));
        let volumes = DirectVolumes::at(&dir.path().join("volumes"));
        let path = Path::new("/v");
        let error = resize(&volumes, &base, path, 0).err().unwrap();
        assert!(error.message.contains("no direct volume /v"), "{error}");
        fs::write(&image, [0; 4096]).unwrap();
        let info = format!(r#"{{"device":"{}","fstype":"ext4"}}"#, image.display());
        volumes.add(path, &info).unwrap();
        assert_eq!(resize(&volumes, &base, path, 4096).unwrap().device, 4096);
        let error = resize(&volumes, &base, path, 4097).err().unwrap();
        assert!(
            error.message.contains("4096 bytes, fewer than 4097"),
            "{error}"
        );
        fs::remove_file(&image).unwrap();
        let error = resize(&volumes, &base, path, 0).err().unwrap();
        assert!(error.message.contains("missing on this node"), "{error}");
        let listed: Value = serde_json::from_str(&list(&volumes, &base, true).unwrap()).unwrap();
        assert_eq!(listed[0]["path"], "/v");
        assert_eq!(listed[0]["pod"], Value::Null);
        let problem = listed[0]["problem"].as_str().unwrap();
        assert!(problem.contains("missing on this node"), "{problem}");
        assert!(
            list(&volumes, &base, false)
                .unwrap()
                .contains("cannot be had")
        );
    }
}
