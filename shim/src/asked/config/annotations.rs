//! Values of the configuration that a pod sets for itself: annotations `io.brig.<key>`.
//!
//! A pod is not trusted: a key counts only when the handler's `pod_annotations` lists it, and its value
//! is parsed by type and checked as the operator's own. What is not allowed is refused by name, because
//! a pod that believes it has what it asked for is worse off than one that does not start.

use super::units::{SIZES, parse_size};
use super::{Config, File, Key, Origin};
use crate::error::{Error, Result};

/// What Brig's annotations begin with.
pub const PREFIX: &str = "io.brig.";

const KEYS: [Key; 4] = [Key::Vcpus, Key::Memory, Key::DebugConsole, Key::MaxFiles];

impl Config {
    /// Applies a pod's annotations; those that are not Brig's are passed over.
    ///
    /// # Errors
    /// `InvalidArgument` that names the annotation, and what the operator or the pod's author can do.
    /// Values are not repeated.
    pub fn annotate<'a>(
        &mut self,
        annotations: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) -> Result<()> {
        for (name, value) in annotations {
            if let Some(key) = name.strip_prefix(PREFIX) {
                self.set(key, value)?;
            }
        }
        Ok(())
    }

    fn set(&mut self, name: &str, value: &str) -> Result<()> {
        let Some(&key) = KEYS.iter().find(|known| known.name() == name) else {
            let known = KEYS.map(Key::name).join(", ");
            return Err(Error::invalid(format!(
                "the annotation {PREFIX}{} is unknown; after {PREFIX} may follow: {known}",
                shown(name)
            )));
        };
        if !self.pod_annotations.contains(&key) {
            return Err(Error::invalid(format!(
                "the annotation {PREFIX}{name} is not allowed by this runtime handler; its operator \
                 allows it with pod_annotations = [\"{name}\"] in the handler's configuration"
            )));
        }
        let invalid = |what: String| Error::invalid(format!("annotation {PREFIX}{name}: {what}"));
        let mut file = File::default();
        let number = || {
            let what = "the value must be a number";
            value.parse::<u64>().map_err(|_| invalid(what.to_owned()))
        };
        match key {
            Key::Vcpus => {
                let most = super::MAX_VCPUS;
                let count = u8::try_from(number()?);
                file.vcpus = Some(count.map_err(|_| invalid(format!("at most {most}")))?);
            }
            Key::Memory => {
                let bytes = match value.parse::<u64>() {
                    Ok(mib) => mib.checked_mul(super::MIB),
                    Err(_) => parse_size(value),
                };
                file.memory = Some(bytes.ok_or_else(|| invalid(SIZES.to_owned()))?);
            }
            Key::DebugConsole => {
                let what = "the value must be true or false";
                let on = value
                    .parse::<bool>()
                    .map_err(|_| invalid(what.to_owned()))?;
                file.debug_console = Some(on);
            }
            Key::MaxFiles => {
                let most = self.max_files;
                let count = number()?;
                if count > most {
                    return Err(invalid(format!("more than the handler's {most}")));
                }
                file.max_files = Some(count);
            }
        }
        self.merge(file, &invalid)?;
        self.agrees(&invalid)?;
        self.origins.insert(name.to_owned(), Origin::Annotation);
        Ok(())
    }
}

/// A name of the pod's own, cut to what belongs into a sentence.
fn shown(name: &str) -> String {
    name.chars()
        .take(63)
        .filter(|c| c.is_ascii_graphic())
        .collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::asked::config::MIB;
    use crate::error::Kind;
    use proptest::prelude::*;

    fn config(allowed: &[Key]) -> Config {
        let mut config = Config::defaults(Path::new("/opt/brig/bin"));
        config.pod_annotations = allowed.to_vec();
        config
    }

    #[test]
    fn allowed_annotations_are_applied_by_their_type() {
        let mut config = config(&[Key::Vcpus, Key::Memory, Key::DebugConsole, Key::MaxFiles]);
        config
            .annotate([
                ("io.brig.vcpus", "3"),
                ("io.brig.memory", "1GiB"),
                ("io.brig.debug_console", "true"),
                ("io.brig.max_files", "10000"),
                ("example.org/other", "x"),
            ])
            .unwrap();
        assert_eq!((config.vcpus, config.memory), (3, 1024 * MIB));
        assert!(config.debug_console);
        assert_eq!(config.max_files, 10_000);
    }

    #[test]
    fn what_is_not_allowed_unknown_or_out_of_range_is_refused_by_name() {
        let all = [Key::Vcpus, Key::Memory, Key::DebugConsole, Key::MaxFiles];
        for (allowed, name, value, expected) in [
            (
                &[Key::Vcpus][..],
                "memory",
                "512",
                "is not allowed by this runtime handler",
            ),
            (&[][..], "vcpus", "1", "pod_annotations = [\"vcpus\"]"),
            (&all[..], "kernel", "/tmp/evil", "is unknown"),
            (&all[..], "memory", "1", "at least 64 MiB"),
            (&all[..], "memory", "much", "a size is"),
            (&all[..], "vcpus", "0", "vcpus is 0"),
            (&all[..], "vcpus", "500", "at most 64"),
            (&all[..], "debug_console", "yes", "true or false"),
            (&all[..], "max_files", "99999999", "more than the handler's"),
        ] {
            let mut config = config(allowed);
            let before = config.clone();
            let name = format!("{PREFIX}{name}");
            let error = config.annotate([(name.as_str(), value)]).unwrap_err();
            assert_eq!(error.kind, Kind::InvalidArgument);
            assert!(error.message.contains(expected), "{error}");
            assert!(error.message.contains(&name), "{error}");
            if allowed.is_empty() {
                assert_eq!(config, before);
            }
        }
    }

    proptest! {
        #[test]
        fn any_annotation_is_applied_or_refused(name in ".{0,80}", value in ".{0,80}") {
            let mut config = config(&[Key::Vcpus, Key::Memory, Key::DebugConsole, Key::MaxFiles]);
            for known in ["vcpus", "memory", "debug_console", "max_files", name.as_str()] {
                let _ = config.annotate([(format!("{PREFIX}{known}").as_str(), value.as_str())]);
            }
            prop_assert!(config.vcpus >= 1 && config.memory >= super::super::MIN_MEMORY);
        }
    }
}
