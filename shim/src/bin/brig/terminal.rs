//! What is printed for people. Much of it comes from guests or is named by users, and a terminal obeys what it is
//! sent: nothing reaches it that is no text.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::io::{self, IsTerminal as _};

use brig_shim::error::{Error, Result};

/// Text of unknown origin, in lines: what could move a cursor, colour, or turn the direction of writing is shown as
/// its number.
#[must_use]
pub fn printable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let mut safe = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '\n' | '\t' => safe.push(letter),
            _ if letter.is_ascii_control() || is_obeyed(letter) => {
                let _ = write!(safe, "\\u{{{:x}}}", u32::from(letter));
            }
            _ => safe.push(letter),
        }
    }
    safe
}

/// Whether a terminal may obey the letter although JSON does not escape it: DEL, C1, and the marks and overrides of
/// bidirectional text.
fn is_obeyed(letter: char) -> bool {
    matches!(
        letter,
        '\u{7f}'..='\u{9f}' | '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}'
    )
}

/// The same in one line.
#[must_use]
pub fn printable_line(text: &str) -> String {
    printable(text.as_bytes()).replace(['\n', '\t'], " ")
}

/// Whether somebody looks.
#[must_use]
pub fn is_one() -> bool {
    io::stdout().is_terminal()
}

/// Columns and lines of the terminal; enough for anything where there is none. A serial console does not know its own.
#[must_use]
pub fn size() -> (usize, usize) {
    let known = |size: u16, usual: usize| match size {
        0 => usual,
        size => usize::from(size).max(4),
    };
    rustix::termios::tcgetwinsize(io::stdout()).map_or((usize::MAX, usize::MAX), |size| {
        (known(size.ws_col, 80), known(size.ws_row, 24))
    })
}

/// Writes to standard output what is printable, or JSON, whose strings have anything. Nobody who reads it any more is no error.
///
/// # Errors
/// What the system says.
pub fn print(text: &str) -> Result<()> {
    send(escaped(text).as_bytes())
}

/// The same JSON without a letter that a terminal may obey: all are letters of the basic plane, for which JSON has an escape.
fn escaped(text: &str) -> Cow<'_, str> {
    if !text.contains(is_obeyed) {
        return Cow::Borrowed(text);
    }
    let mut safe = String::with_capacity(text.len());
    for letter in text.chars() {
        if is_obeyed(letter) {
            let _ = write!(safe, "\\u{:04x}", u32::from(letter));
        } else {
            safe.push(letter);
        }
    }
    Cow::Owned(safe)
}

/// As [`print`], of what is no text.
///
/// # Errors
/// What the system says.
pub fn send(bytes: &[u8]) -> Result<()> {
    use io::Write as _;
    let mut stdout = io::stdout();
    let printed = stdout.write_all(bytes).and_then(|()| stdout.flush());
    match printed {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
        printed => printed.map_err(|error| Error::io("standard output", &error)),
    }
}

/// Says to standard error what is wrong; nobody who reads it any more is no error.
pub fn complain(what: &str) {
    use io::Write as _;
    let text = printable(format!("{what}\n").as_bytes());
    let _ = write!(io::stderr(), "brig: {text}");
}

/// A table whose columns are as wide as they must be; the last is not filled up. Cells are made printable.
#[must_use]
pub fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let rows: Vec<Vec<String>> = rows
        .iter()
        .map(|row| row.iter().map(|cell| printable_line(cell)).collect())
        .collect();
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        let cells = cells.map(|cell| cell.chars().count());
        cells.chain([head[column].len()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let mut text = String::new();
    let head: Vec<String> = head.iter().map(|&cell| cell.to_owned()).collect();
    for row in std::iter::once(&head).chain(&rows) {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            let _ = write!(line, "{cell:<width$}  ");
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_a_terminal_would_obey_is_shown_instead() {
        let text = printable(b"a\x1b[31mb\r\x07\tc\n\xff\xc2\x9b");
        assert_eq!(text, "a\\u{1b}[31mb\\u{d}\\u{7}\tc\n\u{fffd}\\u{9b}");
        assert_eq!(printable("\u{202e}x".as_bytes()), "\\u{202e}x");
        assert_eq!(printable_line("a\nb\tc"), "a b c");
    }

    #[test]
    fn columns_are_as_wide_as_their_cells() {
        let rows = [
            vec!["long name".into(), "1".into()],
            vec!["é\u{1b}".into(), "22".into()],
        ];
        assert_eq!(
            table(&["NAME", "N"], &rows),
            "NAME       N\nlong name  1\né\\u{1b}    22\n"
        );
    }

    proptest! {
        #[test]
        fn no_bytes_pass_as_anything_but_text(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let text = printable(&bytes);
            prop_assert!(!text.chars().any(|letter| letter.is_control() && letter != '\n' && letter != '\t'));
        }

        #[test]
        fn json_is_printed_as_text_that_means_the_same(
            letters in proptest::collection::vec(prop_oneof![any::<char>(), proptest::char::range('\0', '\u{9f}'), Just('\u{202e}')], 0..50),
        ) {
            let told = serde_json::Value::from(letters.into_iter().collect::<String>());
            let text = escaped(&told.to_string()).into_owned();
            let obeyed = text.contains(is_obeyed) || text.contains(char::is_control);
            prop_assert!(!obeyed);
            prop_assert_eq!(serde_json::from_str::<serde_json::Value>(&text).unwrap(), told);
        }
    }
}
