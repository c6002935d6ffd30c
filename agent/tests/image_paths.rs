//! Paths that an image shapes: links that dangle, go round or lead away, files for directories. Each case was
//! tried on runc; what is made and what is refused is the same.
#![allow(clippy::unwrap_used)]
mod guest;

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use brig_agent_protocol::agent::*;
use guest::*;
use serde_json::{Value, json};
use ttrpc::Code;
use update_volume_request::Kind;

/// A container's image, its spec, and the mounts of the share below it.
struct Image {
    id: String,
    root: PathBuf,
    spec: Value,
    mounts: Vec<MountSource>,
}

impl Image {
    fn new(guest: &Guest, script: &str) -> Self {
        let id = format!("i{}", fs::read_dir(guest.share()).unwrap().count());
        Self {
            root: guest.rootfs(&id),
            spec: spec(script),
            mounts: Vec::new(),
            id,
        }
    }

    fn link(self, at: &str, target: &str) -> Self {
        let at = self.root.join(at);
        let _ = fs::remove_dir(&at);
        symlink(target, at).unwrap();
        self
    }

    fn file(self, at: &str) -> Self {
        let at = self.root.join(at);
        let _ = fs::remove_dir(&at);
        fs::write(at, "").unwrap();
        self
    }

    fn next_mount(&mut self, mount: Value) -> u32 {
        let mounts = self.spec["mounts"].as_array_mut().unwrap();
        mounts.push(mount);
        u32::try_from(mounts.len() - 1).unwrap()
    }

    /// Binds a file or directory of the share, made here, at `destination`.
    fn bind(mut self, guest: &Guest, destination: &str, is_dir: bool) -> Self {
        let index = self.next_mount(json!({
            "destination": destination, "type": "bind", "source": "/x", "options": ["rbind", "rw"]
        }));
        let path = format!("{}/m{index}", self.id);
        let at = guest.share().join(&path);
        if is_dir {
            fs::create_dir(&at).unwrap();
            fs::write(at.join("in"), "mounted").unwrap();
        } else {
            fs::write(&at, "mounted").unwrap();
        }
        self.mounts.push(MountSource {
            index,
            share_path: path,
            ..Default::default()
        });
        self
    }

    fn change(mut self, change: impl FnOnce(&mut Value)) -> Self {
        change(&mut self.spec);
        self
    }

    async fn runs(self, guest: &mut Guest) -> String {
        let outcome = guest.whole_with(&self.id, &self.spec, self.mounts).await;
        assert_eq!((outcome.stderr.as_str(), outcome.status), ("", 0));
        outcome.stdout
    }

    async fn refused(self, guest: &mut Guest) -> String {
        let (stdio, _ends) = guest.stdio(false, false).await;
        let created = guest
            .create_with(&self.id, &self.spec, stdio, self.mounts)
            .await;
        let (code, text) = refusal(created);
        assert_eq!(code, Code::INVALID_ARGUMENT, "{text}");
        text
    }
}

/// Nothing may be made beside the root.
fn assert_only_the_root(image: &Path) {
    let parent = image.parent().unwrap();
    for entry in fs::read_dir(parent).unwrap() {
        let name = entry.unwrap().file_name();
        let known = name == "rootfs" || name.to_string_lossy().starts_with('m');
        assert!(known, "{name:?} was made beside the root");
    }
}

#[tokio::test]
async fn mounts_go_where_links_of_the_image_lead_and_what_is_missing_is_made() {
    let mut guest = Guest::start().await;
    let image = Image::new(
        &guest,
        "cat /etc/resolv.conf /etc/hosts; readlink /etc/resolv.conf; cat /srv/x/y/in /mnt/data/in \
         /outside/z/in; stat -c '%F %a %u' /run/systemd/resolve /nowhere/hosts /not/there",
    )
    .link("etc/resolv.conf", "../run/systemd/resolve/stub-resolv.conf")
    .link("etc/hosts", "/nowhere/hosts")
    .link("srv", "not/there")
    .link("data", "/mnt/data")
    .link("out", "../../../../outside");
    let image = image
        .bind(&guest, "/etc/resolv.conf", false)
        .bind(&guest, "/etc/hosts", false)
        .bind(&guest, "/srv/x/y", true)
        .bind(&guest, "/data", true)
        .bind(&guest, "/out/z", true);
    let root = image.root.clone();
    assert_eq!(
        image.runs(&mut guest).await,
        "mountedmounted../run/systemd/resolve/stub-resolv.conf\nmountedmountedmounted\
         directory 755 0\nregular file 644 0\ndirectory 755 0\n"
    );
    assert_only_the_root(&root);
    assert!(!Path::new("/outside").exists());
    guest.stop().await;
}

#[tokio::test]
async fn every_kind_of_mount_follows_links() {
    let mut guest = Guest::start().await;
    let mut image = Image::new(
        &guest,
        "cat /made/copy/key /made/memory/x; awk '$2 ~ /^.made/ {print $2, $3}' /proc/mounts | sort",
    )
    .link("copy", "made/copy")
    .link("memory", "/made/memory")
    .link("tmp2", "made/tmp")
    .link("proc2", "made");
    let volume = |id: &str, kind: Kind, name: &str| UpdateVolumeRequest {
        id: id.into(),
        kind: kind.into(),
        size: 1 << 20,
        entries: vec![
            VolumeEntry {
                mode: libc::S_IFDIR | 0o755,
                identity: 1,
                ..Default::default()
            },
            VolumeEntry {
                path: name.into(),
                mode: libc::S_IFREG | 0o644,
                content: format!("{name} ").into(),
                identity: 2,
                ..Default::default()
            },
        ],
        ..Default::default()
    };
    for (id, kind, name) in [
        ("copied", Kind::REPLICA, "key"),
        ("memory", Kind::MEMORY, "x"),
    ] {
        let request = volume(id, kind, name);
        guest.client.update_volume(ctx(), &request).await.unwrap();
    }
    for (destination, id) in [("/copy", "copied"), ("/memory", "memory")] {
        let index = image.next_mount(json!({
            "destination": destination, "type": "bind", "source": "/x", "options": ["rbind"]
        }));
        image.mounts.push(MountSource {
            index,
            volume: id.into(),
            ..Default::default()
        });
    }
    image.next_mount(json!({"destination": "/tmp2", "type": "tmpfs", "source": "tmpfs"}));
    // A file system of the kernel on the way through a link, but not on one.
    image.next_mount(json!({"destination": "/proc2/proc", "type": "proc", "source": "proc"}));
    assert_eq!(
        image.runs(&mut guest).await,
        "key x /made/copy tmpfs\n/made/memory tmpfs\n/made/proc proc\n/made/tmp tmpfs\n"
    );
    guest.stop().await;
}

#[tokio::test]
async fn dev_can_be_a_link_and_devices_go_where_links_lead() {
    let mut guest = Guest::start().await;
    for target in ["elsewhere", "/deep/down"] {
        let image = Image::new(
            &guest,
            "echo x > /dev/null; readlink /dev/fd; test -c /dev/pts/ptmx && test -d /dev/shm && test -c /dev/zero && echo all",
        )
        .link("dev", target);
        assert_eq!(image.runs(&mut guest).await, "/proc/self/fd\nall\n");
    }
    let image = Image::new(
        &guest,
        "stat -c '%F %t:%T' /not/there/d/f /else; readlink /own",
    )
    .link("srv", "not/there")
    .link("own", "/else")
    .change(|spec| {
        spec["linux"]["devices"] = json!([
            {"path": "/srv/d/f", "type": "c", "major": 10, "minor": 229},
            {"path": "/own", "type": "c", "major": 10, "minor": 229}
        ]);
    });
    let device = "character special file a:e5\n";
    assert_eq!(
        image.runs(&mut guest).await,
        format!("{device}{device}/else\n")
    );
    guest.stop().await;
}

#[tokio::test]
async fn proc_and_sys_must_be_ordinary_directories() {
    let mut guest = Guest::start().await;
    for name in ["proc", "sys"] {
        let image = Image::new(&guest, "true").link(name, "elsewhere");
        let text = image.refused(&mut guest).await;
        assert!(text.contains("ordinary directory"), "{text}");
        assert!(text.contains("symlink there (-> elsewhere)"), "{text}");
        let image = Image::new(&guest, "true").file(name);
        let text = image.refused(&mut guest).await;
        assert!(text.contains("a file there"), "{text}");
    }
    guest.stop().await;
}

#[tokio::test]
async fn what_is_in_the_way_is_named() {
    let mut guest = Guest::start().await;
    let circle = |guest: &Guest| Image::new(guest, "true").link("a", "b").link("b", "/a");
    let image = circle(&guest).bind(&guest, "/a/x", true);
    let text = image.refused(&mut guest).await;
    assert!(text.contains("too many levels of symbolic links"), "{text}");
    assert!(
        text.contains("/a -> b") || text.contains("/b -> /a"),
        "{text}"
    );
    for field in ["maskedPaths", "readonlyPaths"] {
        let image = circle(&guest).change(|spec| spec["linux"][field] = json!(["/b"]));
        let text = image.refused(&mut guest).await;
        assert!(text.contains("too many levels of symbolic links"), "{text}");
    }
    for (destination, is_dir, word) in [
        ("/file", true, "/file: not a directory"),
        ("/by-link", true, "/by-link -> file"),
        ("/by-link/x", true, "/by-link -> file"),
        ("/tmp", false, "/tmp: is a directory"),
    ] {
        let image = Image::new(&guest, "true")
            .file("file")
            .link("by-link", "file")
            .bind(&guest, destination, is_dir);
        let text = image.refused(&mut guest).await;
        assert!(text.contains(word), "{destination}: {text}");
    }
    let image = Image::new(&guest, "true")
        .link("m", "/proc/sys")
        .bind(&guest, "/m/kernel", true);
    let text = image.refused(&mut guest).await;
    assert!(text.contains("inside /proc"), "{text}");
    assert!(text.contains("/m -> /proc/sys"), "{text}");
    guest.stop().await;
}

#[tokio::test]
async fn masks_and_read_only_paths_hold_behind_links() {
    let mut guest = Guest::start().await;
    let image = Image::new(
        &guest,
        "exec 2>/dev/null; cat /secret; ls /hidden; (: > /fixed/x) || echo fixed; readlink /gone",
    )
    .link("mask-file", "secret")
    .link("mask-dir", "/hidden")
    .link("ro", "fixed")
    .link("gone", "no/where")
    .change(|spec| {
        spec["linux"]["maskedPaths"] = json!(["/mask-file", "/mask-dir", "/gone"]);
        spec["linux"]["readonlyPaths"] = json!(["/ro", "/gone"]);
    });
    fs::write(image.root.join("secret"), "secret").unwrap();
    fs::create_dir(image.root.join("hidden")).unwrap();
    fs::write(image.root.join("hidden/x"), "").unwrap();
    fs::create_dir(image.root.join("fixed")).unwrap();
    let root = image.root.clone();
    assert_eq!(image.runs(&mut guest).await, "fixed\nno/where\n");
    assert!(!root.join("no").exists());
    guest.stop().await;
}

#[tokio::test]
async fn the_working_directory_is_made_behind_a_link_but_not_for_one_to_nothing() {
    let mut guest = Guest::start().await;
    let cwd = |path: &str| {
        let path = path.to_owned();
        move |spec: &mut Value| spec["process"]["cwd"] = path.into()
    };
    let image = Image::new(&guest, "pwd; stat -c %a /tmp/x")
        .link("srv", "tmp")
        .change(cwd("/srv/x/y"));
    assert_eq!(image.runs(&mut guest).await, "/tmp/x/y\n755\n");
    for (path, words) in [
        ("/srv", "/srv -> no/where"),
        ("/srv/x", "/srv -> no/where"),
        ("/a", "too many levels of symbolic links"),
        ("/file", "/file: not a directory"),
        ("/file/x", "/file: not a directory"),
    ] {
        let image = Image::new(&guest, "true")
            .link("srv", "no/where")
            .link("a", "a")
            .file("file")
            .change(cwd(path));
        let text = image.refused(&mut guest).await;
        assert!(text.contains("process.cwd"), "{text}");
        assert!(text.contains(words), "{text}");
    }
    guest.stop().await;
}

#[tokio::test]
async fn a_passwd_that_is_no_file_leaves_the_home_directory_open() {
    let mut guest = Guest::start().await;
    for target in ["/no/where", "passwd", "/dev/zero", "."] {
        let image = Image::new(&guest, "echo $HOME");
        fs::remove_file(image.root.join("etc/passwd")).unwrap();
        let image = image.link("etc/passwd", target);
        assert_eq!(image.runs(&mut guest).await, "/\n", "{target}");
    }
    let image = Image::new(&guest, "echo $HOME");
    let passwd = image.root.join("etc/passwd");
    fs::remove_file(&passwd).unwrap();
    nix::unistd::mkfifo(&passwd, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert_eq!(image.runs(&mut guest).await, "/\n");
    guest.stop().await;
}
