//! Every crate Brig is built from carries a licence that Apache-2.0 software may ship with.

use std::process::Command;

use serde_json::Value;

/// SPDX identifiers that need nothing beyond a notice.
const ACCEPTED: &[&str] = &[
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "ISC",
    "MIT",
    "MIT-0",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];

/// Whether an SPDX expression can be met with accepted licences only. `OR` binds weaker than `AND`.
fn acceptable(expression: &str) -> bool {
    any_of(expression.replace('/', " OR ").trim())
}

fn any_of(expression: &str) -> bool {
    split(expression, " OR ").into_iter().any(all_of)
}

fn all_of(expression: &str) -> bool {
    split(expression, " AND ").into_iter().all(|part| {
        match part
            .trim()
            .strip_prefix('(')
            .and_then(|rest| rest.strip_suffix(')'))
        {
            Some(inner) => any_of(inner),
            None => ACCEPTED.contains(&part.trim()),
        }
    })
}

/// Splits at a word that stands outside parentheses.
fn split<'a>(expression: &'a str, word: &str) -> Vec<&'a str> {
    let (mut parts, mut depth, mut start) = (Vec::new(), 0u32, 0);
    for (at, byte) in expression.bytes().enumerate() {
        match byte {
            b'(' => depth += 1,
            b')' => depth = depth.saturating_sub(1),
            _ if depth == 0 && at >= start && expression[at..].starts_with(word) => {
                parts.push(&expression[start..at]);
                start = at + word.len();
            }
            _ => {}
        }
    }
    parts.push(&expression[start..]);
    parts
}

#[test]
fn a_copyleft_licence_is_refused_and_a_choice_is_accepted() {
    assert!(acceptable("MIT OR GPL-3.0"));
    assert!(acceptable("MIT/Apache-2.0"));
    assert!(!acceptable("GPL-2.0-only"));
    assert!(!acceptable("MIT AND LGPL-2.1"));
    assert!(!acceptable("(MIT OR Apache-2.0) AND LGPL-2.1"));
    assert!(acceptable("(MIT OR Apache-2.0) AND Unicode-3.0"));
    assert!(!acceptable(""));
}

#[test]
fn every_dependency_has_an_accepted_licence() {
    // Not offline: no build for this machine fetches what is for others, and those are among them.
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--locked"])
        .output()
        .expect("cargo metadata runs");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("metadata is JSON");
    let refused: Vec<String> = metadata["packages"]
        .as_array()
        .expect("packages")
        .iter()
        .filter(|package| !acceptable(package["license"].as_str().unwrap_or("")))
        .map(|package| {
            format!(
                "{} {}: {}",
                package["name"], package["version"], package["license"]
            )
        })
        .collect();
    assert!(refused.is_empty(), "licences to look at: {refused:#?}");
}
