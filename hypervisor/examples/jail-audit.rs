//! Compares running VMMs with the checked-in list: `jail-audit PID...`. Needs root.

use std::process::ExitCode;

use brig_hypervisor::jail::audit::{Extent, differences, filters};

/// Every thread's filter against the list of its kind; KVM's own helper has that of its creator.
fn filters(pid: u32) -> std::io::Result<Vec<String>> {
    let mut found = Vec::new();
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let task = task?;
        let name = std::fs::read_to_string(task.path().join("comm"))?;
        if name.starts_with("kvm-") {
            continue;
        }
        let thread = task.file_name().to_string_lossy().parse();
        let thread = thread.map_err(std::io::Error::other)?;
        found.extend(filters::difference(thread, filters::kind(name.trim()))?);
    }
    Ok(found)
}

fn main() -> ExitCode {
    let mut code = ExitCode::SUCCESS;
    for argument in std::env::args().skip(1) {
        let found = argument
            .parse()
            .map_err(std::io::Error::other)
            .and_then(|pid| {
                let mut found = differences(pid, Extent::Filtered)?;
                found.extend(filters(pid)?);
                Ok(found)
            });
        match found {
            Ok(found) if found.is_empty() => println!("{argument}: as listed"),
            Ok(found) => {
                code = ExitCode::FAILURE;
                for difference in found {
                    println!("{argument}: {difference}");
                }
            }
            Err(error) => {
                code = ExitCode::FAILURE;
                println!("{argument}: {error}");
            }
        }
    }
    code
}
