//! The pipe on which the child, and then the VMM, says how it went.

use std::fs::File;
use std::io::Read;
use std::os::fd::BorrowedFd;

use super::error::LaunchError;

/// Reads the jail's report to its end.
///
/// # Errors
/// [`LaunchError::Jail`] with the VMM's sentence, or that it died before it could say one.
pub(crate) fn read_report(report: BorrowedFd<'_>) -> Result<(), LaunchError> {
    let mut text = Vec::new();
    File::from(report.try_clone_to_owned().map_err(LaunchError::Prepare)?)
        .take(4096)
        .read_to_end(&mut text)
        .map_err(LaunchError::Prepare)?;
    match text.as_slice() {
        [0] => Ok(()),
        [] => Err(LaunchError::Jail(
            "brig-vmm ended before its jail was closed; its log has the reason".into(),
        )),
        sentence => Err(LaunchError::Jail(
            String::from_utf8_lossy(sentence).into_owned(),
        )),
    }
}
