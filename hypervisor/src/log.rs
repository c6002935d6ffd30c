//! The VMM's log: slog records as JSON lines on standard error, bounded in size.
//!
//! Guest activity can cause log lines, so there is a limit for the life of the process; the last
//! line says that it was met.

use std::fmt;
use std::io::{self, Write};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value};
use slog::{Drain, KV, Key, Logger, Never, OwnedKVList, Record, Serializer, o};

/// The most bytes written in the life of the process.
const MAX_TOTAL: usize = 1 << 20;

/// The tag of the record that says how the VM ended: it is written even when a guest has used up
/// the limit.
pub const LAST_WORDS: &str = "last-words";

/// The process's logger.
pub fn logger() -> Logger {
    Logger::root(
        JsonLines {
            left: AtomicUsize::new(MAX_TOTAL),
        },
        o!("component" => "vmm"),
    )
}

struct JsonLines {
    left: AtomicUsize,
}

impl Drain for JsonLines {
    type Ok = ();
    type Err = Never;

    fn log(&self, record: &Record<'_>, values: &OwnedKVList) -> Result<(), Never> {
        let line = line(record, values);
        let taken = self
            .left
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                left.checked_sub(line.len())
            });
        let line = match taken {
            Ok(_) => line,
            Err(_) if record.tag() == LAST_WORDS => line,
            // Once: the rest of the budget is gone after this.
            Err(left) if left > 0 && self.left.swap(0, Ordering::Relaxed) > 0 => {
                "{\"level\":\"WARN\",\"msg\":\"log limit reached\",\"component\":\"vmm\"}\n".into()
            }
            Err(_) => return Ok(()),
        };
        // One write a line; a log that cannot be written cannot be reported either.
        let _ = io::stderr().write_all(line.as_bytes());
        Ok(())
    }
}

fn line(record: &Record<'_>, values: &OwnedKVList) -> String {
    let mut fields = Fields(Map::new());
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).ok();
    fields.put(
        "ts_ms",
        Value::from(since_epoch.and_then(|time| u64::try_from(time.as_millis()).ok())),
    );
    fields.put("level", Value::from(record.level().as_str()));
    fields.put("msg", Value::from(record.msg().to_string()));
    // Serialising into a map cannot fail.
    let _ = values.serialize(record, &mut fields);
    let _ = record.kv().serialize(record, &mut fields);
    let mut line = Value::Object(fields.0).to_string();
    line.push('\n');
    line
}

/// Numbers and truth values stay what they are in JSON.
macro_rules! emit {
    ($($name:ident $kind:ty),*) => {$(
        fn $name(&mut self, key: Key, value: $kind) -> slog::Result {
            self.put(key, Value::from(value));
            Ok(())
        }
    )*};
}

struct Fields(Map<String, Value>);

impl Fields {
    fn put(&mut self, key: &str, value: Value) {
        self.0.insert(key.to_owned(), value);
    }
}

impl Serializer for Fields {
    fn emit_arguments(&mut self, key: Key, value: &fmt::Arguments<'_>) -> slog::Result {
        self.put(key, Value::from(value.to_string()));
        Ok(())
    }
    emit!(emit_u8 u8, emit_u16 u16, emit_u32 u32, emit_u64 u64, emit_usize usize);
    emit!(emit_i32 i32, emit_i64 i64, emit_bool bool);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_one_line_of_json_with_its_fields() {
        let values: OwnedKVList = o!("component" => "vmm").into();
        let line = line(
            &slog::record!(
                slog::Level::Warning,
                "",
                &format_args!("two\nlines"),
                slog::b!("size" => 7i32)
            ),
            &values,
        );
        assert_eq!(line.matches('\n').count(), 1);
        let value: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(value["msg"], "two\nlines");
        assert_eq!(value["component"], "vmm");
        assert_eq!(value["size"], 7);
        assert_eq!(value["level"], "WARNING");
    }
}
