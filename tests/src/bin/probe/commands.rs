//! Runs one command after the other for who is at the other end of a stream: a line of JSON is a command with its arguments, a line of
//! JSON is what came of it. So that a benchmark counts its program, and not what brings it into a container or a guest.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use serde_json::json;

/// Serves until the input ends.
pub fn serve(input: impl Read, mut output: impl Write) -> Result<u8> {
    for line in BufReader::new(input).lines() {
        let words: Vec<String> = serde_json::from_str(&line?).context("a line is a JSON list")?;
        let (program, args) = words.split_first().context("an empty command")?;
        let ended = Command::new(program)
            .args(args)
            .stdin(Stdio::null())
            .output();
        let answer = match ended {
            Ok(ended) => json!({
                "code": ended.status.code(),
                "stdout": String::from_utf8_lossy(&ended.stdout),
                "stderr": String::from_utf8_lossy(&ended.stderr),
            }),
            Err(error) => {
                json!({"code": 127, "stdout": "", "stderr": format!("{program}: {error}")})
            }
        };
        writeln!(output, "{answer}")?;
        output.flush()?;
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_line_is_a_command_and_is_answered_by_a_line() {
        let input =
            "[\"echo\", \"one two\"]\n[\"sh\", \"-c\", \"echo no >&2; exit 3\"]\n[\"/nosuch\"]\n";
        let mut output = Vec::new();
        serve(input.as_bytes(), &mut output).unwrap();
        let lines: Vec<serde_json::Value> = String::from_utf8(output)
            .unwrap()
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_eq!(
            lines[0],
            json!({"code": 0, "stdout": "one two\n", "stderr": ""})
        );
        assert_eq!(lines[1], json!({"code": 3, "stdout": "", "stderr": "no\n"}));
        assert_eq!(lines[2]["code"], 127);
    }
}
