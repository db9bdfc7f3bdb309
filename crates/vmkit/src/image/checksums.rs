//! Parses files of checksums, in the forms that publishers use.
//!
//! Pure.
//!
//! ```text
//! 3b1f…  image.qcow2            GNU coreutils, or a tab between; a * before the name marks a binary file
//! SHA256 (image.qcow2) = 3b1f…  BSD
//! SHA256(image.qcow2)= 3b1f…    openssl; since its version 3 with SHA2-256
//! 3b1f…                         the checksum alone, in a file of its own, or with - for the name
//! ```
//!
//! Each line is recognised by itself. Source: sha256sum(1), cksum(1) of coreutils; openssl-dgst(1).

use super::digest::Digest;

/// Returns the expected checksum of the file of this name: the strongest one in the text.
///
/// A line for a file of this name in some directory is used only if no line has the bare name. A
/// text of one checksum alone is for any file.
pub(super) fn find(text: &str, file: &str) -> Option<Digest> {
    let text = text.trim_start_matches('\u{feff}');
    let mut found: Option<((bool, usize), Digest)> = None;
    for line in text.lines().map(str::trim_end) {
        let Some((name, digest)) = gnu(line).or_else(|| bsd(line)) else { continue };
        let name = name.strip_prefix("./").unwrap_or(name);
        // Some publishers write the path that the file had where the checksums were made.
        if name != file && name.rsplit('/').next() != Some(file) {
            continue;
        }
        let rank = (name == file, digest.algorithm().hex_digits());
        if found.as_ref().is_none_or(|(best, _)| rank > *best) {
            found = Some((rank, digest));
        }
    }
    found.map(|(_, digest)| digest).or_else(|| alone(text))
}

fn gnu(line: &str) -> Option<(&str, Digest)> {
    let (hex, name) = line.split_once([' ', '\t'])?;
    let name = name.trim_start();
    Some((name.strip_prefix('*').unwrap_or(name), Digest::of_hex(hex)?))
}

fn bsd(line: &str) -> Option<(&str, Digest)> {
    let (kind, rest) = line.split_once('(')?;
    let (name, hex) = rest.rsplit_once(')')?;
    let hex = hex.trim_start().strip_prefix('=')?.trim_start();
    let kind = kind.trim_end().to_ascii_uppercase().replace("SHA2-", "SHA");
    Some((name, Digest::new(&kind, hex)?))
}

fn alone(text: &str) -> Option<Digest> {
    let mut words = text.split_whitespace();
    match (words.next(), words.next(), words.next()) {
        (Some(hex), None | Some("-" | "*-"), None) => Digest::of_hex(hex),
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
            (format!("{a}  -\n"), &a),
            (format!("{a} *-\n"), &a),
            (format!("{a}\tdisk.img\n"), &a),
            (format!("SHA256(disk.img)= {a}\n"), &a),
            (format!("SHA2-256(disk.img)= {a}\n"), &a),
            (format!("SHA2-512(disk.img)= {strong}\n"), &strong),
            (format!("\u{feff}{a}  disk.img\r\n"), &a),
            (format!("\u{feff}{a}\r\n"), &a),
            (format!("SHA256 (a (1)/disk.img) = {a}"), &a),
        ] {
            let found = find(&text, "disk.img").unwrap_or_else(|| panic!("{text}"));
            assert_eq!(found.hex(), expected.to_ascii_lowercase(), "{text}");
        }
    }

    #[test]
    fn a_name_as_it_is_goes_before_one_in_some_directory() {
        let (a, b, strong) = (sha256("aa"), sha256("bb"), "cc".repeat(64));
        for text in [
            format!("{b}  old/disk.img\n{a}  disk.img\n"),
            format!("{a}  disk.img\n{b}  old/disk.img\n"),
            format!("{a}  ./disk.img\n{b}  old/disk.img\n"),
            format!("{a}  disk.img\n{strong}  old/disk.img\n"),
        ] {
            assert_eq!(find(&text, "disk.img").unwrap().hex(), a, "{text}");
        }
    }

    #[test]
    fn another_files_checksum_is_not_taken() {
        let a = sha256("aa");
        for text in [
            format!("{a}  disk.img.asc\n"),
            format!("SHA256 (xdisk.img) = {a}"),
            format!("{a}  other\n{a}\n"),
            format!("{a}  -\n{a}  other\n"),
            format!("SHA256(other.img)= {a}\n"),
            format!("SHA1(disk.img)= {a}\n"),
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
