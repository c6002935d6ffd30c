//! What documents point to is there: files that are linked to or named, headings, and the documents that programs name in
//! their messages.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Component, Path, PathBuf};

/// Folders of the repository that documents name files in.
const FOLDERS: [&str; 7] = [
    "agent",
    "deploy",
    "docs",
    "guest-kernel",
    "hypervisor",
    "shim",
    "tests",
];
/// What has no text in it that anybody reads.
const LEFT_OUT: [&str; 4] = ["target", ".git", "corpus", "results"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The files below a folder whose names end so, by their paths in the repository.
fn files(below: &str, ends: &[&str]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![PathBuf::from(below)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(root().join(&folder)).unwrap() {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            let path = folder.join(&name);
            let kind = entry.file_type().unwrap();
            if kind.is_dir() && !LEFT_OUT.contains(&name.as_str()) {
                folders.push(path);
            } else if kind.is_file() && ends.iter().any(|end| name.ends_with(end)) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

fn documents() -> Vec<PathBuf> {
    let mut all = vec![PathBuf::from("README.md")];
    for folder in FOLDERS {
        all.extend(files(folder, &[".md"]));
    }
    all
}

fn text(path: &Path) -> String {
    fs::read_to_string(root().join(path)).unwrap()
}

/// The lines of a document that are not code.
fn prose(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut is_code = false;
    text.lines().enumerate().filter(move |(_, line)| {
        let fence = line.trim_start().starts_with("```");
        is_code ^= fence;
        !is_code && !fence && !line.starts_with("    ")
    })
}

/// The headings of a document, as a link names them.
fn headings(text: &str) -> BTreeSet<String> {
    let mut seen: BTreeMap<String, u32> = BTreeMap::new();
    let lines = prose(text).map(|(_, line)| line);
    let titles = lines.filter_map(|line| {
        let title = line.trim_start_matches('#');
        title.strip_prefix(' ').filter(|_| title.len() < line.len())
    });
    let mut all = BTreeSet::new();
    for title in titles {
        let name: String = shown(title.trim())
            .to_lowercase()
            .chars()
            .filter_map(|letter| match letter {
                ' ' => Some('-'),
                letter if letter.is_alphanumeric() || matches!(letter, '-' | '_') => Some(letter),
                _ => None,
            })
            .collect();
        let count = seen.entry(name.clone()).or_default();
        all.insert(match *count {
            0 => name,
            count => format!("{name}-{count}"),
        });
        *count += 1;
    }
    all
}

/// A title without what its links point to.
fn shown(title: &str) -> String {
    let mut shown = String::new();
    let mut rest = title;
    while let Some((before, link)) = rest.split_once("](") {
        shown.push_str(before);
        rest = link.split_once(')').map_or("", |(_, after)| after);
    }
    shown + rest
}

/// What the links of a line point to.
fn links(line: &str) -> Vec<&str> {
    let parts = line.split("](").skip(1);
    let ends = parts.filter_map(|part| part.split_once(')'));
    ends.map(|(target, _)| target).collect()
}

/// The words between backticks.
fn named(line: &str) -> impl Iterator<Item = &str> {
    let spans = line.split('`').skip(1).step_by(2);
    spans.flat_map(str::split_whitespace)
}

/// Whether a word is the path of something in the repository.
fn is_path(word: &str) -> bool {
    let plain = |letter: char| letter.is_ascii_alphanumeric() || "_./-".contains(letter);
    let folder = word.split_once('/').map(|(folder, _)| folder);
    folder.is_some_and(|folder| FOLDERS.contains(&folder)) && word.chars().all(plain)
}

/// A path from the root of the repository.
fn plain(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => drop(plain.pop()),
            Component::Normal(name) => plain.push(name),
            _ => {}
        }
    }
    plain
}

/// Why nothing is where a document points to, or is named.
fn missing(target: &Path, heading: Option<&str>) -> Option<String> {
    let target = plain(target);
    if !root().join(&target).exists() {
        return Some(format!("there is no {}", target.display()));
    }
    let heading = heading?;
    let is_there = headings(&text(&target)).contains(heading);
    (!is_there).then(|| format!("{} has no heading #{heading}", target.display()))
}

fn parts(link: &str) -> (&str, Option<&str>) {
    match link.split_once('#') {
        Some((path, heading)) => (path, Some(heading)),
        None => (link, None),
    }
}

#[test]
fn what_documents_link_to_and_name_is_there() {
    let mut wrong = Vec::new();
    let mut count = 0;
    for document in documents() {
        let whole = text(&document);
        for (number, line) in prose(&whole) {
            let mut check = |target: &Path, heading| {
                count += 1;
                if let Some(why) = missing(target, heading) {
                    wrong.push(format!("{}:{}: {why}", document.display(), number + 1));
                }
            };
            for link in links(line).into_iter().filter(|link| !link.contains(':')) {
                let (path, heading) = parts(link);
                match path {
                    "" => check(&document, heading),
                    path => check(&document.with_file_name(path), heading),
                }
            }
            let words = named(line).map(|word| word.trim_end_matches(['.', ',', ';', ':']));
            for word in words.filter(|word| is_path(word)) {
                check(Path::new(word), None);
            }
        }
    }
    assert!(count > 300, "{count}");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_documents_that_programs_and_scripts_name_are_there() {
    let mut wrong = Vec::new();
    let mut count = 0;
    for folder in FOLDERS {
        for file in files(folder, &[".rs", ".toml", ".sh", ".yaml", ".proto", ".md"]) {
            for (number, line) in text(&file).lines().enumerate() {
                for (start, _) in line.match_indices("docs/") {
                    let is_part = |letter: char| {
                        letter.is_ascii_lowercase()
                            || letter.is_ascii_digit()
                            || "/.#-".contains(letter)
                    };
                    let word = &line[start..];
                    let end = word.find(|letter| !is_part(letter)).unwrap_or(word.len());
                    let word = word[..end].trim_end_matches(['.', '-']);
                    let (path, heading) = parts(word);
                    if !path.ends_with(".md") {
                        continue;
                    }
                    count += 1;
                    if let Some(why) = missing(Path::new(path), heading) {
                        wrong.push(format!("{}:{}: {why}", file.display(), number + 1));
                    }
                }
            }
        }
    }
    assert!(count > 20, "{count}");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn links_names_and_headings_are_found() {
    let document = "# A `b` [c](d.md), e!\n## F-g_h\n## F-g_h\n```\n# no\n```\n    # nor this\n";
    let found: Vec<_> = headings(document).into_iter().collect();
    assert_eq!(found, ["a-b-c-e", "f-g_h", "f-g_h-1"]);
    assert_eq!(links("[a](b.md) and [c](#d), (e)"), ["b.md", "#d"]);
    let words: Vec<_> = named("a `shim/src x` b `tests/run`").collect();
    assert_eq!(words, ["shim/src", "x", "tests/run"]);
    assert!(is_path("shim/src/lib.rs") && !is_path("shim") && !is_path("tests/*"));
    assert!(missing(Path::new("none.md"), None).is_some());
    assert!(missing(Path::new("docs/../README.md"), Some("no-heading")).is_some());
    assert!(missing(Path::new("README.md"), Some("look-inside")).is_none());
}
