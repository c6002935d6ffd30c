//! Scripts whose work is long find out at once when its results could not be kept.

use std::fs;
use std::path::Path;
use std::process::Command;

#[test]
fn a_place_where_results_cannot_be_kept_is_refused_before_the_work() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let place = tempfile::tempdir().unwrap();
    // Below a file no directory can be made, not even by root.
    let file = place.path().join("file");
    fs::write(&file, "").unwrap();
    let results = file.join("results");
    for script in [
        &["tests/gate"][..],
        &["tests/run", "--e2e"],
        &["tests/run", "--bench"],
        &["tests/kubernetes/run"],
        &["tests/node/node", "up", "unwritable"],
    ] {
        let output = Command::new(root.join(script[0]))
            .args(&script[1..])
            .env("BRIG_RESULTS_DIR", &results)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{script:?}: {said}");
        assert!(
            said.contains(results.to_str().unwrap()) && said.contains("cannot be made"),
            "{script:?}: {said}"
        );
        for work in ["== ", "installing", "building"] {
            assert!(
                !said.contains(work),
                "{script:?} has begun its work: {said}"
            );
        }
    }
}
