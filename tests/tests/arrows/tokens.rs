//! Rust's tokens as far as paths need them: words, `::` and single characters. Comments, strings and items
//! under `#[cfg(test)]` are gone.

/// One token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Token {
    /// An identifier or keyword.
    Word(String),
    /// `::`
    Path,
    /// Any other character.
    Mark(char),
}

/// The tokens of a source file without its tests.
pub fn of(source: &str) -> Vec<Token> {
    without_tests(&scan(source))
}

fn scan(source: &str) -> Vec<Token> {
    let chars: Vec<char> = source.chars().collect();
    let at = |index: usize| chars.get(index).copied().unwrap_or('\0');
    let word = |c: char| c.is_alphanumeric() || c == '_';
    let mut tokens = Vec::new();
    let mut i = 0;
    while i < chars.len() {
        match at(i) {
            '/' if at(i + 1) == '/' => {
                while i < chars.len() && at(i) != '\n' {
                    i += 1;
                }
            }
            '/' if at(i + 1) == '*' => {
                let mut depth = 1;
                i += 2;
                while i < chars.len() && depth > 0 {
                    match (at(i), at(i + 1)) {
                        ('*', '/') => (depth, i) = (depth - 1, i + 2),
                        ('/', '*') => (depth, i) = (depth + 1, i + 2),
                        _ => i += 1,
                    }
                }
            }
            'r' if at(i + 1) == '"' || (at(i + 1) == '#' && matches!(at(i + 2), '"' | '#')) => {
                let hashes = chars[i + 1..].iter().take_while(|&&c| c == '#').count();
                let end: String = std::iter::once('"')
                    .chain(std::iter::repeat_n('#', hashes))
                    .collect();
                let rest: String = chars[i + 2 + hashes..].iter().collect();
                let length = rest
                    .find(&end)
                    .map_or(rest.len(), |found| found + end.len());
                i += 2 + hashes + rest[..length].chars().count();
            }
            '"' => {
                i += 1;
                while i < chars.len() && at(i) != '"' {
                    i += if at(i) == '\\' { 2 } else { 1 };
                }
                i += 1;
            }
            // A character, or else a lifetime.
            '\'' if at(i + 1) == '\\' => {
                i += 3;
                while i < chars.len() && at(i) != '\'' {
                    i += 1;
                }
                i += 1;
            }
            '\'' if at(i + 2) == '\'' => i += 3,
            ':' if at(i + 1) == ':' => {
                tokens.push(Token::Path);
                i += 2;
            }
            c if word(c) => {
                let start = i;
                while word(at(i)) {
                    i += 1;
                }
                tokens.push(Token::Word(chars[start..i].iter().collect()));
            }
            c => {
                if !c.is_whitespace() {
                    tokens.push(Token::Mark(c));
                }
                i += 1;
            }
        }
    }
    tokens
}

/// The end of an item that begins here: after its `;`, or after its block.
fn item_end(tokens: &[Token], from: usize) -> usize {
    let mut depth = 0usize;
    for (i, token) in tokens.iter().enumerate().skip(from) {
        match token {
            Token::Mark('{' | '(' | '[') => depth += 1,
            Token::Mark(closing @ ('}' | ')' | ']')) => {
                depth = depth.saturating_sub(1);
                if depth == 0 && *closing == '}' {
                    // The block of a `use` is followed by its semicolon.
                    let more = tokens.get(i + 1) == Some(&Token::Mark(';'));
                    return i + 1 + usize::from(more);
                }
            }
            Token::Mark(';' | ',') if depth == 0 => return i + 1,
            _ => {}
        }
    }
    tokens.len()
}

fn without_tests(tokens: &[Token]) -> Vec<Token> {
    let attribute: Vec<Token> = scan("#[cfg(test)]");
    let mut kept = Vec::new();
    let mut i = 0;
    while i < tokens.len() {
        if tokens[i..].starts_with(&attribute) {
            i = item_end(tokens, i + attribute.len());
        } else {
            kept.push(tokens[i].clone());
            i += 1;
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_strings_and_tests_name_nothing() {
        let source = r##"
            // crate::a
            /* crate::b /* nested */ crate::c */
            const S: &str = "crate::d \" crate::e"; const R: &str = r#"crate::f"#;
            fn f<'a>(c: char) -> bool { c == '"' || c == '\'' || c == 'x' }
            #[cfg(test)]
            mod tests { use crate::g; fn t() { crate::h(); } }
            #[cfg(test)]
            use crate::{i, j};
            use crate::kept;
        "##;
        let words: Vec<String> = of(source)
            .windows(3)
            .filter_map(|three| match three {
                [Token::Word(a), Token::Path, Token::Word(b)] if a == "crate" => Some(b.clone()),
                _ => None,
            })
            .collect();
        assert_eq!(words, ["kept"]);
    }
}
