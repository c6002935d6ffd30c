//! The agent as a program; see the library, which exists for its tests and fuzz targets.

fn main() -> std::process::ExitCode {
    brig_agent::main()
}
