//! Waiting for a guest that writes what it has kept to its disks. A process that closes a disk, and a file system that is
//! unmounted, end when the disk has it all, which takes a slow or throttled disk as long as it takes: under runc nobody
//! gives up. Here a time-out begins again while disks get on. It is bounded all the same, as the guest can write for ever.

use std::future::Future;
use std::time::Duration;

use tokio::time::timeout;

use super::Vm;

/// How often a time-out is waited for.
pub(super) const MOST: u32 = 10;
/// The VMM's name for its block devices.
const DISK: &str = "block";

impl Vm {
    /// Waits for `done` as long as `limit`, and again while its disks get on; none if it did not come.
    pub async fn while_disks_get_on<T>(
        &self,
        limit: Duration,
        done: impl Future<Output = T>,
    ) -> Option<T> {
        get_on(limit, done, || self.disk_requests()).await
    }

    /// Requests that the VM's disks have answered; none without disks, or a VMM that says.
    async fn disk_requests(&self) -> Option<u64> {
        let counters = timeout(self.timeouts.word, self.control.counters()).await;
        let devices = counters.ok()?.ok()?.devices.into_iter();
        let disks = devices.filter(|device| device.device == DISK);
        let queues = disks.flat_map(|device| device.queues);
        queues
            .map(|(answered, _)| answered)
            .reduce(u64::wrapping_add)
    }
}

async fn get_on<T, C: Future<Output = Option<u64>>>(
    limit: Duration,
    done: impl Future<Output = T>,
    count: impl Fn() -> C,
) -> Option<T> {
    tokio::pin!(done);
    let mut before = count().await;
    for _ in 0..MOST {
        if let Ok(value) = timeout(limit, &mut done).await {
            return Some(value);
        }
        let now = count().await;
        if now.is_none() || now == before {
            break;
        }
        before = now;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::future::{pending, ready};

    const LIMIT: Duration = Duration::from_secs(30);

    /// How many seconds are waited for what never comes, while the disks answer so many requests in each time-out.
    async fn waited(requests: impl Fn(u64) -> Option<u64>) -> u64 {
        let asked = Cell::new(0);
        let begin = tokio::time::Instant::now();
        let count = || {
            asked.set(asked.get() + 1);
            ready(requests(asked.get()))
        };
        assert_eq!(get_on(LIMIT, pending::<()>(), count).await, None);
        begin.elapsed().as_secs()
    }

    #[tokio::test(start_paused = true)]
    async fn a_guest_is_given_time_while_its_disks_get_on_and_not_for_ever() {
        assert_eq!(waited(|_| None).await, 30);
        assert_eq!(waited(|_| Some(7)).await, 30);
        assert_eq!(waited(|asked| Some(asked.min(4))).await, 120);
        assert_eq!(waited(Some).await, 300);
    }

    #[tokio::test(start_paused = true)]
    async fn what_comes_while_they_do_is_there_at_once() {
        let asked = Cell::new(0);
        let count = || {
            asked.set(asked.get() + 1);
            ready(Some(asked.get()))
        };
        let begin = tokio::time::Instant::now();
        let late = async {
            tokio::time::sleep(3 * LIMIT + Duration::from_secs(1)).await;
            "done"
        };
        assert_eq!(get_on(LIMIT, late, count).await, Some("done"));
        assert_eq!(begin.elapsed().as_secs(), 91);
    }
}
