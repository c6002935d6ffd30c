//! Percent-encoded parts of the URIs by which containerd names streams (RFC 3986 section 2.1). Pure.

/// What a part of a URI stands for; in a query `+` is a blank. None if it is encoded wrongly, is no UTF-8, or has a NUL.
pub(super) fn decode(text: &str, query: bool) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let mut digit = || rest.next().and_then(|byte| char::from(byte).to_digit(16));
                u8::try_from(digit()? * 16 + digit()?).ok()?
            }
            b'+' if query => b' ',
            byte => byte,
        });
    }
    String::from_utf8(bytes)
        .ok()
        .filter(|text| !text.contains('\0'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_decoded_or_it_is_none() {
        assert_eq!(decode("/a%20b+c", false).unwrap(), "/a b+c");
        assert_eq!(decode("a+b%2B", true).unwrap(), "a b+");
        for wrong in ["%", "%2", "%zz", "%ff", "%00"] {
            assert_eq!(decode(wrong, false), None, "{wrong}");
        }
    }
}
