//! The CRI's log format: `TIME STREAM P|F TEXT`, one entry a line; `P` says that the line goes on.

use anyhow::{Context, Result, ensure};

/// One line that a container wrote, its parts joined.
#[derive(Debug, PartialEq, Eq)]
pub struct Line {
    /// RFC 3339 time of its last part.
    pub time: String,
    /// "stdout" or "stderr".
    pub stream: String,
    /// Without the line feed.
    pub text: String,
}

/// Reads a log file.
///
/// # Errors
/// Names the first line that is not of the format.
pub fn parse(data: &str) -> Result<Vec<Line>> {
    let mut lines = Vec::new();
    // Unfinished text of each stream.
    let mut partial: [(&str, String); 2] = [("stdout", String::new()), ("stderr", String::new())];
    for entry in data.lines() {
        let mut fields = entry.splitn(4, ' ');
        let mut field = |what: &str| {
            fields
                .next()
                .with_context(|| format!("log entry without {what}: '{entry}'"))
        };
        let time = field("time")?;
        let stream = field("stream")?;
        let tag = field("tag")?;
        let text = field("text")?;
        ensure!(
            time.len() >= 20 && time.as_bytes()[4] == b'-' && time.as_bytes()[10] == b'T',
            "log entry without an RFC 3339 time: '{entry}'"
        );
        let open = partial
            .iter_mut()
            .find(|(name, _)| *name == stream)
            .with_context(|| format!("log entry of an unknown stream: '{entry}'"))?;
        open.1.push_str(text);
        match tag {
            "P" => {}
            "F" => lines.push(Line {
                time: time.to_owned(),
                stream: stream.to_owned(),
                text: std::mem::take(&mut open.1),
            }),
            _ => anyhow::bail!("log entry with tag '{tag}': '{entry}'"),
        }
    }
    for (stream, text) in partial {
        if !text.is_empty() {
            lines.push(Line {
                time: String::new(),
                stream: stream.to_owned(),
                text,
            });
        }
    }
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_a_line_are_joined_per_stream() {
        let lines = parse(
            "2026-11-20T19:00:00.1Z stdout P one \n2026-11-20T19:00:00.2Z stderr F other\n2026-11-20T19:00:00.3Z stdout F two\n",
        )
        .unwrap();
        let texts: Vec<_> = lines
            .iter()
            .map(|line| (line.stream.as_str(), line.text.as_str()))
            .collect();
        assert_eq!(texts, [("stderr", "other"), ("stdout", "one two")]);
    }

    #[test]
    fn what_is_not_of_the_format_is_an_error() {
        for bad in [
            "hello",
            "2026-11-20T19:00:00Z stdout X text",
            "2026-11-20T19:00:00Z stdin F text",
            "yesterday-at-about-nine stdout F text",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_empty_line_is_a_line() {
        assert_eq!(parse("2026-11-20T19:00:00Z stdout F ").unwrap().len(), 1);
    }
}
