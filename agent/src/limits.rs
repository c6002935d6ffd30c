//! Resource limits of processes whose specification names none: the node's runtime's, as its own containers inherit them.
//!
//! What the guest's kernel gives its first process it reckons from the memory that it has booted with (`fork_init`): some 950
//! processes of a user in 256 MiB, in a VM that has grown too.
//!
//! Trusts the host, as far as it names limits.
use std::{fs, sync::OnceLock};

use brig_agent_protocol::agent::ResourceLimit;

use crate::{
    error::{Error, Result},
    init,
    spec::Rlimit,
};

const FILES: &str = "RLIMIT_NOFILE";
/// The most that a limit of files may be.
const MOST_FILES: &str = "/proc/sys/fs/nr_open";

/// Those of a sandbox, once it was started.
#[derive(Debug, Default)]
pub struct Limits(OnceLock<Vec<Rlimit>>);

impl Limits {
    /// From now on these hold. Once.
    ///
    /// # Errors
    /// `InvalidArgument` for what is no limit.
    pub fn set(&self, limits: &[ResourceLimit]) -> Result<()> {
        let most_files = fs::read_to_string(MOST_FILES).ok();
        let most_files = most_files.and_then(|text| text.trim().parse().ok());
        let limits = checked(limits, most_files.unwrap_or(u64::MAX))?;
        let _ = self.0.set(limits);
        Ok(())
    }

    /// All of them.
    pub fn all(&self) -> Vec<Rlimit> {
        self.0.get().cloned().unwrap_or_default()
    }
}

fn checked(limits: &[ResourceLimit], most_files: u64) -> Result<Vec<Rlimit>> {
    let checked = limits.iter().map(|limit| {
        if !init::is_resource(&limit.type_) || limit.soft > limit.hard {
            return Err(Error::InvalidArgument(format!(
                "{} of {} to {} is no resource limit",
                limit.type_, limit.soft, limit.hard
            )));
        }
        let most = if limit.type_ == FILES {
            most_files
        } else {
            u64::MAX
        };
        Ok(Rlimit {
            kind: limit.type_.clone(),
            soft: limit.soft.min(most),
            hard: limit.hard.min(most),
        })
    });
    checked.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limit(kind: &str, soft: u64, hard: u64) -> ResourceLimit {
        ResourceLimit {
            type_: kind.to_owned(),
            soft,
            hard,
            ..ResourceLimit::default()
        }
    }

    #[test]
    fn no_more_files_are_allowed_than_the_kernel_takes_and_what_is_no_limit_is_refused() {
        let given = [
            limit("RLIMIT_NPROC", u64::MAX, u64::MAX),
            limit(FILES, 1024, u64::MAX),
        ];
        let limits = checked(&given, 5000).unwrap();
        let pairs: Vec<_> = limits.iter().map(|one| (one.soft, one.hard)).collect();
        assert_eq!(pairs, [(u64::MAX, u64::MAX), (1024, 5000)]);
        for wrong in [limit("RLIMIT_X", 1, 2), limit(FILES, 2, 1)] {
            assert!(checked(&[wrong], 9).is_err());
        }
        assert!(Limits::default().all().is_empty());
    }
}
