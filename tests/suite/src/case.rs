//! A case: a sentence about behaviour, and a function that fails with what was expected and found.

use std::fmt;

use anyhow::Result;

/// Which runtimes a case is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Needs {
    /// What any OCI runtime does.
    AnyRuntime,
    /// What only Brig has: a VM, its errors, its devices.
    Brig,
}

/// One behaviour, judged with what the cases of a suite share, `S`.
pub struct Case<S> {
    /// Cases of a group stay together.
    pub group: &'static str,
    /// The behaviour, as a sentence.
    pub name: &'static str,
    /// Which runtimes it applies to.
    pub needs: Needs,
    /// Whether it belongs to the smoke: the part that every change, on every containerd, must pass.
    pub smoke: bool,
    /// Fails with what was expected and what was found.
    pub run: fn(&mut S) -> Result<()>,
}

impl<S> Case<S> {
    /// "group/name": what filters look at and reports show.
    #[must_use]
    pub fn full_name(&self) -> String {
        format!("{}/{}", self.group, self.name)
    }
}

/// A case of any runtime.
pub const fn case<S>(
    group: &'static str,
    name: &'static str,
    run: fn(&mut S) -> Result<()>,
) -> Case<S> {
    Case {
        group,
        name,
        needs: Needs::AnyRuntime,
        smoke: false,
        run,
    }
}

/// A case of any runtime, in the smoke.
pub const fn smoke<S>(
    group: &'static str,
    name: &'static str,
    run: fn(&mut S) -> Result<()>,
) -> Case<S> {
    Case {
        smoke: true,
        ..case(group, name, run)
    }
}

/// A case of Brig alone.
pub const fn brig<S>(
    group: &'static str,
    name: &'static str,
    run: fn(&mut S) -> Result<()>,
) -> Case<S> {
    Case {
        needs: Needs::Brig,
        ..case(group, name, run)
    }
}

/// Why a case says nothing with this runtime, containerd or node.
#[derive(Debug)]
pub struct NotHere(String);

impl fmt::Display for NotHere {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl std::error::Error for NotHere {}

/// Ends a case that cannot be asked here; it is shown with the reason, and is no pass.
///
/// # Errors
/// Always.
pub fn not_here<T>(reason: impl Into<String>) -> Result<T> {
    Err(NotHere(reason.into()).into())
}
