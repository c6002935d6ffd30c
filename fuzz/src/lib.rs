//! What all targets have in common: they begin as a program of Rust's does, which libFuzzer's `main` does not.

pub use libfuzzer_sys;

/// Runs a function of bytes as a target.
#[macro_export]
macro_rules! target {
    ($function:path) => {
        $crate::libfuzzer_sys::fuzz_target!(init: $crate::begin(), |data: &[u8]| $function(data));
    };
}

/// Writing to a socket or pipe whose reader has gone is an error, as in every program of Rust's, and not death.
pub fn begin() {
    // SAFETY: changes what becomes of a signal, before there is another thread.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
}
