//! Volumes that are directories or files of the node.

use std::fs;
use std::path::Path;

use anyhow::Result;
use brig_tests::node::check::{contains_one, equal, that};

use crate::suite::{Case, PROBE, Suite, case, smoke};

const DIRECTORY: &str = "/run/brig-e2e/volume";

pub const CASES: &[Case] = &[
    smoke("mounts", "a bind mount is shared both ways", both_ways),
    case(
        "mounts",
        "a read-only mount and a single file are that and no more",
        readonly,
    ),
];

fn fresh(name: &str) -> Result<String> {
    let path = format!("{DIRECTORY}-{name}");
    let _ = fs::remove_dir_all(&path);
    fs::create_dir_all(&path)?;
    Ok(path)
}

fn both_ways(suite: &mut Suite) -> Result<()> {
    let directory = fresh("rw")?;
    fs::write(format!("{directory}/from-node"), "node")?;
    let run = suite.probe("bind", &["sleep"]).with(
        "--mount",
        &format!("type=bind,src={directory},dst=/mnt/a,options=rbind:rw"),
    );
    let container = suite.ctr.start(&run)?;
    let read = container.exec(&[PROBE, "read", "/mnt/a/from-node"])?;
    equal("the node's file inside", "node", read.text())?;
    container
        .exec(&[PROBE, "write", "/mnt/a/from-container", "inside"])?
        .success()?;
    equal(
        "the container's file on the node",
        "inside",
        fs::read_to_string(format!("{directory}/from-container"))?,
    )?;
    fs::write(format!("{directory}/later"), "new")?;
    let read = container.exec(&[PROBE, "read", "/mnt/a/later"])?;
    equal("a file made while it runs", "new", read.text())?;
    fs::remove_file(format!("{directory}/from-node"))?;
    drop(container);
    that(
        "the node's files survive the container",
        Path::new(&directory).join("later").exists(),
    )
}

fn readonly(suite: &mut Suite) -> Result<()> {
    let directory = fresh("ro")?;
    fs::write(format!("{directory}/one"), "one")?;
    fs::write(format!("{directory}/other"), "other")?;
    let run = suite
        .probe("ro", &["sleep"])
        .with(
            "--mount",
            &format!("type=bind,src={directory},dst=/mnt/a,options=rbind:ro"),
        )
        .with(
            "--mount",
            &format!("type=bind,src={directory}/one,dst=/mnt/b/single,options=bind:rw"),
        )
        .with("--mount", "type=tmpfs,src=tmpfs,dst=/work,options=size=1m");
    let container = suite.ctr.start(&run)?;
    let write = container.exec(&[PROBE, "write", "/mnt/a/one", "x"])?;
    equal("exit status of a write to a read-only mount", 2, write.code)?;
    contains_one("error", &["read-only", "denied"], &write.stderr)?;
    let list = container.exec(&[PROBE, "list", "/mnt/b"])?;
    equal(
        "what is beside a single file",
        "[\"single\"]\n",
        list.text(),
    )?;
    container
        .exec(&[PROBE, "write", "/mnt/b/single", "changed"])?
        .success()?;
    equal(
        "the file on the node",
        "changed",
        fs::read_to_string(format!("{directory}/one"))?,
    )?;
    container
        .exec(&[PROBE, "write", "/work/small", "x"])?
        .success()?;
    Ok(())
}
