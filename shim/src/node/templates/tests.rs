use super::*;

fn recipe(key: &str, kernel: &str) -> Recipe {
    Recipe {
        key: key.to_owned(),
        kernel: kernel.into(),
        initramfs: "/initramfs".into(),
        vmm: "/vmm".into(),
        kvm: "/dev/kvm".into(),
        machine: Machine {
            memory: 1,
            max_memory: 2,
            most_cpus: 1,
        },
        allow_slow_kvm: false,
        max_files: 8192,
        boot_ms: 1000,
        state_dir: "/run/brig".into(),
    }
}

fn captured(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    io::Write::write_all(&mut file, bytes).unwrap();
    file
}

/// On tmpfs, as in real life: the attribute that describes a template is root's.
fn templates() -> Option<(tempfile::TempDir, Templates)> {
    if !brig_fixtures::needs::root() {
        return None;
    }
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let templates = Templates::beside(&dir.path().join("brig"));
    Some((dir, templates))
}

fn keys(templates: &Templates) -> Vec<String> {
    let list = templates.list().unwrap();
    list.into_iter().map(|entry| entry.key).collect()
}

#[test]
fn what_was_kept_can_be_opened_by_its_kind_and_not_be_changed() {
    let Some((_dir, templates)) = templates() else {
        return;
    };
    assert!(templates.list().unwrap().is_empty());
    assert!(templates.open("a").unwrap().is_none());
    let _lock = templates.lock().unwrap().unwrap();
    templates
        .keep(&recipe("a", "/k"), captured(b"guest"))
        .unwrap();
    let file = File::from(templates.open("a").unwrap().unwrap());
    assert_eq!(io::read_to_string(&file).unwrap(), "guest");
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o666);
    assert_eq!(
        file.set_permissions(mode).unwrap_err().kind(),
        io::ErrorKind::ReadOnlyFilesystem
    );
    let entry = templates.list().unwrap().remove(0);
    assert_eq!((entry.bytes, entry.recipe), (5, Some(recipe("a", "/k"))));
    templates.drop_one("a").unwrap();
    templates.drop_one("a").unwrap();
    assert!(keys(&templates).is_empty());
}

#[test]
fn one_makes_templates_at_a_time() {
    let Some((_dir, templates)) = templates() else {
        return;
    };
    let first = templates.lock().unwrap().unwrap();
    assert!(templates.lock().unwrap().is_none());
    drop(first);
    assert!(templates.lock().unwrap().is_some());
}

/// The recipe of what is in a directory's files, for a guest of so much memory.
fn recipe_of(dir: &Path, memory: u64) -> Recipe {
    let path = dir.join("file");
    let file = File::open(&path).unwrap();
    let files = Files {
        kernel: file.as_fd(),
        initramfs: file.as_fd(),
        vmm: &path,
    };
    let machine = Machine {
        memory,
        max_memory: memory,
        most_cpus: 1,
    };
    let kind = Kind::of(&files, &machine).unwrap();
    Recipe {
        kernel: path.clone(),
        initramfs: path.clone(),
        vmm: path,
        machine,
        ..recipe(kind.key(), "")
    }
}

/// A version of Brig.
fn version(dir: &Path, name: &str) -> PathBuf {
    let version = dir.join(name);
    fs::create_dir(&version).unwrap();
    fs::write(version.join("file"), name).unwrap();
    version
}

#[test]
fn a_template_of_files_that_have_changed_or_gone_is_dropped_and_no_other() {
    let Some((dir, templates)) = templates() else {
        return;
    };
    let [one, two, three] = ["one", "two", "three"].map(|name| version(dir.path(), name));
    let _lock = templates.lock().unwrap().unwrap();
    let keep = |version: &Path| {
        let recipe = recipe_of(version, 1);
        templates.keep(&recipe, captured(b"x")).unwrap();
        recipe.key
    };
    let (first, second, third) = (keep(&one), keep(&two), keep(&three));
    let sorted = |mut keys: Vec<String>| {
        keys.sort();
        keys
    };
    let all = [&first, &second, &third].map(String::clone);
    assert_eq!(keys(&templates), sorted(all.to_vec()));
    // Installed again in its place, and removed.
    fs::write(two.join("new"), "two").unwrap();
    fs::rename(two.join("new"), two.join("file")).unwrap();
    fs::remove_dir_all(&one).unwrap();
    templates.refuse("other", "no KVM", false).unwrap();
    templates.drop_useless().unwrap();
    assert_eq!(
        keys(&templates),
        sorted(vec![third.clone(), "other".to_owned()])
    );
    fs::remove_dir_all(&three).unwrap();
    let second = keep(&two);
    assert_eq!(keys(&templates), sorted(vec![second, "other".to_owned()]));
}

#[test]
fn no_more_are_kept_than_the_bound_and_the_oldest_goes() {
    let Some((dir, templates)) = templates() else {
        return;
    };
    let version = version(dir.path(), "one");
    let _lock = templates.lock().unwrap().unwrap();
    let mut made = Vec::new();
    for memory in 0..MOST + 2 {
        let recipe = recipe_of(&version, u64::try_from(memory).unwrap());
        templates.keep(&recipe, captured(b"x")).unwrap();
        made.push(recipe.key);
        std::thread::sleep(Duration::from_millis(20));
    }
    let mut newest = made.split_off(2);
    newest.sort();
    assert_eq!(keys(&templates), newest);
}

#[test]
fn a_template_that_would_take_what_the_node_needs_is_not_kept() {
    let Some((_dir, templates)) = templates() else {
        return;
    };
    let _lock = templates.lock().unwrap().unwrap();
    let large = captured(b"");
    // Of holes: it is refused before it is read.
    large.set_len(1 << 43).unwrap();
    let error = templates.keep(&recipe("a", "/k"), large).unwrap_err();
    assert!(error.to_string().contains("MiB free"), "{error}");
    assert!(templates.lacks("a") && keys(&templates).is_empty());
}

#[test]
fn what_failed_for_the_moment_is_tried_again_and_not_for_each_pod() {
    let Some((_dir, templates)) = templates() else {
        return;
    };
    let _lock = templates.lock().unwrap().unwrap();
    templates.refuse("a", "no room", true).unwrap();
    assert!(!templates.lacks("a"));
    let entry = templates.list().unwrap().remove(0);
    assert_eq!(
        (entry.key.as_str(), entry.later, entry.failed.as_deref()),
        ("a", true, Some("no room"))
    );
    let marker = File::options()
        .write(true)
        .open(templates.dir.join("a.later"));
    let marker = marker.unwrap();
    let now = SystemTime::now();
    marker.set_modified(now - MOMENT).unwrap();
    assert!(templates.lacks("a"));
    marker.set_modified(now + MOMENT).unwrap();
    assert!(templates.lacks("a"));
    templates.keep(&recipe("a", "/k"), captured(b"x")).unwrap();
    assert_eq!(keys(&templates), ["a"]);
    assert!(templates.list().unwrap()[0].failed.is_none());
}

#[test]
fn a_kind_that_cannot_be_made_is_not_tried_again_until_it_is_dropped() {
    let Some((_dir, templates)) = templates() else {
        return;
    };
    let _lock = templates.lock().unwrap().unwrap();
    assert!(templates.lacks("a"));
    templates.refuse("a", "no KVM", false).unwrap();
    assert!(!templates.lacks("a"));
    let entry = templates.list().unwrap().remove(0);
    assert_eq!(entry.failed.as_deref(), Some("no KVM"));
    templates.drop_one("a").unwrap();
    assert!(templates.lacks("a"));
}
