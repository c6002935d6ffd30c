//! Compares running VMMs with the checked-in list: `jail-audit PID...`. Needs root.

use std::process::ExitCode;

use brig_hypervisor::jail::audit::{Extent, differences, filters};

fn main() -> ExitCode {
    let mut code = ExitCode::SUCCESS;
    for argument in std::env::args().skip(1) {
        let found = argument
            .parse()
            .map_err(std::io::Error::other)
            .and_then(|pid| {
                let mut found = differences(pid, Extent::Filtered)?;
                found.extend(filters::differences(pid)?);
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
