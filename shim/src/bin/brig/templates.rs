//! `brig template`: the templates of this node, made before the first pod wants one, and dropped.

use std::os::fd::AsFd as _;
use std::path::Path;
use std::time::SystemTime;

use brig_shim::asked::config::{Config, MIB};
use brig_shim::error::{Error, Result};
use brig_shim::guest::vm::capture;
use brig_shim::guest::vm::host::{open_initramfs, open_kernel, recipe};
use brig_shim::node::templates::maker::own_cgroup;
use brig_shim::node::templates::{Entry, Files, Kind, Templates};
use brig_shim::pod::size::template_machine;
use serde_json::{Value, json};

use crate::cli::TemplateCommand;
use crate::pods::show_age;
use crate::terminal;

/// Does it; what is to be printed.
///
/// # Errors
/// What is missing or in the way.
pub fn run(base: &Path, command: &TemplateCommand) -> Result<String> {
    let templates = Templates::beside(base);
    match command {
        TemplateCommand::List { output } => list(&templates, output.json),
        TemplateCommand::Build { config, output } => build(config.as_deref(), output.json),
        TemplateCommand::Drop { key, output } => drop_some(&templates, key.as_deref(), output.json),
    }
}

fn failed(error: std::io::Error) -> Error {
    Error::io("the templates", &error)
}

fn list(templates: &Templates, as_json: bool) -> Result<String> {
    let entries = templates.list().map_err(failed)?;
    if as_json {
        let rows = entries.iter().map(described);
        return Ok(format!("{}\n", rows.collect::<Value>()));
    }
    let rows = entries.iter().map(|entry| {
        let age = SystemTime::now().duration_since(entry.made);
        let recipe = entry.recipe.as_ref();
        let of = |value: Option<String>| value.unwrap_or_else(|| "-".to_owned());
        vec![
            entry.key.clone(),
            format!("{} MiB", entry.bytes.div_ceil(MIB)),
            show_age(age.unwrap_or_default()),
            of(recipe.map(|recipe| format!("{} MiB", recipe.machine.memory / MIB))),
            of(recipe.map(|recipe| recipe.machine.most_cpus.to_string())),
            match &entry.failed {
                Some(reason) if entry.later => format!("not made, and tried again later: {reason}"),
                Some(reason) => format!("cannot be made: {reason}"),
                None => of(recipe.map(|recipe| recipe.kernel.display().to_string())),
            },
        ]
    });
    let rows: Vec<_> = rows.collect();
    let head = ["TEMPLATE", "SIZE", "AGE", "MEMORY", "CPUS", "KERNEL"];
    Ok(terminal::table(&head, &rows))
}

fn described(entry: &Entry) -> Value {
    json!({
        "template": entry.key,
        "bytes": entry.bytes,
        "madeUnixSeconds": entry.made.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs(),
        "recipe": entry.recipe,
        "failed": entry.failed,
        "later": entry.later,
    })
}

fn build(config: Option<&Path>, as_json: bool) -> Result<String> {
    let config = Config::load(config)?;
    let (kernel, initramfs) = (
        open_kernel(&config.kernel)?,
        open_initramfs(&config.initramfs)?,
    );
    let machine = template_machine(&config);
    let files = Files {
        kernel: kernel.as_fd(),
        initramfs: initramfs.as_fd(),
        vmm: &config.vmm,
    };
    let kind = Kind::of(&files, &machine).map_err(failed)?;
    let recipe = recipe(&config, machine, &kind);
    let templates = Templates::beside(&config.state_dir);
    let lock = templates.lock().map_err(failed)?;
    let _lock = lock.ok_or_else(|| {
        Error::state("a template is being made on this node; look again when it is there")
    })?;
    let known = templates.list().map_err(failed)?;
    let there = known
        .iter()
        .any(|entry| entry.key == recipe.key && entry.failed.is_none());
    if !there {
        capture::make(&recipe, &own_cgroup()?).map_err(|unmade| unmade.error)?;
    }
    if as_json {
        return Ok(format!(
            "{}\n",
            json!({ "template": recipe.key, "made": !there })
        ));
    }
    let what = if there {
        "is there already"
    } else {
        "was made"
    };
    let mut text = format!("{} {what}\n", recipe.key);
    if !config.template {
        text.push_str("no pod uses it: template = false in this configuration\n");
    }
    Ok(text)
}

fn drop_some(templates: &Templates, key: Option<&str>, as_json: bool) -> Result<String> {
    let entries = templates.list().map_err(failed)?;
    let chosen: Vec<_> = entries
        .iter()
        .filter(|entry| key.is_none_or(|key| entry.key.starts_with(key)))
        .collect();
    if let (Some(key), true) = (key, chosen.is_empty()) {
        return Err(Error::not_found(format!(
            "no template of this node begins with {key}; see brig template list"
        )));
    }
    for entry in &chosen {
        templates.drop_one(&entry.key).map_err(failed)?;
    }
    let keys: Vec<_> = chosen.iter().map(|entry| entry.key.as_str()).collect();
    if as_json {
        return Ok(format!("{}\n", json!({ "dropped": keys })));
    }
    Ok(keys.iter().map(|key| format!("dropped {key}\n")).collect())
}
