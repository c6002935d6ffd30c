//! Copies of output that are still under way when processes have ended.
use tokio::sync::watch;

/// Counts copies of output that are still under way.
pub struct Outputs {
    busy: watch::Sender<usize>,
}

impl Default for Outputs {
    fn default() -> Self {
        Self {
            busy: watch::Sender::new(0),
        }
    }
}

impl Outputs {
    /// Counts `done` as under way until it resolves.
    pub fn spawn(&self, done: impl Future<Output = ()> + Send + 'static) {
        self.busy.send_modify(|n| *n += 1);
        let busy = self.busy.clone();
        tokio::spawn(async move {
            done.await;
            busy.send_modify(|n| *n -= 1);
        });
    }

    /// Waits until none is.
    pub async fn idle(&self) {
        let mut receiver = self.busy.subscribe();
        let _ = receiver.wait_for(|n| *n == 0).await;
    }
}
