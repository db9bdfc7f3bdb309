//! Joins several user-data documents into one document of MIME parts.
//!
//! Pure. Source: cloud-init's documentation, "MIME multi-part archive"; RFC 2046, section 5.1.

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;

/// Joins a user's user-data with vmkit's cloud-configs, which come last.
/// cloud-init finds out the type of a `text/plain` part by its first line, as for a whole document.
/// The user's document is included unchanged; if it is a MIME document itself, its parts become
/// nested ones, which cloud-init processes as well.
pub(super) fn joined(theirs: &str, ours: &[String]) -> String {
    let texts: Vec<&str> = ours.iter().map(String::as_str).chain([theirs]).collect();
    let boundary = boundary(&texts);
    let theirs = match is_mime(theirs) {
        true => theirs.trim_start().to_owned(),
        false => part(theirs),
    };
    let ours: String = ours.iter().map(|ours| format!("--{boundary}\n{}\n", part(ours))).collect();
    format!(
        "Content-Type: multipart/mixed; boundary=\"{boundary}\"\nMIME-Version: 1.0\n\n\
         --{boundary}\n{theirs}\n{ours}--{boundary}--\n"
    )
}

/// Writes a text as a part: readable where it is ASCII. cloud-init reads the document as text and
/// not as bytes, and Python's `email` then makes another letter, or nothing, of one that stands
/// there by itself.
fn part(text: &str) -> String {
    let (encoding, body) = match text.is_ascii() {
        true => ("7bit", text.to_owned()),
        false => ("base64", wrapped(&BASE64.encode(text))),
    };
    format!(
        "Content-Type: text/plain; charset=\"utf-8\"\nMIME-Version: 1.0\n\
         Content-Transfer-Encoding: {encoding}\n\n{body}"
    )
}

/// Breaks lines as RFC 2045, section 6.8, asks for.
fn wrapped(base64: &str) -> String {
    const LINE: usize = 76;
    let lines =
        base64.as_bytes().chunks(LINE).map(|line| std::str::from_utf8(line).expect("Base64 is ASCII"));
    lines.collect::<Vec<_>>().join("\n")
}

/// Returns whether the text is a MIME document: header lines come first, and `MIME-Version` is one
/// of them.
fn is_mime(text: &str) -> bool {
    let mut headers = text.trim_start().lines().take_while(|line| !line.is_empty());
    headers.any(|line| line.to_ascii_lowercase().starts_with("mime-version:"))
}

/// Returns a boundary that is nowhere in the texts; the same texts get the same.
fn boundary(texts: &[&str]) -> String {
    (0_u64..)
        .map(|number| format!("==vmkit-{number}=="))
        .find(|boundary| texts.iter().all(|text| !text.contains(boundary.as_str())))
        .expect("a text of finite length lacks one of endlessly many")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_boundary_that_is_in_the_text_is_not_used() {
        let joined = joined("#cloud-config\n# ==vmkit-0==\n", &["#cloud-config\n".to_owned()]);
        assert!(joined.starts_with("Content-Type: multipart/mixed; boundary=\"==vmkit-1==\"\n"), "{joined}");
    }

    #[test]
    fn a_script_that_prints_a_mime_header_is_no_mime_document() {
        assert!(!is_mime("#!/bin/sh\n\necho MIME-Version: 1.0\n"));
        assert!(is_mime("\nContent-Type: multipart/mixed; boundary=x\nMIME-version: 1.0\n\n--x"));
    }
}
