//! The binary containerd runs for the runtime `io.containerd.brig.v2`. containerd is trusted.

use std::io::{self, IsTerminal, Read, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use brig_shim::containerd::bootstrap::args::{self, Action, Args};
use brig_shim::containerd::bootstrap::{delete, info, start};
use brig_shim::containerd::server;
use brig_shim::error::{Error, Result};
use brig_shim::guest::vm::capture;
use brig_shim::guest::vm::host::Node;

/// More than containerd ever sends to `start`.
const MAX_STDIN: u64 = 16 << 20;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    // Not containerd's words but a shim's.
    match words.as_slice() {
        ["build-template", recipe, ..] => return ended(capture::main(recipe)),
        [delete::FINISH, base, namespace, id] => {
            return ended(delete::finish(Path::new(base), namespace, id));
        }
        _ => {}
    }
    let args = match args::parse(std::env::args().skip(1)) {
        Ok(args) => args,
        Err(error) => {
            eprintln!("containerd-shim-brig-v2: {error}");
            return ExitCode::from(2);
        }
    };
    ended(run(&args))
}

fn ended(result: Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("brig: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    match args.action {
        Action::Serve => server::serve(args, Arc::new(Node)),
        Action::Start => print(&start::start(args, &read_stdin()?)?),
        Action::Delete => print(&delete::delete(args)?),
        Action::Info => print(&info::encode(&read_stdin()?)?),
        Action::Version => print(version().as_bytes()),
    }
}

fn version() -> String {
    format!(
        "containerd-shim-brig-v2:\n  Version:  {}\n  Runtime:  io.containerd.brig.v2\n",
        env!("CARGO_PKG_VERSION")
    )
}

fn read_stdin() -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    // An operator who types `-info` has nothing to say.
    if io::stdin().is_terminal() {
        return Ok(bytes);
    }
    io::stdin()
        .take(MAX_STDIN)
        .read_to_end(&mut bytes)
        .map_err(|error| Error::io("standard input", &error))?;
    Ok(bytes)
}

fn print(bytes: &[u8]) -> Result<()> {
    let mut stdout = io::stdout();
    stdout
        .write_all(bytes)
        .and_then(|()| stdout.flush())
        .map_err(|error| Error::io("standard output", &error))
}
