//! The arguments that every suite has, and which cases they select.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use crate::case::{Case, Needs};

/// A part of a suite: the `part`th (from 1) of `of`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shard {
    /// Which part, from 1.
    pub part: usize,
    /// Of how many.
    pub of: usize,
}

impl Shard {
    /// Reads "K/N", 1 <= K <= N.
    fn parse(text: &str) -> Result<Self> {
        text.split_once('/')
            .and_then(|(part, of)| Some((part.parse().ok()?, of.parse().ok()?)))
            .filter(|(part, of)| (1..=*of).contains(part))
            .map(|(part, of)| Self { part, of })
            .with_context(|| format!("--shard needs K/N with 1 <= K <= N, not '{text}'"))
    }

    /// Whether the case at this place (from 0) belongs to this part; places go round the parts.
    #[must_use]
    pub fn has(self, place: usize) -> bool {
        place % self.of == self.part - 1
    }
}

/// What every suite is asked.
#[derive(Debug)]
pub struct Options {
    /// Only cases whose "group/name" contains one of these.
    pub filters: Vec<String>,
    /// Only the cases of the smoke.
    pub smoke: bool,
    /// The containerd to switch the node to first.
    pub containerd: Option<String>,
    /// Only this part.
    pub shard: Shard,
    /// Where results go.
    pub results: PathBuf,
    /// Only list the cases.
    pub list: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            filters: Vec::new(),
            smoke: false,
            containerd: None,
            shard: Shard { part: 1, of: 1 },
            results: PathBuf::from("/host/results"),
            list: false,
        }
    }
}

impl Options {
    /// What a suite's usage says of these.
    pub const USAGE: &str = "[--filter TEXT]... [--smoke] [--shard K/N] [--containerd 1.6|1.7|2.1|DIR] [--results DIR] [--list]";

    /// Takes an argument and its value, if it is one that every suite has; false if it is not.
    ///
    /// # Errors
    /// If its value is missing or not one.
    pub fn take(&mut self, arg: &str, args: &mut impl Iterator<Item = String>) -> Result<bool> {
        match arg {
            "--filter" => self.filters.push(value(arg, args)?),
            "--smoke" => self.smoke = true,
            "--containerd" => self.containerd = Some(value(arg, args)?),
            "--shard" => self.shard = Shard::parse(&value(arg, args)?)?,
            "--results" => self.results = value(arg, args)?.into(),
            "--list" => self.list = true,
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Refuses a filter that names no case, so that a case which was renamed does not go missing from whoever asks for it.
    ///
    /// # Errors
    /// The filter.
    pub fn check<'a, S: 'a>(
        &self,
        cases: impl IntoIterator<Item = &'a Case<S>> + Clone,
    ) -> Result<()> {
        let unknown = self.filters.iter().find(|part| {
            let named = |case: &Case<S>| case.full_name().contains(part.as_str());
            !cases.clone().into_iter().any(named)
        });
        match unknown {
            Some(part) => bail!("no case has '{part}' in its name; --list names them"),
            None => Ok(()),
        }
    }

    /// Whether a case is asked for, whatever its part: by its name, the smoke, and the runtime. One
    /// of Brig alone runs elsewhere only if it is named in full.
    #[must_use]
    pub fn wants<S>(&self, case: &Case<S>, with_brig: bool) -> bool {
        let name = case.full_name();
        (self.filters.is_empty() || self.filters.iter().any(|part| name.contains(part)))
            && (case.smoke || !self.smoke)
            && (with_brig || case.needs == Needs::AnyRuntime || self.filters.contains(&name))
    }
}

/// The value of an argument.
///
/// # Errors
/// If there is none.
pub fn value(arg: &str, args: &mut impl Iterator<Item = String>) -> Result<String> {
    args.next().with_context(|| format!("{arg} needs a value"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::case::{brig, case, smoke};

    fn parsed(args: &[&str]) -> Result<Options> {
        let mut args = args.iter().map(|arg| (*arg).to_owned());
        let mut options = Options::default();
        while let Some(arg) = args.next() {
            anyhow::ensure!(options.take(&arg, &mut args)?, "unknown {arg}");
        }
        Ok(options)
    }

    #[test]
    fn a_shard_is_one_of_its_number() {
        let options = parsed(&["--shard", "2/3"]).unwrap();
        assert_eq!(options.shard, Shard { part: 2, of: 3 });
        for bad in ["0/2", "3/2", "1", "1/x", "/", "x", "0/0"] {
            assert!(parsed(&["--shard", bad]).is_err(), "{bad}");
        }
    }

    #[test]
    fn every_place_is_in_exactly_one_shard() {
        for place in 0..10 {
            let parts = (1..=3).filter(|part| Shard { part: *part, of: 3 }.has(place));
            assert_eq!(parts.count(), 1, "{place}");
        }
    }

    #[test]
    fn another_argument_is_not_taken_and_a_missing_value_is_refused() {
        assert!(
            !Options::default()
                .take("--quick", &mut std::iter::empty())
                .unwrap()
        );
        for arg in ["--filter", "--containerd", "--shard", "--results"] {
            assert!(parsed(&[arg]).is_err(), "{arg}");
        }
    }

    #[test]
    fn a_case_is_selected_by_a_part_of_its_name_and_by_the_smoke() {
        let (plain, quick) = (
            case::<()>("exit", "a code", |()| Ok(())),
            smoke::<()>("exit", "a signal", |()| Ok(())),
        );
        let all = parsed(&[]).unwrap();
        assert!(all.wants(&plain, false) && all.wants(&quick, false));
        let filtered = parsed(&["--filter", "exit/a c", "--filter", "nothing"]).unwrap();
        assert!(filtered.wants(&plain, false) && !filtered.wants(&quick, false));
        let smoke = parsed(&["--smoke"]).unwrap();
        assert!(!smoke.wants(&plain, false) && smoke.wants(&quick, false));
    }

    #[test]
    fn a_filter_that_names_no_case_is_refused() {
        let cases = [case::<()>("exit", "a code", |()| Ok(()))];
        assert!(parsed(&[]).unwrap().check(&cases).is_ok());
        assert!(parsed(&["--filter", "a c"]).unwrap().check(&cases).is_ok());
        let options = parsed(&["--filter", "exit/", "--filter", "a cod "]).unwrap();
        let error = options.check(&cases).unwrap_err().to_string();
        assert!(error.contains("'a cod '"), "{error}");
    }

    #[test]
    fn a_case_of_brig_runs_elsewhere_only_by_its_full_name() {
        let own = brig::<()>("daemon", "a start", |()| Ok(()));
        assert!(parsed(&[]).unwrap().wants(&own, true));
        for (filter, wanted) in [("daemon/", false), ("daemon/a start", true)] {
            let options = parsed(&["--filter", filter]).unwrap();
            assert_eq!(options.wants(&own, false), wanted, "{filter}");
        }
    }
}
