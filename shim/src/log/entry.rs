//! One record of the log, as text or as an object. Text from the guest is escaped and cut.

use std::fmt::{self, Write as _};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value};
use slog::{KV, Key, Level, OwnedKVList, Record};

/// `PIPE_BUF`: the kernel does not interleave writes up to this size.
const MAX_LINE: usize = 4096;
/// The field that says where a line is from which is not the shim's own.
const FROM: &str = "from";
/// Its value for the guest's console.
pub const CONSOLE: &str = "console";

/// A record on its way to a line.
pub(super) struct Entry {
    /// What every line has: time, level and message.
    pub(super) time: String,
    pub(super) level: &'static str,
    pub(super) message: String,
    pub(super) fields: Vec<(String, String)>,
}

impl Entry {
    pub(super) fn of(now: SystemTime, record: &Record<'_>, values: &OwnedKVList) -> Self {
        let level = match record.level() {
            Level::Critical => "fatal",
            Level::Error => "error",
            Level::Warning => "warning",
            Level::Info => "info",
            Level::Debug | Level::Trace => "debug",
        };
        let mut fields = Fields(Vec::new());
        // Collecting cannot fail.
        let _ = record.kv().serialize(record, &mut fields);
        let _ = values.serialize(record, &mut fields);
        Self {
            time: rfc3339(now),
            level,
            message: record.msg().to_string(),
            fields: fields.0,
        }
    }

    pub(super) fn is_console(&self) -> bool {
        let from = self.fields.iter().find(|(key, _)| key == FROM);
        from.is_some_and(|(_, value)| value == CONSOLE)
    }

    /// logfmt, cut to what is written whole.
    pub(super) fn text(&self) -> String {
        let mut line = format!("time=\"{}\" level={} msg=", self.time, self.level);
        push_quoted(&mut line, &self.message);
        for (key, value) in &self.fields {
            line.push(' ');
            line.push_str(key);
            line.push('=');
            push_quoted(&mut line, value);
        }
        line.truncate(floor(&line, MAX_LINE - 1));
        line
    }

    /// A JSON object, whose texts are cut as far as it must be to be written whole.
    pub(super) fn json(&self) -> String {
        let mut most = MAX_LINE;
        loop {
            let cut = |text: &str| Value::from(&text[..floor(text, most)]);
            let fixed = [
                ("time", Value::from(self.time.as_str())),
                ("level", Value::from(self.level)),
                ("msg", cut(&self.message)),
            ];
            let fixed = fixed.map(|(key, value)| (key.to_owned(), value));
            let fields = self.fields.iter();
            let fields = fields.map(|(key, value)| (key.clone(), cut(value)));
            // Of two fields with one name the first counts, and of ours none is another's.
            let mut object: Map<String, Value> = Map::new();
            for (key, value) in fixed.into_iter().chain(fields) {
                object.entry(key).or_insert(value);
            }
            let line = Value::from(object).to_string();
            if line.len() < MAX_LINE || most == 0 {
                return line;
            }
            most /= 2;
        }
    }
}

/// The largest beginning of at most so many bytes that ends between characters.
pub(super) fn floor(text: &str, most: usize) -> usize {
    let mut end = text.len().min(most);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    end
}

/// Fields by name, the record's own first.
struct Fields(Vec<(String, String)>);

impl slog::Serializer for Fields {
    fn emit_arguments(&mut self, key: Key, value: &fmt::Arguments<'_>) -> slog::Result {
        let name: &str = key;
        self.0.push((name.to_owned(), value.to_string()));
        Ok(())
    }
}

fn push_quoted(line: &mut String, text: &str) {
    line.push('"');
    for c in text.chars() {
        match c {
            '"' => line.push_str("\\\""),
            '\\' => line.push_str("\\\\"),
            '\n' => line.push_str("\\n"),
            c if c.is_control() => {
                let _ = write!(line, "\\x{:02x}", u32::from(c));
            }
            c => line.push(c),
        }
    }
    line.push('"');
}

/// The time in UTC as RFC 3339 with milliseconds.
#[must_use]
pub fn rfc3339(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let (days, rest) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    // Civil date from a day count: years that begin in March make the leap day the last one.
    let z = days + 719_468;
    let (era, day_of_era) = (z / 146_097, z % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 {
        shifted + 3
    } else {
        shifted - 9
    };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:03}Z",
        rest / 3600,
        rest / 60 % 60,
        rest % 60,
        since.subsec_millis()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_civil() {
        let at = |secs| rfc3339(UNIX_EPOCH + Duration::from_secs(secs));
        assert_eq!(at(0), "1970-01-01T00:00:00.000Z");
        assert_eq!(at(951_782_400), "2000-02-29T00:00:00.000Z");
        assert_eq!(at(1_795_199_430), "2026-11-20T18:30:30.000Z");
    }

    fn entry(message: &str, fields: &[(&str, &str)]) -> Entry {
        let fields = fields.iter();
        Entry {
            time: rfc3339(UNIX_EPOCH),
            level: "info",
            message: message.to_owned(),
            fields: fields
                .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
                .collect(),
        }
    }

    #[test]
    fn a_record_is_a_line_of_text_or_an_object() {
        let entry = entry("it \"is\"", &[("from", "console"), ("runtime", "brig")]);
        assert_eq!(
            entry.text(),
            r#"time="1970-01-01T00:00:00.000Z" level=info msg="it \"is\"" from="console" runtime="brig""#
        );
        let object: Value = serde_json::from_str(&entry.json()).unwrap();
        assert_eq!(object["msg"], "it \"is\"");
        assert_eq!(
            (&object["from"], &object["level"]),
            (&"console".into(), &"info".into())
        );
        assert!(entry.is_console());
    }

    #[test]
    fn a_long_line_is_cut_and_an_object_stays_one() {
        for text in ["\u{1}".repeat(9000), "é".repeat(9000), "x".repeat(9000)] {
            let entry = entry(&text, &[("a", &text), ("msg", "forged")]);
            assert!(entry.text().len() < MAX_LINE);
            let line = entry.json();
            assert!(line.len() < MAX_LINE && !line.contains('\n'));
            let object: Value = serde_json::from_str(&line).unwrap();
            assert!(object["msg"] != "forged");
            assert!(object["a"].as_str().unwrap().len() > 200);
        }
    }

    #[test]
    fn text_of_the_guest_cannot_forge_a_line() {
        let mut line = String::new();
        push_quoted(&mut line, "a\"\nlevel=error\u{1b}");
        assert_eq!(line, "\"a\\\"\\nlevel=error\\x1b\"");
    }
}
