//! Files that were made for a pod.
use super::*;

#[tokio::test]
async fn a_file_of_the_pods_is_copied_once_and_lasts_as_long_as_the_pod() {
    let dir = tempfile::tempdir().unwrap();
    let files = dir.path().join(crate::node::sandbox_files::DIRECTORY);
    fs::create_dir(&files).unwrap();
    let resolver = files.join("resolv.conf");
    fs::write(&resolver, "nameserver 10.0.0.10\n").unwrap();
    let pod = pod();
    for index in [0, 1] {
        let mut written = bind(index, &resolver);
        written.readonly = index != 0;
        let (planned, sources) = pod.mount(vec![written]).await;
        assert_eq!(
            (sources[0].volume.as_str(), sources[0].volume_path.as_str()),
            ("v1", "file")
        );
        drop(leases(planned));
    }
    // The guest's is the one that counts.
    fs::write(&resolver, "nameserver 10.0.0.11\n").unwrap();
    sleep(Duration::from_millis(200)).await;
    let all = pod.record.all();
    let sent = all.iter().filter(|seen| seen.starts_with("volume "));
    assert_eq!(sent.collect::<Vec<_>>(), ["volume v1 file"]);
    assert!(!pod.record.has("remove volume v1"));
}
