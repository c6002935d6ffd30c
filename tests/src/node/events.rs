//! containerd's event stream, followed from the start of the suite: tests wait for an event instead
//! of sleeping, and judge the order of events afterwards.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// One event as `ctr events` prints it.
#[derive(Debug, Clone)]
pub struct Event {
    /// "/tasks/exit".
    pub topic: String,
    /// Its payload.
    pub body: Value,
}

impl Event {
    fn parse(line: &str) -> Option<Self> {
        // TIME NAMESPACE TOPIC JSON; the time has blanks, the topic is the first word with a slash.
        let start = line.find(" /")? + 1;
        let (topic, body) = line[start..].split_once(' ')?;
        Some(Self {
            topic: topic.to_owned(),
            body: serde_json::from_str(body).ok()?,
        })
    }

    /// The container it is about.
    #[must_use]
    pub fn container(&self) -> &str {
        self.text(&["container_id", "containerID", "id"])
    }

    /// The exec it is about; for an exit event of init it is the container's id.
    #[must_use]
    pub fn exec(&self) -> &str {
        self.text(&["exec_id", "id"])
    }

    /// `exit_status`; absent means 0.
    #[must_use]
    pub fn exit_status(&self) -> u64 {
        self.body["exit_status"].as_u64().unwrap_or(0)
    }

    fn text(&self, names: &[&str]) -> &str {
        names
            .iter()
            .find_map(|name| self.body[*name].as_str())
            .unwrap_or_default()
    }
}

#[derive(Default)]
struct Shared {
    events: Mutex<Vec<Event>>,
    arrived: Condvar,
}

/// Follows the event stream until dropped.
pub struct Events {
    shared: Arc<Shared>,
    child: Child,
}

impl Events {
    /// Starts to follow; returns once the stream is known to be live.
    ///
    /// # Errors
    /// If `ctr events` cannot run or stays silent.
    pub fn follow(namespace: &str, within: Duration) -> Result<Self> {
        let mut child = Command::new("ctr")
            .args(["events"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .context("cannot start ctr events")?;
        let stdout = child.stdout.take().context("ctr events has no output")?;
        let shared = Arc::new(Shared::default());
        let sink = Arc::clone(&shared);
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if let Some(event) = Event::parse(&line) {
                    sink.events
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .push(event);
                    sink.arrived.notify_all();
                }
            }
        });
        let events = Self { shared, child };
        // The subscription says nothing when it is up: make events until one comes through.
        let end = Instant::now() + within;
        for round in 0.. {
            let label = format!("brig-e2e.round={round}");
            let _ = Command::new("ctr")
                .args(["namespaces", "label", namespace, &label])
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status();
            if events
                .wait(0, Duration::from_millis(500), |event| {
                    event.topic.starts_with("/namespaces/")
                })
                .is_ok()
            {
                break;
            }
            if Instant::now() > end {
                bail!("ctr events shows no events");
            }
        }
        Ok(events)
    }

    /// A position in the stream: now.
    #[must_use]
    pub fn mark(&self) -> usize {
        self.lock().len()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Event>> {
        self.shared
            .events
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for an event after `mark` that satisfies `wanted`.
    ///
    /// # Errors
    /// At the deadline, with the topics that came instead.
    pub fn wait(
        &self,
        mark: usize,
        within: Duration,
        wanted: impl Fn(&Event) -> bool,
    ) -> Result<Event> {
        let end = Instant::now() + within;
        let mut events = self.lock();
        loop {
            if let Some(event) = events.iter().skip(mark).find(|event| wanted(event)) {
                return Ok(event.clone());
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let topics: Vec<String> = events
                    .iter()
                    .skip(mark)
                    .map(|event| format!("{} {}", event.topic, event.container()))
                    .collect();
                bail!("the event did not come in time; what came: {topics:?}");
            }
            events = self
                .shared
                .arrived
                .wait_timeout(events, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Waits for the event of a topic about a container.
    ///
    /// # Errors
    /// At the deadline.
    pub fn wait_topic(
        &self,
        mark: usize,
        within: Duration,
        container: &str,
        topic: &str,
    ) -> Result<Event> {
        self.wait(mark, within, |event| {
            event.topic == topic && event.container() == container
        })
        .with_context(|| format!("waiting for {topic} of {container}"))
    }

    /// Events about a container since `mark`, in order.
    #[must_use]
    pub fn of(&self, mark: usize, container: &str) -> Vec<Event> {
        self.lock()
            .iter()
            .skip(mark)
            .filter(|event| event.container() == container)
            .cloned()
            .collect()
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        if let Ok(pid) = i32::try_from(self.child.id()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_ctr_events_is_understood() {
        let event = Event::parse(
            "2026-11-20 18:00:00.1 +0000 UTC default /tasks/exit {\"container_id\":\"a\",\"id\":\"a\",\"pid\":7,\"exit_status\":137}",
        )
        .unwrap();
        assert_eq!(event.topic, "/tasks/exit");
        assert_eq!(event.container(), "a");
        assert_eq!(event.exit_status(), 137);
    }

    #[test]
    fn an_exit_without_status_is_zero() {
        let event = Event::parse("now ns /tasks/exit {\"container_id\":\"a\"}").unwrap();
        assert_eq!(event.exit_status(), 0);
    }
}
