//! `brig debug`: a guest's kernel under gdb, its memory and CPUs as a core file, and its symbols. For pods whose handler
//! has `debug`.
//!
//! What is read of the guest is the guest's: it is shown or written, and page tables of it are followed within its memory.

mod core;
mod gdb;
mod memory;
mod registers;
mod session;
mod symbols;

use std::io::ErrorKind;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use brig_shim::asked::config::MIB;
use brig_shim::containerd::debug_service::Method;
use brig_shim::error::{Error, Result};
use serde_json::{Value, json};

use crate::cli::{self, DebugHow};
use crate::look;
use crate::pods;
use crate::shims;

/// A pod whose guest may be debugged.
struct Pod {
    namespace: String,
    id: String,
    /// Its shim's.
    socket: PathBuf,
    vmm: u32,
    /// Bytes of memory that it started with.
    first: u64,
    /// It goes on from a template.
    template: bool,
    /// Where the guest's kernel is.
    kernel: PathBuf,
}

impl Pod {
    fn find(base: &Path, pod: &cli::Pod) -> Result<Self> {
        let row = pods::find(base, pod)?;
        let socket = look::socket_of(&row)?;
        let told = shims::ask_json(&socket, Method::Inspect, &Value::Null)?;
        if told["config"]["debug"]["value"] != true {
            return Err(Error::state(
                "a guest is debugged where the handler has debug = true in its configuration, for pods that start from then on",
            ));
        }
        let no_vm = || Error::state(format!("pod {} has no VM", row.id));
        let vmm = row.processes().find(|(name, _)| *name == "vmm");
        let (_, vmm) = vmm.ok_or_else(no_vm)?;
        let first = told["size"]["startedWithMiB"].as_u64().ok_or_else(no_vm)?;
        let kernel = told["config"]["kernel"]["value"].as_str().unwrap_or("");
        Ok(Self {
            socket,
            vmm,
            first: first * MIB,
            template: !told["template"].is_null(),
            kernel: PathBuf::from(kernel),
            namespace: row.namespace,
            id: row.id,
        })
    }
}

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
