//! The start of a pod as a picture, and the starts of two beside each other.
//!
//! The names of moments come from a journal that is root's, but the guest may add to it, so they are escaped.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use brig_shim::error::{Error, Result};
use brig_shim::node::journal::StateDir;
use brig_shim::pod::timeline::{Mark, Timeline};
use serde_json::{Value, json};

/// Pixels of the longest bar, of a line, and of the column of names.
const WIDTH: f64 = 640.0;
const LINE: usize = 22;
const NAMES: f64 = 220.0;
/// A bar shorter than this cannot be seen.
const SHORTEST: f64 = 1.0;

/// The timeline of a pod.
///
/// # Errors
/// If there is none, or it is damaged.
pub fn read(base: &Path, namespace: &str, id: &str) -> Result<Timeline> {
    let bytes = StateDir::new(base, namespace, id)?.read_timeline()?;
    serde_json::from_slice(&bytes)
        .map_err(|error| Error::internal(format!("the timeline is damaged: {error}")))
}

fn in_order(timeline: &Timeline) -> Vec<Mark> {
    let mut marks = timeline.marks.clone();
    marks.sort_by_key(|mark| mark.micros);
    marks
}

fn millis(micros: u64) -> f64 {
    Duration::from_micros(micros).as_secs_f64() * 1000.0
}

/// A waterfall, each bar the time since the moment before, as an SVG document that needs nothing else.
#[must_use]
pub fn svg(timeline: &Timeline, title: &str) -> String {
    let marks = in_order(timeline);
    let total = millis(marks.last().map_or(1, |mark| mark.micros).max(1));
    let height = LINE * (marks.len() + 2);
    let mut picture = String::new();
    let _ = writeln!(
        picture,
        r#"<svg xmlns="http://www.w3.org/2000/svg" width="{:.0}" height="{height}" font-family="sans-serif" font-size="12">"#,
        NAMES + WIDTH + 180.0
    );
    let _ = writeln!(
        picture,
        r#"<rect width="100%" height="100%" fill="white"/><text x="8" y="{LINE}" font-weight="bold">{}</text>"#,
        escaped(title)
    );
    let mut before = 0;
    for (line, mark) in (2..).zip(&marks) {
        let from = NAMES + millis(before) / total * WIDTH;
        let length = (millis(mark.micros - before) / total * WIDTH).max(SHORTEST);
        let (base, top) = (line * LINE, line * LINE - 12);
        let _ = writeln!(
            picture,
            r##"<text x="8" y="{base}">{}</text><rect x="{from:.1}" y="{top}" width="{length:.1}" height="14" fill="#3465a4"/><text x="{:.1}" y="{base}">{:.1} ms (+{:.1})</text>"##,
            escaped(&mark.name),
            from + length + 6.0,
            millis(mark.micros),
            millis(mark.micros - before),
        );
        before = mark.micros;
    }
    picture.push_str("</svg>\n");
    picture
}

fn escaped(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            // XML has no way to say the others.
            _ if letter.is_control() => safe.push('\u{fffd}'),
            _ => safe.push(letter),
        }
    }
    safe
}

/// A step of one start, of the other, or of both, with microseconds since the moment before.
type Step = (String, Option<u64>, Option<u64>);

/// The steps of this start, and those that only the other has.
fn beside(this: &Timeline, other: &Timeline) -> Vec<Step> {
    let (a, b) = (steps(this), steps(other));
    let of = |steps: &[(String, u64)], name: &str| {
        let step = steps.iter().find(|step| step.0 == name);
        step.map(|step| step.1)
    };
    let there = |name: &str| of(&b, name);
    let only_there = b.iter().filter(|step| of(&a, &step.0).is_none());
    a.iter()
        .map(|(name, took)| (name.clone(), Some(*took), there(name)))
        .chain(only_there.map(|(name, took)| (name.clone(), None, Some(*took))))
        .collect()
}

/// VM exits by reason, here and there.
fn exits_beside(this: &Timeline, other: &Timeline) -> Vec<(String, u64, u64)> {
    let reasons: BTreeSet<&String> = this.exits.keys().chain(other.exits.keys()).collect();
    let count =
        |timeline: &Timeline, reason: &String| timeline.exits.get(reason).copied().unwrap_or(0);
    let reasons = reasons.into_iter();
    reasons
        .map(|reason| (reason.clone(), count(this, reason), count(other, reason)))
        .collect()
}

/// As [`compare`], for programs.
#[must_use]
pub fn compare_json(this: &Timeline, other: &Timeline) -> Value {
    let steps = beside(this, other).into_iter();
    let steps = steps
        .map(|(name, here, there)| json!({ "step": name, "micros": here, "otherMicros": there }));
    let exits = exits_beside(this, other).into_iter();
    let exits = exits.map(
        |(reason, here, there)| json!({ "reason": reason, "count": here, "otherCount": there }),
    );
    json!({ "steps": steps.collect::<Value>(), "exits": exits.collect::<Value>() })
}

/// For each moment how long it took since the one before, here and there, and how many VM exits there were by
/// reason; what only one of the two has stands alone.
#[must_use]
pub fn compare(this: &Timeline, other: &Timeline) -> String {
    let steps = beside(this, other);
    let names = steps.iter().map(|step| &step.0);
    let width = names.map(|name| name.len()).max().unwrap_or(0).max(8);
    let mut text = format!(
        "{:<width$} {:>12} {:>12} {:>12}\n",
        "STEP", "THIS", "OTHER", "MORE"
    );
    let ms = |micros: Option<u64>| {
        micros.map_or("-".to_owned(), |micros| format!("{:.1} ms", millis(micros)))
    };
    for (name, here, there) in &steps {
        let (here, there) = (*here, *there);
        let more = match (here, there) {
            (Some(here), Some(there)) => more_ms(here, there),
            _ => String::new(),
        };
        let _ = writeln!(
            text,
            "{name:<width$} {:>12} {:>12} {more:>12}",
            ms(here),
            ms(there)
        );
    }
    for (reason, here, there) in exits_beside(this, other) {
        let more = i128::from(here) - i128::from(there);
        let _ = writeln!(
            text,
            "{:<width$} {here:>12} {there:>12} {more:>+12}",
            format!("exits: {reason}")
        );
    }
    text
}

/// How much longer a step took here than there. What is less than is shown of it is nothing, and nothing has no sign.
fn more_ms(here: u64, there: u64) -> String {
    let more = format!("{:.1} ms", millis(here.abs_diff(there)));
    if more == "0.0 ms" {
        return more;
    }
    let sign = if here < there { '-' } else { '+' };
    format!("{sign}{more}")
}

/// Each moment with the microseconds since the one before; one that happened again is told apart.
fn steps(timeline: &Timeline) -> Vec<(String, u64)> {
    let mut seen: BTreeMap<String, usize> = BTreeMap::new();
    let mut before = 0;
    let steps = in_order(timeline).into_iter().map(|mark| {
        let took = mark.micros - before;
        before = mark.micros;
        let times = seen.entry(mark.name.clone()).or_default();
        *times += 1;
        let name = if *times == 1 {
            mark.name
        } else {
            format!("{} ({times})", mark.name)
        };
        (name, took)
    });
    steps.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::SystemTime;

    fn timeline(marks: &[(&str, u64)]) -> Timeline {
        let mut timeline = Timeline::new(SystemTime::UNIX_EPOCH);
        for (name, millis) in marks {
            timeline.mark(
                name,
                SystemTime::UNIX_EPOCH + Duration::from_millis(*millis),
            );
        }
        timeline
    }

    #[test]
    fn a_picture_has_a_bar_a_moment_as_long_as_it_took() {
        let picture = svg(&timeline(&[("launched", 75), ("create", 25)]), "web & <co>");
        assert!(picture.contains("web &amp; &lt;co&gt;"), "{picture}");
        assert_eq!(picture.matches("<rect x=").count(), 2);
        let create = picture.find(">create<").unwrap();
        assert!(
            create < picture.find(">launched<").unwrap(),
            "in order of time"
        );
        assert!(
            picture.contains(r#"x="220.0" y="32" width="213.3""#),
            "{picture}"
        );
        assert!(
            picture.contains(r#"x="433.3" y="54" width="426.7""#),
            "{picture}"
        );
        assert!(svg(&timeline(&[]), "none").ends_with("</svg>\n"));
    }

    #[test]
    fn two_starts_are_compared_step_by_step() {
        let mut this = timeline(&[("create", 10), ("mark", 30), ("mark", 35)]);
        let mut other = timeline(&[("create", 15), ("mark", 30), ("later", 60)]);
        this.exits.insert("io".to_owned(), 5);
        other.exits.insert("mmio".to_owned(), 7);
        let text = compare(&this, &other);
        let line = |name: &str| {
            let line = text.lines().find(|line| line.starts_with(name)).unwrap();
            line.split_whitespace().collect::<Vec<_>>().join(" ")
        };
        assert_eq!(line("create"), "create 10.0 ms 15.0 ms -5.0 ms");
        assert_eq!(line("mark "), "mark 20.0 ms 15.0 ms +5.0 ms");
        assert_eq!(line("mark (2)"), "mark (2) 5.0 ms -");
        assert_eq!(line("later"), "later - 30.0 ms");
        assert_eq!(line("exits: io"), "exits: io 5 0 +5");
        assert_eq!(line("exits: mmio"), "exits: mmio 0 7 -7");
        let told = compare_json(&this, &other);
        let step = |name: &str, here: Value, there: Value| json!({ "step": name, "micros": here, "otherMicros": there });
        assert_eq!(
            told["steps"][0],
            step("create", 10_000.into(), 15_000.into())
        );
        assert_eq!(told["steps"][3], step("later", Value::Null, 30_000.into()));
        assert_eq!(told["exits"][1]["otherCount"], 7);
    }

    #[test]
    fn a_difference_that_is_not_shown_has_no_sign() {
        assert_eq!(more_ms(10_000, 10_000), "0.0 ms");
        assert_eq!(more_ms(10_000, 10_049), "0.0 ms");
        assert_eq!(more_ms(10_049, 10_000), "0.0 ms");
        assert_eq!(more_ms(10_000, 10_060), "-0.1 ms");
        assert_eq!(more_ms(10_060, 10_000), "+0.1 ms");
    }

    proptest! {
        #[test]
        fn whatever_a_guest_calls_its_moments_the_picture_stays_one(name in any::<String>()) {
            let picture = svg(&timeline(&[("create", 5), (&name, 9)]), &name);
            prop_assert_eq!(picture.matches("<svg").count(), 1);
            prop_assert_eq!(picture.matches("<text").count(), 5);
            prop_assert!(!picture.chars().any(|letter| letter.is_control() && letter != '\n'));
        }
    }
}
