//! Runs cases one after another, says how each went, and counts.

use std::io::Write;
use std::panic::AssertUnwindSafe;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, anyhow};
use serde_json::{Value, json};

use crate::case::{Case, NotHere};

/// How a case went.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// As stated.
    Passed,
    /// Not as stated: what was expected and what was found.
    Failed(String),
    /// It cannot be asked here: why.
    NotHere(String),
}

/// A case that has run.
pub struct Outcome<'a, S> {
    /// The case.
    pub case: &'a Case<S>,
    /// How it went.
    pub verdict: Verdict,
    /// How long it took.
    pub millis: u64,
}

impl<S> Outcome<'_, S> {
    /// What is written down of it; `passed` is null where it could not be asked.
    #[must_use]
    pub fn record(&self) -> Value {
        let (passed, message) = match &self.verdict {
            Verdict::Passed => (Some(true), None),
            Verdict::Failed(message) => (Some(false), Some(message)),
            Verdict::NotHere(reason) => (None, Some(reason)),
        };
        json!({
            "group": self.case.group,
            "name": self.case.name,
            "passed": passed,
            "millis": self.millis,
            "message": message,
        })
    }
}

/// How many cases passed, and which failed.
#[derive(Debug, Default)]
pub struct Totals {
    passed: usize,
    failed: Vec<String>,
}

impl Totals {
    /// Counts what a check outside the cases found, which its line has told already.
    pub fn count(&mut self, passed: bool, name: &str) {
        if passed {
            self.passed += 1;
        } else {
            self.failed.push(name.to_owned());
        }
    }

    /// Names the failed ones and closes with `N passed, N failed`; returns the second number.
    #[must_use]
    pub fn print(&self) -> usize {
        for name in &self.failed {
            println!("failed: {name}");
        }
        println!("{} passed, {} failed", self.passed, self.failed.len());
        self.failed.len()
    }
}

/// Runs cases; each is told in a line, its name after `prefix`. `after` hears of every one, with what they share.
///
/// # Errors
/// Those of `after`.
pub fn run<'a, S>(
    cases: impl IntoIterator<Item = &'a Case<S>>,
    prefix: &str,
    shared: &mut S,
    totals: &mut Totals,
    mut after: impl FnMut(&mut S, &Outcome<'a, S>) -> Result<()>,
) -> Result<()>
where
    S: 'a,
{
    for case in cases {
        let begin = Instant::now();
        let name = format!("{prefix}{}", case.full_name());
        let verdict = std::panic::catch_unwind(AssertUnwindSafe(|| (case.run)(shared)))
            .unwrap_or_else(|_| Err(anyhow!("the case panicked")));
        let millis = u64::try_from(begin.elapsed().as_millis()).unwrap_or(u64::MAX);
        let verdict = match verdict {
            Ok(()) => {
                println!("PASS  {name}  ({millis} ms)");
                totals.count(true, &name);
                Verdict::Passed
            }
            Err(error) if error.is::<NotHere>() => {
                println!("n/a   {name}  ({millis} ms)\n      {error:#}");
                Verdict::NotHere(format!("{error:#}"))
            }
            Err(error) => {
                println!("FAIL  {name}  ({millis} ms)\n      {error:#}");
                totals.count(false, &name);
                Verdict::Failed(format!("{error:#}"))
            }
        };
        // A reader of the log follows.
        let _ = std::io::stdout().flush();
        let outcome = Outcome {
            case,
            verdict,
            millis,
        };
        after(shared, &outcome)?;
    }
    Ok(())
}

/// Lists cases instead of running them.
pub fn list<'a, S: 'a>(cases: impl IntoIterator<Item = &'a Case<S>>) {
    for case in cases {
        println!("{}", case.full_name());
    }
}

/// How a suite exits: 1 if cases failed, 2 if it could not run.
pub fn exit(program: &str, failed: Result<usize>) -> ExitCode {
    match failed {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{program}: {error:#}");
            ExitCode::from(2)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::case::{case, not_here};

    #[test]
    fn every_way_a_case_can_end_is_told_apart_and_the_next_one_runs() {
        let cases = [
            case("a", "passes", |ran: &mut Vec<u8>| {
                ran.push(1);
                Ok(())
            }),
            case("a", "fails", |_: &mut Vec<u8>| {
                Err(anyhow!("expected 1, got 2"))
            }),
            case("a", "panics", |ran: &mut Vec<u8>| {
                ran.push(3);
                std::panic::resume_unwind(Box::new(()))
            }),
            case("a", "cannot be asked", |_: &mut Vec<u8>| {
                not_here("not on cgroup v1")
            }),
        ];
        let (mut ran, mut totals) = (Vec::new(), Totals::default());
        let mut records = Vec::new();
        run(
            &cases,
            "runc on 1.7: ",
            &mut ran,
            &mut totals,
            |ran, outcome| {
                ran.push(0);
                records.push(outcome.record());
                Ok(())
            },
        )
        .unwrap();
        assert_eq!(ran, [1, 0, 0, 3, 0, 0]);
        assert_eq!(totals.passed, 1);
        assert_eq!(
            totals.failed,
            ["runc on 1.7: a/fails", "runc on 1.7: a/panics"]
        );
        let passed: Vec<_> = records.iter().map(|record| &record["passed"]).collect();
        assert_eq!(
            passed,
            [&json!(true), &json!(false), &json!(false), &Value::Null]
        );
        assert_eq!(records[1]["message"], "expected 1, got 2");
        assert_eq!(records[2]["message"], "the case panicked");
        assert_eq!(records[3]["message"], "not on cgroup v1");
        assert_eq!(records[0]["message"], Value::Null);
    }
}
