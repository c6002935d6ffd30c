//! How long containerd is kept waiting for a guest's word.
//!
//! containerd asks the tasks of a node one after another for their figures, and sets no time-out: what one guest
//! takes, all others wait for. So the calls of one kind share an allowance of waiting, which fills up slowly, and
//! one that was not answered in it takes the rest away until an answer comes. The call itself goes on meanwhile,
//! one at a time for each thing that is asked, and what it brings late is there for the next who asks.

use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, timeout};

use crate::error::{Error, Kind, Result};

/// The part of the time that a guest may keep containerd waiting.
const SHARE: u32 = 10;
/// How old figures may be to be given in place of new ones.
const STALE: Duration = Duration::from_secs(60);

/// The allowance of one kind of calls of one VM; cheap to clone.
#[derive(Debug, Clone)]
pub struct Patience {
    limit: Duration,
    state: Arc<Mutex<State>>,
}

#[derive(Debug)]
struct State {
    /// What is left, as of `at`.
    left: Duration,
    at: Instant,
    /// Callers that wait. While there is one, time is taken away, once for all of them.
    waiting: usize,
    /// A call was not answered in time, and none has been since.
    silent: bool,
}

impl State {
    /// Brings the allowance up to this moment.
    fn settle(&mut self, now: Instant, limit: Duration) {
        let passed = now.saturating_duration_since(self.at);
        self.at = now;
        self.left = if self.waiting > 0 {
            self.left.saturating_sub(passed)
        } else {
            self.left.saturating_add(passed / SHARE).min(limit)
        };
    }
}

/// One caller's wait; it ends with this.
struct Waiting<'a>(&'a Patience);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.settle(Instant::now(), self.0.limit);
        state.waiting = state.waiting.saturating_sub(1);
    }
}

impl Patience {
    /// An allowance of this much waiting.
    #[must_use]
    pub fn new(limit: Duration) -> Self {
        let state = State {
            left: limit,
            at: Instant::now(),
            waiting: 0,
            silent: false,
        };
        Self {
            limit,
            state: Arc::new(Mutex::new(state)),
        }
    }

    /// Waits as long as there is patience; `None` when that was not enough.
    pub async fn wait<T>(&self, answer: impl Future<Output = T>) -> Option<T> {
        let (left, _waiting) = self.begin();
        let answered = timeout(left, answer).await.ok();
        if answered.is_none() {
            self.lock().silent = true;
        }
        answered
    }

    /// The guest has answered a call of this kind, in time or not.
    pub fn answered(&self) {
        self.lock().silent = false;
    }

    fn begin(&self) -> (Duration, Waiting<'_>) {
        let mut state = self.lock();
        state.settle(Instant::now(), self.limit);
        state.waiting += 1;
        let left = if state.silent {
            Duration::ZERO
        } else {
            state.left
        };
        (left, Waiting(self))
    }

    /// Consistent whenever the lock is free.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Something that a guest is asked again and again: one call at a time, and the last answer is kept.
#[derive(Debug)]
pub struct Asked<T> {
    what: &'static str,
    state: Arc<Mutex<Last<T>>>,
}

/// The call under way.
type UnderWay<T> = watch::Receiver<Option<Result<T>>>;

#[derive(Debug)]
struct Last<T> {
    answer: Option<(Instant, T)>,
    under_way: Option<UnderWay<T>>,
}

impl<T: Clone + Send + Sync + 'static> Asked<T> {
    /// Nothing has been asked yet.
    #[must_use]
    pub fn new(what: &'static str) -> Self {
        let last = Last {
            answer: None,
            under_way: None,
        };
        Self {
            what,
            state: Arc::new(Mutex::new(last)),
        }
    }

    /// Asks by `call`, unless an earlier call is still under way, whose answer serves as well. Returns a future
    /// that waits for the answer within `patience`; where that is not enough it has the last answer.
    ///
    /// # Errors
    /// Those of the call; `DeadlineExceeded` without a last answer of the last minute.
    pub fn ask<F>(
        &self,
        patience: Patience,
        call: F,
    ) -> impl Future<Output = Result<T>> + Send + use<T, F>
    where
        F: Future<Output = Result<T>> + Send + 'static,
    {
        let mut answer = self.start(patience.clone(), call);
        let (state, what) = (Arc::clone(&self.state), self.what);
        async move {
            let came = patience.wait(answer.wait_for(Option::is_some)).await;
            let answered = match came {
                Some(Ok(answer)) => answer.clone(),
                _ => None,
            };
            if let Some(answered) = answered {
                return answered;
            }
            let last = lock(&state).answer.clone();
            match last {
                Some((at, last)) if at.elapsed() < STALE => Ok(last),
                _ => Err(Error::new(
                    Kind::DeadlineExceeded,
                    format!("the guest's agent does not answer {what} in time"),
                )),
            }
        }
    }

    fn start(
        &self,
        patience: Patience,
        call: impl Future<Output = Result<T>> + Send + 'static,
    ) -> UnderWay<T> {
        let mut state = lock(&self.state);
        if let Some(under_way) = &state.under_way {
            return under_way.clone();
        }
        let (told, answer) = watch::channel(None);
        state.under_way = Some(answer.clone());
        drop(state);
        let state = Arc::clone(&self.state);
        tokio::spawn(async move {
            let result = call.await;
            let mut last = lock(&state);
            last.under_way = None;
            if let Ok(answer) = &result {
                last.answer = Some((Instant::now(), answer.clone()));
            }
            drop(last);
            // Our own time-out is no word of the guest.
            if !matches!(&result, Err(error) if error.kind == Kind::DeadlineExceeded) {
                patience.answered();
            }
            told.send_replace(Some(result));
        });
        answer
    }
}

fn lock<T>(state: &Mutex<Last<T>>) -> MutexGuard<'_, Last<T>> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use tokio::time::{advance, sleep};

    const LIMIT: Duration = Duration::from_secs(1);

    async fn waited<T>(patience: &Patience, answer: impl Future<Output = T>) -> (bool, Duration) {
        let before = Instant::now();
        let answered = patience.wait(answer).await.is_some();
        (answered, before.elapsed())
    }

    fn silence() -> std::future::Pending<()> {
        std::future::pending()
    }

    #[tokio::test(start_paused = true)]
    async fn a_guest_that_says_nothing_is_waited_for_once() {
        let patience = Patience::new(LIMIT);
        let (answered, took) = waited(&patience, silence()).await;
        assert!(!answered && took >= LIMIT && took < LIMIT + Duration::from_millis(10));
        advance(Duration::from_secs(3600)).await;
        let (answered, took) = waited(&patience, silence()).await;
        assert!(!answered && took < Duration::from_millis(10), "{took:?}");
        patience.answered();
        let (answered, _) = waited(&patience, sleep(LIMIT / 2)).await;
        assert!(answered, "an answer restores what has filled up meanwhile");
    }

    #[tokio::test(start_paused = true)]
    async fn a_guest_that_is_always_just_in_time_takes_a_tenth_of_the_time() {
        let patience = Patience::new(LIMIT);
        let began = Instant::now();
        let mut kept = Duration::ZERO;
        while began.elapsed() < Duration::from_secs(100) {
            let (_, took) = waited(&patience, sleep(LIMIT * 9 / 10)).await;
            kept += took;
            patience.answered();
            sleep(Duration::from_millis(10)).await;
        }
        assert!(kept <= Duration::from_secs(12), "{kept:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn callers_that_wait_together_use_up_the_time_once() {
        let patience = Patience::new(LIMIT);
        let all = (0..50).map(|_| waited(&patience, sleep(LIMIT / 2)));
        let answered = futures::future::join_all(all).await;
        assert!(answered.iter().all(|(answered, _)| *answered));
        let (answered, _) = waited(&patience, sleep(LIMIT / 3)).await;
        assert!(answered);
    }

    #[tokio::test(start_paused = true)]
    async fn one_call_is_under_way_and_its_late_answer_serves_the_next() {
        let asked = Asked::new("Stats");
        let patience = Patience::new(LIMIT);
        let calls = Arc::new(AtomicUsize::new(0));
        let call = || {
            let calls = Arc::clone(&calls);
            async move {
                let nth = calls.fetch_add(1, Ordering::Relaxed);
                sleep(LIMIT * 3).await;
                Ok(nth)
            }
        };
        let error = asked.ask(patience.clone(), call()).await.unwrap_err();
        assert_eq!(error.kind, Kind::DeadlineExceeded);
        assert!(error.message.contains("Stats"), "{}", error.message);
        for _ in 0..5 {
            assert!(asked.ask(patience.clone(), call()).await.is_err());
        }
        assert_eq!(calls.load(Ordering::Relaxed), 1);
        sleep(LIMIT * 3).await;
        // The next one asks anew, and has no patience for more than what has come.
        assert_eq!(asked.ask(patience.clone(), call()).await, Ok(0));
        assert_eq!(calls.load(Ordering::Relaxed), 2);
        sleep(STALE * 2).await;
        assert_eq!(lock(&asked.state).answer.as_ref().unwrap().1, 1);
        lock(&asked.state).under_way = Some(watch::channel(None).1);
        assert!(asked.ask(patience, call()).await.is_err(), "too old");
    }
}
