//! Reads a namespace's rules: whether there are any, all of them, and once more when they change meanwhile.

use std::path::Path;

use super::legacy;
use super::listed::{ListError, is_missing};
use super::ruleset::Ruleset;
use super::socket::Nftables;
use super::take;
use crate::node::network::error::{NetworkError, failed};

/// How often rules that change while they are read are read again.
const ATTEMPTS: usize = 16;
/// The number of a ruleset that nobody has touched.
pub const UNTOUCHED: u32 = 1;

/// Reads the rules of the calling thread's network namespace, whose interfaces have these numbers.
///
/// # Errors
/// [`NetworkError`]; a kernel without nf_tables has no rules, which is none.
pub fn read(interfaces: &[(u32, &str)]) -> Result<Ruleset, NetworkError> {
    let mut ruleset = match nf_tables(interfaces) {
        Ok(ruleset) => ruleset,
        Err(ListError::Io(error)) => return Err(failed("read the packet filter", error)),
        Err(error) => {
            let what = format!("of its packet filter: {error}");
            return Err(NetworkError::Unsupported(what));
        }
    };
    ruleset.refused.extend(legacy::tables());
    Ok(ruleset)
}

/// Whether the rules of the calling thread's network namespace are in this state; none: as nobody has touched them.
pub fn is_as(given: Option<u32>) -> bool {
    generation() == given.unwrap_or(UNTOUCHED)
}

/// The number of the calling thread's network namespace's ruleset; of a kernel without one, of none.
fn generation() -> u32 {
    if !has_nf_tables() {
        return UNTOUCHED;
    }
    let asked = Nftables::open().map_err(ListError::Io);
    asked
        .and_then(|mut netlink| netlink.generation())
        .unwrap_or(UNTOUCHED)
}

/// Whether the node's kernel has nf_tables at hand: to ask a kernel that does not would load the module.
pub fn has_nf_tables() -> bool {
    if Path::new("/sys/module/nf_tables").exists() {
        return true;
    }
    // One that is built in has no entry there. Who cannot be sure asks.
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    std::fs::read(format!("/lib/modules/{}/modules.builtin", release.trim())).map_or(true, |list| {
        let name = b"/nf_tables.ko";
        list.windows(name.len()).any(|window| window == name)
    })
}

fn nf_tables(interfaces: &[(u32, &str)]) -> Result<Ruleset, ListError> {
    let empty = Ruleset {
        generation: UNTOUCHED,
        ..Ruleset::default()
    };
    if !has_nf_tables() {
        return Ok(empty);
    }
    for _ in 0..ATTEMPTS {
        let mut netlink = match Nftables::open() {
            Err(error) if is_missing(&error) => return Ok(empty),
            opened => opened?,
        };
        let generation = match netlink.generation() {
            Err(ListError::Io(error)) if is_missing(&error) => return Ok(empty),
            generation => generation?,
        };
        if generation == UNTOUCHED {
            return Ok(empty);
        }
        let taken = take::all(&mut netlink, interfaces);
        match taken {
            Err(ListError::Changed) => continue,
            Err(error) => return Err(error),
            Ok(ruleset) if netlink.generation()? == generation => {
                return Ok(Ruleset {
                    generation,
                    ..ruleset
                });
            }
            Ok(_) => {}
        }
    }
    Err(ListError::Changed)
}
