//! What lies in something that the pod has already.
use super::*;

/// A directory on a file system of its own, whose mount table is then one line; nothing without the rights for it.
fn volume() -> Option<(tempfile::TempDir, Tmpfs)> {
    if !brig_fixtures::needs::root() {
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    let tmpfs = Tmpfs::on(dir.path());
    fs::create_dir_all(dir.path().join("app/deep")).unwrap();
    fs::write(dir.path().join("app/file"), "x").unwrap();
    Some((dir, tmpfs))
}

/// A second place of something.
fn bound(from: &Path, to: &Path) -> Tmpfs {
    let mut command = std::process::Command::new("mount");
    let done = command.arg("--bind").args([from, to]).status().unwrap();
    assert!(done.success());
    Tmpfs(to.to_owned())
}

fn writable(index: usize, source: &Path) -> BindMount {
    BindMount {
        readonly: false,
        ..bind(index, source)
    }
}

/// Where each mount is found, by its index.
fn places(leases: &Leases) -> Vec<(String, String)> {
    let mut sources = leases.sources().unwrap();
    sources.sort_by_key(|source| source.index);
    let place = |source: MountSource| (source.share_path, source.volume_path);
    sources.into_iter().map(place).collect()
}

#[tokio::test]
async fn equal_sub_paths_of_two_containers_are_one_attachment() {
    let Some((dir, _tmpfs)) = volume() else {
        return;
    };
    let kubelets = tempfile::tempdir().unwrap();
    let pod = pod();
    let mut all = Vec::new();
    let mut mounts = Vec::new();
    for container in ["main", "side"] {
        let at = kubelets
            .path()
            .join("pods/u/volume-subpaths/data")
            .join(container)
            .join("0");
        fs::create_dir_all(&at).unwrap();
        mounts.push(bound(&dir.path().join("app"), &at));
        all.push(pod.share(vec![writable(0, &at)]).await);
    }
    assert_eq!(places(&all[0]), places(&all[1]));
    assert_eq!(places(&all[0])[0].1, "");
    // A mount of the node that has gone since is not needed.
    let side = mounts.remove(1);
    drop(mounts);
    pod.volumes.release(all.remove(0)).await;
    assert_eq!(pod.shared().len(), 1);
    pod.volumes.release(all.remove(0)).await;
    assert!(pod.shared()[1].starts_with("forget "));
    drop(side);
}

#[tokio::test]
async fn a_part_is_taken_from_the_whole_that_the_pod_has() {
    let Some((dir, _tmpfs)) = volume() else {
        return;
    };
    let (whole, app) = (dir.path(), dir.path().join("app"));
    let pod = pod();
    // Whatever their order in a container.
    let first = pod
        .share(vec![
            writable(0, &app.join("file")),
            writable(1, whole),
            bind(2, &app),
        ])
        .await;
    let share_path = places(&first)[1].0.clone();
    let expected = ["app/file", "", "app"].map(|inside| (share_path.clone(), inside.to_owned()));
    assert_eq!(places(&first), expected);
    let directories = first.sources().unwrap();
    assert!(directories.iter().all(|source| source.directory));
    let later = pod.share(vec![writable(0, &app.join("deep"))]).await;
    assert_eq!(places(&later), [(share_path.clone(), "app/deep".into())]);
    // It stays for the part, and as it is for who writes there.
    pod.volumes.release(first).await;
    assert_eq!(pod.shared(), [format!("attach {share_path}")]);
    pod.volumes.release(later).await;
    assert!(pod.shared()[1].starts_with("forget "));
}

#[tokio::test]
async fn nothing_is_given_that_no_container_has_asked_for() {
    let Some((dir, _tmpfs)) = volume() else {
        return;
    };
    let (whole, app) = (dir.path(), dir.path().join("app"));
    let pod = pod();
    // The whole is not attached for a part's sake, nor made writable for it.
    let part = pod.share(vec![writable(0, &app)]).await;
    let read = pod.share(vec![bind(0, whole)]).await;
    let deep = pod.share(vec![writable(0, &app.join("deep"))]).await;
    let paths: Vec<_> = [&part, &read]
        .map(|leases| places(leases)[0].0.clone())
        .into();
    assert_ne!(paths[0], paths[1]);
    assert_eq!(places(&deep), [(paths[0].clone(), "deep".into())]);
    pod.volumes.release(part).await;
    pod.volumes.release(deep).await;
    let alone = pod.share(vec![writable(0, &app)]).await;
    assert!(places(&alone)[0].0 != paths[1] && places(&alone)[0].1.is_empty());
    let reader = pod.share(vec![bind(0, &app.join("deep"))]).await;
    assert_eq!(places(&reader)[0].1, "deep");
    assert_eq!(
        places(&reader)[0].0,
        places(&alone)[0].0,
        "where it is written"
    );
    let shared = pod.shared();
    assert!(shared.contains(&format!("attach {} ro", paths[1])));
    assert!(!shared.contains(&format!("remount {} rw", paths[1])));
    for leases in [read, alone, reader] {
        pod.volumes.release(leases).await;
    }
}

#[tokio::test]
async fn a_mount_that_the_node_has_replaced_is_another_for_a_later_container() {
    let Some((dir, _tmpfs)) = volume() else {
        return;
    };
    let below = dir.path().join("app/deep");
    let pod = pod();
    let mounted = Tmpfs::on(&below);
    let first = pod.share(vec![writable(0, dir.path())]).await;
    let same = pod.share(vec![writable(0, dir.path())]).await;
    assert_eq!(places(&first), places(&same));
    // As the clone in a VMM does, this keeps its device number from the next one, which most likely has its mount's number.
    let held = tempfile::tempdir().unwrap();
    let _held = bound(&below, held.path());
    drop(mounted);
    let _mounted = Tmpfs::on(&below);
    let later = pod.share(vec![writable(0, dir.path())]).await;
    assert_ne!(places(&first), places(&later));
    for leases in [first, same, later] {
        pod.volumes.release(leases).await;
    }
}
