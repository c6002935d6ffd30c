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
    match options::parse(std::env::args().skip(1)).and_then(|options| results::run_all(&options)) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("brig-e2e: {error:#}");
            ExitCode::from(2)
        }
    }
}
