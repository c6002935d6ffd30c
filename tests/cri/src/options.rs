//! What the suite is asked to run.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};

/// Arguments of the suite.
pub struct Options {
    /// Runtime handlers of containerd's configuration, compared with one another.
    pub handlers: Vec<String>,
    /// Only cases whose "group/name" contains one of these.
    pub filters: Vec<String>,
    /// The containerd to switch the node to first.
    pub containerd: Option<String>,
    /// Where results go.
    pub results: PathBuf,
    /// Only list the cases.
    pub list: bool,
    /// Only write the table of the results that are there.
    pub table: bool,
}

const USAGE: &str = "usage: brig-cri [--handler runc|brig|brig-shim]... [--filter TEXT]... [--containerd 1.6|1.7|2.1] [--results DIR] [--list] [--table]";

/// Reads the arguments. Without a handler: runc and brig.
pub fn parse(mut args: impl Iterator<Item = String>) -> Result<Options> {
    let mut options = Options {
        handlers: Vec::new(),
        filters: Vec::new(),
        containerd: None,
        results: PathBuf::from("/host/results"),
        list: false,
        table: false,
    };
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("{arg} needs a value"));
        match arg.as_str() {
            "--handler" => options.handlers.push(value()?),
            "--filter" => options.filters.push(value()?),
            "--containerd" => options.containerd = Some(value()?),
            "--results" => options.results = value()?.into(),
            "--list" => options.list = true,
            "--table" => options.table = true,
            _ => bail!("unknown argument {arg}\n{USAGE}"),
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
        assert!(parsed(&["--smoke"]).is_err());
        assert!(parsed(&["--handler"]).is_err());
    }
}
