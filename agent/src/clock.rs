//! The guest's wall clock: set when the sandbox starts, and moved when the host says that it is off.
//!
//! The guest counts on by itself (kvmclock or the TSC), but the host's wall clock is set, disciplined by
//! NTP and jumps over a sleep, none of which a guest notices. The host is trusted with the time.
use std::{
    io,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use nix::{
    sys::time::TimeSpec,
    time::{ClockId, clock_settime},
};

use crate::error::{Error, Result};

/// From here on the clock steps. adjtime(3) takes no more, and at its 500 ppm it would need a quarter of
/// an hour for this.
const STEP: Duration = Duration::from_millis(500);
const SECOND: i64 = 1_000_000_000;

/// Sets the clock, nanoseconds since the epoch.
///
/// # Errors
/// `Internal` when the kernel refuses.
pub fn set(unix_ns: u64) -> Result<()> {
    let part = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
    let time = TimeSpec::new(part(unix_ns / 1_000_000_000), part(unix_ns % 1_000_000_000));
    clock_settime(ClockId::CLOCK_REALTIME, time).map_err(|e| Error::io("clock", e))
}

/// What the clock shows, nanoseconds since the epoch.
#[must_use]
pub fn now() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// Moves the clock by so many nanoseconds: at once from half a second on, else slowly.
///
/// # Errors
/// `Internal` when the kernel refuses.
pub fn adjust(offset_ns: i64) -> Result<()> {
    let mut change = change(offset_ns);
    // SAFETY: the structure is whole and outlives the call.
    match unsafe { libc::adjtimex(&raw mut change) } {
        -1 => Err(Error::io("clock", io::Error::last_os_error())),
        _ => Ok(()),
    }
}

fn change(offset_ns: i64) -> libc::timex {
    // SAFETY: a structure of integers, for which all zeroes is a value: change nothing.
    let mut change: libc::timex = unsafe { std::mem::zeroed() };
    if u128::from(offset_ns.unsigned_abs()) >= STEP.as_nanos() {
        change.modes = libc::ADJ_SETOFFSET | libc::ADJ_NANO;
        // The seconds carry the sign (clock_adjtime(2)).
        change.time.tv_sec = offset_ns.div_euclid(SECOND);
        change.time.tv_usec = offset_ns.rem_euclid(SECOND);
    } else {
        change.modes = libc::ADJ_OFFSET_SINGLESHOT;
        // Microseconds.
        change.offset = offset_ns / 1_000;
    }
    change
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_a_second_and_more_is_a_step_whose_seconds_carry_the_sign() {
        let stepped = |ns| {
            let change = change(ns);
            assert_eq!(change.modes, libc::ADJ_SETOFFSET | libc::ADJ_NANO, "{ns}");
            (change.time.tv_sec, change.time.tv_usec)
        };
        assert_eq!(stepped(3_600 * SECOND), (3_600, 0));
        assert_eq!(stepped(500_000_000), (0, 500_000_000));
        assert_eq!(stepped(-500_000_000), (-1, 500_000_000));
        assert_eq!(stepped(-2 * SECOND), (-2, 0));
        assert_eq!(stepped(i64::MIN).0, i64::MIN.div_euclid(SECOND));
    }

    #[test]
    fn less_is_made_up_slowly_in_microseconds() {
        for (ns, us) in [(499_999_999, 499_999), (-30_000_000, -30_000), (0, 0)] {
            let change = change(ns);
            assert_eq!(change.modes, libc::ADJ_OFFSET_SINGLESHOT);
            assert_eq!(change.offset, us);
        }
    }
}
