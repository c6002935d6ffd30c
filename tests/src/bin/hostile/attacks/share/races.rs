//! What changes while the server looks: directories that become links, requests that are rewritten.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::refused;
use crate::attacks::files::{Answer, Files, ROOT, name, op, read_in, words};
use crate::virtio::{NEXT, WRITE};

fn exchange(files: &mut Files<'_>, parent: u64, one: &str, other: &str) -> Result<Answer> {
    let mut body = parent.to_le_bytes().to_vec();
    body.extend(words(&[2, 0]));
    body.extend(name(one));
    body.extend(name(other));
    files.call(op::RENAME2, parent, &body)
}

pub fn exchanged(files: &mut Files<'_>) -> Result<()> {
    let volume = files.walk(&["vol"])?;
    for _ in 0..6 {
        let directory = files.lookup(volume, "dir")?.ok().context("dir")?;
        let swapped = exchange(files, volume, "dir", "link-to-dir")?;
        ensure!(swapped.is_ok(), "RENAME_EXCHANGE: {swapped:?}");
        // The node is the directory still; its name leads elsewhere.
        let inner = files.lookup(directory, "inner")?;
        ensure!(inner.is_ok(), "the directory is lost: {inner:?}");
        refused(
            "secret",
            &files.call(op::LOOKUP, directory, &name("secret"))?,
        )?;
        let link = files.lookup(volume, "dir")?.ok().context("link")?;
        refused("secret", &files.call(op::LOOKUP, link, &name("secret"))?)?;
        let back = exchange(files, volume, "dir", "link-to-dir")?;
        ensure!(back.is_ok(), "RENAME_EXCHANGE: {back:?}");
    }
    Ok(())
}

/// The judge swaps `swap` all the time.
pub fn raced(files: &mut Files<'_>) -> Result<()> {
    let volume = files.walk(&["vol"])?;
    for _ in 0..150 {
        let Ok(node) = files.lookup(volume, "swap")? else {
            continue;
        };
        if let Ok(secret) = files.lookup(node, "secret")?
            && let Ok(handle) = files.opened(op::OPEN, secret, libc::O_RDONLY)?
        {
            // The directory has a file of this name too; `call` knows them apart.
            let _ = files.call(op::READ, secret, &read_in(handle, 0, 64))?;
        }
        files.tell(op::FORGET, node, &1u64.to_le_bytes())?;
    }
    Ok(())
}

/// Another CPU changes the request, its descriptors and their order while the server reads them.
pub fn rewritten(files: &mut Files<'_>) -> Result<()> {
    let good = files.message(op::LOOKUP, ROOT, &name("vol"));
    let climbing = files.message(op::LOOKUP, ROOT, &name("../outside"));
    let stop = AtomicBool::new(false);
    let mut lost = 0;
    {
        let (page, reply, ring) = (&files.request, &files.reply, &files.requests);
        let length = u32::try_from(good.len())?;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut turn = 0u32;
                while !stop.load(Ordering::Relaxed) {
                    turn = turn.wrapping_add(1);
                    match turn % 6 {
                        0 => page.write(0, &climbing),
                        1 => page.write(0, &u32::MAX.to_le_bytes()),
                        2 => ring.descriptor(0, page.address, u32::MAX, NEXT, 1),
                        3 => ring.descriptor(1, 0xfee0_0000, 4096, WRITE, 0),
                        4 => ring.descriptor(0, page.address, length, NEXT, 0),
                        _ => ring.descriptor(1, reply.address, 0, WRITE | NEXT, 1),
                    }
                }
            });
            for _ in 0..200 {
                page.write(0, &good);
                ring.descriptor(0, page.address, length, NEXT, 1);
                ring.descriptor(1, reply.address, 4096, WRITE, 0);
                ring.offer(0);
                files.function.kick(1);
                // A broken chain ends the device until its reset: the answer never comes.
                if !ring.wait_used(ring.position(), Duration::from_millis(40)) {
                    lost += 1;
                    if files.function.start_again(&[&files.hiprio, ring]).is_err() {
                        break;
                    }
                }
            }
            stop.store(true, Ordering::Relaxed);
        });
    }
    files.answer()?;
    ensure!(lost < 200, "no request was ever answered");
    Ok(())
}
