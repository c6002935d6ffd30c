//! How a command answers: for people or for programs.

use clap::Args;
use serde_json::Value;

/// How to answer.
#[derive(Debug, Args)]
pub struct Output {
    /// As JSON
    #[arg(long)]
    pub json: bool,
}

impl Output {
    /// What was done, for people or for programs.
    #[must_use]
    pub fn tell(&self, done: &Value, text: String) -> String {
        if self.json { format!("{done}\n") } else { text }
    }
}
