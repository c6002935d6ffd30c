//! One line of what `brig check` says.

use std::borrow::Cow;
use std::fmt;

use serde_json::{Value, json};

/// How a check came out.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    /// As it should be.
    Good,
    /// Pods run without it, or not as well.
    Note,
    /// No VM can start.
    Fatal,
}

/// One line of the report.
#[derive(Debug)]
pub struct Finding {
    outcome: Outcome,
    pub(super) what: &'static str,
    detail: String,
    /// What to do about it.
    fix: Option<Cow<'static, str>>,
    /// What it is about, part by part for programs, and what that is called.
    parts: Option<(&'static str, Value)>,
}

impl Finding {
    /// Whether no VM can start with it.
    #[must_use]
    pub fn is_fatal(&self) -> bool {
        self.outcome == Outcome::Fatal
    }

    /// For programs.
    #[must_use]
    pub fn json(&self) -> Value {
        let outcome = match self.outcome {
            Outcome::Good => "ok",
            Outcome::Note => "note",
            Outcome::Fatal => "fatal",
        };
        let mut told = json!({ "check": self.what, "outcome": outcome, "detail": self.detail, "fix": self.fix });
        if let (Some((name, parts)), Some(told)) = (&self.parts, told.as_object_mut()) {
            told.insert((*name).to_owned(), parts.clone());
        }
        told
    }

    /// Something without which no VM can start.
    #[must_use]
    pub fn of(what: &'static str, result: Result<String, String>) -> Self {
        let (outcome, detail) = match result {
            Ok(detail) => (Outcome::Good, detail),
            Err(detail) => (Outcome::Fatal, detail),
        };
        Self {
            outcome,
            what,
            detail,
            fix: None,
            parts: None,
        }
    }

    /// What to do about it, if it is not as it should be.
    #[must_use]
    pub(super) fn or(mut self, fix: impl Into<Cow<'static, str>>) -> Self {
        if self.outcome != Outcome::Good {
            self.fix = Some(fix.into());
        }
        self
    }

    /// What it is about, for programs.
    #[must_use]
    pub(super) fn about(mut self, name: &'static str, parts: Value) -> Self {
        self.parts = Some((name, parts));
        self
    }

    /// Pods run without it, but not as well.
    #[must_use]
    pub(super) fn noted(mut self) -> Self {
        if self.outcome == Outcome::Fatal {
            self.outcome = Outcome::Note;
        }
        self
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sign = match self.outcome {
            Outcome::Good => "ok  ",
            Outcome::Note => "note",
            Outcome::Fatal => "FAIL",
        };
        write!(f, "{sign}  {:<16} {}", self.what, self.detail)?;
        match &self.fix {
            Some(fix) => write!(f, "\n      {:<16} fix: {fix}", ""),
            None => Ok(()),
        }
    }
}

/// The lines of findings of which none is fatal.
#[cfg(test)]
pub(super) fn said(findings: &[Finding]) -> String {
    assert!(findings.iter().all(|finding| !finding.is_fatal()));
    findings
        .iter()
        .map(|finding| format!("{finding}\n"))
        .collect()
}
