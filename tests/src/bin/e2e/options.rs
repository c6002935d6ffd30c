//! What the suite is asked to run.

use anyhow::{Result, bail};
use brig_suite::options::{self, value};

/// Arguments of the suite.
pub struct Options {
    /// containerd's name of the runtime.
    pub runtime: String,
    /// What every suite is asked.
    pub common: options::Options,
}

/// Reads the arguments.
pub fn parse(mut args: impl Iterator<Item = String>) -> Result<Options> {
    let mut options = Options {
        runtime: "io.containerd.brig.v2".to_owned(),
        common: options::Options::default(),
    };
    while let Some(arg) = args.next() {
        if options.common.take(&arg, &mut args)? {
            continue;
        }
        match arg.as_str() {
            "--runtime" => options.runtime = value(&arg, &mut args)?,
            _ => bail!(
                "unknown argument {arg}\nusage: brig-e2e [--runtime NAME] {}",
                options::Options::USAGE
            ),
        }
    }
    Ok(options)
}
