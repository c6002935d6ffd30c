//! Who asks for the end of a pod and of its shim, and hears of it.

use std::fs;
use std::time::Duration;

use slog::warn;
use tokio::sync::oneshot;

use super::handle::End;
use super::{Pod, Stage};
use crate::error::ignore_missing;

impl Pod {
    /// Ends what is asked for, and answers when it has ended: false if it is not to end.
    pub(super) async fn end(&mut self, end: End, reply: oneshot::Sender<bool>) {
        let busy = self.sandbox.is_some() || !self.containers.is_empty();
        if busy && end == End::IfEmpty {
            let _ = reply.send(false);
            return;
        }
        // What has been asked for is kept here, not by who asked: nobody may be waiting when it comes to pass.
        self.with_shim |= end != End::Pod;
        self.waiting.push(reply);
        if matches!(self.stage, Stage::Stopped) {
            self.tell_end();
        } else {
            let gently = end == End::Gently;
            let grace = if gently { self.grace } else { Duration::ZERO };
            self.stop(grace).await;
        }
    }

    /// The pod has ended, which those hear that wait for it, and so does the shim if it is to end too.
    pub(super) fn tell_end(&mut self) {
        if self.with_shim && !*self.over.borrow() {
            // Before anybody hears of it: from then on another shim may have the names.
            self.give_up_names();
            self.over.send_replace(true);
        }
        for waiting in self.waiting.drain(..) {
            let _ = waiting.send(true);
        }
    }

    /// Removes what other shims find this one by. The directory was removed with the pod, but a task of the pod's
    /// may have put something into it meanwhile.
    fn give_up_names(&self) {
        self.setup.state.remove();
        if let Some(socket) = &self.setup.journal.socket
            && let Err(error) = ignore_missing(fs::remove_file(socket))
        {
            warn!(self.setup.logger, "the shim's socket is left"; "error" => %error);
        }
    }
}
