//! `brig exec`, `brig dmesg`, `brig logs`, `brig console` and `brig level`: what a living pod's shim and guest tell when
//! they are asked. What a guest says is any bytes.

use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use brig_shim::containerd::debug_service::Method;
use brig_shim::error::{Error, Result};
use brig_shim::log::Line;
use serde_json::{Value, json};

use crate::cli;
use crate::pods;
use crate::shims;
use crate::terminal::{self, printable, printable_line};

/// Between two looks for new lines.
const FOLLOW: Duration = Duration::from_millis(500);

/// Where the shim of a pod listens.
///
/// # Errors
/// `NotFound`; `FailedPrecondition` for one whose shim has ended.
pub fn socket(base: &Path, pod: &cli::Pod) -> Result<PathBuf> {
    socket_of(&pods::find(base, pod)?)
}

/// The same of a pod that was found.
///
/// # Errors
/// `FailedPrecondition` for one whose shim has ended.
pub fn socket_of(row: &pods::Row) -> Result<PathBuf> {
    row.to_ask().ok_or_else(|| {
        Error::state(format!(
            "pod {} has no shim that could be asked: see 'brig dump {}'",
            row.id, row.id
        ))
    })
}

/// The guest's answer to `words`, for people or programs.
///
/// # Errors
/// The shim's and the agent's.
pub fn guest(base: &Path, pod: &cli::Pod, words: &[String], as_json: bool) -> Result<String> {
    let answer = bytes(&socket(base, pod)?, words)?;
    Ok(if as_json {
        let output = String::from_utf8_lossy(&answer);
        format!("{}\n", json!({ "words": words, "output": output }))
    } else {
        ended(printable(&answer))
    })
}

/// The guest's answer to `words`.
///
/// # Errors
/// As of [`guest`].
pub fn bytes(socket: &Path, words: &[String]) -> Result<Vec<u8>> {
    shims::ask(
        socket,
        Method::Look,
        &json!({ "words": words }),
        shims::PATIENCE,
    )
}

/// The lines of a pod's log from `from` on.
///
/// # Errors
/// The shim's.
pub fn lines(socket: &Path, from: u64) -> Result<Vec<Line>> {
    let lines = shims::ask_json(socket, Method::Logs, &json!({ "from": from }))?;
    serde_json::from_value(lines)
        .map_err(|error| Error::internal(format!("the shim's lines are none: {error}")))
}

/// Prints what the pod's log has, or of it what the guest's console said, and what comes if it is followed.
///
/// # Errors
/// The shim's; `FailedPrecondition` for the console of a pod whose handler has no `debug`.
pub fn logs(base: &Path, pod: &cli::Pod, how: &cli::Lines, console: bool) -> Result<()> {
    let row = pods::find(base, pod)?;
    let socket = socket_of(&row)?;
    if console {
        let told = shims::ask_json(&socket, Method::Inspect, &Value::Null)?;
        if told["config"]["debug"]["value"] != true {
            return Err(Error::state(
                "the console is for handlers with debug = true in their configuration; 'brig dmesg' has the guest \
                 kernel's log, 'brig logs' the shim's",
            ));
        }
    }
    let mut from = 0;
    loop {
        let lines = match lines(&socket, from) {
            // It has ended, and all that it had to say was seen.
            Err(_) if from > 0 && !row.lives_on(base) => return Ok(()),
            Err(error) if from > 0 => {
                terminal::complain(&format!("{error}; asking again"));
                Vec::new()
            }
            lines => lines?,
        };
        let mut text = String::new();
        for line in &lines {
            if line.number > from {
                text.push_str(&missed(line.number - from, how.output.json));
            }
            from = line.number + 1;
            if line.console || !console {
                text.push_str(&show(line, console, how.output.json));
            }
        }
        terminal::print(&text)?;
        if !how.follow {
            return Ok(());
        }
        sleep(FOLLOW);
    }
}

fn missed(lines: u64, as_json: bool) -> String {
    if as_json {
        String::new()
    } else {
        format!("[{lines} earlier lines are not kept]\n")
    }
}

fn show(line: &Line, console: bool, as_json: bool) -> String {
    if as_json {
        format!(
            "{}\n",
            json!({ "number": line.number, "console": line.console, "text": line.text })
        )
    } else if console {
        format!("{}\n", printable_line(&message(&line.text)))
    } else {
        format!("{}\n", printable_line(&line.text))
    }
}

/// The message of a line of the log, whichever form it has.
fn message(line: &str) -> String {
    if let Ok(object) = serde_json::from_str::<Value>(line) {
        return object["msg"].as_str().unwrap_or_default().to_owned();
    }
    let Some((_, quoted)) = line.split_once(" msg=\"") else {
        return line.to_owned();
    };
    let mut message = String::new();
    let mut letters = quoted.chars();
    while let Some(letter) = letters.next() {
        match letter {
            '"' => break,
            '\\' => match letters.next() {
                Some('n') => message.push('\n'),
                // \x1b and the like stay as they are: nobody wants them done.
                Some('x') => message.push_str("\\x"),
                Some(other) => message.push(other),
                None => {}
            },
            other => message.push(other),
        }
    }
    message
}

/// Changes how much a living pod's shim logs.
///
/// # Errors
/// The shim's.
pub fn level(base: &Path, pod: &cli::Pod, level: &str, as_json: bool) -> Result<String> {
    let request = json!({ "level": level });
    let answer = shims::ask_json(&socket(base, pod)?, Method::Level, &request)?;
    if as_json {
        return Ok(format!("{answer}\n"));
    }
    let was = answer["was"].as_str().unwrap_or_default();
    Ok(format!(
        "logs {level} and worse from now on; before: {was}\n"
    ))
}

fn ended(mut text: String) -> String {
    if !text.is_empty() && !text.ends_with('\n') {
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_found_in_either_form() {
        let text = r#"time="t" level=info msg="a \"b\"\n\x1b[1m \\ c" from="console""#;
        assert_eq!(message(text), "a \"b\"\n\\x1b[1m \\ c");
        assert_eq!(message(r#"{"msg":"a\nb","from":"console"}"#), "a\nb");
        assert_eq!(message("neither"), "neither");
        let line = Line {
            number: 3,
            console: true,
            text: text.to_owned(),
        };
        assert_eq!(show(&line, true, false), "a \"b\" \\x1b[1m \\ c\n");
    }
}
