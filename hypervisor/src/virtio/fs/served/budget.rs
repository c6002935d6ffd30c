//! Keeps the file server from taking the last descriptors of the process.
//!
//! The guest decides how many inodes it knows, and each is a descriptor. At `RLIMIT_NOFILE` the control
//! socket could not deliver descriptors any more and the VMM would fail. So the guest gets `ENFILE` a
//! little earlier. Before that, someone is told: the guest holds most inodes only as cache, and lets go of
//! them when its agent asks its kernel to.

use std::fs;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::errno;
use crate::virtio::vsock::MAX_STREAMS;

/// Descriptors left to the rest of the VMM: two for each vsock stream and the agent's, and those of the
/// other devices, of the control socket's messages, and of [`INTERVAL`].
const RESERVE: u64 = 2 * (MAX_STREAMS as u64 + 1) + 1024;
/// The most descriptors that one opening leaves: CREATE makes an inode and a handle.
const PER_OPENING: u64 = 2;
/// The kernel is asked for the number at least once in so many openings near a bound.
const INTERVAL: u64 = 64;
const _: () = assert!(INTERVAL * PER_OPENING < 512);
/// While the pressure lasts, it is told again once in so many openings...
const REMINDER: u64 = 64 * INTERVAL;
/// ...and never more often than this, whatever the guest does around the bound.
const PAUSE: Duration = Duration::from_secs(1);

/// Called on the file server's thread when its descriptors run short.
pub(super) type OnPressure = Box<dyn Fn() + Send + Sync>;

/// The file server's share of the descriptor table.
pub(super) struct Budget {
    /// Descriptors of the process at which the guest is refused more.
    end: u64,
    /// Three quarters of it: where the pressure begins.
    high: u64,
    on_pressure: OnceLock<OnPressure>,
    pressure: Mutex<Pressure>,
    /// Openings until the kernel is asked again.
    left: AtomicU64,
}

/// When the pressure was told last.
#[derive(Default)]
struct Pressure {
    told: Option<Instant>,
    /// Openings since then; as many as it takes once the pressure has gone.
    openings: u64,
}

impl Budget {
    /// What `RLIMIT_NOFILE` leaves.
    pub(super) fn new() -> io::Result<Self> {
        let (soft, _) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE)?;
        Ok(Self::of(soft))
    }

    fn of(limit: u64) -> Self {
        // A limit that is tiny anyhow is shared by halves.
        let end = limit.saturating_sub(RESERVE).max(limit / 2);
        Self {
            end,
            high: end / 4 * 3,
            on_pressure: OnceLock::new(),
            pressure: Mutex::default(),
            left: AtomicU64::new(0),
        }
    }

    /// To be called before anything is opened for the guest.
    ///
    /// # Errors
    /// `ENFILE` at the end of the budget.
    pub(super) fn admit(&self) -> io::Result<()> {
        let one_less = |left: u64| left.checked_sub(1);
        let left = self
            .left
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_less);
        if left.is_ok() {
            return Ok(());
        }
        self.judge(open_descriptors()?, Instant::now())
    }

    /// Decides by the number of descriptors, and how many openings later it matters again. The number is
    /// the kernel's: a free place somewhere in the table says nothing, the guest decides where they are.
    fn judge(&self, used: u64, now: Instant) -> io::Result<()> {
        if used < self.high {
            self.pressure().openings = REMINDER;
            self.ask_again(self.high - used);
            return Ok(());
        }
        self.tell(now);
        if used < self.end {
            self.ask_again((self.end - used).min(REMINDER));
            return Ok(());
        }
        // Ask again next time: the guest may have forgotten some.
        self.left.store(0, Ordering::Relaxed);
        Err(errno(libc::ENFILE))
    }

    /// After half of the openings that could take `room`, and what others open is in the reserve.
    fn ask_again(&self, room: u64) {
        let next = (room / PER_OPENING / 2).max(INTERVAL);
        self.pressure().openings += next;
        self.left.store(next - 1, Ordering::Relaxed);
    }

    fn pressure(&self) -> std::sync::MutexGuard<'_, Pressure> {
        self.pressure.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets who is told of pressure; the first one stays.
    pub(super) fn on_pressure(&self, told: OnPressure) {
        let _ = self.on_pressure.set(told);
    }

    fn tell(&self, now: Instant) {
        let mut pressure = self.pressure();
        if let Some(told) = pressure.told
            && (now.saturating_duration_since(told) < PAUSE || pressure.openings < REMINDER)
        {
            return;
        }
        pressure.told = Some(now);
        pressure.openings = 0;
        drop(pressure);
        if let Some(told) = self.on_pressure.get() {
            told();
        }
    }
}

/// How many descriptors the process has.
fn open_descriptors() -> io::Result<u64> {
    let directory = "/proc/self/fd";
    // Linux 6.2 tells the number as the directory's size; before, it must be listed.
    let size = fs::metadata(directory)?.len();
    if size > 0 {
        return Ok(size);
    }
    Ok(fs::read_dir(directory)?.map(|_| 1).sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_counted() {
        let before = open_descriptors().unwrap();
        let files: Vec<_> = (0..100)
            .map(|_| fs::File::open("/dev/null").unwrap())
            .collect();
        let with = open_descriptors().unwrap();
        // Other tests open and close some at the same time.
        assert!(with.abs_diff(before + 100) < 60, "{before} {with}");
        drop(files);
    }

    #[test]
    fn the_guest_is_refused_before_the_table_is_full() {
        // Whatever this process has open is below the end of its own budget and above that of none.
        let own = Budget::new().unwrap();
        for _ in 0..1000 {
            own.admit().unwrap();
        }
        let none = Budget::of(2);
        for _ in 0..3 {
            assert_eq!(none.admit().unwrap_err().raw_os_error(), Some(libc::ENFILE));
        }
    }

    /// A guest that fills the table, and makes holes in it where it likes, in every interval.
    #[test]
    fn a_hole_in_the_table_lets_nobody_past_the_end() {
        let budget = Budget::of(20_000);
        let mut used = 100;
        for _ in 0..100_000 {
            let asked = budget.left.load(Ordering::Relaxed) == 0;
            let admitted = if asked {
                budget.judge(used - 1, Instant::now())
            } else {
                budget.admit()
            };
            if admitted.is_ok() {
                used += PER_OPENING;
            }
            assert!(used < budget.end + INTERVAL * PER_OPENING + 2, "{used}");
        }
        assert!(used > budget.end - INTERVAL, "and the budget is of use");
    }

    #[test]
    fn the_kernel_is_asked_rarely_while_there_is_room() {
        let budget = Budget::of(100_000);
        budget.judge(100, Instant::now()).unwrap();
        assert!(budget.left.load(Ordering::Relaxed) > 10_000);
        budget.judge(budget.high - 1, Instant::now()).unwrap();
        assert_eq!(budget.left.load(Ordering::Relaxed), INTERVAL - 1);
    }

    fn counted(budget: &Budget) -> impl Fn() -> u64 + use<> {
        let told = std::sync::Arc::new(AtomicU64::new(0));
        let counter = std::sync::Arc::clone(&told);
        budget.on_pressure(Box::new(move || {
            counter.fetch_add(1, Ordering::SeqCst);
        }));
        move || told.load(Ordering::SeqCst)
    }

    #[test]
    fn pressure_is_told_before_the_end_and_not_each_time() {
        let budget = Budget::of(10_000 + RESERVE);
        let told = counted(&budget);
        let start = Instant::now();
        budget.judge(7400, start).unwrap();
        assert_eq!(told(), 0);
        // Near the end each judgement is INTERVAL openings later.
        budget.judge(9999, start).unwrap();
        assert_eq!(told(), 1);
        let later = start + PAUSE;
        for _ in 1..REMINDER / INTERVAL {
            budget.judge(9999, later).unwrap();
        }
        assert_eq!(told(), 1, "not each time");
        budget.judge(9999, later).unwrap();
        assert_eq!(told(), 2, "but again when it lasts");
        budget.judge(100, later).unwrap();
        budget.judge(9400, later + PAUSE).unwrap();
        assert_eq!(told(), 3, "and when it comes back");
        assert!(budget.judge(10_000, later + PAUSE).is_err());
    }

    #[test]
    fn a_guest_that_swings_around_the_bound_tells_nobody_more_often() {
        let budget = Budget::of(10_000 + RESERVE);
        let told = counted(&budget);
        let start = Instant::now();
        for swing in 0..10_000u32 {
            let now = start + PAUSE * swing / 1000;
            budget.judge(7400, now).unwrap();
            budget.judge(7600, now).unwrap();
            let _ = budget.judge(10_000, now);
        }
        assert!((9..=10).contains(&told()), "{}", told());
    }

    #[test]
    fn all_streams_fit_into_what_is_always_left_to_the_vmm() {
        assert_eq!(Budget::of(10_000).end, 10_000 - RESERVE);
        assert_eq!(Budget::of(100).end, 50);
        let streams = 2 * (MAX_STREAMS as u64 + 1);
        assert!(RESERVE >= streams + 512);
    }
}
