//! The wish to end a VM at once, and why: for what its guest does or leaves undone, or without a word.

use std::sync::OnceLock;

use tokio::sync::Notify;

/// One VM's; whoever watches its process carries it out.
#[derive(Debug, Default)]
pub struct Kill {
    wish: Notify,
    reason: OnceLock<String>,
}

impl Kill {
    /// Wishes it. The first reason becomes that of the VM's end.
    pub fn wish(&self, reason: Option<String>) {
        if let Some(reason) = reason {
            let _ = self.reason.set(reason);
        }
        self.wish.notify_one();
    }

    /// Waits for the wish.
    pub async fn wished(&self) {
        self.wish.notified().await;
    }

    /// The reason, if there is one.
    #[must_use]
    pub fn reason(&self) -> Option<&str> {
        self.reason.get().map(String::as_str)
    }
}
