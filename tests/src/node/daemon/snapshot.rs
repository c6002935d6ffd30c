//! Mounts of a root file system as containerd's snapshotters hand them to a runtime.

use containerd_shim_protos::api::Mount;

/// One mount.
#[must_use]
pub fn mount(kind: &str, source: &str, options: &[&str]) -> Mount {
    Mount {
        type_: kind.to_owned(),
        source: source.to_owned(),
        options: options.iter().map(|option| (*option).to_owned()).collect(),
        ..Mount::default()
    }
}

/// What the erofs snapshotter of 2.2 and later gives for a writable container in block mode, to a runtime that mounts for itself. The
/// uppermost layer comes first.
#[must_use]
pub fn erofs(writable: &str, layers: &[String]) -> Vec<Mount> {
    let mut all = vec![mount("ext4", writable, &["rw", "loop"])];
    all.extend(
        layers
            .iter()
            .map(|layer| mount("erofs", layer, &["ro", "loop"])),
    );
    let lower = format!("lowerdir={{{{ overlay 1 {} }}}}", layers.len());
    let options = [
        "X-containerd.mkdir.path={{ mount 0 }}/upper:0755",
        "X-containerd.mkdir.path={{ mount 0 }}/work:0755",
        "workdir={{ mount 0 }}/work",
        "upperdir={{ mount 0 }}/upper",
        &lower,
    ];
    all.push(mount("format/mkdir/overlay", "overlay", &options));
    all
}
