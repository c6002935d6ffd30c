//! An image made of another on the node, with another setting in its configuration.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::node::{self, Directory, Image};

fn read(layout: &Path, digest: &Value) -> Result<Value> {
    let digest = digest.as_str().context("no digest")?;
    let path = layout.join("blobs").join(digest.replace(':', "/"));
    let text = fs::read(&path).with_context(|| path.display().to_string())?;
    Ok(serde_json::from_slice(&text)?)
}

/// Stores a blob and points a descriptor at it.
fn write(layout: &Path, blob: &Value, descriptor: &mut Value) -> Result<()> {
    let text = serde_json::to_string(blob)?;
    let blobs = layout.join("blobs/sha256");
    let new = blobs.join("new");
    fs::write(&new, &text)?;
    let sum = node::run("sha256sum", &[&new.display().to_string()])?;
    let sum = sum.split(' ').next().context("no sum")?;
    fs::rename(&new, blobs.join(sum))?;
    descriptor["digest"] = format!("sha256:{sum}").into();
    descriptor["size"] = text.len().into();
    Ok(())
}

/// Imports `image` as `name`, with `config.KEY` of its configuration set.
///
/// # Errors
/// If the archive is no OCI layout, or containerd refuses it.
pub fn import(image: Image, name: &str, key: &str, value: impl Into<Value>) -> Result<()> {
    let work = Directory::new("variant")?;
    let layout = work.directory("layout")?;
    let at = layout.display().to_string();
    node::run("tar", &["-C", &at, "-xf", image.1])?;
    let index_path = layout.join("index.json");
    let mut index: Value = serde_json::from_slice(&fs::read(&index_path)?)?;
    let mut manifest = read(&layout, &index["manifests"][0]["digest"])?;
    let mut config = read(&layout, &manifest["config"]["digest"])?;
    config["config"][key] = value.into();
    write(&layout, &config, &mut manifest["config"])?;
    write(&layout, &manifest, &mut index["manifests"][0])?;
    index["manifests"][0]["annotations"] = serde_json::json!({
        "io.containerd.image.name": name,
        "org.opencontainers.image.ref.name": name,
    });
    fs::write(&index_path, serde_json::to_string(&index)?)?;
    // Docker's own list of what is in the archive would win over the index.
    let _ = fs::remove_file(layout.join("manifest.json"));
    let archive = work.path.join("variant.tar").display().to_string();
    node::run("tar", &["-C", &at, "-cf", &archive, "."])?;
    node::run("ctr", &["-n", "k8s.io", "image", "import", &archive]).map(drop)
}
