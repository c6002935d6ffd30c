//! What the helper tells the agent that started it, and the agent's one word.
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use super::failure::{Context as _, Result};
use crate::control::{self, Message};

/// The helper's end of the conversation with the agent.
pub struct Agent {
    socket: OwnedFd,
}

impl Agent {
    /// Speaks on `socket`.
    pub fn new(socket: OwnedFd) -> Self {
        Self { socket }
    }

    /// Tells the agent something; a dead agent is noticed at the wait for its word.
    pub fn tell(&self, message: &Message) {
        let _ = control::send(self.socket.as_fd(), message, None);
    }

    /// Names the process that will run the program; a dead agent is noticed likewise.
    pub fn name_process(&self, pid: i32, pidfd: BorrowedFd<'_>) {
        let _ = control::send(self.socket.as_fd(), &Message::Pid(pid), Some(pidfd));
    }

    /// Says that something was left out.
    pub fn warn(&self, text: String) {
        self.tell(&Message::Warning(text));
    }

    /// Hands over the master of a pty.
    pub fn give_terminal(&self, master: BorrowedFd<'_>) -> Result<()> {
        control::send(self.socket.as_fd(), &Message::Terminal, Some(master))
            .during("passing the terminal")
    }

    /// Hands over the directory in which the container has its device nodes.
    pub fn give_devices(&self, directory: BorrowedFd<'_>) -> Result<()> {
        control::send(self.socket.as_fd(), &Message::Devices, Some(directory))
            .during("passing /dev")
    }

    /// Reports readiness and waits for the word to go on; `false` when the agent hung up.
    pub fn wait_for_go(&self) -> bool {
        self.tell(&Message::Ready);
        let mut word = [0; 8];
        loop {
            match rustix::io::read(&self.socket, &mut word) {
                Ok(n) => return word.get(..n) == Some(control::GO),
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return false,
            }
        }
    }
}
