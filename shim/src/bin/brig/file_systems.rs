//! How full the file systems of a guest are, by its agent's answer to `df`: a guest's word, of which only lines of the known
//! form are taken, about containers and volumes that the shim knows.

use serde_json::{Value, json};

/// The figures of a line behind its name and type.
const FIGURES: [&str; 6] = [
    "bytes",
    "usedBytes",
    "availableBytes",
    "files",
    "usedFiles",
    "availableFiles",
];
/// The longest name of a type.
const MAX_TYPE: usize = 16;

/// What is known of each container's root and each volume on a disk, in the order of the answer. `shim` is its word on the
/// pod.
#[must_use]
pub fn rows(answer: &[u8], shim: &Value) -> Vec<Value> {
    let text = String::from_utf8_lossy(answer);
    let mut rows: Vec<Value> = Vec::new();
    for line in text.lines().skip(1) {
        let Some(row) = row(line, shim) else { continue };
        let is_same = |other: &Value| other["of"] == row["of"] && other["name"] == row["name"];
        if !rows.iter().any(is_same) {
            rows.push(row);
        }
    }
    rows
}

fn row(line: &str, shim: &Value) -> Option<Value> {
    let words: Vec<&str> = line.split(' ').collect();
    let [of, name, kind, figures @ ..] = words.as_slice() else {
        return None;
    };
    let known = match *of {
        "container" => &shim["containers"],
        "volume" => &shim["volumes"],
        _ => return None,
    };
    let known = known.as_array()?.iter().find(|one| one["id"] == *name)?;
    let plain = kind.len() <= MAX_TYPE && kind.bytes().all(|byte| byte.is_ascii_alphanumeric());
    if !plain || figures.len() != FIGURES.len() {
        return None;
    }
    let mut row = json!({ "of": of, "name": name, "type": kind, "path": known["path"] });
    for (key, figure) in FIGURES.iter().zip(figures) {
        row[*key] = json!(figure.parse::<u64>().ok()?);
    }
    // Nobody uses more than there is.
    let within = |used: &str, all: &str| row[used].as_u64() <= row[all].as_u64();
    (within("usedBytes", "bytes") && within("usedFiles", "files")).then_some(row)
}

/// One of them for people.
#[must_use]
pub fn line(row: &Value) -> String {
    let figure = |key: &str| row[key].as_u64().unwrap_or(0);
    let kib = |key: &str| figure(key) / 1024;
    let what = match row["path"].as_str() {
        Some(path) => format!("volume {path}"),
        None => format!("{} {}", text(&row["of"]), text(&row["name"])),
    };
    format!(
        "{what}: {} of {} KiB used, {} can be; {} of {} files ({})",
        kib("usedBytes"),
        kib("bytes"),
        kib("availableBytes"),
        figure("usedFiles"),
        figure("files"),
        text(&row["type"])
    )
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or("-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_shim_knows_of_is_taken_and_in_the_known_form() {
        let shim = json!({ "containers": [{ "id": "c1" }], "volumes": [{ "id": "d1", "path": "/pv/mount" }] });
        let answer = "OF NAME …\n\
            container c1 overlay 4096 1024 3072 10 4 6\n\
            container c1 overlay 9 9 9 9 9 9\n\
            container c2 overlay 4096 1024 3072 10 4 6\n\
            volume d1 ext4 8192 2048 6144 20 1 19\n\
            volume d1 ext4 1 2\n\
            volume d1 \u{1b}[2J 1 1 1 1 1 1\n\
            other c1 ext4 1 1 1 1 1 1\n";
        let rows = rows(answer.as_bytes(), &shim);
        assert_eq!(rows.len(), 2, "{rows:?}");
        assert_eq!(
            (&rows[0]["name"], &rows[0]["usedBytes"]),
            (&json!("c1"), &json!(1024))
        );
        assert_eq!(
            line(&rows[1]),
            "volume /pv/mount: 2 of 8 KiB used, 6 can be; 1 of 20 files (ext4)"
        );
    }

    #[test]
    fn figures_that_cannot_be_are_none() {
        let shim = json!({ "containers": [{ "id": "c1" }] });
        for figures in [
            "1 2 0 1 1 0",
            "5 1 1 1 2 0",
            "-1 0 0 0 0 0",
            "99999999999999999999 0 0 0 0 0",
        ] {
            let answer = format!("\ncontainer c1 ext4 {figures}\n");
            assert!(rows(answer.as_bytes(), &shim).is_empty(), "{figures}");
        }
        assert!(rows(b"\n\xff\xfe", &Value::Null).is_empty());
    }
}
