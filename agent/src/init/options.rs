//! Mount options of the OCI specification: which are attributes of the mount, which set its
//! propagation, which make it a bind, and which belong to the file system.
use crate::mount_attr::Change;

/// A propagation type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Propagation {
    /// `MS_SHARED`, `MS_SLAVE`, `MS_PRIVATE` or `MS_UNBINDABLE`.
    pub flag: u64,
    /// Also of the mounts below.
    pub recursive: bool,
}

/// The options of one mount, sorted.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// `Some(recursive)` for a bind mount.
    pub bind: Option<bool>,
    /// Attributes of the mount itself.
    pub own: Change,
    /// Attributes of the mount and all below (the `r…` options).
    pub below: Change,
    /// In the order given.
    pub propagation: Vec<Propagation>,
    /// For the file system: (key, value).
    pub data: Vec<(String, Option<String>)>,
    /// `ro` was the last word about writing.
    pub readonly: bool,
    /// Owners are mapped: `Some(recursive)`, for the mounts below too.
    pub idmap: Option<bool>,
}

/// A propagation option, e.g. `rslave`.
pub fn propagation(name: &str) -> Option<Propagation> {
    let (flag, recursive) = match name {
        "shared" => (libc::MS_SHARED, false),
        "rshared" => (libc::MS_SHARED, true),
        "slave" => (libc::MS_SLAVE, false),
        "rslave" => (libc::MS_SLAVE, true),
        "private" => (libc::MS_PRIVATE, false),
        "rprivate" => (libc::MS_PRIVATE, true),
        "unbindable" => (libc::MS_UNBINDABLE, false),
        "runbindable" => (libc::MS_UNBINDABLE, true),
        _ => return None,
    };
    Some(Propagation { flag, recursive })
}

enum Attr {
    Set(u64),
    Clear(u64),
    /// One of the access-time modes, which exclude each other.
    Time(u64),
}

fn attribute(name: &str) -> Option<Attr> {
    Some(match name {
        "ro" => Attr::Set(libc::MOUNT_ATTR_RDONLY),
        "rw" => Attr::Clear(libc::MOUNT_ATTR_RDONLY),
        "nosuid" => Attr::Set(libc::MOUNT_ATTR_NOSUID),
        "suid" => Attr::Clear(libc::MOUNT_ATTR_NOSUID),
        "nodev" => Attr::Set(libc::MOUNT_ATTR_NODEV),
        "dev" => Attr::Clear(libc::MOUNT_ATTR_NODEV),
        "noexec" => Attr::Set(libc::MOUNT_ATTR_NOEXEC),
        "exec" => Attr::Clear(libc::MOUNT_ATTR_NOEXEC),
        "nodiratime" => Attr::Set(libc::MOUNT_ATTR_NODIRATIME),
        "diratime" => Attr::Clear(libc::MOUNT_ATTR_NODIRATIME),
        "nosymfollow" => Attr::Set(libc::MOUNT_ATTR_NOSYMFOLLOW),
        "symfollow" => Attr::Clear(libc::MOUNT_ATTR_NOSYMFOLLOW),
        "noatime" => Attr::Time(libc::MOUNT_ATTR_NOATIME),
        "relatime" | "atime" | "nostrictatime" => Attr::Time(libc::MOUNT_ATTR_RELATIME),
        "strictatime" => Attr::Time(libc::MOUNT_ATTR_STRICTATIME),
        _ => return None,
    })
}

fn apply(change: &mut Change, attr: &Attr) {
    match attr {
        Attr::Set(bits) => {
            change.set |= bits;
            change.clear &= !bits;
        }
        Attr::Clear(bits) => {
            change.clear |= bits;
            change.set &= !bits;
        }
        Attr::Time(mode) => {
            // The kernel wants the whole field cleared to change it (mount_setattr(2)).
            change.clear |= libc::MOUNT_ATTR__ATIME;
            change.set = change.set & !libc::MOUNT_ATTR__ATIME | mode;
        }
    }
}

/// What mount(8) says of a file system, and of a bind mount too, where it changes nothing.
const OF_EVERY_MOUNT: [&str; 15] = [
    "acl",
    "async",
    "dirsync",
    "iversion",
    "lazytime",
    "loud",
    "mand",
    "noacl",
    "noiversion",
    "nolazytime",
    "nomand",
    "norelatime",
    "remount",
    "silent",
    "sync",
];

impl Options {
    /// The first option that only a new file system could be given.
    pub fn of_file_system(&self) -> Option<&str> {
        let mut names = self.data.iter().map(|(name, _)| name.as_str());
        names.find(|name| !OF_EVERY_MOUNT.contains(name))
    }
}

/// Sorts the options of a mount.
pub fn parse(options: &[String]) -> Options {
    let mut parsed = Options::default();
    // An entry may itself hold several, as in fstab(5).
    for option in options
        .iter()
        .flat_map(|o| o.split(','))
        .filter(|o| !o.is_empty())
    {
        match option {
            "defaults" => {}
            "bind" => parsed.bind = parsed.bind.or(Some(false)),
            "rbind" => parsed.bind = Some(true),
            "idmap" => parsed.idmap = parsed.idmap.or(Some(false)),
            "ridmap" => parsed.idmap = Some(true),
            _ => {
                if let Some(attr) = attribute(option) {
                    apply(&mut parsed.own, &attr);
                    parsed.readonly = parsed.own.set & libc::MOUNT_ATTR_RDONLY != 0;
                } else if let Some(propagation) = propagation(option) {
                    parsed.propagation.push(propagation);
                } else if let Some(attr) = option.strip_prefix('r').and_then(attribute) {
                    apply(&mut parsed.below, &attr);
                } else {
                    let (key, value) = match option.split_once('=') {
                        Some((key, value)) => (key, Some(value.to_owned())),
                        None => (option, None),
                    };
                    parsed.data.push((key.to_owned(), value));
                }
            }
        }
    }
    parsed
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parsed(options: &[&str]) -> Options {
        parse(&options.iter().map(|o| (*o).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn attributes_and_data_are_told_apart() {
        let got = parsed(&["nosuid", "noexec", "mode=755", "size=65536k", "ro"]);
        assert_eq!(
            got.own.set,
            libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC | libc::MOUNT_ATTR_RDONLY
        );
        assert_eq!(
            got.data,
            [
                ("mode".into(), Some("755".into())),
                ("size".into(), Some("65536k".into()))
            ]
        );
        assert!(got.readonly);
    }

    #[test]
    fn the_last_word_wins() {
        let got = parsed(&["ro", "rw"]);
        assert_eq!((got.own.set, got.own.clear), (0, libc::MOUNT_ATTR_RDONLY));
        assert!(!got.readonly);
        let got = parsed(&["noatime", "strictatime"]);
        assert_eq!(
            (got.own.set, got.own.clear),
            (libc::MOUNT_ATTR_STRICTATIME, libc::MOUNT_ATTR__ATIME)
        );
    }

    #[test]
    fn recursive_forms_are_not_confused_with_plain_ones() {
        let got = parsed(&["rbind", "rro", "rslave", "relatime", "ridmap"]);
        assert_eq!((got.bind, got.idmap), (Some(true), Some(true)));
        assert_eq!(got.below.set, libc::MOUNT_ATTR_RDONLY);
        assert_eq!(
            got.propagation,
            [Propagation {
                flag: libc::MS_SLAVE,
                recursive: true
            }]
        );
        assert_eq!(got.own.clear, libc::MOUNT_ATTR__ATIME);
        assert!(got.data.is_empty());
    }

    proptest! {
        #[test]
        fn set_and_clear_never_contradict_outside_the_time_field(options in proptest::collection::vec("[a-z=,]{0,12}|ro|rw|rro|rrw|nosuid|suid|noatime|rnoatime", 0..8)) {
            let got = parse(&options);
            for change in [got.own, got.below] {
                prop_assert_eq!(change.set & change.clear & !libc::MOUNT_ATTR__ATIME, 0);
            }
        }
    }
}
