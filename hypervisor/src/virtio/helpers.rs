//! Threads that do what may take long, for a device whose own thread does all the rest.
//!
//! There are none until something is handed over, and one that has had nothing for [`REST`] ends. They are started by
//! the device's thread, whose filter they inherit. What is handed over belongs to a lane: a lane that hangs keeps at most
//! its own number of threads, and what waits for it holds up no other. Who hands over bounds how much waits.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::sync::lock;

/// How long a thread without work stays.
const REST: Duration = Duration::from_secs(10);

/// How many threads there are at most.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// In all.
    pub threads: usize,
    /// At work for one lane.
    pub of_lane: usize,
}

/// The threads of one device, and what waits for them. Dropping it waits for what they are doing.
pub struct Helpers<J> {
    shared: Arc<Shared<J>>,
    name: &'static str,
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// The node gives no thread.
    #[cfg(test)]
    refuse: std::sync::atomic::AtomicBool,
}

/// What helpers have to do for a lane.
#[derive(Debug, Clone, Copy)]
pub struct Lane {
    /// Jobs, also those that wait.
    pub jobs: usize,
    /// When the oldest that is being done was begun.
    pub since: Option<Instant>,
}

type Work<J> = Box<dyn Fn(J) + Send + Sync>;

struct Shared<J> {
    limits: Limits,
    begin: fn(),
    work: Work<J>,
    state: Mutex<State<J>>,
    /// Something waits, or it is the end.
    called: Condvar,
    /// Nothing is being done.
    settled: Condvar,
}

struct State<J> {
    waiting: VecDeque<(u32, J)>,
    /// Lanes of what is being done, and since when.
    running: Vec<(u32, Instant)>,
    threads: usize,
    ending: bool,
}

impl<J: Send + 'static> Helpers<J> {
    /// No thread yet. Each will be called `name`, does `begin` first, and `work` with what it is given.
    pub fn new(
        name: &'static str,
        limits: Limits,
        begin: fn(),
        work: impl Fn(J) + Send + Sync + 'static,
    ) -> Self {
        Self {
            shared: Arc::new(Shared {
                limits,
                begin,
                work: Box::new(work),
                state: Mutex::new(State {
                    waiting: VecDeque::new(),
                    running: Vec::new(),
                    threads: 0,
                    ending: false,
                }),
                called: Condvar::new(),
                settled: Condvar::new(),
            }),
            name,
            threads: Mutex::default(),
            #[cfg(test)]
            refuse: std::sync::atomic::AtomicBool::new(false),
        }
    }

    /// From now on the node gives no thread.
    #[cfg(test)]
    pub fn refuse_threads(&self) {
        self.refuse
            .store(true, std::sync::atomic::Ordering::Relaxed);
    }

    /// Hands a job over.
    ///
    /// # Errors
    /// This very job, if there is no thread and the host gives none.
    pub fn submit(&self, lane: u32, job: J) -> Result<(), J> {
        // Kept over the start of a thread: nobody else's job comes or goes meanwhile, and the one that cannot be handed over
        // is the caller's own.
        let mut state = lock(&self.shared.state);
        let free = state.threads - state.running.len();
        if state.startable_with(lane, self.shared.limits) > free
            && state.threads < self.shared.limits.threads
        {
            if self.start() {
                state.threads += 1;
            } else if state.threads == 0 {
                return Err(job);
            }
        }
        state.waiting.push_back((lane, job));
        drop(state);
        self.shared.called.notify_one();
        Ok(())
    }

    /// The thread does nothing before the state is let go of.
    fn start(&self) -> bool {
        #[cfg(test)]
        if self.refuse.load(std::sync::atomic::Ordering::Relaxed) {
            // As long as a node takes that has no thread to give: others hand jobs over meanwhile.
            std::thread::sleep(Duration::from_millis(1));
            return false;
        }
        let shared = Arc::clone(&self.shared);
        let started = std::thread::Builder::new()
            .name(self.name.to_owned())
            .spawn(move || shared.live());
        let mut threads = lock(&self.threads);
        threads.retain(|thread| !thread.is_finished());
        started.map(|thread| threads.push(thread)).is_ok()
    }

    /// How much waits.
    pub fn waiting(&self) -> usize {
        lock(&self.shared.state).waiting.len()
    }

    /// Whether nothing is being done and nothing waits.
    pub fn is_idle(&self) -> bool {
        let state = lock(&self.shared.state);
        state.running.is_empty() && state.waiting.is_empty()
    }

    /// What there is for a lane.
    pub fn lane(&self, lane: u32) -> Lane {
        let state = lock(&self.shared.state);
        let running = state.running.iter().filter(|(one, _)| *one == lane);
        let waiting = state.waiting.iter().filter(|(one, _)| *one == lane);
        Lane {
            jobs: running.clone().count() + waiting.count(),
            since: running.map(|(_, since)| *since).min(),
        }
    }

    /// Takes back what waits, and returns it when nothing is being done any more.
    pub fn settle(&self) -> Vec<J> {
        let mut state = lock(&self.shared.state);
        let waited = state.waiting.drain(..).map(|(_, job)| job).collect();
        while !state.running.is_empty() {
            state = self
                .shared
                .settled
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        waited
    }
}

impl<J> Drop for Helpers<J> {
    fn drop(&mut self) {
        let mut state = lock(&self.shared.state);
        state.ending = true;
        state.waiting.clear();
        drop(state);
        self.shared.called.notify_all();
        for thread in lock(&self.threads).drain(..) {
            let _ = thread.join();
        }
    }
}

impl<J> State<J> {
    fn running_in(&self, lane: u32) -> usize {
        self.running.iter().filter(|(one, _)| *one == lane).count()
    }

    /// How many of those that wait, and one more of this lane, could be done now, had they threads.
    fn startable_with(&self, lane: u32, limits: Limits) -> usize {
        let mut taken: Vec<(u32, usize)> = vec![(lane, 1)];
        for (lane, _) in &self.waiting {
            match taken.iter_mut().find(|(one, _)| one == lane) {
                Some((_, count)) => *count += 1,
                None => taken.push((*lane, 1)),
            }
        }
        let room = |lane| limits.of_lane.saturating_sub(self.running_in(lane));
        taken
            .into_iter()
            .map(|(lane, count)| count.min(room(lane)))
            .sum()
    }

    /// The first one whose lane has a thread to spare.
    fn take(&mut self, limits: Limits) -> Option<(u32, J)> {
        let first = self
            .waiting
            .iter()
            .position(|(lane, _)| self.running_in(*lane) < limits.of_lane)?;
        self.waiting.remove(first)
    }
}

impl<J> Shared<J> {
    /// A thread's life.
    fn live(&self) {
        (self.begin)();
        let mut state = lock(&self.state);
        while !state.ending {
            if let Some((lane, job)) = state.take(self.limits) {
                let since = Instant::now();
                state.running.push((lane, since));
                drop(state);
                (self.work)(job);
                state = lock(&self.state);
                let own = state.running.iter().position(|one| *one == (lane, since));
                own.map(|own| state.running.swap_remove(own));
                if state.running.is_empty() {
                    self.settled.notify_all();
                }
                // A lane that has a thread to spare again has this one.
                continue;
            }
            let (next, waited) = self
                .called
                .wait_timeout(state, REST)
                .unwrap_or_else(PoisonError::into_inner);
            state = next;
            if waited.timed_out() && state.waiting.is_empty() {
                break;
            }
        }
        state.threads -= 1;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    /// Each job waits for its own word before it is done.
    struct Job {
        number: u32,
        go: Receiver<()>,
    }

    fn helpers(threads: usize, of_lane: usize) -> (Helpers<Job>, Receiver<(bool, u32)>) {
        let (told, heard) = channel();
        let told: Mutex<Sender<_>> = Mutex::new(told);
        let limits = Limits { threads, of_lane };
        let tell = move |what| lock(&told).send(what).unwrap();
        let work = move |job: Job| {
            tell((true, job.number));
            let _ = job.go.recv();
            tell((false, job.number));
        };
        (Helpers::new("test", limits, || (), work), heard)
    }

    fn submit(helpers: &Helpers<Job>, lane: u32, number: u32) -> Sender<()> {
        let (send, go) = channel();
        assert!(helpers.submit(lane, Job { number, go }).is_ok());
        send
    }

    fn begun(heard: &Receiver<(bool, u32)>) -> u32 {
        match heard.recv_timeout(PATIENCE).unwrap() {
            (true, number) => number,
            (false, number) => panic!("{number} is done"),
        }
    }

    #[test]
    fn a_lane_that_hangs_keeps_its_own_threads_and_no_more() {
        let (helpers, heard) = helpers(3, 2);
        let hung: Vec<_> = (0..50).map(|number| submit(&helpers, 7, number)).collect();
        let mut first = [begun(&heard), begun(&heard)];
        first.sort_unstable();
        assert_eq!(first, [0, 1]);
        assert_eq!(helpers.waiting(), 48);
        assert_eq!(helpers.lane(7).jobs, 50);
        assert!(helpers.lane(7).since.is_some() && helpers.lane(8).since.is_none());
        // Another lane is served at once, one after the other by the thread that is left.
        for number in 100..110 {
            let go = submit(&helpers, 8, number);
            assert_eq!(begun(&heard), number);
            go.send(()).unwrap();
            assert_eq!(heard.recv_timeout(PATIENCE).unwrap(), (false, number));
        }
        // In their order, once there is a thread again.
        drop(hung);
        let mut order = Vec::new();
        while order.len() < 48 {
            if let (true, number) = heard.recv_timeout(PATIENCE).unwrap() {
                order.push(number);
            }
        }
        order.sort_unstable();
        assert_eq!(order, (2..50).collect::<Vec<_>>());
    }

    #[test]
    fn there_is_no_thread_before_there_is_work_nor_more_than_work() {
        let (helpers, heard) = helpers(4, 4);
        assert_eq!(lock(&helpers.shared.state).threads, 0);
        for number in 0..20 {
            let go = submit(&helpers, 0, number);
            assert_eq!(begun(&heard), number);
            go.send(()).unwrap();
            assert_eq!(heard.recv_timeout(PATIENCE).unwrap(), (false, number));
            assert!(helpers.settle().is_empty());
        }
        assert_eq!(lock(&helpers.shared.state).threads, 1);
    }

    #[test]
    fn who_gets_no_thread_has_its_own_job_back_and_no_job_is_left_waiting() {
        let (helpers, _heard) = helpers(1, 1);
        helpers.refuse_threads();
        std::thread::scope(|scope| {
            for own in 0..4u32 {
                let helpers = &helpers;
                scope.spawn(move || {
                    for _ in 0..20 {
                        let (_send, go) = channel();
                        let back = helpers.submit(own, Job { number: own, go });
                        assert_eq!(back.err().map(|job| job.number), Some(own));
                    }
                });
            }
        });
        assert!(helpers.is_idle());
    }

    #[test]
    fn settling_waits_for_what_is_done_and_takes_back_what_is_not() {
        let (helpers, heard) = helpers(1, 1);
        let go = submit(&helpers, 0, 1);
        let _never = submit(&helpers, 0, 2);
        assert_eq!(begun(&heard), 1);
        let opened = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            go.send(()).unwrap();
        });
        let back = helpers.settle();
        assert_eq!(heard.try_recv(), Ok((false, 1)));
        assert_eq!(back.iter().map(|job| job.number).collect::<Vec<_>>(), [2]);
        opened.join().unwrap();
    }
}
