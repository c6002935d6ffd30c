//! `brig-e2e`: the end-to-end suite. Runs inside the disposable node, against a real containerd.
//!
//! Every case is judged by what the node and the container show, and runs with any runtime: runc is
//! the reference that shows the suite itself to be right. It trusts containerd and the node.

mod cases;
mod options;
mod results;
mod suite;

use std::process::ExitCode;

fn main() -> ExitCode {
    let options = options::parse(std::env::args().skip(1));
    brig_suite::run::exit(
        "brig-e2e",
        options.and_then(|options| results::run_all(&options)),
    )
}
