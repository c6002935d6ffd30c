//! What is held of files where a server hides what is held and does not remove it.

use super::mounts::open_below;
use super::*;

const UNLINK: u32 = 10;
const RMDIR: u32 = 11;
const RENAME: u32 = 12;

fn remote(share: &Path) -> Client {
    let client = Client::new(share);
    client.handle.served.pretend_remote(ROOT);
    client
}

fn named(client: &mut Client, opcode: u32, parent: u64, name: &str) -> Result<(), i32> {
    let body = [name.as_bytes(), b"\0"].concat();
    client.call(opcode, parent, &body).map(drop)
}

fn rename(client: &mut Client, from: &str, to: &str) -> Result<(), i32> {
    let names = format!("{from}\0{to}\0");
    let body = [&ROOT.to_le_bytes(), names.as_bytes()].concat();
    client.call(RENAME, ROOT, &body).map(drop)
}

fn look(client: &mut Client, node: u64) -> Result<u64, i32> {
    let reply = client.call(GETATTR, node, &[0; 16])?;
    Ok(u64_at(&reply, 16))
}

fn close(client: &mut Client, node: u64, handle: u64) {
    let body = [handle.to_le_bytes().as_slice(), &[0; 16]].concat();
    client.call(RELEASE, node, &body).unwrap();
}

/// How often a file or one that has been removed is open here.
fn held(share: &Path, name: &str) -> usize {
    open_below(&share.join(name)).len() + open_below(&share.join(format!("{name} (deleted)"))).len()
}

#[test]
fn nothing_is_held_of_a_file_that_was_removed() {
    let share = share();
    let path = share.path();
    let mut client = remote(path);
    let directory = client.walk("dir").node;
    client.walk("dir/inner");
    let inner = client.walk("dir/inner");
    assert_eq!(held(path, "dir/inner"), 1);
    named(&mut client, UNLINK, directory, "inner").unwrap();
    assert_eq!(held(path, "dir/inner"), 0);
    assert_eq!(look(&mut client, inner.node).unwrap_err(), libc::ESTALE);
    named(&mut client, RMDIR, ROOT, "dir").unwrap();
    client.forget_on_hiprio(inner.node, 2);
    client.harness.device.catch_up().unwrap();
    assert_eq!(look(&mut client, inner.node).unwrap_err(), libc::EBADF);
}

#[test]
fn a_link_and_a_pipe_are_let_go_as_a_file_is() {
    let share = share();
    let path = share.path();
    let pipe = path.join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let mut client = remote(path);
    client.list(ROOT);
    for name in ["link", "pipe", "file"] {
        assert_eq!(held(path, name), 1, "{name}");
        named(&mut client, UNLINK, ROOT, name).unwrap();
        assert_eq!(held(path, name), 0, "{name}");
    }
}

#[test]
fn a_file_that_is_open_when_it_is_removed_stays_held_until_it_is_closed() {
    let share = share();
    let path = share.path();
    let mut client = remote(path);
    let file = client.walk("file");
    let handle = client.open(OPEN, file.node, libc::O_RDWR).unwrap();
    named(&mut client, UNLINK, ROOT, "file").unwrap();
    assert_eq!(look(&mut client, file.node).unwrap(), file.ino);
    client.write(file.node, handle, b"CON").unwrap();
    let read = client.read(READ, file.node, handle, 0, 4096).unwrap();
    assert_eq!(read, b"CONtent");
    let again = client.open(OPEN, file.node, libc::O_RDONLY).unwrap();
    close(&mut client, file.node, handle);
    assert_eq!(look(&mut client, file.node).unwrap(), file.ino);
    assert!(held(path, "file") > 0);
    close(&mut client, file.node, again);
    assert_eq!(held(path, "file"), 0);
    assert_eq!(look(&mut client, file.node).unwrap_err(), libc::ESTALE);
    // One that is made is open as well.
    let made = client.create(ROOT, "made", 0o600).unwrap();
    named(&mut client, UNLINK, ROOT, "made").unwrap();
    assert_eq!(look(&mut client, made.node).unwrap(), made.ino);
}

#[test]
fn a_file_that_keeps_its_name_is_held_when_it_is_closed() {
    let share = share();
    let mut client = remote(share.path());
    let file = client.walk("file");
    let handle = client.open(OPEN, file.node, libc::O_RDWR).unwrap();
    close(&mut client, file.node, handle);
    assert_eq!(held(share.path(), "file"), 1);
    assert_eq!(look(&mut client, file.node).unwrap(), file.ino);
}

#[test]
fn a_new_file_of_that_name_is_another() {
    let share = share();
    let path = share.path();
    let mut client = remote(path);
    let old = client.walk("file");
    named(&mut client, UNLINK, ROOT, "file").unwrap();
    fs::write(path.join("file"), "new").unwrap();
    let new = client.walk("file");
    assert_ne!(new.node, old.node);
    assert_eq!(look(&mut client, old.node).unwrap_err(), libc::ESTALE);
    assert_eq!(look(&mut client, new.node).unwrap(), new.ino);
}

#[test]
fn the_other_name_of_a_file_finds_it_again() {
    let share = share();
    let path = share.path();
    fs::hard_link(path.join("file"), path.join("other")).unwrap();
    let mut client = remote(path);
    let file = client.walk("file");
    assert_eq!(client.walk("other").node, file.node);
    named(&mut client, UNLINK, ROOT, "file").unwrap();
    assert_eq!(look(&mut client, file.node).unwrap_err(), libc::ESTALE);
    assert_eq!(client.walk("other").node, file.node);
    assert_eq!(look(&mut client, file.node).unwrap(), file.ino);
}

#[test]
fn nothing_is_held_of_what_another_file_takes_the_place_of() {
    let share = share();
    let path = share.path();
    fs::write(path.join("new"), "new").unwrap();
    let mut client = remote(path);
    let (old, new) = (client.walk("file"), client.walk("new"));
    rename(&mut client, "new", "file").unwrap();
    assert_eq!(held(path, "file"), 1, "the one that is there");
    assert_eq!(look(&mut client, old.node).unwrap_err(), libc::ESTALE);
    assert_eq!(look(&mut client, new.node).unwrap(), new.ino);
    assert_eq!(client.walk("file").node, new.node);
}

#[test]
fn a_file_that_was_not_removed_after_all_is_held_as_before() {
    let share = share();
    let mut client = remote(share.path());
    let file = client.walk("file");
    let refused = rename(&mut client, "dir", "file");
    assert_eq!(refused.unwrap_err(), libc::ENOTDIR);
    assert_eq!(look(&mut client, file.node).unwrap(), file.ino);
    assert_eq!(
        named(&mut client, UNLINK, ROOT, "absent").unwrap_err(),
        libc::ENOENT
    );
    assert_eq!(
        named(&mut client, RMDIR, ROOT, "file").unwrap_err(),
        libc::ENOTDIR
    );
    assert_eq!(look(&mut client, file.node).unwrap(), file.ino);
}

/// There it costs nothing to hold it, and to find out what is held would.
#[test]
fn a_local_file_is_held_until_it_is_forgotten() {
    let share = share();
    let mut client = Client::new(share.path());
    let file = client.walk("file");
    named(&mut client, UNLINK, ROOT, "file").unwrap();
    assert_eq!(held(share.path(), "file"), 1);
    assert_eq!(look(&mut client, file.node).unwrap(), file.ino);
}
