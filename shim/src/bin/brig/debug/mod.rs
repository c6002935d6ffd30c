//! `brig debug`: a guest's kernel under gdb, its memory and CPUs as a core file, and its symbols. For pods whose handler
//! has `debug`.
//!
//! What is read of the guest is the guest's: it is shown or written, and page tables of it are followed within its memory.

mod core;
mod gdb;
mod memory;
mod pod;
mod registers;
mod session;
mod symbols;

use std::io::ErrorKind;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;

use brig_shim::error::{Error, Result};
use serde_json::json;

use crate::cli::{self, DebugHow};
use pod::Pod;

/// What is to be done; the text to print.
///
/// # Errors
/// `FailedPrecondition` for a pod whose handler has no `debug`, or that has no VM; what the system says.
pub fn run(base: &Path, pod: &cli::Pod, how: &DebugHow, output: &cli::Output) -> Result<String> {
    let pod = Pod::find(base, pod)?;
    if let Some(file) = &how.dump_memory {
        let dumped = core::dump(&pod, file)?;
        return Ok(output.tell(&dumped.json(), dumped.to_string()));
    }
    if how.symbols {
        let symbols = symbols::of(&pod)?.display().to_string();
        return Ok(output.tell(&json!({ "symbols": symbols }), format!("{symbols}\n")));
    }
    if how.gdb {
        return gdb::serve(&pod).map(|()| String::new());
    }
    Err(start_gdb(&pod))
}

/// Becomes gdb, with the guest's kernel before it; returns only if it cannot.
fn start_gdb(pod: &Pod) -> Error {
    let symbols = match symbols::of(pod) {
        Ok(symbols) => symbols,
        Err(error) => return error,
    };
    let own = match std::env::current_exe() {
        Ok(own) => own,
        Err(error) => return Error::io("cannot find brig", &error),
    };
    let target = format!(
        "target remote | {} debug --namespace {} {} --gdb",
        own.display(),
        pod.namespace,
        pod.id
    );
    let error = Command::new("gdb")
        .arg("-q")
        // What finds callers is beside the symbols.
        .args(["-iex", "set remotetimeout 60"])
        .args([
            "-iex",
            &format!("add-auto-load-safe-path {}", symbols.display()),
        ])
        .arg(&symbols)
        .args(["-ex", &target])
        .exec();
    if error.kind() == ErrorKind::NotFound {
        return Error::state(format!(
            "there is no gdb on this node: install it, or run it elsewhere with a copy of {} and the command '{target}', by ssh",
            symbols.display()
        ));
    }
    Error::io("cannot start gdb", &error)
}
