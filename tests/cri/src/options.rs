//! What the suite is asked to run.

use anyhow::{Context, Result, bail};
use brig_suite::options::{self, value};

use crate::soak;

/// Arguments of the suite.
pub struct Options {
    /// Runtime handlers of containerd's configuration, compared with one another.
    pub handlers: Vec<String>,
    /// Instead of the cases: this many pods come and go, and nothing may grow.
    pub churn: Option<u32>,
    /// The same under mixed load, with random kills.
    pub soak: Option<u32>,
    /// The soak ends after so many hours, if not before.
    pub hours: f64,
    /// Gives the order of the soak's kills.
    pub seed: u64,
    /// Only write the table of the results that are there.
    pub table: bool,
    /// What every suite is asked.
    pub common: options::Options,
}

const USAGE: &str = "usage: brig-cri [--handler runc|brig|brig-shim|brig-streaming]... [--churn PODS] [--soak PODS [--hours N] [--seed N]] [--table]";

/// Reads the arguments. Without a handler: runc and brig.
pub fn parse(mut args: impl Iterator<Item = String>) -> Result<Options> {
    let mut options = Options {
        handlers: Vec::new(),
        churn: None,
        soak: None,
        hours: f64::INFINITY,
        seed: soak::SEED,
        table: false,
        common: options::Options::default(),
    };
    while let Some(arg) = args.next() {
        if options.common.take(&arg, &mut args)? {
            continue;
        }
        match arg.as_str() {
            "--handler" => options.handlers.push(value(&arg, &mut args)?),
            "--churn" => options.churn = Some(number(&arg, &mut args)?),
            "--hours" => options.hours = number(&arg, &mut args)?,
            "--soak" => options.soak = Some(number(&arg, &mut args)?),
            "--seed" => options.seed = number(&arg, &mut args)?,
            "--table" => options.table = true,
            _ => bail!(
                "unknown argument {arg}\n{USAGE} {}",
                options::Options::USAGE
            ),
        }
    }
    if options.handlers.is_empty() {
        options.handlers = vec!["runc".to_owned(), "brig".to_owned()];
    }
    Ok(options)
}

fn number<T>(arg: &str, args: &mut impl Iterator<Item = String>) -> Result<T>
where
    T: std::str::FromStr<Err: std::error::Error + Send + Sync + 'static>,
{
    let text = value(arg, args)?;
    text.parse()
        .with_context(|| format!("{arg} needs a number, not '{text}'"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(args: &[&str]) -> Result<Options> {
        parse(args.iter().map(|arg| (*arg).to_owned()))
    }

    #[test]
    fn without_a_handler_both_are_compared() {
        assert_eq!(parsed(&[]).unwrap().handlers, ["runc", "brig"]);
        assert_eq!(parsed(&["--handler", "brig"]).unwrap().handlers, ["brig"]);
    }

    #[test]
    fn an_unknown_argument_or_a_missing_value_is_refused() {
        assert!(parsed(&["--quick"]).is_err());
        assert!(parsed(&["--handler"]).is_err());
        assert!(parsed(&["--soak", "many"]).is_err());
        assert!(parsed(&["--soak", "9", "--seed", "one"]).is_err());
    }
}
