use super::*;
use proptest::prelude::*;

fn node(text: Option<&str>, merges: bool) -> (Containerd, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("containerd/config.toml");
    if let Some(text) = text {
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(&file, text).unwrap();
    }
    let handlers = dir.path().join("brig");
    (
        Containerd {
            file,
            handlers,
            is_usual: true,
            merges,
        },
        dir,
    )
}

fn names(dir: &Path) -> Vec<String> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        names.push(entry.path().display().to_string());
        names.extend(self::names(&entry.path()));
    }
    names.sort();
    names
}

/// All that a containerd which merges or does not would have of the handlers.
fn handlers(node: &Containerd, version: u64) -> usize {
    let main: Table = toml::from_str(&node.text().unwrap()).unwrap();
    let imported = node.imported(&main).map(|dir| dir.join(FILE));
    let drop_in = imported.and_then(|file| fs::read_to_string(file).ok());
    let drop_in: Table = toml::from_str(&drop_in.unwrap_or_default()).unwrap();
    let here = |table: &Table| {
        let all = ALL.iter();
        all.filter(|handler| has(table, version, handler.name))
            .count()
    };
    here(&main) + here(&drop_in)
}

const V2: &str =
    "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\n  config_path = \"/x\"";
const V3: &str = "version = 3\n[plugins.\"io.containerd.cri.v1.images\"]\n  snapshotter = \"x\"\n";
const V3_IMPORTS: &str = "version = 3\nimports = [\"extra/*.toml\"]\n";
const V3_FIXED: &str = "version = 3\nimports = [\"/one.toml\"]\n";
/// What `containerd config default` of 2.3 prints, shortened: it imports drop-ins, quotes with apostrophes, and has its
/// sockets among the plugins.
const V4: &str = "version = 4\nroot = '/var/lib/containerd'\nstate = '/run/containerd'\ntemp = ''\n\
    disabled_plugins = []\nrequired_plugins = []\noom_score = 0\nimports = ['/IMPORTED/*.toml']\n\n\
    [debug]\n  level = ''\n  format = ''\n\n[plugins]\n  [plugins.'io.containerd.cri.v1.images']\n    \
    snapshotter = 'overlayfs'\n\n  [plugins.'io.containerd.cri.v1.runtime']\n    enable_cdi = true\n\n    \
    [plugins.'io.containerd.cri.v1.runtime'.containerd]\n      default_runtime_name = 'runc'\n\n      \
    [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes]\n        \
    [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]\n          \
    runtime_type = 'io.containerd.runc.v2'\n          sandboxer = 'podsandbox'\n\n  \
    [plugins.'io.containerd.server.v1.grpc']\n    address = '/run/containerd/containerd.sock'\n    uid = 0\n\n  \
    [plugins.'io.containerd.server.v1.ttrpc']\n    address = '/run/containerd/containerd.sock.ttrpc'\n";
const V4_BARE: &str = "version = 4\n";
const COMMENTS: &str = "# Nothing is set here.\n#version = 2";

#[test]
fn handlers_come_and_go_and_leave_every_kind_of_file_as_it_was() {
    for (text, merges, version) in [
        (Some(V2), false, 2),
        (Some(V2), true, 2),
        (Some(V3), true, 3),
        (Some(V3_IMPORTS), true, 3),
        (Some(V3_FIXED), true, 3),
        (Some(V4_BARE), true, 4),
        (Some(COMMENTS), false, 2),
        (Some(COMMENTS), true, 2),
        (Some(""), false, 2),
        (Some(""), true, 2),
        (None, false, 2),
        (None, true, 2),
    ] {
        let (node, dir) = node(text, merges);
        let before = names(dir.path());
        let done = node.add().unwrap();
        assert!(!done.changed.is_empty());
        assert_eq!(handlers(&node, version), 3, "{text:?}");
        assert_eq!(
            node.add().unwrap().changed,
            Vec::<PathBuf>::new(),
            "{text:?}"
        );
        node.remove().unwrap();
        assert_eq!(names(dir.path()), before, "{text:?}");
        assert_eq!(fs::read_to_string(&node.file).ok().as_deref(), text);
        assert_eq!(node.remove().unwrap().changed, Vec::<PathBuf>::new());
    }
}

#[test]
fn the_operators_file_gets_no_more_than_an_imports_line_where_files_are_merged() {
    let (node, _dir) = node(Some(V3), true);
    node.add().unwrap();
    let text = node.text().unwrap();
    assert_eq!(text.matches("imports").count(), 1);
    assert!(text.ends_with(V3) && !text.contains("runtimes"), "{text}");
    let (node, _dir) = self::node(Some(V3_IMPORTS), true);
    node.add().unwrap();
    assert_eq!(node.text().unwrap(), V3_IMPORTS);
}

#[test]
fn a_default_configuration_of_version_4_is_not_touched_and_its_drop_in_is_of_its_version() {
    // That this containerd merges is told by the version, whatever the one in PATH is.
    for merges in [true, false] {
        let (node, dir) = node(None, merges);
        let imported = dir.path().join("containerd/conf.d");
        let text = V4.replace("/IMPORTED", &imported.display().to_string());
        write(&node.file, &text, None).unwrap();
        let before = names(dir.path());
        node.add().unwrap();
        assert_eq!(node.text().unwrap(), text);
        assert!(!node.backup().exists());
        let drop_in: Table =
            toml::from_str(&fs::read_to_string(imported.join(FILE)).unwrap()).unwrap();
        assert_eq!(drop_in["version"], Value::Integer(4));
        let plugins = drop_in["plugins"].as_table().unwrap();
        assert_eq!(
            plugins.keys().collect::<Vec<_>>(),
            ["io.containerd.cri.v1.runtime"]
        );
        assert!(ALL.iter().all(|handler| has(&drop_in, 4, handler.name)));
        let (tables, as_json) = node.print().unwrap();
        assert_eq!(tables.matches("runtimes.brig").count(), 5);
        let section = &as_json["plugins"]["io.containerd.cri.v1.runtime"]["containerd"];
        assert!(section["runtimes"]["brig-gpu"].is_object(), "{as_json}");
        node.remove().unwrap();
        assert_eq!(names(dir.path()), before);
        assert_eq!(node.text().unwrap(), text);
    }
}

#[test]
fn handlers_of_another_version_of_brig_are_replaced() {
    for text in [Some(V2), Some(COMMENTS), None] {
        let (node, _dir) = node(text, false);
        node.add().unwrap();
        let older = node.text().unwrap().replace("io.brig.*", "io.older.*");
        fs::write(&node.file, &older).unwrap();
        assert_eq!(
            node.add().unwrap().changed,
            std::slice::from_ref(&node.file)
        );
        assert!(!node.text().unwrap().contains("io.older"));
        node.remove().unwrap();
        assert_eq!(fs::read_to_string(&node.file).ok().as_deref(), text);
    }
}

#[test]
fn what_the_operator_changes_meanwhile_stays() {
    let (node, _dir) = node(Some(V2), false);
    node.add().unwrap();
    let changed = node.text().unwrap().replace("/x", "/y");
    fs::write(&node.file, format!("{changed}# mine\n")).unwrap();
    fs::write(node.handlers.join("debug.toml"), "debug = false\n").unwrap();
    node.remove().unwrap();
    assert_eq!(
        node.text().unwrap().trim_end(),
        format!("{}\n# mine", V2.replace("/x", "/y"))
    );
    assert!(node.handlers.join("debug.toml").exists());
    assert!(!node.handlers.join("gpu.toml").exists());
    assert!(!node.backup().exists());
}

#[test]
fn what_others_import_by_the_line_of_ours_is_still_imported_without_us() {
    for text in [Some(V3), Some(V4_BARE), Some(COMMENTS), None] {
        let (node, _dir) = node(text, true);
        node.add().unwrap();
        let theirs = node.own_directory().join("99-nvidia.toml");
        fs::write(&theirs, "# theirs\n").unwrap();
        let done = node.remove().unwrap();
        assert_eq!(done.kept, Some(node.own_directory()), "{text:?}");
        let files = configured::read(&node.file, None).files;
        assert_eq!(files, [node.file.clone(), theirs.clone()], "{text:?}");
        let kept = node.text().unwrap();
        assert!(!kept.contains("brig"), "{kept}");
        assert!(kept.ends_with(text.unwrap_or_default()), "{kept}");
        // It is the operator's now.
        assert_eq!(node.remove().unwrap(), Done::default());
        node.add().unwrap();
        assert_eq!(node.text().unwrap(), kept);
        fs::remove_file(&theirs).unwrap();
        assert_eq!(node.remove().unwrap().kept, None);
        assert_eq!(node.text().unwrap(), kept);
    }
}

#[test]
fn a_file_that_cannot_have_them_is_left_alone_and_told() {
    for (text, expected) in [
        ("[plugins.cri]\nx = 1\n", "version 1"),
        ("version = 9\n", "newer than Brig knows"),
        (
            "version = 2\n[plugins]\n\"io.containerd.grpc.v1.cri\" = {}\n",
            "cannot read it",
        ),
        (
            "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.brig]\n",
            "already",
        ),
        ("version = = 2", "cannot read it"),
        (
            "version = 2\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n",
            "take it out",
        ),
        (
            "version = 4\ndisabled_plugins = ['x', 'io.containerd.cri.v1.runtime']\n",
            "io.containerd.cri.v1.runtime in disabled_plugins",
        ),
    ] {
        let (node, dir) = node(Some(text), false);
        let error = node.add().unwrap_err();
        assert!(error.message.contains(expected), "{error}");
        assert_eq!(node.text().unwrap(), text);
        assert!(!dir.path().join("containerd/conf.d").exists());
    }
}

#[test]
fn what_an_operator_has_of_brigs_in_imported_files_is_left_alone_and_told() {
    let own = |section: &str, name: &str| {
        format!("[plugins.\"{section}\".containerd.runtimes.{name}]\n  sandboxer = \"shim\"\n")
    };
    let (old, new) = (section(2), section(3));
    for (main, file, text, merges, expected) in [
        // Of ours by its name alone, imported or not yet.
        (
            V3,
            "conf.d/brig.toml",
            format!("version = 3\n{}", own(new, "mine")),
            true,
            "another name",
        ),
        (
            V3_IMPORTS,
            "extra/brig.toml",
            String::new(),
            true,
            "another name",
        ),
        (
            V3_IMPORTS,
            "extra/50-mine.toml",
            format!("version = 3\n{}", own(new, "brig")),
            true,
            "50-mine.toml has a runtime handler brig already",
        ),
        // Without a version it is of the importing file's.
        (
            V3_IMPORTS,
            "extra/50-mine.toml",
            own(new, "brig-gpu"),
            true,
            "handler brig-gpu already",
        ),
        (
            "version = 2\nimports = [\"nvidia.toml\"]\n",
            "nvidia.toml",
            format!("version = 2\n{}", own(old, "nvidia")),
            false,
            "containerd 1 does not look into that",
        ),
    ] {
        let (node, dir) = node(Some(main), merges);
        let file = node.file.with_file_name(file);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(&file, &text).unwrap();
        let before = names(dir.path());
        let error = node.add().unwrap_err();
        assert!(error.message.contains(expected), "{error}");
        assert_eq!(node.remove().unwrap(), Done::default());
        assert_eq!(names(dir.path()), before, "{expected}");
        assert_eq!(node.text().unwrap(), main);
        assert_eq!(fs::read_to_string(&file).unwrap(), text);
    }
}

#[test]
fn what_is_read_by_root_alone_stays_so_and_a_link_leads_where_it_led() {
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    let (node, dir) = node(Some(V2), false);
    let real = dir.path().join("elsewhere/real.toml");
    fs::create_dir(real.parent().unwrap()).unwrap();
    fs::rename(&node.file, &real).unwrap();
    std::os::unix::fs::symlink(&real, &node.file).unwrap();
    fs::set_permissions(&real, Permissions::from_mode(0o600)).unwrap();
    node.add().unwrap();
    assert!(node.file.is_symlink());
    assert_eq!((mode(&real), mode(&node.backup())), (0o600, 0o600));
    assert_eq!(fs::read_dir(real.parent().unwrap()).unwrap().count(), 1);
    node.remove().unwrap();
    assert_eq!(mode(&real), 0o600);
    assert_eq!(fs::read_to_string(&node.file).unwrap(), V2);
}

#[test]
fn containerd_is_not_to_be_restarted_for_what_it_does_not_read() {
    let (node, _dir) = node(Some(V3), true);
    let done = node.add().unwrap();
    assert_eq!((done.changed.len(), done.handlers.len()), (2, 2));
    fs::remove_file(node.handlers.join("gpu.toml")).unwrap();
    let done = node.add().unwrap();
    assert_eq!((done.changed.len(), done.handlers.len()), (0, 1));
}

#[test]
fn a_file_that_containerd_was_not_started_with_is_not_made() {
    let (usual, dir) = node(None, true);
    let node = Containerd {
        is_usual: false,
        ..usual
    };
    let error = node.add().unwrap_err();
    assert!(error.message.contains("is not there"), "{error}");
    assert_eq!(names(dir.path()), Vec::<String>::new());
    assert!(node.print().is_ok() && node.remove().unwrap().changed.is_empty());
}

#[test]
fn the_configurations_of_handlers_are_right() {
    for (name, text) in ALL.iter().filter_map(|handler| handler.configuration) {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join(name);
        fs::write(&file, text).unwrap();
        brig_shim::asked::config::Config::load(Some(&file)).unwrap();
    }
}

proptest! {
    #[test]
    fn any_text_without_marks_is_its_own_rest(text in "[a-z\\[\\]#\n= ]{0,80}") {
        prop_assert_eq!(stripped(&text), text.clone());
        let block = format!("{text}{BEGIN}x = 1\n{END}{text}");
        prop_assert_eq!(stripped(&block), format!("{text}{text}"));
    }
}
