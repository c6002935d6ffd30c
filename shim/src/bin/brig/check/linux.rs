//! The node's kernel, by its version: what the jail is made of came with one, and nothing can stand in for it.

use brig_hypervisor::jail::OLDEST_LINUX;

use super::finding::Finding;

/// Whether the kernel of this release (`uname -r`) is new enough.
pub fn finding(release: &str) -> Finding {
    let (major, minor) = OLDEST_LINUX;
    let result = match version(release) {
        Some(own) if own < OLDEST_LINUX => Err(format!(
            "{release} is older than {major}.{minor}, so no VMM can be jailed: it lacks mount_setattr(2)"
        )),
        _ => Ok(release.to_owned()),
    };
    Finding::of("linux", result).or(format!(
        "boot the node with Linux {major}.{minor} or later, as Debian 12, Ubuntu 22.04 and RHEL 9 have it"
    ))
}

/// The first two numbers.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|letter: char| !letter.is_ascii_digit());
    let mut number = || numbers.next()?.parse().ok();
    Some((number()?, number()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_without_what_the_jail_is_made_of_is_fatal_with_one_that_has_it() {
        for release in [
            "5.11.0-49-generic",
            "5.10.0-28-amd64",
            "4.18.0-553.el8.x86_64",
            "5.4",
        ] {
            let finding = finding(release);
            assert!(finding.is_fatal(), "{release}");
            let said = finding.to_string();
            let words = format!("{release} is older than 5.12");
            assert!(
                said.contains(&words) && said.contains("fix: boot the node with Linux 5.12"),
                "{said}"
            );
        }
        for release in [
            "5.12.0",
            "5.15.0-91-generic",
            "6.12.57+deb13-amd64",
            "5.14.0-427.el9.x86_64",
            "10.0",
            "strange",
        ] {
            assert!(!finding(release).is_fatal(), "{release}");
        }
    }

    #[test]
    fn the_documentation_names_the_oldest_kernel() {
        let (major, minor) = OLDEST_LINUX;
        for page in ["README.md", "docs/operator-guide.md"] {
            let path = format!("{}/../{page}", env!("CARGO_MANIFEST_DIR"));
            let text = std::fs::read_to_string(path).unwrap();
            assert!(
                text.contains(&format!("Linux {major}.{minor} or later")),
                "{page}"
            );
        }
    }
}
