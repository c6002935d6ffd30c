//! What the suite is asked to run.

use anyhow::{Context, Result, bail};
use brig_suite::options::{self, value};

/// Arguments of the suite.
pub struct Options {
    /// Runtime handlers of containerd's configuration, compared with one another.
    pub handlers: Vec<String>,
    /// Instead of the cases: this many pods come and go, and nothing may grow.
    pub churn: Option<u32>,
    /// Only write the table of the results that are there.
    pub table: bool,
    /// What every suite is asked.
    pub common: options::Options,
}

const USAGE: &str =
    "usage: brig-cri [--handler runc|brig|brig-shim|brig-streaming]... [--churn PODS] [--table]";

/// Reads the arguments. Without a handler: runc and brig.
pub fn parse(mut args: impl Iterator<Item = String>) -> Result<Options> {
    let mut options = Options {
        handlers: Vec::new(),
        churn: None,
        table: false,
        common: options::Options::default(),
    };
    while let Some(arg) = args.next() {
        if options.common.take(&arg, &mut args)? {
            continue;
        }
        match arg.as_str() {
            "--handler" => options.handlers.push(value(&arg, &mut args)?),
            "--churn" => {
                let pods = value(&arg, &mut args)?;
                options.churn = Some(pods.parse().context("--churn needs a number")?);
            }
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
    }
}
