//! Public keys as `ssh-keygen` writes them and `authorized_keys` has them, checked before a guest
//! gets them: one that is cut would be found out by a login that fails minutes later.
//!
//! Source: sshd(8), "AUTHORIZED_KEYS FILE FORMAT"; RFC 4253, section 6.6.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use vmkit::Error;
use vmkit::error::ValueProblem;

use crate::places::stdin_or;

/// More than any list of keys has.
const MOST_BYTES: u64 = 64 << 10;
/// As much of a line is shown in an error.
const MOST_SHOWN: usize = 40;

/// What the name of a kind of certificate has in it. Source: OpenSSH, PROTOCOL.certkeys.
const CERTIFICATE: &str = "-cert-v0";

/// What the names of all kinds of key begin with.
const KINDS: [&str; 4] = ["ssh-", "ecdsa-sha2-", "sk-ssh-", "sk-ecdsa-"];

/// Reads public keys from a file or a pipe, one a line; an empty line and a comment are none.
///
/// # Errors
/// `InvalidInput` on `ssh-key` where the file can't be read or has anything else: a private key
/// given to a guest would be given away.
pub(crate) fn read(path: &Path) -> Result<Vec<String>, Error> {
    let refused = |why: String| Error::invalid("ssh-key", path.display(), why);
    let mut text = String::new();
    if path.starts_with("https:") || path.starts_with("http:") {
        return Err(refused("URLs are not fetched here".to_owned()).with_problem(ValueProblem::UrlNotFetched));
    }
    File::open(stdin_or(path))
        .and_then(|file| file.take(MOST_BYTES).read_to_string(&mut text))
        .map_err(|error| refused("the file can't be read".to_owned()).with_source(error))?;
    if text.contains("PRIVATE KEY") {
        return Err(refused("this is a private key: give the public one, which ends in .pub".to_owned()));
    }
    let text = text.trim_start_matches('\u{feff}');
    let mut keys = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        check(line).map_err(|why| refused(format!("line {}: {why}", index + 1)))?;
        keys.push(with_spaces(line));
    }
    match keys.is_empty() {
        true => Err(refused("there is no key in this file".to_owned())),
        false => Ok(keys),
    }
}

/// Checks one line: options, where it has some, the kind of key, the key, and a comment.
fn check(line: &str) -> Result<(), String> {
    if let Some(control) = line.chars().find(|c| c.is_control() && *c != '\t') {
        return Err(format!("a public key has no control characters, and this has {control:?}"));
    }
    let is_kind = |word: &str| KINDS.iter().any(|kind| word.starts_with(kind));
    let (first, rest) = word(line);
    let (kind, rest) = if is_kind(first) { (first, rest) } else { word(rest) };
    if !is_kind(kind) {
        let line: String = line.chars().take(MOST_SHOWN).collect();
        return Err(format!("a public key begins with ssh-, ecdsa- or sk-, not {line:?}"));
    }
    if kind.contains(CERTIFICATE) {
        return Err(format!(
            "`{kind}` is a certificate (expected the public key that it certifies, in the file without `-cert` in its name)"
        ));
    }
    let (encoded, _) = word(rest);
    if encoded.is_empty() {
        return Err(format!("no key follows `{kind}`"));
    }
    let wrong = |why: &str| format!("the key after `{kind}` {why}: was it copied completely?");
    let blob = decoded(encoded).ok_or_else(|| wrong("is not base64"))?;
    let fields = fields(&blob).ok_or_else(|| wrong("is cut"))?;
    let Some((name, fields)) = fields.split_first() else { return Err(wrong("is cut")) };
    if *name != kind.as_bytes() {
        return Err(wrong(&format!("is one of kind `{}`", String::from_utf8_lossy(name).escape_debug())));
    }
    match is_whole(kind, fields) {
        true => Ok(()),
        false => Err(wrong("is cut")),
    }
}

/// Returns a line with a space where a tab stands between two of its words, as sshd(8) has it.
fn with_spaces(line: &str) -> String {
    let mut words = Vec::new();
    let mut rest = line;
    while !rest.is_empty() {
        let (first, behind) = word(rest);
        words.push(first);
        rest = behind;
    }
    words.join(" ")
}

/// Returns whether a key of this kind has all its fields; of a kind that is not known it may have
/// any.
fn is_whole(kind: &str, fields: &[&[u8]]) -> bool {
    match (kind, fields) {
        ("ssh-ed25519", fields) => matches!(fields, [key] if key.len() == 32),
        ("sk-ssh-ed25519@openssh.com", fields) => matches!(fields, [key, _] if key.len() == 32),
        ("ssh-rsa", fields) => {
            matches!(fields, [exponent, modulus] if !exponent.is_empty() && modulus.len() >= 128)
        }
        (kind, fields) if kind.starts_with("ecdsa-") => matches!(fields, [_, point] if point.len() >= 33),
        (kind, fields) if kind.starts_with("sk-ecdsa-") => {
            matches!(fields, [_, point, _] if point.len() >= 33)
        }
        (_, fields) => !fields.is_empty(),
    }
}

/// Returns the first word of a line, and what follows; blanks within double quotes are no end.
fn word(text: &str) -> (&str, &str) {
    let mut quoted = false;
    let mut escaped = false;
    for (at, char) in text.char_indices() {
        match char {
            '"' if !escaped => quoted = !quoted,
            ' ' | '\t' if !quoted => return (&text[..at], text[at..].trim_start()),
            _ => {}
        }
        escaped = char == '\\' && !escaped;
    }
    (text, "")
}

/// Returns the fields of a key, each with its length before it.
fn fields(mut blob: &[u8]) -> Option<Vec<&[u8]>> {
    let mut fields = Vec::new();
    while !blob.is_empty() {
        let (length, rest) = blob.split_first_chunk::<4>()?;
        let (field, rest) = rest.split_at_checked(u32::from_be_bytes(*length) as usize)?;
        fields.push(field);
        blob = rest;
    }
    Some(fields)
}

/// Decodes base64. Source: RFC 4648, section 4.
fn decoded(text: &str) -> Option<Vec<u8>> {
    let digits = text.trim_end_matches('=');
    if !text.len().is_multiple_of(4) || text.len() - digits.len() > 2 {
        return None;
    }
    let mut bytes = Vec::new();
    let (mut bits, mut count) = (0_u32, 0);
    for digit in digits.bytes() {
        let value = match digit {
            b'A'..=b'Z' => digit - b'A',
            b'a'..=b'z' => digit - b'a' + 26,
            b'0'..=b'9' => digit - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = bits << 6 | u32::from(value);
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count) as u8);
        }
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ED25519: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKqP3bKC0zJt0S2qLfv3Dc5jHMF0UfA1T0sGdXpSyhsW";

    fn found(content: &str) -> Result<Vec<String>, String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), content).unwrap();
        read(file.path()).map_err(|error| error.to_string())
    }

    #[test]
    fn keys_are_taken_with_options_comments_and_line_ends_of_any_kind() {
        let options =
            format!("from=\"10.0.0.0/8, 1.2.3.4\",no-pty,command=\"a \\\"b\\\" c\" {ED25519} me@host\r\n");
        assert_eq!(found(&options).unwrap(), [options.trim()]);
        let two = format!("\u{feff}# mine\n\n{ED25519}\n  {ED25519} a comment of words\n");
        assert_eq!(found(&two).unwrap().len(), 2);
        let tabs = format!("no-pty\t{}\tme", ED25519.replace(' ', "\t"));
        assert_eq!(found(&tabs).unwrap(), [format!("no-pty {ED25519} me")]);
    }

    #[test]
    fn what_is_no_whole_public_key_is_refused_with_its_line() {
        let cut = &ED25519[..ED25519.len() - 8];
        let odd = &ED25519[..ED25519.len() - 1];
        let other = ED25519.replacen("ssh-ed25519", "ssh-rsa", 1);
        for (content, why) in [
            ("-----BEGIN OPENSSH PRIVATE KEY-----\nabc\n", "ends in .pub"),
            ("\n# nothing\n", "no key in this file"),
            ("hello", "line 1: a public key begins with ssh-, ecdsa- or sk-, not \"hello\""),
            ("no-pty hello there", "not \"no-pty hello there\""),
            ("ssh-ed25519", "no key follows `ssh-ed25519`"),
            ("ssh-ed25519 AAAA", "the key after `ssh-ed25519` is cut: was it copied completely?"),
            ("ssh-ed25519 %%%%", "is not base64"),
            (
                "ssh-ed25519\u{7} AAAA",
                "line 1: a public key has no control characters, and this has '\\u{7}'",
            ),
            (cut, "is cut"),
            (odd, "is not base64"),
            (
                "ssh-ed25519-cert-v01@openssh.com AAAA",
                "is a certificate (expected the public key that it certifies",
            ),
            (&other, "is one of kind `ssh-ed25519`"),
            (&format!("{ED25519}\n{cut}"), "line 2: "),
        ] {
            let error = found(content).unwrap_err();
            assert!(error.starts_with("ssh-key: ") && error.contains(why), "{content}: {error}");
        }
    }

    #[test]
    fn what_ssh_keygen_writes_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        for (kind, bits) in [("ed25519", "0"), ("rsa", "2048"), ("ecdsa", "256"), ("ecdsa", "521")] {
            let file = dir.path().join(format!("{kind}{bits}"));
            let mut keygen = std::process::Command::new("ssh-keygen");
            keygen.args(["-q", "-N", "", "-t", kind]).arg("-f").arg(&file);
            if bits != "0" {
                keygen.args(["-b", bits]);
            }
            match keygen.status() {
                Ok(status) => assert!(status.success()),
                Err(_) => return,
            }
            read(&file.with_extension("pub")).unwrap();
        }
    }
}
