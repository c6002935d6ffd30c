//! Lines that the VMM, the guest's kernel and its agent write, on their way to the shim's log: bounded
//! in length and rate, escaped by the log. The VMM and the agent write JSON lines; their level and
//! message are taken over, anything else is logged as it is.

use std::fmt::Write as _;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use serde_json::{Map, Value};
use slog::{Logger, debug, error, info, warn};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, BufReader};
use tokio::net::unix::pipe;

use crate::log::{Gate, Passed};

/// The longest line in bytes.
const MAX_LINE: u64 = 2048;

/// Cuts a line that comes whole from the VMM.
pub(super) fn cut(line: &mut String) {
    let most = usize::try_from(MAX_LINE).unwrap_or(usize::MAX);
    let mut end = line.len().min(most);
    while !line.is_char_boundary(end) {
        end -= 1;
    }
    line.truncate(end);
}

/// How serious a line is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Severity {
    Error,
    Warning,
    Info,
    Debug,
    /// It does not say: a panic's, or a library's.
    Unsaid,
}

/// Logs the lines of a pipe within the gate's rate; returns the message of the last one that may say why something ended.
pub async fn forward(fd: OwnedFd, source: &'static str, logger: Logger) -> Option<String> {
    let _ = rustix::io::ioctl_fionbio(fd.as_fd(), true);
    let reader = match pipe::Receiver::from_owned_fd(fd) {
        Ok(reader) => reader,
        Err(error) => {
            warn!(logger, "cannot read lines"; "from" => source, "error" => %error);
            return None;
        }
    };
    let mut gate = Gate::new();
    let mut reader = BufReader::with_capacity(1024, reader);
    let mut last = None;
    while let Ok(Some(line)) = next(&mut reader).await {
        if !line.trim().is_empty() {
            let (severity, message) = logged(&logger, &mut gate, source, &line);
            if !matches!(severity, Severity::Info | Severity::Debug) {
                last = Some(message);
            }
        }
    }
    last
}

/// A line without its end; a longer one comes in pieces.
async fn next<R: AsyncRead + Unpin>(reader: &mut BufReader<R>) -> io::Result<Option<String>> {
    let mut bytes = Vec::new();
    if reader.take(MAX_LINE).read_until(b'\n', &mut bytes).await? == 0 {
        return Ok(None);
    }
    let text = String::from_utf8_lossy(&bytes);
    Ok(Some(text.trim_end_matches(['\n', '\r']).to_owned()))
}

/// Logs one line if the gate lets it pass; returns its message.
pub(super) fn log(logger: &Logger, gate: &mut Gate, source: &str, line: &str) -> String {
    logged(logger, gate, source, line).1
}

fn logged(logger: &Logger, gate: &mut Gate, source: &str, line: &str) -> (Severity, String) {
    let (severity, message) = read(line);
    if let Passed::Yes { suppressed } = gate.pass(Instant::now()) {
        if suppressed > 0 {
            warn!(logger, "lines were suppressed"; "from" => source, "lines" => suppressed);
        }
        match severity {
            Severity::Error => error!(logger, "{}", message; "from" => source),
            Severity::Warning => warn!(logger, "{}", message; "from" => source),
            Severity::Info | Severity::Unsaid => info!(logger, "{}", message; "from" => source),
            Severity::Debug => debug!(logger, "{}", message; "from" => source),
        }
    }
    (severity, message)
}

/// Takes a JSON line of slog's apart.
fn read(line: &str) -> (Severity, String) {
    let plain = || (Severity::Unsaid, line.to_owned());
    if !line.starts_with('{') {
        return plain();
    }
    let Ok(fields) = serde_json::from_str::<Map<String, Value>>(line) else {
        return plain();
    };
    let Some(message) = fields.get("msg").and_then(Value::as_str) else {
        return plain();
    };
    let severity = match fields.get("level").and_then(Value::as_str) {
        Some("CRIT" | "CRITICAL" | "ERRO" | "ERROR") => Severity::Error,
        Some("WARN" | "WARNING") => Severity::Warning,
        Some("DEBG" | "DEBUG" | "TRCE" | "TRACE") => Severity::Debug,
        _ => Severity::Info,
    };
    let mut text = message.to_owned();
    for (key, value) in &fields {
        if !matches!(key.as_str(), "msg" | "level" | "ts" | "ts_ms" | "component") {
            let _ = match value {
                Value::String(value) => write!(text, " {key}={value}"),
                value => write!(text, " {key}={value}"),
            };
        }
    }
    (severity, text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_json_line_keeps_its_level_and_fields_and_others_are_left_as_they_are() {
        let line = r#"{"level":"WARN","msg":"slow","ts":1,"component":"vmm","micros":7,"why":"x"}"#;
        assert_eq!(
            read(line),
            (Severity::Warning, "slow micros=7 why=x".into())
        );
        for plain in ["panicked at main.rs", "{broken", r#"{"no":"message"}"#, ""] {
            assert_eq!(read(plain), (Severity::Unsaid, plain.into()));
        }
    }

    #[tokio::test]
    async fn the_last_line_is_told_and_long_ones_come_in_pieces() {
        let (read, write) = rustix::pipe::pipe().unwrap();
        let logger = Logger::root(slog::Discard, slog::o!());
        let mut text = "x".repeat(5000);
        text.push_str("\nlast words\n\n");
        rustix::io::write(&write, text.as_bytes()).unwrap();
        drop(write);
        assert_eq!(forward(read, "test", logger).await.unwrap(), "last words");
    }

    #[tokio::test]
    async fn what_goes_as_it_should_is_no_reason_of_an_end() {
        let started = r#"{"level":"INFO","msg":"VM started","vcpus":1}"#;
        let slow = r#"{"level":"WARN","msg":"the disk is slow"}"#;
        for (lines, expected) in [
            (vec![started], None),
            (vec![slow, started], Some("the disk is slow")),
            (
                vec!["panicked at main.rs", started],
                Some("panicked at main.rs"),
            ),
        ] {
            let (read, write) = rustix::pipe::pipe().unwrap();
            rustix::io::write(&write, lines.join("\n").as_bytes()).unwrap();
            drop(write);
            let logger = Logger::root(slog::Discard, slog::o!());
            assert_eq!(forward(read, "test", logger).await.as_deref(), expected);
        }
    }

    proptest! {
        #[test]
        fn any_line_is_read(line in "\\{?.{0,80}") {
            let _ = read(&line);
        }
    }
}
