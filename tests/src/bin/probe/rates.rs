//! Programs whose time is what a benchmark wants: small files one after the other, and a byte that goes to and fro. Each prints the
//! microseconds that it took, without its own start.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

fn micros(start: Instant) -> Value {
    json!({ "micros": u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX) })
}

/// One step with `count` files of a directory: `create` and close them empty, `stat` each, `readdir` all of it, `unlink` each.
pub fn metadata(step: &str, directory: &str, count: u32) -> Result<Value> {
    let directory = Path::new(directory);
    let name = |number: u32| directory.join(format!("file-{number}"));
    let start = Instant::now();
    match step {
        "create" => {
            for number in 0..count {
                fs::File::create_new(name(number)).with_context(|| format!("file {number}"))?;
            }
        }
        "stat" => {
            for number in 0..count {
                fs::metadata(name(number)).with_context(|| format!("file {number}"))?;
            }
        }
        "readdir" => {
            let mut found = 0;
            for entry in fs::read_dir(directory)? {
                entry?;
                found += 1;
            }
            ensure!(
                found >= count,
                "{found} entries where {count} files were made"
            );
        }
        "unlink" => {
            for number in 0..count {
                fs::remove_file(name(number)).with_context(|| format!("file {number}"))?;
            }
        }
        other => bail!("{other} is no step: create, stat, readdir and unlink are"),
    }
    Ok(micros(start))
}

/// Gives back each byte of each connection.
pub fn echo_bytes(port: u16) -> Result<u8> {
    let listener = TcpListener::bind(("0.0.0.0", port))?;
    loop {
        let (mut stream, _) = listener.accept()?;
        stream.set_nodelay(true)?;
        let mut byte = [0];
        while let Ok(1) = stream.read(&mut byte) {
            stream.write_all(&byte)?;
        }
    }
}

/// Sends a byte and waits for it, `rounds` times.
pub fn ping(target: &str, rounds: u32) -> Result<Value> {
    let mut stream =
        TcpStream::connect(target).with_context(|| format!("cannot connect to {target}"))?;
    stream.set_nodelay(true)?;
    let mut byte = [7];
    let start = Instant::now();
    for round in 0..rounds {
        stream.write_all(&byte)?;
        stream
            .read_exact(&mut byte)
            .with_context(|| format!("round {round}"))?;
    }
    Ok(micros(start))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_made_found_and_gone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().to_str().unwrap();
        for step in ["create", "stat", "readdir", "unlink"] {
            assert!(metadata(step, path, 5).unwrap()["micros"].is_u64());
        }
        assert_eq!(fs::read_dir(path).unwrap().count(), 0);
        assert!(metadata("stat", path, 1).is_err());
        assert!(metadata("readdir", path, 1).is_err());
    }

    #[test]
    fn a_byte_comes_back() {
        let port = TcpListener::bind("127.0.0.1:0")
            .and_then(|listener| listener.local_addr())
            .unwrap()
            .port();
        std::thread::spawn(move || echo_bytes(port));
        let target = format!("127.0.0.1:{port}");
        let answered = (0..100).find_map(|_| {
            std::thread::sleep(std::time::Duration::from_millis(20));
            ping(&target, 3).ok()
        });
        assert!(answered.unwrap()["micros"].is_u64());
    }
}
