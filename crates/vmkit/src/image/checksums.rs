//! Reads files of checksums, in the three forms that publishers use.
//!
//! Pure.
//!
//! ```text
//! 3b1f…  image.qcow2            GNU coreutils; a * before the name marks a binary file
//! SHA256 (image.qcow2) = 3b1f…  BSD
//! 3b1f…                         the checksum alone, in a file of its own
//! ```
//!
//! Which one it is, is seen line by line. Source: sha256sum(1), cksum(1) of coreutils.

use super::digest::{Digest, DigestAlgorithm};

/// Answers what the file of this name must hash to: the strongest checksum that the text has for it.
///
/// A text of nothing but one checksum is for whatever file it lies beside.
pub(super) fn find(text: &str, file: &str) -> Option<Digest> {
    let mut found: Option<Digest> = None;
    for line in text.lines().map(str::trim_end) {
        let Some((name, digest)) = gnu(line).or_else(|| bsd(line)) else { continue };
        // Some publishers write the path that the file had where the checksums were made.
        let is_meant = name == file || name.rsplit('/').next() == Some(file);
        let is_stronger = found.as_ref().is_none_or(|found| found.algorithm() == DigestAlgorithm::Sha256);
        if is_meant && is_stronger {
            found = Some(digest);
        }
    }
    found.or_else(|| alone(text))
}

fn gnu(line: &str) -> Option<(&str, Digest)> {
    let (hex, name) = line.split_once(' ')?;
    let name = name.trim_start();
    Some((name.strip_prefix('*').unwrap_or(name), Digest::of_hex(hex)?))
}

fn bsd(line: &str) -> Option<(&str, Digest)> {
    let (kind, rest) = line.split_once(" (")?;
    let (name, hex) = rest.rsplit_once(") = ")?;
    Some((name, Digest::new(kind, hex)?))
}

fn alone(text: &str) -> Option<Digest> {
    let mut words = text.split_whitespace();
    match (words.next(), words.next()) {
        (Some(hex), None) => Digest::of_hex(hex),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sha256(byte: &str) -> String {
        byte.repeat(32)
    }

    #[test]
    fn every_form_is_read() {
        let (a, b) = (sha256("aa"), sha256("BB"));
        let strong = "cc".repeat(64);
        for (text, expected) in [
            (format!("{a}  other\n{b}  disk.img\n"), &b),
            (format!("{a} *disk.img\r\n"), &a),
            (format!("# disk.img: 5 bytes\nSHA256 (disk.img) = {a}\n"), &a),
            (format!("SHA512 (disk.img) = {strong}\nSHA256 (disk.img) = {a}\n"), &strong),
            (format!("SHA256 (disk.img) = {a}\nSHA512 (disk.img) = {strong}\n"), &strong),
            (format!("{a}  ./out/disk.img\n"), &a),
            (format!("{a}\n"), &a),
        ] {
            let found = find(&text, "disk.img").unwrap_or_else(|| panic!("{text}"));
            assert_eq!(found.hex(), expected.to_ascii_lowercase(), "{text}");
        }
    }

    #[test]
    fn another_files_checksum_is_not_taken() {
        let a = sha256("aa");
        for text in [
            format!("{a}  disk.img.asc\n"),
            format!("SHA256 (xdisk.img) = {a}"),
            format!("{a}  other\n{a}\n"),
            "d41d8cd98f00b204e9800998ecf8427e  disk.img\n".to_owned(),
            String::new(),
        ] {
            assert_eq!(find(&text, "disk.img"), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn reading_any_text_never_panics(text in "(?s).*", file in ".*") {
            let _ = find(&text, &file);
        }

        #[test]
        fn whatever_sha256sum_writes_is_found(name in "[a-zA-Z0-9._-]{1,30}", byte in "[0-9a-f]{2}") {
            let text = format!("{}  {name}\n", sha256(&byte));
            let found = find(&text, &name).unwrap();
            prop_assert_eq!(found.hex(), sha256(&byte));
        }
    }
}
