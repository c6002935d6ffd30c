//! What a layer is checked against: the file that containerd's erofs differ writes beside a layer with a dm-verity tree. Blocking. Trusts
//! containerd in meaning, not in form.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;

use serde::Deserialize;

use crate::error::{Error, Result};

/// Bytes of the file; some hundred is what it has.
const MAX_FILE: u64 = 64 << 10;
/// Bytes of a hash, from SHA-1's to SHA-512's.
const HASH: std::ops::RangeInclusive<usize> = 20..=64;

/// The root of a layer's tree of hashes.
#[derive(Debug, PartialEq, Eq)]
pub struct Tree {
    /// The hash.
    pub root_hash: Vec<u8>,
    /// Where in the layer's file the tree's superblock lies, bytes.
    pub hash_offset: u64,
}

#[derive(Deserialize)]
struct Sidecar {
    roothash: String,
    hashoffset: u64,
}

/// Reads the file; `None` if it is not there.
///
/// # Errors
/// One sentence that names it: what cannot be read or understood must not pass for a layer without a tree.
pub fn read(path: &Path) -> Result<Option<Tree>> {
    let text = File::open(path).and_then(|file| {
        let mut text = String::new();
        file.take(MAX_FILE).read_to_string(&mut text)?;
        Ok(text)
    });
    let text = match text {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io(format_args!("{}", path.display()), &error)),
    };
    parse(&text).map(Some).map_err(|reason| {
        Error::invalid(format!(
            "{} does not say what its layer is checked against: {reason}; remove the image and pull it again",
            path.display()
        ))
    })
}

fn parse(text: &str) -> std::result::Result<Tree, String> {
    let sidecar: Sidecar = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let root_hash = bytes(&sidecar.roothash).filter(|hash| HASH.contains(&hash.len()));
    Ok(Tree {
        root_hash: root_hash.ok_or("roothash is no hash")?,
        hash_offset: sidecar.hashoffset,
    })
}

fn bytes(hex: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| {
        char::from(byte)
            .to_digit(16)
            .and_then(|digit| u8::try_from(digit).ok())
    };
    let (pairs, rest) = hex.as_bytes().as_chunks::<2>();
    if !rest.is_empty() {
        return None;
    }
    pairs
        .iter()
        .map(|[high, low]| Some(digit(*high)? << 4 | digit(*low)?))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_file_of_containerds_differ_has_hash_and_offset() {
        let hash = "0aFf".repeat(16);
        let text = format!("{{\n  \"roothash\": \"{hash}\",\n  \"hashoffset\": 8192\n}}");
        let tree = parse(&text).unwrap();
        assert_eq!(tree.root_hash, [0x0a, 0xff].repeat(16));
        assert_eq!(tree.hash_offset, 8192);
    }

    #[test]
    fn what_says_nothing_is_an_error_and_what_is_not_there_is_none() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("layer.erofs.dmverity");
        assert_eq!(read(&path).unwrap(), None);
        for wrong in [
            "",
            "{}",
            r#"{"roothash": "", "hashoffset": 0}"#,
            r#"{"roothash": "0a0", "hashoffset": 0}"#,
            r#"{"roothash": "zz", "hashoffset": 0}"#,
        ] {
            std::fs::write(&path, wrong).unwrap();
            let error = read(&path).unwrap_err().to_string();
            assert!(error.contains("layer.erofs.dmverity"), "{error}");
        }
        std::fs::write(&path, vec![b' '; 1 << 20]).unwrap();
        assert!(read(&path).is_err(), "more than such a file has");
    }

    proptest! {
        #[test]
        fn any_text_is_a_tree_or_an_error(text in "[\"{}:,a-f0-9]{0,60}", hash in "[0-9a-g]{0,140}") {
            let _ = parse(&text);
            let text = format!("{{\"roothash\": \"{hash}\", \"hashoffset\": 1}}");
            if let Ok(tree) = parse(&text) {
                prop_assert!(HASH.contains(&tree.root_hash.len()) && !hash.contains('g'));
            }
        }
    }
}
