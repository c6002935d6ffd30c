//! The agent's log: JSON lines in a bounded ring until the shim opens the log stream, which then
//! drains the ring. Written only by the agent; a line never holds more than ids, sizes and causes.
use std::{
    collections::VecDeque,
    fmt, fs,
    io::{self, Write as _},
    panic::{RefUnwindSafe, UnwindSafe},
    sync::{Arc, Mutex, MutexGuard},
    time::{SystemTime, UNIX_EPOCH},
};

use serde_json::{Map, Value};
use slog::{Drain, KV, Key, Logger, OwnedKVList, Record, Serializer};
use tokio::{io::AsyncWriteExt as _, sync::Notify};

use crate::stream::Stream;
use crate::sync::lock;

/// Lines kept while nobody reads; older ones are dropped and counted.
const RING_LINES: usize = 512;

/// A line in the kernel's log, for what has no ring to write to: the VMM passes it on. `level` as syslog(2) has it.
///
/// # Errors
/// If there is no /dev/kmsg.
pub fn to_kernel(level: u8, text: &str) -> io::Result<()> {
    let line = format!("<{level}>brig-agent: {}\n", text.replace('\n', " "));
    fs::OpenOptions::new()
        .write(true)
        .open("/dev/kmsg")?
        .write_all(line.as_bytes())
}

/// The ring behind the logger. Cheap to clone.
#[derive(Clone)]
pub struct LogRing {
    shared: Arc<Shared>,
}

struct Shared {
    lines: Mutex<Lines>,
    added: Notify,
    echo: bool,
}

#[derive(Default)]
struct Lines {
    queue: VecDeque<String>,
    dropped: u64,
}

impl UnwindSafe for LogRing {}
impl RefUnwindSafe for LogRing {}

impl LogRing {
    /// An empty ring; with `echo` each line also goes to stderr.
    pub fn new(echo: bool) -> Self {
        Self {
            shared: Arc::new(Shared {
                lines: Mutex::default(),
                added: Notify::new(),
                echo,
            }),
        }
    }

    /// A logger that writes into this ring.
    pub fn logger(&self) -> Logger {
        Logger::root(self.clone().ignore_res(), slog::o!())
    }

    fn lines(&self) -> MutexGuard<'_, Lines> {
        lock(&self.shared.lines)
    }

    fn push(&self, line: String) {
        if self.shared.echo {
            let _ = io::stderr().write_all(line.as_bytes());
        }
        let mut lines = self.lines();
        if lines.queue.len() == RING_LINES {
            lines.queue.pop_front();
            lines.dropped += 1;
        }
        lines.queue.push_back(line);
        drop(lines);
        self.shared.added.notify_one();
    }

    /// Copies lines to `stream` for as long as it takes them.
    ///
    /// # Errors
    /// The error that ended the stream.
    pub async fn drain_to(&self, mut stream: Stream) -> io::Result<()> {
        loop {
            let (line, dropped) = {
                let mut lines = self.lines();
                (lines.queue.pop_front(), std::mem::take(&mut lines.dropped))
            };
            if dropped > 0 {
                let note = format!(
                    "{{\"level\":\"WARN\",\"msg\":\"log lines dropped\",\"count\":{dropped}}}\n"
                );
                stream.write_all(note.as_bytes()).await?;
            }
            match line {
                Some(line) => stream.write_all(line.as_bytes()).await?,
                None => self.shared.added.notified().await,
            }
        }
    }
}

impl Drain for LogRing {
    type Ok = ();
    type Err = slog::Never;

    fn log(&self, record: &Record<'_>, values: &OwnedKVList) -> Result<(), slog::Never> {
        let mut line = Line(Map::new());
        let ts = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        line.0.insert("ts".into(), Value::from(ts.as_secs_f64()));
        line.0
            .insert("level".into(), Value::from(record.level().as_str()));
        line.0
            .insert("msg".into(), Value::from(record.msg().to_string()));
        let _ = record.kv().serialize(record, &mut line);
        let _ = values.serialize(record, &mut line);
        let mut text = Value::Object(line.0).to_string();
        text.push('\n');
        self.push(text);
        Ok(())
    }
}

/// Collects the key-value pairs of one record; numbers stay numbers.
struct Line(Map<String, Value>);

macro_rules! emit_number {
    ($($name:ident: $ty:ty),*) => {$(
        fn $name(&mut self, key: Key, value: $ty) -> slog::Result {
            self.0.insert(key.to_string(), Value::from(value));
            Ok(())
        }
    )*};
}

impl Serializer for Line {
    emit_number!(emit_u8: u8, emit_u16: u16, emit_u32: u32, emit_u64: u64, emit_usize: usize,
        emit_i8: i8, emit_i16: i16, emit_i32: i32, emit_i64: i64, emit_isize: isize, emit_bool: bool);

    fn emit_arguments(&mut self, key: Key, value: &fmt::Arguments<'_>) -> slog::Result {
        self.0
            .insert(key.to_string(), Value::from(value.to_string()));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_becomes_one_json_line_with_its_fields() {
        let ring = LogRing::new(false);
        slog::info!(ring.logger(), "created"; "container" => "c\"1", "pid" => 7_u32);
        let line = ring.lines().queue.pop_front().unwrap();
        let value: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(value["container"], "c\"1");
        assert_eq!(value["pid"], 7);
        assert_eq!(value["level"], "INFO");
        assert!(line.ends_with("}\n"));
    }

    #[test]
    fn the_ring_keeps_the_newest_lines_and_counts_the_rest() {
        let ring = LogRing::new(false);
        for n in 0..RING_LINES + 3 {
            ring.push(n.to_string());
        }
        assert_eq!(ring.lines().dropped, 3);
        assert_eq!(ring.lines().queue.front().unwrap(), "3");
    }
}
