//! What depmod(8) has written about a kernel's modules, and which of them answer to a name, in the order to load them in.
//!
//! The files are the host's and trusted; a line that is not understood is none.
use std::{
    collections::{HashMap, HashSet},
    fs, io,
    path::Path,
};

use super::pattern;

/// The text of the files, as far as they are needed.
#[derive(Debug, Default)]
pub struct Index {
    /// modules.dep by module: its file, and the files it needs, of which each needs only later ones.
    files: HashMap<String, (String, Vec<String>)>,
    /// modules.alias: pattern and module.
    aliases: Vec<(String, String)>,
    /// modules.softdep: what should come before a module, and what after it.
    wishes: HashMap<String, (Vec<String>, Vec<String>)>,
    /// Names of what is in the kernel itself.
    builtin: HashSet<String>,
}

impl Index {
    /// Reads that of a directory `/lib/modules/RELEASE`.
    ///
    /// # Errors
    /// When modules.dep or modules.alias cannot be read; the others may be missing.
    pub fn read(directory: &Path) -> io::Result<Self> {
        let must = |name| fs::read_to_string(directory.join(name));
        let may = |name| fs::read_to_string(directory.join(name)).unwrap_or_default();
        Ok(Self::parse(
            &must("modules.dep")?,
            &must("modules.alias")?,
            &may("modules.softdep"),
            &may("modules.builtin"),
        ))
    }

    fn parse(dep: &str, alias: &str, softdep: &str, builtin: &str) -> Self {
        let mut index = Self::default();
        for line in dep.lines() {
            if let Some((file, needs)) = line.split_once(':') {
                let needs = needs.split_whitespace().map(str::to_owned).collect();
                index.files.insert(name_of(file), (file.to_owned(), needs));
            }
        }
        for line in alias.lines() {
            let mut words = line.split_whitespace();
            if let (Some("alias"), Some(pattern), Some(module)) =
                (words.next(), words.next(), words.next())
            {
                index.aliases.push((normal(pattern), normal(module)));
            }
        }
        for line in softdep.lines() {
            let mut words = line.split_whitespace();
            let (Some("softdep"), Some(module)) = (words.next(), words.next()) else {
                continue;
            };
            let (before, after) = index.wishes.entry(normal(module)).or_default();
            let mut list = None;
            for word in words {
                match word {
                    "pre:" => list = Some(&mut *before),
                    "post:" => list = Some(&mut *after),
                    module => {
                        if let Some(list) = &mut list {
                            list.push(normal(module));
                        }
                    }
                }
            }
        }
        index.builtin = builtin.lines().map(name_of).collect();
        index
    }

    /// The files of everything that answers to `name`, a module's or an alias, each after those that it needs. Empty: it is
    /// in the kernel. `None`: nobody does.
    pub fn resolve(&self, name: &str) -> Option<Vec<String>> {
        let name = normal(name);
        if self.builtin.contains(&name) {
            return Some(Vec::new());
        }
        let mut order = Order::default();
        if self.files.contains_key(&name) {
            self.add(&name, &mut order);
        } else {
            for (pattern, module) in &self.aliases {
                if pattern::matches(pattern.as_bytes(), name.as_bytes()) {
                    self.add(module, &mut order);
                }
            }
        }
        (!order.files.is_empty()).then_some(order.files)
    }

    fn add(&self, module: &str, order: &mut Order) {
        let Some((file, needs)) = self.files.get(module) else {
            return;
        };
        // Wishes may go round in circles; needs cannot.
        if !order.begun.insert(module.to_owned()) {
            return;
        }
        let wishes = self.wishes.get(module);
        for before in wishes.iter().flat_map(|(before, _)| before) {
            self.add(before, order);
        }
        for need in needs.iter().rev() {
            self.add(&name_of(need), order);
        }
        order.files.push(file.clone());
        for after in wishes.iter().flat_map(|(_, after)| after) {
            self.add(after, order);
        }
    }
}

#[derive(Default)]
struct Order {
    begun: HashSet<String>,
    files: Vec<String>,
}

/// The module's name in that of its file.
pub fn name_of(file: &str) -> String {
    let base = file.rsplit('/').next().unwrap_or(file);
    normal(base.split_once('.').map_or(base, |(name, _)| name))
}

/// Names do not tell `-` from `_`, but in a set of characters `-` makes a range.
fn normal(name: &str) -> String {
    let mut in_set = false;
    name.chars()
        .map(|c| {
            match c {
                '[' => in_set = true,
                ']' => in_set = false,
                '-' if !in_set => return '_',
                _ => {}
            }
            c
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DEP: &str = "\
kernel/net/wireguard.ko: kernel/net/udp_tunnel.ko kernel/net/ip6_udp_tunnel.ko kernel/lib/libcurve.ko
kernel/net/udp_tunnel.ko:
kernel/net/ip6_udp_tunnel.ko: kernel/lib/libcurve.ko
kernel/lib/libcurve.ko:
kernel/fs/btrfs/btrfs.ko: kernel/lib/xor.ko
kernel/lib/xor.ko:
kernel/crypto/xxhash-generic.ko:
kernel/net/nf-two.ko:
kernel/net/nf-one.ko:
";
    const ALIAS: &str = "\
# Aliases extracted from modules themselves.
alias rtnl-link-wireguard wireguard
alias fs-btrfs btrfs
alias char-major-[0-9]-* nf_one
alias nf-log nf_one
alias nf-l* nf_two
alias fs-gone gone
";
    const SOFTDEP: &str =
        "softdep btrfs pre: xxhash-generic gone post: nf-one\nsoftdep xxhash_generic pre: btrfs\n";

    fn index() -> Index {
        Index::parse(DEP, ALIAS, SOFTDEP, "kernel/fs/overlayfs/overlay.ko\n")
    }

    fn resolved(name: &str) -> Option<Vec<String>> {
        let names = |files: Vec<String>| files.iter().map(|file| name_of(file)).collect();
        index().resolve(name).map(names)
    }

    fn some(names: &[&str]) -> Option<Vec<String>> {
        Some(names.iter().map(|name| (*name).to_owned()).collect())
    }

    #[test]
    fn a_module_comes_after_what_it_needs() {
        let order = ["libcurve", "ip6_udp_tunnel", "udp_tunnel", "wireguard"];
        assert_eq!(resolved("wireguard"), some(&order));
        assert_eq!(resolved("rtnl-link-wireguard"), some(&order));
        assert_eq!(resolved("rtnl_link_wireguard"), some(&order));
    }

    #[test]
    fn wishes_are_met_on_both_sides_without_going_in_circles() {
        assert_eq!(
            resolved("fs-btrfs"),
            some(&["xxhash_generic", "xor", "btrfs", "nf_one"])
        );
    }

    #[test]
    fn all_that_answer_to_an_alias_are_loaded() {
        assert_eq!(resolved("nf-log"), some(&["nf_one", "nf_two"]));
        assert_eq!(resolved("char-major-7-229"), some(&["nf_one"]));
        assert_eq!(resolved("char-major-x-229"), None);
    }

    #[test]
    fn what_is_in_the_kernel_needs_no_file() {
        assert_eq!(resolved("overlay"), Some(Vec::new()));
    }

    #[test]
    fn nobody_answers_to_an_unknown_name_or_for_a_module_that_is_gone() {
        assert_eq!(resolved("net-pf-77"), None);
        assert_eq!(resolved("fs-gone"), None);
        assert_eq!(resolved(""), None);
        assert_eq!(resolved("../../etc/passwd"), None);
    }

    proptest! {
        #[test]
        fn any_name_leads_to_files_of_the_index_alone(name in "\\PC{0,60}") {
            for file in index().resolve(&name).unwrap_or_default() {
                prop_assert!(DEP.contains(&file));
            }
        }

        #[test]
        fn any_text_is_an_index(text in "(alias|softdep|[a-c:./*\\[\\]-]|pre:|post:| |\n){0,80}", name in "[a-c]{1,3}") {
            Index::parse(&text, &text, &text, &text).resolve(&name);
        }
    }
}
