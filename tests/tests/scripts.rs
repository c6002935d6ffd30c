//! Scripts whose work is long: they find out at once when its results could not be kept, and what they are to break is
//! there to be broken. And what an operator applies as it stands runs nobody else's image.

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

#[test]
fn each_mutation_finds_its_place_in_the_sources_once() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    // Description, file and text of each, as tests/mutate is told them.
    let list = "mutation() { printf '%s\\0' \"${@:1:3}\"; }; . tests/mutations";
    let output = Command::new("bash")
        .args(["-c", list])
        .current_dir(&root)
        .output()
        .unwrap();
    let told = String::from_utf8(output.stdout).unwrap();
    let words: Vec<&str> = told.split_terminator('\0').collect();
    let (mutations, rest) = words.as_chunks::<3>();
    assert!(mutations.len() >= 20 && rest.is_empty(), "{told}");
    for [description, file, text] in mutations {
        let source = fs::read_to_string(root.join(file));
        let source = source.unwrap_or_else(|error| panic!("{description}: {file}: {error}"));
        assert_eq!(source.matches(text).count(), 1, "{description}: {file}");
    }
}

#[test]
fn no_manifest_runs_an_image_that_a_stranger_could_have_pushed() {
    let deploy = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy");
    let mut images = Vec::new();
    let mut pending = vec![deploy.clone()];
    while let Some(dir) = pending.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                pending.push(path);
                continue;
            }
            let text = fs::read_to_string(&path).unwrap();
            let names = text
                .lines()
                .filter_map(|line| line.trim().strip_prefix("image:"));
            images.extend(names.map(|name| name.trim().to_owned()));
        }
    }
    // What deploy/installer/build puts the image's name in place of.
    assert_eq!(images, ["localhost/brig-installer:VERSION"]);
    for name in [
        "example/brig",
        "example/brig:latest",
        "host:5000/brig",
        "a:b c",
    ] {
        let mut build = Command::new(deploy.join("installer/build"));
        let output = build.args(["--name", name]).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains(name), "{said}");
    }
}
