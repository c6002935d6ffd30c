//! Gives the host what is free in small pieces, once the guest has come to rest.
//!
//! The kernel reports free memory to the host in blocks of 2 MiB, which costs a running guest next to
//! nothing and leaves the host several MiB in pieces that starting up has left behind. For a short while
//! after containers have started, and seldom after that, pieces of every size are reported.
//! Where the operator wants it, files that nobody uses are let go before ([`file_cache`]).
//! Nothing here wakes a guest in which nothing is started; a sign of life, for which it wakes anyway, counts as a start when
//! files have piled up.
use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};
use tokio::{
    sync::Notify,
    time::{sleep, timeout},
};

use crate::file_cache;

/// The kernel's parameters that are set for as long as everything is reported.
#[derive(Clone)]
pub struct Parameters {
    /// The smallest block that is reported, as a power of two of pages.
    pub order: PathBuf,
    /// The part of all memory that the CPUs' own lists of free pages may hold, whose pages are not reported; 0: as much as
    /// the low watermark, 2 MiB of a guest of 256.
    pub lists: PathBuf,
}

impl Parameters {
    /// Where the kernel has them.
    #[must_use]
    pub fn of_kernel() -> Self {
        Self {
            order: "/sys/module/page_reporting/parameters/page_reporting_order".into(),
            lists: "/proc/sys/vm/percpu_pagelist_high_fraction".into(),
        }
    }
}

/// A part so small that a list holds the least that it can, four batches: 240 KiB in a guest of 256 MiB.
const SHORT_LISTS: &str = "1000000";
/// Nothing has been started or has ended for this long.
const REST: Duration = Duration::from_secs(5);
/// The kernel looks every two seconds and takes a sixteenth of what there was of a size.
const WINDOW: Duration = Duration::from_secs(16);
/// A probe every ten seconds is not to have its pages taken away each time.
const APART: Duration = Duration::from_secs(600);
/// As many bytes of files as are worth a look.
const PILE: u64 = 64 << 20;
/// A guest that computes more than this part of the time is not at rest.
const BUSY: f64 = 0.2;
/// Enough pages to go past a short list of a CPU: what is freed beyond it starts a report.
const NUDGE: usize = 1 << 20;

/// Told when something happens in the guest.
#[derive(Clone, Default)]
pub struct PageReporting(Arc<Shared>);

#[derive(Default)]
struct Shared {
    stirred: Notify,
    /// Files that nobody uses are let go.
    returns_files: AtomicBool,
}

impl PageReporting {
    /// Something was started, or ended.
    pub fn stirred(&self) {
        self.0.stirred.notify_one();
    }

    /// From now on files that nobody uses are let go.
    pub fn return_files(&self) {
        self.0.returns_files.store(true, Ordering::Relaxed);
    }

    /// The guest is awake for a moment anyway: files that have piled up since are looked at.
    pub fn looked_in(&self) {
        if self.0.returns_files.load(Ordering::Relaxed)
            && file_cache::excess().is_ok_and(|bytes| bytes > PILE)
        {
            self.stirred();
        }
    }

    /// Lets files go that nobody uses.
    async fn let_files_go(&self, cgroups: &Path) -> io::Result<()> {
        if !self.0.returns_files.load(Ordering::Relaxed) {
            return Ok(());
        }
        let root = cgroups.to_owned();
        let done = tokio::task::spawn_blocking(move || match file_cache::excess()? {
            0 => Ok(()),
            bytes => file_cache::reclaim(&root, bytes),
        });
        done.await.map_err(io::Error::other)?
    }

    /// Waits for stirring and rest, for ever; returns only where the kernel has no page reporting.
    /// `busy` tells the part of the CPUs' time that was
    /// not idle since it was asked last, and `cgroups` is their root.
    pub async fn run(
        self,
        parameters: Parameters,
        cgroups: PathBuf,
        mut busy: impl FnMut() -> f64,
        logger: slog::Logger,
    ) {
        let read = |path: &Path| fs::read_to_string(path).map(|value| value.trim().to_owned());
        let usual = match (read(&parameters.order), read(&parameters.lists)) {
            (Ok(order), Ok(lists)) => [order, lists],
            (Err(error), _) | (_, Err(error)) => {
                slog::debug!(logger, "free pages are not reported"; "error" => %error);
                return;
            }
        };
        loop {
            self.0.stirred.notified().await;
            self.rest(&mut busy).await;
            if let Err(error) = self.let_files_go(&cgroups).await {
                slog::warn!(logger, "files that nobody uses stay in memory"; "error" => %error);
            }
            let done = self.report_all(&parameters, &usual).await;
            if let Err(error) = done {
                slog::warn!(logger, "free pages cannot be reported"; "error" => %error);
                return;
            }
            sleep(APART).await;
        }
    }

    /// Until nothing has stirred for a while and the CPUs have had little to do.
    async fn rest(&self, busy: &mut impl FnMut() -> f64) {
        loop {
            busy();
            if timeout(REST, self.0.stirred.notified()).await.is_ok() {
                continue;
            }
            if busy() <= BUSY {
                return;
            }
            sleep(APART / 10).await;
        }
    }

    /// Lets the kernel report everything for a while, or until something stirs.
    async fn report_all(&self, parameters: &Parameters, usual: &[String; 2]) -> io::Result<()> {
        let Parameters { order, lists } = parameters;
        fs::write(lists, SHORT_LISTS)?;
        fs::write(order, "0")?;
        // It takes no part of the while, and nothing depends on its end.
        drop(tokio::task::spawn_blocking(nudge));
        let stirred = timeout(WINDOW, self.0.stirred.notified()).await.is_ok();
        fs::write(order, &usual[0])?;
        fs::write(lists, &usual[1])?;
        if stirred {
            self.0.stirred.notify_one();
        }
        Ok(())
    }
}

/// The kernel looks for what to report when a page is freed into its lists, and a CPU's own list is cut to its measure when a
/// page is freed into it: so many are, by each CPU.
fn nudge() {
    let here = Pid::from_raw(0);
    let Ok(all) = sched_getaffinity(here) else {
        return;
    };
    for cpu in (0..CpuSet::count()).filter(|cpu| all.is_set(*cpu) == Ok(true)) {
        let mut one = CpuSet::new();
        // A CPU that has gone meanwhile has no list.
        if one.set(cpu).is_ok() && sched_setaffinity(here, &one).is_ok() {
            drop(std::hint::black_box(vec![1_u8; NUDGE]));
        }
    }
    // The thread serves others after this; it has had this set before.
    let _ = sched_setaffinity(here, &all);
}

/// The part of the CPUs' time that was not idle since it was asked last, by `/proc/uptime`.
pub fn busy() -> impl FnMut() -> f64 {
    let mut last = None;
    move || {
        // They come and go.
        let cpus = std::thread::available_parallelism()
            .map_or(1.0, |n| f64::from(u32::try_from(n.get()).unwrap_or(1)));
        let now = Uptime::now();
        let before = std::mem::replace(&mut last, now);
        match (before, now) {
            (Some(before), Some(now)) => now.busy_since(&before, cpus),
            _ => 0.0,
        }
    }
}

/// The two figures of `/proc/uptime`, seconds.
#[derive(Clone, Copy)]
struct Uptime {
    up: f64,
    /// Of all CPUs together.
    idle: f64,
}

impl Uptime {
    fn now() -> Option<Self> {
        Self::parse(&fs::read_to_string("/proc/uptime").ok()?)
    }

    fn parse(text: &str) -> Option<Self> {
        let mut figures = text.split_whitespace().map(str::parse);
        let (up, idle) = (figures.next()?.ok()?, figures.next()?.ok()?);
        Some(Self { up, idle })
    }

    /// The part of `cpus` CPUs' time since then that was not idle: 0 to 1.
    fn busy_since(&self, before: &Self, cpus: f64) -> f64 {
        let passed = (self.up - before.up) * cpus;
        if passed <= 0.0 {
            return 0.0;
        }
        (1.0 - (self.idle - before.idle) / passed).clamp(0.0, 1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;
    use tokio::time::advance;

    fn order(dir: &Path) -> String {
        fs::read_to_string(dir.join("order")).unwrap()
    }

    fn lists(dir: &Path) -> String {
        fs::read_to_string(dir.join("lists")).unwrap()
    }

    /// A reporter over files, and the directory they are in.
    fn reporter() -> (PageReporting, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let parameters = Parameters {
            order: dir.path().join("order"),
            lists: dir.path().join("lists"),
        };
        fs::write(&parameters.order, "9\n").unwrap();
        fs::write(&parameters.lists, "0\n").unwrap();
        let reporting = PageReporting::default();
        let logger = slog::Logger::root(slog::Discard, slog::o!());
        tokio::spawn(
            reporting
                .clone()
                .run(parameters, dir.path().to_owned(), || 0.0, logger),
        );
        (reporting, dir)
    }

    /// Lets time pass in steps that every sleeper notices.
    async fn pass(time: Duration) {
        for _ in 0..time.as_millis() / 500 {
            advance(Duration::from_millis(500)).await;
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn small_pieces_are_reported_for_a_while_once_the_guest_rests() {
        let (reporting, dir) = reporter();
        pass(REST * 4).await;
        assert_eq!(order(dir.path()), "9\n", "nothing was started");
        reporting.stirred();
        pass(REST / 2).await;
        reporting.stirred();
        pass(REST / 2 + Duration::from_secs(1)).await;
        assert_eq!(order(dir.path()), "9\n", "not at rest yet");
        pass(REST).await;
        assert_eq!(order(dir.path()), "0");
        assert_eq!(lists(dir.path()), SHORT_LISTS);
        pass(WINDOW).await;
        assert_eq!(order(dir.path()), "9");
        assert_eq!(lists(dir.path()), "0");
    }

    #[tokio::test]
    async fn files_are_let_go_only_where_that_is_wanted() {
        let (reporting, dir) = reporter();
        let asked = dir.path().join("memory.reclaim");
        reporting.let_files_go(dir.path()).await.unwrap();
        assert!(!asked.exists());
        reporting.return_files();
        reporting.let_files_go(dir.path()).await.unwrap();
        // A machine that runs tests has files in memory.
        assert_eq!(asked.exists(), file_cache::excess().unwrap() > 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_start_ends_the_reporting_and_it_is_made_up_for_later() {
        let (reporting, dir) = reporter();
        reporting.stirred();
        pass(REST + WINDOW / 4).await;
        assert_eq!(order(dir.path()), "0");
        reporting.stirred();
        pass(Duration::from_secs(1)).await;
        assert_eq!(order(dir.path()), "9");
        pass(APART / 2).await;
        assert_eq!(order(dir.path()), "9", "too soon");
        pass(APART / 2 + REST).await;
        assert_eq!(order(dir.path()), "0");
    }

    #[test]
    fn busy_is_what_was_not_idle_on_any_cpu() {
        let before = Uptime::parse("100.50 150.00\n").unwrap();
        let now = Uptime::parse("110.50 155.00\n").unwrap();
        assert!((now.busy_since(&before, 2.0) - 0.75).abs() < 1e-9);
        assert!(before.busy_since(&before, 2.0).abs() < 1e-9);
        assert!(Uptime::parse("1.0").is_none());
        assert!(Uptime::parse("").is_none());
    }
}
