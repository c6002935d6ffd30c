//! The patterns of module aliases: `*`, `?` and sets of characters, as fnmatch(3) has them without flags.

/// Whether all of `text` is what `pattern` means. Time is bounded by the product of their lengths. A set that is not closed
/// stands for itself.
pub fn matches(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    // After the last star, and what it has to leave: one character more at each failure.
    let mut again = None;
    loop {
        if let Some(b'*') = pattern.get(p) {
            p += 1;
            again = Some((p, t));
            continue;
        }
        match (pattern.get(p..).and_then(one), text.get(t)) {
            (None, None) => return true,
            (Some((length, class)), Some(&byte)) if class.holds(byte) => {
                p += length;
                t += 1;
            }
            _ => match again {
                Some((after, from)) if from < text.len() => {
                    p = after;
                    t = from + 1;
                    again = Some((after, t));
                }
                _ => return false,
            },
        }
    }
}

enum Class<'a> {
    Any,
    Byte(u8),
    Set(&'a [u8]),
}

impl Class<'_> {
    fn holds(&self, byte: u8) -> bool {
        match self {
            Self::Any => true,
            Self::Byte(own) => *own == byte,
            Self::Set(set) => {
                let (negated, mut rest) = match set {
                    [b'!' | b'^', rest @ ..] => (true, rest),
                    rest => (false, *rest),
                };
                let mut found = false;
                loop {
                    match rest {
                        [low, b'-', high, tail @ ..] => {
                            found |= (*low..=*high).contains(&byte);
                            rest = tail;
                        }
                        [own, tail @ ..] => {
                            found |= *own == byte;
                            rest = tail;
                        }
                        [] => return found != negated,
                    }
                }
            }
        }
    }
}

/// The first element of a pattern that is no star, and its length.
fn one(pattern: &[u8]) -> Option<(usize, Class<'_>)> {
    match pattern {
        [] => None,
        [b'?', ..] => Some((1, Class::Any)),
        [b'[', rest @ ..] => {
            // A bracket that comes first is one of the set.
            let skip = match rest {
                [b'!' | b'^', b']', ..] => 2,
                [b'!' | b'^', ..] | [b']', ..] => 1,
                _ => 0,
            };
            let end = rest.iter().skip(skip).position(|byte| *byte == b']');
            match end.map(|end| end + skip) {
                Some(end) => Some((end + 2, Class::Set(rest.get(..end)?))),
                None => Some((1, Class::Byte(b'['))),
            }
        }
        [byte, ..] => Some((1, Class::Byte(*byte))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_depmod_writes_matches_as_it_should() {
        let nvme = "pci:v*d*sv*sd*bc01sc08i02*";
        let device = "pci:v00001B36d00000010sv00001AF4sd00001100bc01sc08i02";
        for (pattern, text, expected) in [
            ("fs_xfs", "fs_xfs", true),
            ("fs_xfs", "fs_xf", false),
            ("fs_xfs", "fs_xfss", false),
            (nvme, device, true),
            (
                nvme,
                "pci:v00001B36d00000010sv00001AF4sd00001100bc01sc06i02",
                false,
            ),
            ("*", "", true),
            ("", "", true),
            ("", "a", false),
            ("a*b*c", "aXbXbXc", true),
            ("a?c", "abc", true),
            ("a?c", "ac", false),
            ("char[0-9]", "char7", true),
            ("char[0-9]", "charx", false),
            ("char[!0-9]", "charx", true),
            ("[]]", "]", true),
            ("a[", "a[", true),
        ] {
            assert_eq!(
                matches(pattern.as_bytes(), text.as_bytes()),
                expected,
                "{pattern} {text}"
            );
        }
    }

    /// The meaning, without care for time.
    fn means(pattern: &[u8], text: &[u8]) -> bool {
        match pattern {
            [b'*', rest @ ..] => (0..=text.len()).any(|n| means(rest, &text[n..])),
            _ => match (one(pattern), text) {
                (None, []) => true,
                (Some((length, class)), [byte, rest @ ..]) => {
                    class.holds(*byte) && means(&pattern[length..], rest)
                }
                _ => false,
            },
        }
    }

    proptest! {
        #[test]
        fn stars_are_found_as_by_trying_everything(pattern in "[ab*?\\[\\]!-]{0,9}", text in "[ab\\[\\]-]{0,9}") {
            prop_assert_eq!(matches(pattern.as_bytes(), text.as_bytes()), means(pattern.as_bytes(), text.as_bytes()));
        }
    }
}
