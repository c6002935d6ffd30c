//! What the benchmarks of storage and network stand on: the image's files, and a disk of the node that is its memory, so that what
//! lies between a program and the disk is compared, and not a disk. All of it goes with this.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use brig_tests::node::{clock, process};
use serde_json::Value;

const IMAGE: &str = "/host/assets/images/bench.tar";
const DIRECTORY: &str = "/var/lib/brig-bench";
/// KiB of each disk at most; it takes what is written to it.
const DISK_KIB: u64 = 2 << 20;
/// Bytes of a root file system's image.
const ROOT: u64 = 256 << 20;

/// The disk with its file system, and what lies there.
pub struct Ground {
    directory: PathBuf,
}

/// Runs a program of the node, which must succeed.
pub fn run(program: &str, args: &[&str]) -> Result<String> {
    let mut command = Command::new(program);
    command.args(args);
    let outcome = process::run(command, clock::seconds(60))?
        .success()
        .with_context(|| format!("{program} {}", args.join(" ")))?;
    Ok(outcome.text())
}

/// A path of ours as text.
pub fn text(path: &Path) -> String {
    path.display().to_string()
}

impl Ground {
    /// Makes the disk and unpacks the image there.
    pub fn prepare() -> Result<Self> {
        let directory = PathBuf::from(DIRECTORY);
        fs::create_dir_all(&directory)?;
        run(
            "modprobe",
            &["brd", "rd_nr=4", &format!("rd_size={DISK_KIB}")],
        )?;
        run("mkfs.ext4", &["-q", "-F", "/dev/ram0"])?;
        run("mount", &["-o", "noatime", "/dev/ram0", DIRECTORY])?;
        let ground = Self { directory };
        ground.unpack().context("the image")?;
        Ok(ground)
    }

    fn unpack(&self) -> Result<()> {
        let (image, tree) = (self.directory.join("image"), self.tree());
        fs::create_dir_all(&image)?;
        fs::create_dir_all(&tree)?;
        run("tar", &["-xf", IMAGE, "-C", &text(&image)])
            .context("tests/images/build bench makes it")?;
        let read = |name: &str| -> Result<Value> {
            let bytes = fs::read(image.join(name)).with_context(|| name.to_owned())?;
            Ok(serde_json::from_slice(&bytes)?)
        };
        let blob = |of: &Value| -> Result<String> {
            let digest = of["digest"].as_str().context("no digest")?;
            Ok(format!("blobs/{}", digest.replace(':', "/")))
        };
        let manifest = read(&blob(&read("index.json")?["manifests"][0])?)?;
        let layer = text(&image.join(blob(&manifest["layers"][0])?));
        run("tar", &["-xf", &layer, "-C", &text(&tree)])?;
        fs::remove_dir_all(&image)?;
        // It answers in containers by this name, and in a guest as its init.
        for place in ["bin/brig-probe", "init"] {
            fs::copy("/host/bin/brig-probe", tree.join(place))?;
        }
        // An init finds its first three files closed, and a program of Rust's wants something to open then.
        let null = text(&tree.join("dev/null"));
        run("mknod", &[&null, "c", "1", "3"])?;
        for place in ["mnt", "volume"] {
            fs::create_dir_all(tree.join(place))?;
        }
        for file in ["hostname", "hosts", "resolv.conf"] {
            fs::write(tree.join("etc").join(file), "")?;
        }
        run("cp", &["-a", &text(&tree), &text(&self.tools())])?;
        for (place, kind) in [("proc", "proc"), ("dev", "devtmpfs")] {
            run(
                "mount",
                &["-t", kind, kind, &text(&self.tools().join(place))],
            )?;
        }
        Ok(())
    }

    /// The image's files, as an unpacked layer.
    pub fn tree(&self) -> PathBuf {
        self.directory.join("tree")
    }

    /// The same again, for programs that the node runs from there.
    pub fn tools(&self) -> PathBuf {
        self.directory.join("tools")
    }

    /// A command of [`Self::tools`].
    pub fn tool(&self, program: &str) -> Command {
        let mut command = Command::new("chroot");
        command.arg(self.tools()).arg(program);
        command
    }

    /// A path on the disk.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// A new directory on the disk.
    pub fn directory(&self, name: &str) -> Result<PathBuf> {
        let path = self.path(name);
        fs::create_dir_all(&path)?;
        Ok(path)
    }

    /// An image of ext4 with the tree, or empty, for one user.
    pub fn ext4(&self, name: &str, filled: bool) -> Result<PathBuf> {
        let path = self.path(&format!("{name}.ext4"));
        File::create(&path)?.set_len(ROOT)?;
        let (tree, image) = (text(&self.tree()), text(&path));
        let mut args = vec!["-q", "-F"];
        if filled {
            args.extend(["-d", &tree]);
        }
        args.push(&image);
        run("mkfs.ext4", &args)?;
        Ok(path)
    }

    /// The tree as an image of erofs, the same for all.
    pub fn erofs(&self) -> Result<PathBuf> {
        let path = self.path("layer.erofs");
        if !path.exists() {
            run(
                "mkfs.erofs",
                &["--quiet", "-b4096", &text(&path), &text(&self.tree())],
            )?;
        }
        Ok(path)
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        for place in ["tools/proc", "tools/dev", ""] {
            let path = text(&self.directory.join(place));
            if let Err(error) = run("umount", &["-R", &path]) {
                eprintln!("brig-bench: {error:#}");
            }
        }
        // Gives the memory back.
        let _ = run("rmmod", &["brd"]);
    }
}

/// Mounts of the node that go at the end of a scope, the last one first.
#[derive(Default)]
pub struct Mounted(Vec<String>);

impl Mounted {
    /// Mounts with these arguments, the last of which is the place.
    pub fn add(&mut self, args: &[&str]) -> Result<()> {
        run("mount", args)?;
        self.0.extend(args.last().map(|place| (*place).to_owned()));
        Ok(())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        for place in self.0.iter().rev() {
            if let Err(error) = run("umount", &[place]) {
                eprintln!("brig-bench: {error:#}");
            }
        }
    }
}
