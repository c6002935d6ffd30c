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
    /// Only the cases of the smoke.
    pub smoke: bool,
    /// Only each `.1`th case, from the `.0`th (from 1) on.
    pub shard: (usize, usize),
    /// Instead of the cases: this many pods come and go, and nothing may grow.
    pub churn: Option<u32>,
    /// Only list the cases.
    pub list: bool,
    /// Only write the table of the results that are there.
    pub table: bool,
}

const USAGE: &str = "usage: brig-cri [--handler runc|brig|brig-shim|brig-streaming]... [--filter TEXT]... [--smoke] [--shard K/N] [--containerd 1.6|1.7|2.1] [--churn PODS] [--results DIR] [--list] [--table]";

/// Reads the arguments. Without a handler: runc and brig.
pub fn parse(mut args: impl Iterator<Item = String>) -> Result<Options> {
    let mut options = Options {
        handlers: Vec::new(),
        filters: Vec::new(),
        containerd: None,
        results: PathBuf::from("/host/results"),
        smoke: false,
        shard: (1, 1),
        churn: None,
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
            "--smoke" => options.smoke = true,
            "--shard" => options.shard = shard(&value()?)?,
            "--churn" => options.churn = Some(value()?.parse().context("--churn needs a number")?),
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

/// Reads "K/N", 1 <= K <= N.
fn shard(text: &str) -> Result<(usize, usize)> {
    let parts = text
        .split_once('/')
        .and_then(|(part, of)| Some((part.parse().ok()?, of.parse().ok()?)))
        .filter(|(part, of): &(usize, usize)| (1..=*of).contains(part));
    parts.with_context(|| format!("--shard needs K/N with 1 <= K <= N, not '{text}'"))
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

    #[test]
    fn a_shard_is_one_of_its_number() {
        assert_eq!(parsed(&["--shard", "2/3"]).unwrap().shard, (2, 3));
        for bad in ["0/2", "3/2", "1", "1/x", "/"] {
            assert!(parsed(&["--shard", bad]).is_err(), "{bad}");
        }
    }
}
