//! brig-agent: PID 1 of a pod's microVM, which runs the pod's OCI containers (DESIGN section 7).
//!
//! One program, four lives: PID 1 in the guest (no arguments), the `container-init` helper that
//! becomes a container's process, the kernel's `/sbin/modprobe`, and a server over Unix sockets for component tests. It trusts the
//! host, and nothing that a container or an image says.
mod boot_mark;
mod bundle;
mod bundled;
mod cgroup;
mod clock;
mod command;
mod component;
mod container;
mod context;
mod control;
mod cpus;
mod detached;
mod device_nodes;
mod error;
mod events;
mod exec_defaults;
mod file_cache;
mod forward;
mod freezer;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod given;
mod huge_pages;
mod id_map;
mod image;
mod inherited;
mod init;
mod launch;
mod limits;
mod log;
mod look;
mod memory;
mod modules;
mod mount_attr;
mod names;
mod netfilter;
mod netlink;
mod network;
mod outputs;
mod page_reporting;
mod pci;
mod pid1;
mod places;
mod process;
mod queue_pairs;
mod quiet;
mod readiness;
mod reaper;
mod root_disks;
mod sandbox;
mod serve;
mod server;
mod setup;
mod spec;
mod stdio;
mod stream;
mod streams;
mod submounts;
mod sync;
mod template;
mod validate;
mod variables;
mod volume;
mod write_back;

use std::{path::Path, process::ExitCode};

/// The program.
pub fn main() -> ExitCode {
    // A module's name may be of any bytes.
    let lossy = |arg: std::ffi::OsString| arg.to_string_lossy().into_owned();
    let mut args = std::env::args_os().map(lossy);
    let name = args.next();
    let args: Vec<String> = args.collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args.as_slice() {
        args if name.as_deref() == Some(modules::MODPROBE) => modules::main(args),
        ["container-init"] => init::main(),
        ["--serve-unix", socket, "--state", state] => {
            component::main(Path::new(socket), Path::new(state))
        }
        // The kernel passes unknown command line words on to init.
        _ if std::process::id() == 1 => pid1::main(),
        _ => {
            eprintln!("usage: brig-agent --serve-unix SOCKET --state DIR (or as PID 1 of a guest)");
            ExitCode::from(2)
        }
    }
}
