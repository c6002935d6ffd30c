//! What the suite is asked to run.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};

/// Arguments of the suite.
pub struct Options {
    /// containerd's name of the runtime.
    pub runtime: String,
    /// Only cases whose "group/name" contains one of these.
    pub filters: Vec<String>,
    /// Only the smoke subset.
    pub smoke: bool,
    /// The containerd to switch the node to first.
    pub containerd: Option<String>,
    /// This part (from 1) of that many.
    pub shard: (usize, usize),
    /// Where results go.
    pub results: PathBuf,
    /// Only list the cases.
    pub list: bool,
}

const USAGE: &str = "usage: brig-e2e [--runtime NAME] [--filter TEXT]... [--smoke] [--containerd 1.6|1.7|2.1] [--shard K/N] [--results DIR] [--list]";

/// Reads the arguments.
pub fn parse(mut args: impl Iterator<Item = String>) -> Result<Options> {
    let mut options = Options {
        runtime: "io.containerd.brig.v2".to_owned(),
        filters: Vec::new(),
        smoke: false,
        containerd: None,
        shard: (1, 1),
        results: PathBuf::from("/host/results"),
        list: false,
    };
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("{arg} needs a value"));
        match arg.as_str() {
            "--runtime" => options.runtime = value()?,
            "--filter" => options.filters.push(value()?),
            "--smoke" => options.smoke = true,
            "--containerd" => options.containerd = Some(value()?),
            "--shard" => options.shard = shard(&value()?)?,
            "--results" => options.results = value()?.into(),
            "--list" => options.list = true,
            _ => bail!("unknown argument {arg}\n{USAGE}"),
        }
    }
    Ok(options)
}

fn shard(text: &str) -> Result<(usize, usize)> {
    text.split_once('/')
        .and_then(|(part, of)| Some((part.parse().ok()?, of.parse().ok()?)))
        .filter(|(part, of)| (1..=*of).contains(part))
        .with_context(|| format!("--shard {text}: expected K/N with 1 <= K <= N"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shard_outside_its_range_is_refused() {
        assert_eq!(shard("2/3").unwrap(), (2, 3));
        for bad in ["0/2", "3/2", "x", "1"] {
            assert!(shard(bad).is_err(), "{bad}");
        }
    }
}
