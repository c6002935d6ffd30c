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
    if !nix::unistd::geteuid().is_root() {
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

#[test]
fn files_that_have_changed_make_the_old_template_useless_and_no_other() {
    let Some((_dir, templates)) = templates() else {
        return;
    };
    let _lock = templates.lock().unwrap().unwrap();
    templates
        .keep(&recipe("other", "/other"), captured(b"1"))
        .unwrap();
    templates
        .keep(&recipe("old", "/k"), captured(b"2"))
        .unwrap();
    templates
        .keep(&recipe("new", "/k"), captured(b"3"))
        .unwrap();
    assert_eq!(keys(&templates), ["new", "other"]);
}

#[test]
fn no_more_are_kept_than_the_bound_and_the_oldest_goes() {
    let Some((_dir, templates)) = templates() else {
        return;
    };
    let _lock = templates.lock().unwrap().unwrap();
    for number in 0..MOST + 2 {
        let name = format!("k{number:02}");
        templates
            .keep(&recipe(&name, &name), captured(b"x"))
            .unwrap();
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let kept = keys(&templates);
    assert_eq!(kept.len(), MOST);
    assert_eq!(kept[0], "k02");
}

#[test]
fn a_kind_that_cannot_be_made_is_not_tried_again_until_it_is_dropped() {
    let Some((_dir, templates)) = templates() else {
        return;
    };
    let _lock = templates.lock().unwrap().unwrap();
    assert!(templates.lacks("a"));
    templates.refuse("a", "no KVM").unwrap();
    assert!(!templates.lacks("a"));
    let entry = templates.list().unwrap().remove(0);
    assert_eq!(entry.failed.as_deref(), Some("no KVM"));
    templates.drop_one("a").unwrap();
    assert!(templates.lacks("a"));
}
