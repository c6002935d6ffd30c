//! `brig`, the operator's command: what this node lacks, which pods run, how one booted, what its VM
//! did. Runs as root and trusts the files below the state directory.

mod benchmark;
mod check;
mod cli;
mod configuration;
mod configured;
mod debug;
mod direct_volumes;
mod dump;
mod exporter;
mod file_systems;
mod handlers;
mod inspect;
mod installed;
mod look;
mod metrics;
mod next_start;
mod others;
mod pods;
mod processes;
mod seen;
mod shims;
mod templates;
mod terminal;
mod timelines;
mod top;
mod uninstall;
mod units;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use brig_shim::asked::config::Config;
use brig_shim::containerd::debug_service::Method;
use brig_shim::error::{Error, Result};
use brig_shim::pod::timeline::Timeline;
use clap::{CommandFactory as _, Parser as _};
use serde_json::{Value, json};

use cli::{Cli, Command, ConfigCommand, ContainerdCommand};
use handlers::Containerd;

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            // Some of its words may be a guest's.
            terminal::complain(&error.to_string());
            ExitCode::from(2)
        }
    }
}

fn run(command: Command) -> Result<bool> {
    let text = match command {
        Command::Check {
            config,
            bench,
            output,
        } => return run_check(config.as_deref(), bench, output.json),
        Command::List { output } => pods::list(&base()?, output.json),
        Command::Ps { output } => top::once(&base()?, output.json)?,
        Command::Top {
            once,
            interval,
            output,
        } => {
            if !once && !output.json && terminal::is_one() {
                return top::live(&base()?, Duration::from_secs(interval.into())).map(|()| true);
            }
            top::once(&base()?, output.json)?
        }
        Command::Inspect { pod, output } => inspect::pod(&base()?, &pod, output.json)?,
        Command::Logs { pod, how } => {
            return look::logs(&base()?, &pod, &how, false).map(|()| true);
        }
        Command::Console { pod, how } => {
            return look::logs(&base()?, &pod, &how, true).map(|()| true);
        }
        Command::Level { pod, level, output } => look::level(&base()?, &pod, &level, output.json)?,
        Command::Dmesg { pod, output } => {
            look::guest(&base()?, &pod, &["dmesg".to_owned()], output.json)?
        }
        Command::Exec {
            pod,
            output,
            command,
        } => look::guest(&base()?, &pod, &command, output.json)?,
        Command::Dump { pod, output, json } => dump::dump(&base()?, &pod, output.as_deref(), json)?,
        Command::Timeline {
            namespace,
            id,
            follow: _,
            output,
            svg,
            compare,
        } => {
            let base = base()?;
            let pod = match id {
                Some(id) => cli::Pod { namespace, id },
                None => next_start::next(&base, namespace)?,
            };
            match (compare, svg) {
                (Some(other), _) => compared(&base, &pod, other, &output)?,
                (None, Some(file)) => drawn(&base, &pod, &file)?,
                (None, None) => timeline(&base, &pod, output.json)?,
            }
        }
        Command::Debug { pod, how, output } => debug::run(&base()?, &pod, &how, &output)?,
        // These have but one form.
        Command::Counters { pod, output: _ } => counters(&base()?, &pod)?,
        Command::Metrics {
            listen: None,
            output,
        } => {
            let families = metrics::scrape(&base()?)?;
            match output.json {
                true => metrics::json(&families),
                false => metrics::text(&families),
            }
        }
        Command::Metrics {
            listen: Some(address),
            output: _,
        } => return exporter::serve(&base()?, address.as_deref()).map(|()| true),
        Command::Config(command) => config(&command)?,
        Command::Template(command) => templates::run(&base()?, &command)?,
        Command::DirectVolume(command) => direct_volumes::run(&base()?, &command)?,
        Command::Containerd(command) => containerd(&command)?,
        Command::Versions { output } => installation()?.list(output.json)?,
        Command::Use { version, output } => {
            installation()?.switch(&version)?;
            units::restart();
            let text = format!("pods that start now get {version}\n");
            output.tell(&json!({ "current": version }), text)
        }
        Command::Remove { version, output } => {
            installation()?.remove(&version)?;
            let text = format!("removed {version}\n");
            output.tell(&json!({ "removed": version }), text)
        }
        Command::Uninstall {
            purge,
            links,
            output,
        } => uninstall::uninstall(&installation()?, purge, &links, &output)?,
        Command::Completion { shell } => completion(shell),
        Command::Man { into } => {
            man(&into)?;
            String::new()
        }
        Command::Version { output } => {
            let version = env!("CARGO_PKG_VERSION");
            output.tell(&json!({ "version": version }), format!("brig {version}\n"))
        }
    };
    terminal::print(&text).map(|()| true)
}

fn config(command: &ConfigCommand) -> Result<String> {
    match command {
        ConfigCommand::Check { source, output } => {
            let checked = configuration::check(source.file.as_deref())?;
            let text = format!("{checked} is right\n");
            Ok(output.tell(&json!({ "file": checked, "right": true }), text))
        }
        ConfigCommand::Show { source, output } => {
            configuration::show(source.file.as_deref(), output.json)
        }
        ConfigCommand::Default { output } => Ok(configuration::default(output.json)),
        ConfigCommand::Schema { output: _ } => Ok(configuration::schema()),
        ConfigCommand::Reference => Ok(configuration::reference()),
    }
}

/// Handlers in a file of containerd's configuration.
fn handlers_in(file: &Path) -> Containerd {
    Containerd::new(file, check::containerd_merges(file))
}

fn containerd(command: &ContainerdCommand) -> Result<String> {
    let (done, what, output) = match command {
        ContainerdCommand::Print { place, output } => {
            let (tables, as_json) = handlers_in(&place.config).print()?;
            return Ok(output.tell(&as_json, tables));
        }
        ContainerdCommand::Add { place, output } => {
            (handlers_in(&place.config).add()?, "there", output)
        }
        ContainerdCommand::Remove {
            place,
            unless_others,
            output,
        } => {
            let others = others::others();
            if *unless_others && !others.is_empty() {
                let text = uninstall::shared(&others);
                return Ok(output.tell(&json!({ "others": others }), text));
            }
            (handlers_in(&place.config).remove()?, "gone", output)
        }
    };
    if output.json {
        let mut said = json!({ "changed": done.changed, "handlers": done.handlers });
        if let Some(dir) = done.kept {
            said["kept"] = json!(dir);
        }
        return Ok(format!("{said}\n"));
    }
    let files = done.changed.iter().chain(&done.handlers);
    let files = files.map(|file| format!("changed {}\n", file.display()));
    let left = done.left();
    let then = match done.changed.is_empty() {
        true => "already",
        false => "once containerd is restarted: systemctl restart containerd",
    };
    Ok(format!(
        "{}{left}the handlers are {what} {then}\n",
        files.collect::<String>()
    ))
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

/// Where pods keep their journals, for those who look. What runs was started with a configuration that was right: one that
/// is wrong now hides it from nobody.
fn base() -> Result<PathBuf> {
    let base = Config::load(None).map_or_else(
        |error| {
            let base = Config::installed().state_dir;
            let place = base.display();
            terminal::complain(&format!(
                "{error}; until that is mended pods are looked for in {place}"
            ));
            base
        },
        |config| config.state_dir,
    );
    match fs::read_dir(&base) {
        // Before the first pod.
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io(
            format_args!("cannot look at pods in {}", base.display()),
            &error,
        )),
        _ => Ok(base),
    }
}

fn run_check(config: Option<&Path>, bench: bool, as_json: bool) -> Result<bool> {
    let mut findings = check::node(config);
    if bench && !findings.iter().any(check::Finding::is_fatal) {
        findings.extend(benchmark::findings(config));
    }
    let text = if as_json {
        let all: Vec<_> = findings.iter().map(check::Finding::json).collect();
        format!("{}\n", Value::from(all))
    } else {
        let lines = findings.iter().map(|finding| format!("{finding}\n"));
        lines.collect()
    };
    terminal::print(&text)?;
    Ok(findings.iter().all(|finding| !finding.is_fatal()))
}

fn damaged(error: serde_json::Error) -> Error {
    Error::internal(format!("the timeline is damaged: {error}"))
}

fn read_timeline(base: &Path, pod: &cli::Pod) -> Result<Timeline> {
    let row = pods::find(base, pod)?;
    timelines::read(base, &row.namespace, &row.id)
}

fn compared(base: &Path, pod: &cli::Pod, other: String, output: &cli::Output) -> Result<String> {
    let namespace = pod.namespace.clone();
    let other = cli::Pod {
        namespace,
        id: other,
    };
    let (this, other) = (read_timeline(base, pod)?, read_timeline(base, &other)?);
    if output.json {
        return Ok(format!("{}\n", timelines::compare_json(&this, &other)));
    }
    Ok(timelines::compare(&this, &other))
}

fn drawn(base: &Path, pod: &cli::Pod, file: &Path) -> Result<String> {
    let timeline = read_timeline(base, pod)?;
    let picture = timelines::svg(&timeline, &pod.id);
    if file == Path::new("-") {
        return Ok(picture);
    }
    fs::write(file, picture)
        .map_err(|error| Error::io(format_args!("cannot write {}", file.display()), &error))?;
    let moments = timeline.marks.len();
    Ok(format!("{}: {moments} moments\n", file.display()))
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
    let socket = look::socket(base, pod)?;
    let counters = shims::ask_json(&socket, Method::Counters, &Value::Null)?;
    Ok(format!("{counters}\n"))
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
    fn a_word_that_is_empty_means_no_pod_and_not_every_one() {
        for line in [
            "inspect |",
            "exec | -- ps",
            "dump |",
            "timeline |",
            "timeline web --compare |",
            "inspect web --namespace |",
            "template drop |",
            "direct-volume add | --device /dev/x --fstype ext4",
            "direct-volume remove |",
            "direct-volume stats --volume-path |",
            "direct-volume resize |",
            "use |",
            "remove |",
        ] {
            let words = line
                .split(' ')
                .map(|word| if word == "|" { "" } else { word });
            let error = Cli::try_parse_from(["brig"].into_iter().chain(words)).unwrap_err();
            assert_eq!(
                error.kind(),
                clap::error::ErrorKind::InvalidValue,
                "{line}: {error}"
            );
        }
    }

    #[test]
    fn a_direct_volume_is_given_as_katas_programs_take_it_or_by_its_parts() {
        use cli::direct_volume::DirectVolumeCommand;
        let parsed = |line: &str| {
            let words = ["brig", "direct-volume"].into_iter();
            let words = words.chain(line.split_whitespace());
            match Cli::try_parse_from(words)?.command {
                Command::DirectVolume(command) => Ok::<_, clap::Error>(command),
                other => panic!("{other:?}"),
            }
        };
        for line in [
            r#"add /v {"device":"/dev/x","fstype":"ext4"}"#,
            r#"add --volume-path /v --mount-info {"device":"/dev/x","fstype":"ext4"}"#,
        ] {
            let Ok(DirectVolumeCommand::Add {
                volume, mount_info, ..
            }) = parsed(line)
            else {
                panic!("{line}");
            };
            assert_eq!(volume.given(), "/v");
            assert_eq!(mount_info.text(), r#"{"device":"/dev/x","fstype":"ext4"}"#);
        }
        let line = "add /v --device /dev/x --fstype xfs --options noatime,ro --fs-group 7 \
                    --fs-group-change-policy OnRootMismatch";
        let Ok(DirectVolumeCommand::Add { mount_info, .. }) = parsed(line) else {
            panic!("{line}");
        };
        let written: Value = serde_json::from_str(&mount_info.text()).unwrap();
        assert_eq!(
            written,
            json!({ "volume-type": "block", "device": "/dev/x", "fstype": "xfs", "options": ["noatime", "ro"],
                "metadata": { "fsGroup": "7", "fsGroupChangePolicy": "OnRootMismatch" } })
        );
        for line in ["resize /v 4096", "resize --volume-path /v --size 4096"] {
            let Ok(DirectVolumeCommand::Resize { size, .. }) = parsed(line) else {
                panic!("{line}");
            };
            assert_eq!(size.least(), 4096);
        }
        for line in [
            "add /v",
            "add /v {} --device /dev/x --fstype ext4",
            "add /v --device /dev/x",
            "add /v --fstype ext4",
            "add /v {} --options ro",
            "add --mount-info {}",
            "stats",
            "remove /v --volume-path /v",
            "resize /v -1",
            "resize /v 8Gi",
        ] {
            assert!(parsed(line).is_err(), "{line}");
        }
    }

    /// The commands below one that are told of, as they are said.
    fn said(command: &clap::Command, before: &str) -> Vec<String> {
        let shown = command.get_subcommands().filter(|sub| !sub.is_hide_set());
        let shown = shown.filter(|sub| sub.get_name() != "help");
        let mut all = Vec::new();
        for sub in shown {
            let name = format!("{before} {}", sub.get_name());
            let below = said(sub, &name);
            all.extend(if below.is_empty() { vec![name] } else { below });
        }
        all
    }

    #[test]
    fn what_each_command_prints_is_documented() {
        let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/commands.md");
        let page = fs::read_to_string(page).unwrap();
        let titles: Vec<&str> = page
            .lines()
            .filter_map(|line| line.strip_prefix("### `"))
            .collect();
        let all = said(&Cli::command(), "brig");
        assert!(all.len() > 25, "{all:?}");
        for name in all {
            let is_of = |title: &&str| {
                title
                    .strip_prefix(&name)
                    .is_some_and(|rest| rest.starts_with([' ', '`']))
            };
            assert!(
                titles.iter().any(is_of),
                "tests/outputs has nothing of '{name}'"
            );
        }
    }

    #[test]
    fn every_shell_and_every_command_is_described() {
        for shell in clap_complete::Shell::value_variants() {
            let script = completion(*shell);
            assert!(script.contains("timeline"), "{shell}");
        }
        let dir = tempfile::tempdir().unwrap();
        man(dir.path()).unwrap();
        for page in [
            "brig.1",
            "brig-check.1",
            "brig-config-show.1",
            "brig-direct-volume-add.1",
        ] {
            let page = fs::read_to_string(dir.path().join(page)).unwrap();
            assert!(page.contains(".SH SYNOPSIS"));
        }
    }
}
