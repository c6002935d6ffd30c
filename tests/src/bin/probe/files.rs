//! What a container can do with files, and the names of the errors it meets.

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result, bail};
use brig_tests::pattern::{self, Checksum};
use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use serde_json::{Value, json};

/// The symbolic name of an error, "EROFS".
pub fn errno_name(error: &io::Error) -> String {
    error.raw_os_error().map_or_else(
        || error.to_string(),
        |code| format!("{:?}", Errno::from_raw(code)),
    )
}

/// "ok", or the name of the error, of creating the file and removing it again.
pub fn attempt_write(path: &str) -> String {
    match fs::write(path, b"x") {
        Ok(()) => {
            let _ = fs::remove_file(path);
            "ok".to_owned()
        }
        Err(error) => errno_name(&error),
    }
}

/// Prints a file.
pub fn read(path: &str) -> Result<u8> {
    let data = fs::read(path).with_context(|| format!("cannot read {path}"))?;
    io::stdout().write_all(&data)?;
    Ok(0)
}

/// Writes text to a file that may exist.
pub fn write(path: &str, text: &str) -> Result<u8> {
    fs::write(path, text).with_context(|| format!("cannot write {path}"))?;
    Ok(0)
}

/// Owner, mode and size.
pub fn stat(path: &str) -> Result<Value> {
    let meta = fs::symlink_metadata(path).with_context(|| format!("cannot stat {path}"))?;
    Ok(json!({
        "uid": meta.uid(),
        "gid": meta.gid(),
        "mode": format!("{:o}", meta.mode() & 0o7777),
        "size": meta.size(),
    }))
}

/// Names in a directory, sorted.
pub fn list(path: &str) -> Result<Value> {
    let mut names: Vec<String> = fs::read_dir(path)
        .with_context(|| format!("cannot list {path}"))?
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    Ok(json!(names))
}

/// Does one thing with each of `count` files of a directory: `make` it empty, make it and `write` 4 KiB, `stat` it,
/// `remove` it; `open` it, look at it, read it and close it. `list` is of the directory, that many times; `append` is 4 KiB to
/// one file, that many times, which is closed then and removed.
pub fn many(step: &str, path: &str, count: u32) -> Result<u8> {
    if step == "append" {
        let name = format!("{path}/appended");
        let mut file = fs::File::options().create(true).append(true).open(&name)?;
        for number in 0..count {
            let done = file.write_all(&[7; 4096]);
            done.with_context(|| format!("cannot append {number}"))?;
        }
        drop(file);
        let size = fs::metadata(&name)?.len();
        fs::remove_file(&name)?;
        if size != 4096 * u64::from(count) {
            bail!("{count} times 4 KiB are {size} bytes");
        }
        return Ok(0);
    }
    for number in 0..count {
        let name = format!("{path}/many-{number}");
        let done = match step {
            "make" => fs::File::create_new(name).map(drop),
            "write" => fs::File::create_new(name).and_then(|mut file| file.write_all(&[7; 4096])),
            "stat" => fs::metadata(name).map(drop),
            "open" => fs::File::open(name).and_then(|mut file| {
                file.metadata()?;
                file.read_exact(&mut [0; 4096])
            }),
            "remove" => fs::remove_file(name),
            "list" => fs::read_dir(path)
                .and_then(|mut entries| entries.try_for_each(|entry| entry.map(drop))),
            other => bail!("{other} is nothing to do with a file"),
        };
        done.with_context(|| format!("cannot {step} {number}"))?;
    }
    Ok(0)
}

/// Says 'ready', and names what inotify says of a directory until `wanted` is renamed in it.
pub fn watch(path: &str, wanted: &str) -> Result<u8> {
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC)?;
    let mask = AddWatchFlags::IN_MOVED_TO | AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MODIFY;
    inotify
        .add_watch(path, mask)
        .with_context(|| format!("cannot watch {path}"))?;
    println!("ready");
    io::stdout().flush()?;
    loop {
        for event in inotify.read_events()? {
            let name = event.name.unwrap_or_default();
            println!("{:?} {}", event.mask, name.to_string_lossy());
            if event.mask.contains(AddWatchFlags::IN_MOVED_TO) && name == wanted {
                return Ok(0);
            }
        }
    }
}

/// Connects to a Unix socket, sends a line and prints the answer.
pub fn connect(path: &str) -> Result<u8> {
    let mut stream =
        UnixStream::connect(path).with_context(|| format!("cannot connect to {path}"))?;
    stream.set_read_timeout(Some(std::time::Duration::from_secs(20)))?;
    stream.write_all(b"hello\n")?;
    io::copy(&mut stream, &mut io::stdout().lock())?;
    Ok(0)
}

/// Writes the pattern, makes it durable, says so, and waits to be killed.
pub fn write_fsync(path: &str, bytes: u64) -> Result<u8> {
    let mut file = fs::File::create(path).with_context(|| format!("cannot create {path}"))?;
    pattern::write(&mut file, bytes)?;
    file.sync_all()?;
    let mut sum = Checksum::default();
    pattern::write(&mut sum, bytes)?;
    println!("synced {}", sum.hex());
    io::stdout().flush()?;
    crate::actions::sleep(None)
}
