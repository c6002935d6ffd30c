//! Which drivers a guest has for the node's PCI functions, by the lists that lie beside the images of its kernel's modules and
//! of driver bundles (`modules.erofs`, `modules.alias`): what depmod(8) has written of them, so that nothing is mounted.
//!
//! Trusts these files, which are the operator's.

use std::collections::BTreeSet;
use std::ffi::CString;
use std::fs;
use std::path::{Path, PathBuf};

use brig_shim::asked::config::Config;

/// What a line of a list begins with: of a module, and of a driver that is in the kernel itself.
const MODULE: &str = "alias";
const BUILT_IN: &str = "builtin";

/// The lists of all configurations.
#[derive(Default)]
pub struct Drivers {
    drivers: Vec<Driver>,
    read: BTreeSet<PathBuf>,
    /// An image of which nobody knows what is in it.
    unknown: bool,
}

struct Driver {
    /// Of the functions that it is for, as fnmatch(3) has it.
    pattern: CString,
    /// Its name, and the bundle that it is from.
    name: String,
}

impl Drivers {
    /// Adds what guests of this configuration have.
    pub fn add(&mut self, config: &Config) {
        // Without the image, what is in the kernel is left.
        let has_modules = config.modules.is_file();
        self.add_list(&config.modules, None, has_modules);
        if let Some(bundle) = config.driver_bundle.as_deref().filter(|it| it.is_file()) {
            self.add_list(bundle, Some(bundle), true);
        }
    }

    fn add_list(&mut self, image: &Path, bundle: Option<&Path>, modules: bool) {
        let list = image.with_extension("alias");
        if !self.read.insert(list.clone()) {
            return;
        }
        let Ok(text) = fs::read_to_string(list) else {
            self.unknown = true;
            return;
        };
        for line in text.lines() {
            let mut words = line.split_ascii_whitespace();
            let (Some(kind), Some(pattern), Some(name)) =
                (words.next(), words.next(), words.next())
            else {
                continue;
            };
            let counts = kind == BUILT_IN || modules && kind == MODULE;
            if let (true, Ok(pattern)) = (counts, CString::new(pattern)) {
                let name = match bundle {
                    Some(bundle) => format!("{name} of {}", bundle.display()),
                    None => name.to_owned(),
                };
                self.drivers.push(Driver { pattern, name });
            }
        }
    }

    /// Those for a function, by its alias in sysfs (`modalias`); `None` where that cannot be known.
    #[must_use]
    pub fn of(&self, alias: &str) -> Option<Vec<&str>> {
        let alias = CString::new(alias).ok().filter(|alias| !alias.is_empty())?;
        let mut found: Vec<&str> = Vec::new();
        for driver in self.drivers.iter().filter(|one| one.is_for(&alias)) {
            if !found.contains(&driver.name.as_str()) {
                found.push(&driver.name);
            }
        }
        (!found.is_empty() || !self.unknown).then_some(found)
    }
}

impl Driver {
    fn is_for(&self, alias: &CString) -> bool {
        // SAFETY: two C strings, which are only read.
        unsafe { libc::fnmatch(self.pattern.as_ptr(), alias.as_ptr(), 0) == 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NVME: &str = "pci:v00001B36d00000010sv00001AF4sd00001100bc01sc08i02";
    const EDU: &str = "pci:v00001234d000011E8sv00001AF4sd00001100bc00scFFi00";
    const VIRTIO: &str = "pci:v00001AF4d00001041sv00001AF4sd00001100bc02sc00i00";
    const KERNEL: &str = "alias pci:v*d*sv*sd*bc01sc08i02* nvme\nalias pci:v*d*sv*sd*bc01sc08i02* nvme\n\
                          # depmod's\nbuiltin pci:v00001AF4d* virtio_pci\n";

    fn config(dir: &Path, bundle: bool) -> Config {
        Config {
            modules: dir.join("modules.erofs"),
            driver_bundle: bundle.then(|| dir.join("edu-1.0.erofs")),
            ..Config::installed()
        }
    }

    #[test]
    fn a_driver_is_the_kernels_or_its_modules_or_a_bundles() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        let drivers = |bundle: bool| {
            let mut drivers = Drivers::default();
            drivers.add(&config(dir.path(), bundle));
            drivers
        };
        // Nothing is known of these images.
        write("modules.erofs", "");
        assert_eq!(drivers(false).of(NVME), None);
        write("modules.alias", KERNEL);
        assert_eq!(drivers(false).of(NVME), Some(vec!["nvme"]));
        assert_eq!(drivers(false).of(VIRTIO), Some(vec!["virtio_pci"]));
        assert_eq!(drivers(false).of(EDU), Some(vec![]));
        assert_eq!(drivers(false).of(""), None);
        // A bundle that is not there brings nothing, and one without a list nobody knows what.
        assert_eq!(drivers(true).of(EDU), Some(vec![]));
        write("edu-1.0.erofs", "");
        assert_eq!(drivers(true).of(EDU), None);
        assert_eq!(drivers(true).of(NVME), Some(vec!["nvme"]));
        write(
            "edu-1.0.alias",
            "alias pci:v00001234d000011E8sv*sd*bc*sc*i* brig_edu\n",
        );
        let name = format!("brig_edu of {}", dir.path().join("edu-1.0.erofs").display());
        assert_eq!(drivers(true).of(EDU), Some(vec![name.as_str()]));
        // Without modules what is in the kernel is left.
        fs::remove_file(dir.path().join("modules.erofs")).unwrap();
        assert_eq!(drivers(false).of(NVME), Some(vec![]));
        assert_eq!(drivers(false).of(VIRTIO), Some(vec!["virtio_pci"]));
    }

    #[test]
    fn the_lists_of_all_configurations_count() {
        let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let mut drivers = Drivers::default();
        for (dir, text) in [(&one, KERNEL), (&other, "builtin pci:v00001234d* other\n")] {
            fs::write(dir.path().join("modules.erofs"), "").unwrap();
            fs::write(dir.path().join("modules.alias"), text).unwrap();
            drivers.add(&config(dir.path(), false));
            drivers.add(&config(dir.path(), false));
        }
        assert_eq!(drivers.drivers.len(), 4);
        assert_eq!(drivers.of(EDU), Some(vec!["other"]));
    }
}
