//! `brig`, the operator's command: what this node lacks, which pods run, how one booted, what its VM
//! did. Runs as root and trusts the files below the state directory.

mod check;
mod cli;
mod configuration;
mod installed;
mod metrics;
mod pods;
mod shims;
mod timelines;

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use brig_shim::asked::config::Config;
use brig_shim::error::{Error, Result};
use brig_shim::pod::timeline::Timeline;
use clap::{CommandFactory as _, Parser as _};

use cli::{Cli, Command, ConfigCommand};

/// How long the shim of one pod may take, which a person waits for.
const PATIENCE: Duration = Duration::from_secs(10);

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("brig: {error}");
            ExitCode::from(2)
        }
    }
}

fn run(command: Command) -> Result<bool> {
    let text = match command {
        Command::Check { config, output } => return run_check(config.as_deref(), output.json),
        Command::List { output } => pods::list(&base()?, output.json),
        Command::Timeline {
            pod,
            compare: Some(other),
            ..
        } => compared(&base()?, &pod, other)?,
        Command::Timeline {
            pod,
            svg: Some(file),
            ..
        } => drawn(&base()?, &pod, &file)?,
        Command::Timeline { pod, output, .. } => timeline(&base()?, &pod, output.json)?,
        Command::Counters { pod } => counters(&base()?, &pod)?,
        Command::Metrics => metrics::scrape(&base()?)?,
        Command::Config(command) => config(&command)?,
        Command::Versions { output } => installation()?.list(output.json)?,
        Command::Use { version } => installation()?.switch(&version)?,
        Command::Remove { version } => installation()?.remove(&version)?,
        Command::Uninstall { purge, links } => {
            let configuration = purge.then_some(Path::new("/etc/brig"));
            installation()?.uninstall(&links, configuration)?
        }
        Command::Completion { shell } => completion(shell),
        Command::Man { into } => {
            man(&into)?;
            String::new()
        }
        Command::Version => format!("brig {}\n", env!("CARGO_PKG_VERSION")),
    };
    print(&text).map(|()| true)
}

fn config(command: &ConfigCommand) -> Result<String> {
    match command {
        ConfigCommand::Check { source } => configuration::check(source.file.as_deref()),
        ConfigCommand::Show { source, output } => {
            configuration::show(source.file.as_deref(), output.json)
        }
        ConfigCommand::Default => Ok(configuration::default()),
        ConfigCommand::Schema => Ok(configuration::schema()),
        ConfigCommand::Reference => Ok(configuration::reference()),
    }
}

fn completion(shell: clap_complete::Shell) -> String {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "brig", &mut script);
    String::from_utf8_lossy(&script).into_owned()
}

fn man(into: &Path) -> Result<()> {
    let failed = |error| Error::io(format_args!("cannot write to {}", into.display()), &error);
    fs::create_dir_all(into).map_err(failed)?;
    clap_mangen::generate_to(Cli::command(), into).map_err(failed)
}

fn installation() -> Result<installed::Installation> {
    installed::Installation::own(base()?)
}

fn base() -> Result<PathBuf> {
    Ok(Config::load(None)?.state_dir)
}

fn print(text: &str) -> Result<()> {
    let mut stdout = io::stdout();
    stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
        .map_err(|error| Error::io("standard output", &error))
}

fn run_check(config: Option<&Path>, as_json: bool) -> Result<bool> {
    let findings = check::node(config);
    let text = if as_json {
        let all: Vec<_> = findings.iter().map(check::Finding::json).collect();
        format!("{}\n", serde_json::Value::from(all))
    } else {
        let lines = findings.iter().map(|finding| format!("{finding}\n"));
        lines.collect()
    };
    print(&text)?;
    Ok(findings.iter().all(|finding| !finding.is_fatal()))
}

fn damaged(error: serde_json::Error) -> Error {
    Error::internal(format!("the timeline is damaged: {error}"))
}

fn read_timeline(base: &Path, pod: &cli::Pod) -> Result<Timeline> {
    let bytes = pods::find(base, pod)?.read_timeline()?;
    serde_json::from_slice(&bytes).map_err(damaged)
}

fn compared(base: &Path, pod: &cli::Pod, other: String) -> Result<String> {
    let namespace = pod.namespace.clone();
    let other = cli::Pod {
        namespace,
        id: other,
    };
    let (this, other) = (read_timeline(base, pod)?, read_timeline(base, &other)?);
    Ok(timelines::compare(&this, &other))
}

fn drawn(base: &Path, pod: &cli::Pod, file: &Path) -> Result<String> {
    let picture = timelines::svg(&read_timeline(base, pod)?, &pod.id);
    fs::write(file, picture)
        .map_err(|error| Error::io(format_args!("cannot write {}", file.display()), &error))?;
    Ok(String::new())
}

fn timeline(base: &Path, pod: &cli::Pod, as_json: bool) -> Result<String> {
    let timeline = read_timeline(base, pod)?;
    if as_json {
        let timeline = serde_json::to_string(&timeline).map_err(damaged)?;
        return Ok(format!("{timeline}\n"));
    }
    let mut text = timeline.draw();
    if !timeline.exits.is_empty() {
        let exits = timeline
            .exits
            .iter()
            .map(|(reason, count)| format!("{reason} {count}"));
        text.push_str(&format!(
            "VM exits: {}\n",
            exits.collect::<Vec<_>>().join(", ")
        ));
    }
    Ok(text)
}

fn counters(base: &Path, pod: &cli::Pod) -> Result<String> {
    let journal = pods::find(base, pod)?.read()?;
    let socket = journal.and_then(|journal| journal.socket);
    let socket = socket.ok_or_else(|| Error::state("the pod has no shim to ask"))?;
    Ok(format!("{}\n", shims::counters(&socket, PATIENCE)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::ValueEnum as _;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_shell_and_every_command_is_described() {
        for shell in clap_complete::Shell::value_variants() {
            let script = completion(*shell);
            assert!(script.contains("timeline"), "{shell}");
        }
        let dir = tempfile::tempdir().unwrap();
        man(dir.path()).unwrap();
        for page in ["brig.1", "brig-check.1", "brig-config-show.1"] {
            let page = fs::read_to_string(dir.path().join(page)).unwrap();
            assert!(page.contains(".SH SYNOPSIS"));
        }
    }
}
