use super::*;
use crate::asked::config::Config;
use crate::asked::spec::{Network, Propagation};
use crate::guest::fakes::{Behaviour, FakeHost, Record};
use crate::guest::vm::Plan;
use crate::guest::vm::boot::Sandbox;
use brig_hypervisor::share::{IdMap, IdRange};
use std::fs;
use std::os::unix::fs::symlink;
use std::time::Duration;
use tokio::time::{sleep, timeout};

mod parts;
mod pod_files;

struct Pod {
    volumes: Volumes,
    boot: Boot,
    record: Record,
    _news: tokio::sync::mpsc::Receiver<crate::guest::vm::boot::News>,
}

fn pod() -> Pod {
    let host = FakeHost::new(Behaviour::default());
    let record = host.record.clone();
    let logger = Logger::root(slog::Discard, slog::o!());
    let (news, news_in) = tokio::sync::mpsc::channel(256);
    let config = Config {
        memory: 64 << 20,
        ..Config::defaults(Path::new("/nonexistent"))
    };
    let plan = Plan::of(config, Network::New);
    let boot = Boot::start(host, plan, Sandbox::default(), news, logger.clone());
    Pod {
        volumes: Volumes::new(logger),
        boot,
        record,
        _news: news_in,
    }
}

impl Pod {
    async fn mount(&self, binds: Vec<BindMount>) -> (Planned, Vec<MountSource>) {
        let planned = self.volumes.plan(binds, &self.boot, false).await.unwrap();
        let vm = self.boot.ready().await.unwrap();
        let sources = planned.in_guest(&vm).await.unwrap();
        (planned, sources)
    }

    async fn eventually(&self, entry: &str) {
        let seen = async {
            while !self.record.has(entry) {
                sleep(Duration::from_millis(5)).await;
            }
        };
        if timeout(Duration::from_secs(10), seen).await.is_err() {
            panic!("no {entry:?} in {:?}", self.record.all());
        }
    }
}

fn leases(planned: Planned) -> Leases {
    let mut leases = Leases::default();
    planned.lease(&mut leases);
    leases
}

fn bind(index: usize, source: &Path) -> BindMount {
    BindMount {
        index,
        destination: format!("/v{index}"),
        readonly: true,
        ..BindMount::plain(source)
    }
}

/// Where kubelet keeps a ConfigMap.
fn config_map() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let volume = dir
        .path()
        .join("pods/u/volumes/kubernetes.io~configmap/settings");
    fs::create_dir_all(&volume).unwrap();
    (dir, volume)
}

fn write(volume: &Path, generation: u32) {
    let name = format!("..{generation}");
    fs::create_dir(volume.join(&name)).unwrap();
    fs::write(volume.join(&name).join("key"), format!("{generation}")).unwrap();
    symlink(&name, volume.join("..data_tmp")).unwrap();
    fs::rename(volume.join("..data_tmp"), volume.join("..data")).unwrap();
    if generation > 1 {
        fs::remove_dir_all(volume.join(format!("..{}", generation - 1))).unwrap();
    }
}

#[tokio::test]
async fn a_change_on_the_node_reaches_the_guest_and_the_last_container_frees_it() {
    let (_dir, volume) = config_map();
    write(&volume, 1);
    let pod = pod();
    let (first, sources) = pod.mount(vec![bind(3, &volume)]).await;
    assert!(first.shared.is_empty());
    assert_eq!((sources[0].index, sources[0].volume.as_str()), (3, "v1"));
    assert!(sources[0].share_path.is_empty());
    pod.eventually("volume v1 ..1 ..1/key ..data>..1").await;
    // Another container of the pod has the same one.
    let (second, sources) = pod.mount(vec![bind(0, &volume)]).await;
    assert_eq!(sources[0].volume, "v1");
    write(&volume, 2);
    pod.eventually("volume v1 ..2 ..2/key ..data>..2").await;
    drop(leases(first));
    write(&volume, 3);
    pod.eventually("volume v1 ..3 ..3/key ..data>..3").await;
    assert!(!pod.record.has("remove volume v1"));
    drop(leases(second));
    pod.eventually("remove volume v1").await;
    // A container that comes later gets a new one.
    let (_third, sources) = pod.mount(vec![bind(0, &volume)]).await;
    assert_eq!(sources[0].volume, "v2");
}

#[tokio::test]
async fn the_guest_never_sees_half_a_generation() {
    let (_dir, volume) = config_map();
    write(&volume, 1);
    let pod = pod();
    let (_planned, _) = pod.mount(vec![bind(0, &volume)]).await;
    for generation in 2..60 {
        write(&volume, generation);
        sleep(Duration::from_millis(u64::from(generation % 7))).await;
    }
    pod.eventually("volume v1 ..59 ..59/key ..data>..59").await;
    for seen in pod.record.all() {
        let Some((_, target)) = seen.split_once("..data>") else {
            continue;
        };
        assert!(seen.contains(&format!(" {target}/key ")), "{seen}");
    }
}

#[tokio::test]
async fn what_cannot_be_copied_is_shared_and_what_cannot_be_had_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let large = dir
        .path()
        .join("pods/u/volumes/kubernetes.io~configmap/large");
    fs::create_dir_all(&large).unwrap();
    fs::write(large.join("f"), vec![0; 3 << 20]).unwrap();
    let plain = dir.path().join("plain");
    fs::create_dir(&plain).unwrap();
    let pod = pod();
    let binds = vec![
        bind(0, &plain),
        bind(1, &large),
        bind(2, Path::new("/dev/null")),
    ];
    let (planned, sources) = pod.mount(binds).await;
    let shared: Vec<_> = planned.shared.iter().map(|(bind, _)| bind.index).collect();
    assert_eq!(shared, [0, 1]);
    assert_eq!(sources.len(), 1);
    assert_eq!((sources[0].index, sources[0].device.as_str()), (2, "null"));
    let fifo = dir.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let refused = pod
        .volumes
        .plan(vec![bind(0, &fifo)], &pod.boot, false)
        .await;
    assert!(refused.is_err_and(|error| error.message.contains("/fifo")));
}

#[tokio::test]
async fn what_a_container_may_write_is_never_a_copy() {
    let (dir, volume) = config_map();
    write(&volume, 1);
    for around in [
        "pods/u/volumes",
        "pods/u/volumes/kubernetes.io~configmap/settings/..1",
    ] {
        let pod = pod();
        let mut writer = bind(0, &dir.path().join(around));
        writer.readonly = false;
        // Whether it comes with the same container or came with another.
        pod.mount(vec![writer]).await;
        let (planned, sources) = pod.mount(vec![bind(1, &volume)]).await;
        assert_eq!((planned.shared.len(), sources.len()), (1, 0), "{around}");
    }
}

#[tokio::test]
async fn the_copies_of_a_pod_stay_within_its_budget_when_they_grow() {
    let dir = tempfile::tempdir().unwrap();
    let volumes: Vec<PathBuf> = (0..6)
        .map(|n| {
            let name = format!("pods/u/volumes/kubernetes.io~configmap/v{n}");
            let volume = dir.path().join(name);
            fs::create_dir_all(&volume).unwrap();
            volume
        })
        .collect();
    let pod = pod();
    let binds = volumes
        .iter()
        .enumerate()
        .map(|(n, v)| bind(n, v))
        .collect();
    let (_planned, sources) = pod.mount(binds).await;
    assert_eq!(sources.len(), volumes.len());
    // 15 MiB each: four fit.
    for volume in &volumes {
        for file in 0..8 {
            fs::write(volume.join(format!("f{file}")), vec![0; 15 << 17]).unwrap();
        }
    }
    let grown = || {
        let all = pod.record.all();
        let grown: BTreeSet<String> = all
            .iter()
            .filter(|seen| seen.starts_with("volume ") && seen.ends_with(" f7"))
            .cloned()
            .collect();
        grown.len()
    };
    let four = async {
        while grown() < 4 {
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(Duration::from_secs(30), four)
        .await
        .expect("too few");
    sleep(Duration::from_millis(500)).await;
    assert_eq!(grown(), 4);
}

#[tokio::test]
async fn a_fixed_copy_does_not_follow_its_source() {
    let dir = tempfile::tempdir().unwrap();
    let bound = dir.path().join("pods/u/volume-subpaths/cfg/main");
    fs::create_dir_all(
        dir.path()
            .join("pods/u/volumes/kubernetes.io~configmap/cfg"),
    )
    .unwrap();
    fs::create_dir_all(&bound).unwrap();
    fs::write(bound.join("0"), "one").unwrap();
    let pod = pod();
    let (planned, sources) = pod.mount(vec![bind(0, &bound.join("0"))]).await;
    assert_eq!(sources[0].volume_path, "file");
    fs::write(bound.join("0"), "two").unwrap();
    sleep(Duration::from_millis(200)).await;
    let sent = pod.record.all();
    let sent = sent
        .iter()
        .filter(|seen| seen.starts_with("volume "))
        .count();
    assert_eq!(sent, 1);
    drop(planned);
    pod.eventually("remove volume v1").await;
}

impl Pod {
    async fn share(&self, binds: Vec<BindMount>) -> Leases {
        let mut planned = self.volumes.plan(binds, &self.boot, false).await.unwrap();
        let vm = self.boot.ready().await.unwrap();
        let mut leases = Leases::default();
        let attaching = self.volumes.share(&mut planned, &vm, &mut leases);
        attaching.done().await.unwrap();
        leases.join().await.unwrap();
        leases
    }

    /// What was done to the share, in order.
    fn shared(&self) -> Vec<String> {
        let words = ["attach ", "remount ", "forget ", "detach "];
        let mut all = self.record.all();
        all.retain(|seen| words.iter().any(|word| seen.starts_with(word)));
        all
    }
}

#[tokio::test]
async fn a_directory_is_attached_once_and_freed_with_its_last_container() {
    let dir = tempfile::tempdir().unwrap();
    let pod = pod();
    let mut writer = bind(0, dir.path());
    writer.readonly = false;
    let first = pod.share(vec![bind(4, dir.path())]).await;
    let path = first.sources().unwrap()[0].share_path.clone();
    assert_eq!(first.sources().unwrap()[0].index, 4);
    let second = pod.share(vec![writer, bind(1, dir.path())]).await;
    let paths: Vec<_> = second.sources().unwrap();
    assert!(paths.len() == 2 && paths.iter().all(|source| source.share_path == path));
    pod.volumes.release(first).await;
    assert_eq!(
        pod.shared(),
        [format!("attach {path} ro"), format!("remount {path} rw")]
    );
    pod.volumes.release(second).await;
    assert_eq!(
        pod.shared()[2..],
        [format!("forget {path}"), format!("detach {path}")]
    );
    let third = pod.share(vec![bind(0, dir.path())]).await;
    assert_ne!(third.sources().unwrap()[0].share_path, path);
}

#[tokio::test]
async fn what_is_writable_becomes_read_only_when_its_last_writer_has_gone() {
    let dir = tempfile::tempdir().unwrap();
    let pod = pod();
    let mut writer = bind(0, dir.path());
    writer.readonly = false;
    let first = pod.share(vec![writer]).await;
    let second = pod.share(vec![bind(0, dir.path())]).await;
    let path = first.sources().unwrap()[0].share_path.clone();
    pod.volumes.release(first).await;
    assert_eq!(
        pod.shared(),
        [format!("attach {path}"), format!("remount {path} ro")]
    );
    pod.volumes.release(second).await;
}

#[tokio::test]
async fn an_attachment_that_fails_names_its_mount() {
    let dir = tempfile::tempdir().unwrap();
    let volume = dir.path().join("v");
    fs::create_dir(&volume).unwrap();
    let pod = pod();
    let binds = vec![bind(7, &volume)];
    let mut planned = pod.volumes.plan(binds, &pod.boot, false).await.unwrap();
    let vm = pod.boot.ready().await.unwrap();
    fs::remove_dir(&volume).unwrap();
    let mut leases = Leases::default();
    let attaching = pod.volumes.share(&mut planned, &vm, &mut leases);
    let error = attaching.done().await.unwrap_err();
    assert!(error.message.contains("/v7"), "{error}");
    pod.volumes.release(leases).await;
}

/// A tmpfs of the node for the time of a test.
struct Tmpfs(PathBuf);

impl Tmpfs {
    fn on(path: &Path) -> Self {
        Self::of("tmpfs", path, "rw")
    }

    fn of(kind: &str, path: &Path, options: &str) -> Self {
        let arguments = ["-t", kind, "-o", options, "brig-test"];
        let mut command = std::process::Command::new("mount");
        assert!(
            command
                .args(arguments)
                .arg(path)
                .status()
                .unwrap()
                .success()
        );
        Self(path.to_owned())
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg(&self.0).status();
    }
}

#[tokio::test]
async fn a_later_mount_of_the_node_comes_and_goes_where_it_was_asked_for() {
    if !brig_fixtures::needs::root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for name in ["one/deep", "two/deep"] {
        fs::create_dir_all(dir.path().join(name)).unwrap();
    }
    let pod = pod();
    let mut follows = bind(0, &dir.path().join("one"));
    follows.propagation = Propagation::HostToContainer;
    let leases = pod
        .share(vec![follows, bind(1, &dir.path().join("two"))])
        .await;
    let path = leases.shared[0].attachment.path.clone();
    let mounts = ["one/deep", "two/deep"].map(|name| Tmpfs::on(&dir.path().join(name)));
    pod.eventually(&format!("attach {path} below deep ro"))
        .await;
    drop(mounts);
    pod.eventually(&format!("detach {path} below deep")).await;
    pod.eventually("drop_caches").await;
    let below = pod
        .shared()
        .iter()
        .filter(|seen| seen.contains(" below "))
        .count();
    assert_eq!(below, 2, "the private one is left alone");
    pod.volumes.release(leases).await;
}

/// A directory as kubelet makes it for an emptyDir in memory.
fn memory_volume() -> (tempfile::TempDir, PathBuf, Tmpfs) {
    let dir = tempfile::tempdir().unwrap();
    let volume = dir.path().join("volumes/kubernetes.io~empty-dir/cache");
    fs::create_dir_all(&volume).unwrap();
    let tmpfs = Tmpfs::on(&volume);
    (dir, volume, tmpfs)
}

#[tokio::test]
async fn a_memory_volume_is_made_once_and_lasts_as_long_as_the_pod() {
    if !brig_fixtures::needs::root() {
        return;
    }
    let (_dir, volume, _tmpfs) = memory_volume();
    fs::write(volume.join("seed"), "x").unwrap();
    let pod = pod();
    let (planned, sources) = pod.mount(vec![bind(0, &volume)]).await;
    assert_eq!(
        (sources[0].volume.as_str(), sources[0].volume_path.as_str()),
        ("v1", "")
    );
    pod.eventually("volume v1 seed").await;
    drop(leases(planned));
    // Kubelet makes the directory of a sub-path; what else it finds there is not sent again.
    fs::create_dir_all(volume.join("a/b")).unwrap();
    let (_second, sources) = pod.mount(vec![bind(2, &volume.join("a/b"))]).await;
    assert_eq!(
        (sources[0].volume.as_str(), sources[0].volume_path.as_str()),
        ("v1", "a/b")
    );
    pod.eventually("volume v1 a a/b").await;
    assert!(!pod.record.has("remove volume v1"));
}

#[tokio::test]
async fn huge_pages_are_the_guests_own_and_nothing_of_the_nodes_is_sent() {
    if !brig_fixtures::needs::root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let volume = dir.path().join("volumes/kubernetes.io~empty-dir/huge");
    fs::create_dir_all(&volume).unwrap();
    let pod = pod();
    {
        let _mounted = Tmpfs::of("hugetlbfs", &volume, "pagesize=2M");
        fs::create_dir(volume.join("a")).unwrap();
        fs::create_dir(volume.join("b")).unwrap();
        let (planned, sources) = pod.mount(vec![bind(0, &volume)]).await;
        assert_eq!(sources[0].volume, "v1");
        pod.eventually("volume v1 ").await;
        drop(leases(planned));
        let (_second, sources) = pod.mount(vec![bind(2, &volume.join("a"))]).await;
        assert_eq!(sources[0].volume_path, "a");
        pod.eventually("volume v1 a").await;
        assert!(!pod.record.has("remove volume v1"));
    }
    let _mounted = Tmpfs::of("hugetlbfs", &volume, "pagesize=1G");
    let planned = pod.volumes.plan(vec![bind(0, &volume)], &pod.boot, false);
    let Err(error) = planned.await else {
        panic!("a guest has no pages of that size")
    };
    assert!(error.message.contains("HugePages-2Mi"), "{error}");
}

#[tokio::test]
async fn read_only_holds_for_the_mounts_below_only_if_asked_for() {
    if !brig_fixtures::needs::root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("below")).unwrap();
    let _below = Tmpfs::on(&dir.path().join("below"));
    let pod = pod();
    let mut all = bind(0, dir.path());
    all.readonly_below = true;
    let leases = pod.share(vec![all, bind(1, dir.path())]).await;
    let sources = leases.sources().unwrap();
    let (all, top) = (&sources[0], &sources[1]);
    assert_ne!(all.share_path, top.share_path);
    assert!(!all.readonly_on_host && top.readonly_on_host);
    let shared = pod.shared();
    assert!(shared.contains(&format!("attach {} ro", all.share_path)));
    assert!(shared.contains(&format!("attach {} ro, writable below", top.share_path)));
    pod.volumes.release(leases).await;
}

#[tokio::test]
async fn a_mapped_mount_has_an_attachment_of_its_own_that_those_with_its_map_share() {
    let dir = tempfile::tempdir().unwrap();
    let pod = pod();
    let range = |seen| IdRange {
        stored: 0,
        seen,
        length: 65_536,
    };
    let mapped = |index, seen| BindMount {
        id_map: Some(IdMap::new(&[range(seen)], &[range(seen)], false)),
        ..bind(index, dir.path())
    };
    let binds = vec![
        bind(0, dir.path()),
        mapped(1, 200_000),
        mapped(2, 200_000),
        mapped(3, 300_000),
    ];
    let leases = pod.share(binds).await;
    let sources = leases.sources().unwrap();
    let told: Vec<bool> = sources.iter().map(|source| source.mapped_on_host).collect();
    assert_eq!(told, [false, true, true, true]);
    let path = |n: usize| sources[n].share_path.as_str();
    assert_eq!(path(1), path(2));
    assert!(path(0) != path(1) && path(1) != path(3));
    let shared = pod.shared();
    assert!(shared.contains(&format!("attach {} ro", path(0))));
    assert!(shared.contains(&format!("attach {} ro mapped", path(1))));
    pod.volumes.release(leases).await;
}

#[tokio::test]
async fn containers_that_propagate_have_one_volume_of_the_guest() {
    let dir = tempfile::tempdir().unwrap();
    let pod = pod();
    let with = |propagation| BindMount {
        readonly: false,
        propagation,
        ..bind(0, dir.path())
    };
    let first = pod.share(vec![with(Propagation::Bidirectional)]).await;
    let second = pod.share(vec![with(Propagation::HostToContainer)]).await;
    let third = pod.share(vec![with(Propagation::Private)]).await;
    let source = |leases: &Leases| leases.sources().unwrap()[0].clone();
    assert_eq!(source(&first).volume, source(&second).volume);
    assert!(source(&first).share_path.is_empty() && !source(&third).share_path.is_empty());
    let volume = source(&first).volume;
    let made = format!("volume {volume} ");
    let count = || {
        pod.record
            .all()
            .iter()
            .filter(|seen| **seen == made)
            .count()
    };
    assert_eq!(count(), 1);
    let path = first.shared[0].attachment.path.clone();
    pod.volumes.release(first).await;
    assert!(!pod.record.has(&format!("remove volume {volume}")));
    pod.volumes.release(second).await;
    let removed = format!("remove volume {volume}");
    assert!(pod.record.in_order(&removed, &format!("forget {path}")));
    pod.volumes.release(third).await;
}

#[tokio::test]
async fn a_change_that_does_not_reach_the_guest_is_sent_again() {
    let (_dir, volume) = config_map();
    write(&volume, 1);
    let pod = pod();
    let (_planned, _) = pod.mount(vec![bind(0, &volume)]).await;
    fs::write(volume.join("refused-once"), "x").unwrap();
    pod.eventually("refused").await;
    // Nothing changes on the node any more.
    pod.eventually("volume v1 ..1 ..1/key ..data>..1 refused-once")
        .await;
}

#[tokio::test]
async fn a_memory_volume_that_failed_is_made_anew() {
    if !brig_fixtures::needs::root() {
        return;
    }
    let (_dir, volume, _tmpfs) = memory_volume();
    fs::write(volume.join("refused-once"), "x").unwrap();
    let pod = pod();
    let vm = pod.boot.ready().await.unwrap();
    let planned = pod.volumes.plan(vec![bind(0, &volume)], &pod.boot, false);
    assert!(planned.await.unwrap().in_guest(&vm).await.is_err());
    pod.eventually("remove volume v1").await;
    let (_second, sources) = pod.mount(vec![bind(0, &volume)]).await;
    assert_eq!(sources[0].volume, "v2");
}
