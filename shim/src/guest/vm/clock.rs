//! Keeps the guest's wall clock at the node's: after the boot, when the node's clock is set, when the
//! node wakes from a sleep, and now and then, because NTP disciplines the node's and not the guest's.
//!
//! The guest says what its clock shows; half of the time that the question took is how wrong the answer may
//! be. A guest that lies about it has a wrong clock, and nobody else has.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use brig_agent_protocol::agent::AdjustClockRequest;
use rustix::io::Errno;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use slog::{Logger, debug, info, warn};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, sleep};
use ttrpc::context;

use super::Vm;
use crate::error::Result;
use crate::node::watched::watched;

/// Between two looks without a reason: at 50 ppm, more than an undisciplined clock drifts, 30 ms.
const DRIFT: Duration = Duration::from_secs(600);
/// Questions of one look; the one that was answered fastest counts.
const QUESTIONS: usize = 3;
/// A difference that nobody notices, and that scheduling alone explains.
const NEGLIGIBLE: Duration = Duration::from_millis(2);
/// The year 2242: the timer is never to expire.
const NEVER: i64 = 1 << 33;

/// Runs until the VM ends.
pub async fn keep(vm: Arc<Vm>, logger: Logger) {
    let changes = Changes::watch().inspect_err(
        |error| warn!(logger, "the node's clock cannot be watched"; "error" => %error),
    );
    let mut changes = changes.ok();
    loop {
        if let Err(error) = bring_into_line(&vm, &logger).await {
            debug!(logger, "the guest's clock was not looked at"; "error" => error.message);
        }
        let changed = async {
            match &changes {
                Some(changes) => changes.next().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            changed = changed => if let Err(error) = changed {
                warn!(logger, "the node's clock is watched no more"; "error" => %error);
                // The looks go on.
                changes = None;
            },
            () = sleep(DRIFT) => {}
            _ = vm.ended() => return,
        }
    }
}

/// Compares the clocks and moves the guest's if it is off by more than the comparison is.
async fn bring_into_line(vm: &Vm, logger: &Logger) -> Result<()> {
    let mut best = compare(vm).await?;
    for _ in 1..QUESTIONS {
        let next = compare(vm).await?;
        if next.doubt < best.doubt {
            best = next;
        }
    }
    let Some(offset_ns) = best.correction() else {
        return Ok(());
    };
    ask(vm, offset_ns).await?;
    info!(logger, "the guest's clock is moved to the node's";
        "offset_ms" => offset_ns / 1_000_000, "doubt_ms" => best.doubt.as_millis());
    Ok(())
}

/// How far the guest's clock is behind the node's.
#[derive(Debug, Clone, Copy)]
struct Comparison {
    /// Nanoseconds; negative: it is ahead.
    behind: i64,
    /// How wrong that may be.
    doubt: Duration,
}

impl Comparison {
    /// `before` and `guest` in nanoseconds since the epoch, `took` from the question to the answer. The guest
    /// chooses its number.
    fn of(before: u64, took: Duration, guest: u64) -> Self {
        let doubt = took / 2;
        let middle = i128::from(before) + i128::try_from(doubt.as_nanos()).unwrap_or(i128::MAX / 2);
        let behind = middle - i128::from(guest);
        let limit = if behind < 0 { i64::MIN } else { i64::MAX };
        Self {
            behind: i64::try_from(behind).unwrap_or(limit),
            doubt,
        }
    }

    /// What to add to the guest's clock, if it is worth it.
    fn correction(self) -> Option<i64> {
        let off = Duration::from_nanos(self.behind.unsigned_abs());
        (off > self.doubt.max(NEGLIGIBLE)).then_some(self.behind)
    }
}

async fn compare(vm: &Vm) -> Result<Comparison> {
    let before = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let began = Instant::now();
    let guest = ask(vm, 0).await?;
    let before = u64::try_from(before.as_nanos()).unwrap_or(u64::MAX);
    Ok(Comparison::of(before, began.elapsed(), guest))
}

async fn ask(vm: &Vm, offset_ns: i64) -> Result<u64> {
    let request = AdjustClockRequest {
        offset_ns,
        ..AdjustClockRequest::default()
    };
    let answer = vm.agent.adjust_clock(context::Context::default(), &request);
    Ok(vm.call("AdjustClock", answer).await?.unix_time_ns)
}

/// Tells when the node's wall clock is set, or jumps because the node has slept (timerfd_create(2),
/// TFD_TIMER_CANCEL_ON_SET).
struct Changes(AsyncFd<OwnedFd>);

impl Changes {
    fn watch() -> io::Result<Self> {
        let timer = timerfd_create(
            TimerfdClockId::Realtime,
            TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC,
        )?;
        let flags = TimerfdTimerFlags::ABSTIME | TimerfdTimerFlags::CANCEL_ON_SET;
        let zero = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let never = Itimerspec {
            it_interval: zero,
            it_value: Timespec {
                tv_sec: NEVER,
                tv_nsec: 0,
            },
        };
        timerfd_settime(&timer, flags, &never)?;
        Ok(Self(watched(timer, Interest::READABLE)?))
    }

    /// Waits for the next change; several at once are one.
    async fn next(&self) -> io::Result<()> {
        let mut expirations = [0; 8];
        self.0
            .async_io(Interest::READABLE, |timer| {
                // ECANCELED is the change; the timer stays armed.
                match rustix::io::read(timer, &mut expirations) {
                    Ok(_) | Err(Errno::CANCELED) => Ok(()),
                    Err(error) => Err(error.into()),
                }
            })
            .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn correction(before: u64, took_ms: u64, guest: u64) -> Option<i64> {
        Comparison::of(before, Duration::from_millis(took_ms), guest).correction()
    }

    #[test]
    fn a_clock_that_may_be_right_is_left_alone() {
        // 100 ms for the question: the guest may have read its clock at any moment of it.
        for guest in [0, 50_000_000, 100_000_000] {
            assert_eq!(correction(SECOND, 100, SECOND + guest), None, "{guest}");
        }
        assert_eq!(correction(SECOND, 0, SECOND + 1_000_000), None);
    }

    #[test]
    fn a_clock_that_is_off_is_moved_by_the_middle_of_the_doubt() {
        let hour = 3_600 * SECOND;
        assert_eq!(
            correction(hour + SECOND, 100, SECOND),
            Some(3_600_050_000_000)
        );
        assert_eq!(
            correction(SECOND, 100, SECOND + 200_000_000),
            Some(-150_000_000)
        );
    }

    #[test]
    fn whatever_the_guest_says_is_a_number() {
        assert_eq!(correction(u64::MAX, 10, 0), Some(i64::MAX));
        assert_eq!(correction(0, 10, u64::MAX), Some(i64::MIN));
    }

    #[tokio::test]
    async fn a_clock_that_nobody_sets_wakes_nobody() {
        let changes = Changes::watch().unwrap();
        let woken = tokio::time::timeout(Duration::from_millis(50), changes.next()).await;
        assert!(woken.is_err());
    }
}
