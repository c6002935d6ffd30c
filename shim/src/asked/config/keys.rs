//! Every key of the configuration with what it is: the one source of `brig config default`, of its JSON
//! schema, of the reference in docs/configuration.md and of the hint that a wrong key gets.

use serde_json::{Value, json};

use super::{Config, MAX_GRACE, MAX_VCPUS, MIB, MIN_MEMORY, MOST_FILES, units};

/// What a value may be, for the schema.
#[derive(Debug, Clone, Copy)]
enum Form {
    Path,
    PathOrNone,
    Switch,
    /// Least and most.
    Count(u64, u64),
    /// Least and most.
    Factor(f64, f64),
    /// Least in bytes.
    Size(u64),
    /// Most, in seconds.
    Time(u32),
    /// Any names.
    Names,
    /// One of these words.
    Word(&'static [&'static str]),
    /// Of these words.
    Words(&'static [&'static str]),
}

/// One key.
#[derive(Debug)]
pub struct KeyDoc {
    /// Its name.
    pub name: &'static str,
    /// What it is, in one sentence.
    pub what: &'static str,
    form: Form,
    /// Its value in a configuration.
    value: fn(&Config) -> Value,
}

fn path(path: &std::path::Path) -> Value {
    Value::from(path.display().to_string())
}

/// All keys in the order in which a reader meets them.
pub const KEYS: &[KeyDoc] = &[
    KeyDoc {
        name: "vcpus",
        what: "CPUs of a VM; a pod whose limits need more gets more",
        form: Form::Count(1, MAX_VCPUS as u64),
        value: |c| c.vcpus.into(),
    },
    KeyDoc {
        name: "max_vcpus",
        what: "CPUs that a VM may be given while it runs, when limits of its containers need more; each beyond those it starts with costs memory of the guest (docs/overhead.md)",
        form: Form::Count(1, MAX_VCPUS as u64),
        value: |c| c.max_vcpus.into(),
    },
    KeyDoc {
        name: "memory",
        what: "memory of a VM; a pod whose limits need more gets more",
        form: Form::Size(MIN_MEMORY),
        value: |c| units::show_size(c.memory).into(),
    },
    KeyDoc {
        name: "max_memory",
        what: "as much as a VM may grow to while it runs, when limits of its containers need more; never more than the node has, and the same as memory if it is not to grow",
        form: Form::Size(MIN_MEMORY),
        value: |c| units::show_size(c.max_memory).into(),
    },
    KeyDoc {
        name: "template",
        what: "let pods go on from a guest that was captured once on this node instead of booting one each: they start sooner and have most of its memory in common, which one pod can notice of another (docs/template.md)",
        form: Form::Switch,
        value: |c| c.template.into(),
    },
    KeyDoc {
        name: "idle_files",
        what: "what becomes of the memory in which an idle guest keeps what it has read of files: it stays (keep), or goes back to the node, and what is read again is fetched again (return)",
        form: Form::Word(&["keep", "return"]),
        value: |c| c.idle_files.name().into(),
    },
    KeyDoc {
        name: "image_layers",
        what: "as what a guest has the layers of an image that the erofs snapshotter hands over as files: a disk, so that what is read is in the guest's own memory (disk), or memory of the node, one copy for all pods of an image, which one pod can notice of another (memory; docs/volumes.md)",
        form: Form::Word(&["disk", "memory"]),
        value: |c| c.image_layers.name().into(),
    },
    KeyDoc {
        name: "kernel",
        what: "the guest's vmlinux",
        form: Form::Path,
        value: |c| path(&c.kernel),
    },
    KeyDoc {
        name: "modules",
        what: "the image of that kernel's modules; without it pods have none",
        form: Form::Path,
        value: |c| path(&c.modules),
    },
    KeyDoc {
        name: "driver_bundle",
        what: "an image of kernel modules, firmware, libraries and CDI files for devices of the node that pods are given (docs/driver-bundles.md)",
        form: Form::PathOrNone,
        value: |c| c.driver_bundle.as_deref().map_or("".into(), path),
    },
    KeyDoc {
        name: "devices",
        what: "PCI devices of the node that each pod of the handler has from its start, for all its containers (docs/devices.md): by address (0000:3b:00.0), or the first free one by vendor and device (10de:2330)",
        form: Form::Names,
        value: |c| {
            let names = c.devices.iter().map(ToString::to_string);
            names.collect::<Vec<_>>().into()
        },
    },
    KeyDoc {
        name: "pod_resources",
        what: "kubelet's socket (/var/lib/kubelet/pod-resources/kubelet.sock), to have the devices that it has assigned to a pod's containers in the VM when the guest boots (docs/devices.md)",
        form: Form::PathOrNone,
        value: |c| c.pod_resources.as_deref().map_or("".into(), path),
    },
    KeyDoc {
        name: "initramfs",
        what: "the guest's initramfs, which holds the agent",
        form: Form::Path,
        value: |c| path(&c.initramfs),
    },
    KeyDoc {
        name: "vmm",
        what: "the binary of brig-vmm",
        form: Form::Path,
        value: |c| path(&c.vmm),
    },
    KeyDoc {
        name: "kvm",
        what: "the KVM device",
        form: Form::Path,
        value: |c| path(&c.kvm),
    },
    KeyDoc {
        name: "debug_console",
        what: "log the guest kernel's messages, not only a panic's",
        form: Form::Switch,
        value: |c| c.debug_console.into(),
    },
    KeyDoc {
        name: "debug",
        what: "let the node's root look into the guest with `brig exec` and `brig console`",
        form: Form::Switch,
        value: |c| c.debug.into(),
    },
    KeyDoc {
        name: "log_level",
        what: "how much a pod's shim logs; `brig level` changes it for one that runs, and containerd's own debug level beats it",
        form: Form::Word(&["error", "warning", "info", "debug"]),
        value: |c| c.log_level.name().into(),
    },
    KeyDoc {
        name: "log_format",
        what: "what a line of that log looks like: logfmt as containerd's, or a JSON object",
        form: Form::Word(&["text", "json"]),
        value: |c| c.log_format.name().into(),
    },
    KeyDoc {
        name: "journald",
        what: "log to the node's journal too, each field one of the entry (`journalctl -t brig`); for nodes whose containerd does not log there itself",
        form: Form::Switch,
        value: |c| c.journald.into(),
    },
    KeyDoc {
        name: "allow_slow_kvm",
        what: "start although /dev/kvm only emulates",
        form: Form::Switch,
        value: |c| c.allow_slow_kvm.into(),
    },
    KeyDoc {
        name: "max_files",
        what: "descriptors a VMM may hold: one for each file its guest knows",
        form: Form::Count(8192, MOST_FILES),
        value: |c| c.max_files.into(),
    },
    KeyDoc {
        name: "file_systems",
        what: "further types of file systems, as in /proc/filesystems, whose directories a pod may be given; one that is not known to hold data is refused, or left out below a recursive mount",
        form: Form::Names,
        value: |c| c.file_systems.added().into(),
    },
    KeyDoc {
        name: "direct_volumes",
        what: "take volumes that a storage driver hands over as block devices, by Kata Containers' direct-volumes files: their file systems are mounted in the guest and never on the node (docs/volumes.md); a pod with one is refused without it",
        form: Form::Switch,
        value: |c| c.direct_volumes.into(),
    },
    KeyDoc {
        name: "netfilter",
        what: "what becomes of a pod with packet filter rules in its network namespace that its guest cannot have: it is refused (require), starts without them and each is logged (warn), or no rule is looked at (ignore)",
        form: Form::Word(&["require", "warn", "ignore"]),
        value: |c| c.netfilter.name().into(),
    },
    KeyDoc {
        name: "vhost_net",
        what: "let the node's kernel move the frames of pods' interfaces (/dev/vhost-net), instead of the jailed VMM: no system call a frame, and more of the kernel within a guest's reach (docs/threat-model.md); where the node has none the VMM moves them, and the log says so",
        form: Form::Switch,
        value: |c| c.vhost_net.into(),
    },
    KeyDoc {
        name: "shutdown_grace",
        what: "what a pod's processes have between SIGTERM and SIGKILL when the node shuts down",
        form: Form::Time(MAX_GRACE),
        value: |c| units::show_time(c.shutdown_grace).into(),
    },
    KeyDoc {
        name: "time_scale",
        what: "multiplies every time-out, for slow machines",
        form: Form::Factor(0.1, 100.0),
        value: |c| c.time_scale.into(),
    },
    KeyDoc {
        name: "pod_annotations",
        what: "the keys that a pod may set for itself, as annotations io.brig.KEY",
        form: Form::Words(&["vcpus", "memory", "debug_console", "max_files"]),
        value: |c| {
            let names = c.pod_annotations.iter().map(|key| key.name());
            names.collect::<Vec<_>>().into()
        },
    },
    KeyDoc {
        name: "state_dir",
        what: "what `delete` needs to clean up; read from /etc/brig/config.toml and its drop-ins alone",
        form: Form::Path,
        value: |c| path(&c.state_dir),
    },
];

/// Every key with the value in force and where it is from: `{"KEY": {"value": …, "from": "default"}}`.
#[must_use]
pub fn in_force(config: &Config) -> Value {
    let shown = |key: &KeyDoc| {
        let from = config.origins.get(key.name);
        let from = from.map_or_else(|| "default".to_owned(), ToString::to_string);
        let shown = json!({ "value": key.value(config), "from": from });
        (key.name.to_owned(), shown)
    };
    Value::from(KEYS.iter().map(shown).collect::<serde_json::Map<_, _>>())
}

impl KeyDoc {
    /// Its value in a configuration, as TOML and JSON write it.
    #[must_use]
    pub fn value(&self, config: &Config) -> Value {
        (self.value)(config)
    }

    /// What its value may be, in words.
    #[must_use]
    pub fn form(&self) -> String {
        match self.form {
            Form::Path => "an absolute path".to_owned(),
            Form::PathOrNone => "an absolute path, or `\"\"` for none".to_owned(),
            Form::Switch => "`true` or `false`".to_owned(),
            Form::Count(least, most) => format!("a number, {least} to {most}"),
            Form::Factor(least, most) => format!("a factor, {least} to {most}"),
            Form::Size(least) => format!(
                "a size such as `\"256MiB\"` or a number of MiB, at least {}",
                units::show_size(least)
            ),
            Form::Time(most) => {
                format!("a time such as `\"500ms\"` or a number of seconds, at most {most} s")
            }
            Form::Names => "a list of names".to_owned(),
            Form::Word(words) => format!("`\"{}\"`", words.join("\"`, `\"")),
            Form::Words(words) => format!("a list of `{}`", words.join("`, `")),
        }
    }

    fn schema(&self, default: &Value) -> Value {
        let mut schema = match self.form {
            Form::Path => json!({ "type": "string", "pattern": "^/" }),
            Form::PathOrNone => json!({ "type": "string", "pattern": "^(/.*)?$" }),
            Form::Switch => json!({ "type": "boolean" }),
            Form::Count(least, most) => {
                json!({ "type": "integer", "minimum": least, "maximum": most })
            }
            Form::Factor(least, most) => {
                json!({ "type": "number", "minimum": least, "maximum": most })
            }
            Form::Size(least) => json!({ "anyOf": [
                { "type": "integer", "minimum": least / MIB },
                { "type": "string", "pattern": "^[0-9]+ ?(K|KiB|M|MiB|G|GiB)$" },
            ] }),
            Form::Time(most) => json!({ "anyOf": [
                { "type": "integer", "minimum": 0, "maximum": most },
                { "type": "string", "pattern": "^[0-9]+ ?(ms|s|m|min)$" },
            ] }),
            Form::Names => json!({ "type": "array", "items": { "type": "string" } }),
            Form::Word(words) => json!({ "enum": words }),
            Form::Words(words) => json!({ "type": "array", "items": { "enum": words } }),
        };
        schema["description"] = self.what.into();
        schema["default"] = default.clone();
        schema
    }
}

/// The JSON schema (draft 2020-12) of a configuration file, with the values of `defaults`.
#[must_use]
pub fn schema(defaults: &Config) -> Value {
    let properties = KEYS
        .iter()
        .map(|key| (key.name.to_owned(), key.schema(&key.value(defaults))));
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Brig's configuration",
        "type": "object",
        "additionalProperties": false,
        "properties": properties.collect::<serde_json::Map<_, _>>(),
    })
}

/// A configuration file that sets nothing and says what could be set, with the values of `defaults`.
#[must_use]
pub fn documented(defaults: &Config) -> String {
    let mut text = String::from(
        "# Brig's configuration. Every line that is commented out has the default.\n\
         # Drop-ins beside it, config.d/*.toml, are read after it in the order of their names.\n",
    );
    for key in KEYS {
        let form = key.form().replace('`', "");
        let (name, what, value) = (key.name, key.what, key.value(defaults));
        text.push_str(&format!("\n# {what}\n# ({form})\n#{name} = {value}\n"));
    }
    text
}

/// The known key that an unknown one was most likely meant to be.
pub(super) fn nearest(unknown: &str) -> Option<&'static str> {
    let distance = |name: &str| strsim::damerau_levenshtein(name, unknown);
    let nearest = KEYS
        .iter()
        .map(|key| key.name)
        .min_by_key(|name| distance(name))?;
    // A third of the letters may be wrong: more is another word.
    (distance(nearest) * 3 <= unknown.chars().count().max(3)).then_some(nearest)
}
