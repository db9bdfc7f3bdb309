//! The parts of raw user-data, as cloud-init takes it apart.
//!
//! Pure. Source: cloud-init's `user_data.py` and `handlers/__init__.py`; RFC 2045 and RFC 2046 for
//! MIME.

use std::borrow::Cow;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;

use super::beginning::{begins_with, is_mime};
use super::yaml::YamlMistake;
use super::yaml_tree::{NodeKind, YamlTree};

/// How deep parts are looked for in parts.
const MOST_DEPTH: usize = 8;

/// What cloud-init takes a part for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PartKind {
    /// A cloud-config.
    Config,
    /// A list of parts, in YAML.
    Archive,
    /// What says only in the guest what it says: a template, a patch, addresses of further parts,
    /// something packed.
    Opaque,
    /// What can't name a user or a key of cloud-init's: a script, a boothook, a program that
    /// handles parts.
    Program,
}

/// A part of raw user-data.
#[derive(Debug)]
pub(super) struct RawPart<'a> {
    pub(super) text: Cow<'a, str>,
    pub(super) kind: PartKind,
    /// Whether a header says how the part is joined with those before it.
    pub(super) has_merge_header: bool,
    /// How many lines stand before it, and how many bytes.
    line: usize,
    byte: usize,
    /// Whether it stands in the document as it is read, so that a place in it is one in the
    /// document.
    is_verbatim: bool,
}

impl RawPart<'_> {
    /// Returns a mistake in the part as one in the whole document.
    pub(super) fn mistake(&self, mistake: YamlMistake) -> YamlMistake {
        match self.is_verbatim {
            true => YamlMistake { line: self.line + mistake.line, byte: self.byte + mistake.byte, ..mistake },
            false => YamlMistake {
                line: self.line + 1,
                column: 1,
                byte: self.byte,
                what: format!("in the part that begins here, line {}: {}", mistake.line, mistake.what),
            },
        }
    }

    /// Returns the line in the whole document of a line of the part, or of where the part begins.
    pub(super) fn line(&self, line: usize) -> usize {
        self.line + if self.is_verbatim { line } else { 1 }
    }
}

/// Takes user-data apart.
///
/// # Errors
/// The first mistake in an archive of parts.
pub(super) fn parts(text: &str) -> Result<Vec<RawPart<'_>>, YamlMistake> {
    let mut parts = Vec::new();
    let whole = DocumentPart { text: Cow::Borrowed(text), line: 0, byte: 0, is_verbatim: true };
    match is_mime(text) {
        true => take_message(whole, MOST_DEPTH, &mut parts)?,
        false => take_piece(whole, None, false, MOST_DEPTH, &mut parts)?,
    }
    Ok(parts)
}

/// A stretch of the document, or what is encoded there.
struct DocumentPart<'a> {
    text: Cow<'a, str>,
    line: usize,
    byte: usize,
    is_verbatim: bool,
}

impl<'a> DocumentPart<'a> {
    /// Returns a stretch of the piece.
    fn slice(&self, from: usize, to: usize) -> DocumentPart<'a> {
        let lines = self.text[..from].matches('\n').count();
        let text = match &self.text {
            Cow::Borrowed(text) => Cow::Borrowed(&text[from..to]),
            Cow::Owned(text) => Cow::Owned(text[from..to].to_owned()),
        };
        let (line, byte) = match self.is_verbatim {
            true => (self.line + lines, self.byte + from),
            false => (self.line, self.byte),
        };
        DocumentPart { text, line, byte, is_verbatim: self.is_verbatim }
    }
}

/// Takes a piece for what its type says, or what it begins with.
fn take_piece<'a>(
    piece: DocumentPart<'a>,
    content_type: Option<&str>,
    has_merge_header: bool,
    depth: usize,
    parts: &mut Vec<RawPart<'a>>,
) -> Result<(), YamlMistake> {
    let kind = match content_type {
        Some("text/cloud-config") => PartKind::Config,
        Some("text/cloud-config-archive") => PartKind::Archive,
        Some(
            "text/jinja2" | "text/cloud-config-jsonp" | "text/x-include-url" | "text/x-include-once-url",
        ) => PartKind::Opaque,
        Some(packed)
            if packed.contains("gzip") || packed.contains("compress") || packed.contains("gunzip") =>
        {
            PartKind::Opaque
        }
        // What cloud-init looks at itself.
        None | Some("text/plain" | "text/x-not-multipart" | "text/x-shellscript") => beginning(&piece.text),
        Some(_) => PartKind::Program,
    };
    let DocumentPart { text, line, byte, is_verbatim } = piece;
    let part = RawPart { text, kind, has_merge_header, line, byte, is_verbatim };
    match kind {
        PartKind::Archive if depth > 0 => take_archive(&part, depth, parts),
        _ => {
            parts.push(part);
            Ok(())
        }
    }
}

fn beginning(text: &str) -> PartKind {
    const KINDS: &[(&str, PartKind)] = &[
        ("#cloud-config-archive", PartKind::Archive),
        ("#cloud-config-jsonp", PartKind::Opaque),
        ("#cloud-config", PartKind::Config),
        ("#include", PartKind::Opaque),
        ("## template: jinja", PartKind::Opaque),
    ];
    KINDS.iter().find(|(begins, _)| begins_with(text, begins)).map_or(PartKind::Program, |(_, kind)| *kind)
}

/// Takes the parts of a list in YAML.
fn take_archive(
    archive: &RawPart<'_>,
    depth: usize,
    parts: &mut Vec<RawPart<'_>>,
) -> Result<(), YamlMistake> {
    let tree = YamlTree::parse(&archive.text).map_err(|mistake| archive.mistake(mistake))?;
    for entry in tree.root().into_iter().flat_map(|root| root.items().collect::<Vec<_>>()) {
        let mapping = entry.kind() == NodeKind::Mapping;
        let (content, kind) = match mapping {
            true => (entry.get("content"), entry.get("type").and_then(|kind| kind.text())),
            false => (Some(entry), None),
        };
        let Some(text) = content.and_then(|content| content.text()) else { continue };
        let has_merge_header =
            mapping && entry.entries().iter().any(|(key, _)| key.text().is_some_and(is_merge_header));
        let piece = DocumentPart {
            text: Cow::Owned(text.to_owned()),
            line: archive.line(entry.line()) - 1,
            byte: archive.byte,
            is_verbatim: false,
        };
        // What begins as nothing that is known is a cloud-config here.
        let is_known = text.trim_start().starts_with('#');
        let kind = kind.or((!is_known).then_some("text/cloud-config"));
        take_piece(piece, kind, has_merge_header, depth - 1, parts)?;
    }
    Ok(())
}

fn is_merge_header(name: &str) -> bool {
    ["merge-type", "x-merge-type"].iter().any(|header| name.eq_ignore_ascii_case(header))
}

/// Takes the parts of a MIME message.
fn take_message<'a>(
    message: DocumentPart<'a>,
    depth: usize,
    parts: &mut Vec<RawPart<'a>>,
) -> Result<(), YamlMistake> {
    let (headers, body) = split_headers(&message.text);
    let header = |name: &str| {
        headers.iter().find(|(found, _)| found.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    };
    let content_type = header("content-type")
        .map(|value| value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase());
    let body = message.slice(body, message.text.len());
    if content_type.as_deref().is_some_and(|kind| kind.starts_with("multipart/")) {
        let boundary = header("content-type").and_then(boundary);
        let Some(boundary) = boundary.filter(|_| depth > 0) else { return Ok(()) };
        for (from, to) in between(&body.text, &boundary) {
            take_message(body.slice(from, to), depth - 1, parts)?;
        }
        return Ok(());
    }
    let has_merge_header = headers.iter().any(|(name, _)| is_merge_header(name));
    let encoding = header("content-transfer-encoding").unwrap_or_default().trim().to_ascii_lowercase();
    let decoded = match encoding.as_str() {
        "base64" => {
            let plain: String = body.text.split_ascii_whitespace().collect();
            Some(BASE64.decode(plain).unwrap_or_default())
        }
        "quoted-printable" => Some(unquoted(&body.text)),
        _ => None,
    };
    let Some(bytes) = decoded else {
        return take_piece(body, content_type.as_deref(), has_merge_header, depth, parts);
    };
    // What is no text is packed, or a program.
    let is_text = std::str::from_utf8(&bytes).is_ok();
    let text = Cow::Owned(String::from_utf8_lossy(&bytes).into_owned());
    let kind = if is_text { content_type } else { Some("application/gzip".to_owned()) };
    let piece = DocumentPart { text, line: body.line, byte: body.byte, is_verbatim: false };
    take_piece(piece, kind.as_deref(), has_merge_header, depth, parts)
}

/// Returns the headers of a message, those that go on in further lines in one, and where its body
/// begins.
fn split_headers(text: &str) -> (Vec<(String, String)>, usize) {
    let mut headers: Vec<(String, String)> = Vec::new();
    let mut at = 0;
    for line in text.split_inclusive('\n') {
        let bare = line.trim_end_matches(['\r', '\n']);
        if bare.is_empty() {
            at += line.len();
            // A document may begin with empty lines.
            if headers.is_empty() && !text[at..].trim().is_empty() && is_mime(&text[at..]) {
                continue;
            }
            break;
        }
        if let (true, Some((_, value))) = (bare.starts_with([' ', '\t']), headers.last_mut()) {
            value.push_str(bare);
        } else if let Some((name, value)) = bare.split_once(':').filter(|(name, _)| !name.contains(' ')) {
            headers.push((name.to_owned(), value.trim().to_owned()));
        } else {
            // The body begins without an empty line.
            break;
        }
        at += line.len();
    }
    (headers, at)
}

fn boundary(content_type: &str) -> Option<String> {
    let parameters = content_type.split(';').skip(1);
    let named = parameters.filter_map(|parameter| parameter.split_once('='));
    let mut boundary = named.filter(|(name, _)| name.trim().eq_ignore_ascii_case("boundary"));
    boundary.next().map(|(_, value)| value.trim().trim_matches('"').to_owned())
}

/// Returns where the parts of a body begin and end.
fn between(body: &str, boundary: &str) -> Vec<(usize, usize)> {
    let (mut found, mut begins, mut at) = (Vec::new(), None, 0);
    for line in body.split_inclusive('\n') {
        let mark = line.trim_end().strip_prefix("--").and_then(|line| line.strip_prefix(boundary));
        if let Some(rest @ ("" | "--")) = mark {
            if let Some(from) = begins {
                found.push((from, at));
            }
            begins = rest.is_empty().then_some(at + line.len());
            if rest == "--" {
                break;
            }
        }
        at += line.len();
    }
    // A message whose end is missing has its last part all the same.
    found.extend(begins.map(|from| (from, body.len())));
    found
}

/// Decodes quoted-printable text. Source: RFC 2045, section 6.7.
fn unquoted(text: &str) -> Vec<u8> {
    let (bytes, mut plain, mut at) = (text.as_bytes(), Vec::new(), 0);
    while let Some(&byte) = bytes.get(at) {
        at += 1;
        if byte != b'=' {
            plain.push(byte);
            continue;
        }
        let rest = &bytes[at..];
        if rest.starts_with(b"\r\n") {
            at += 2;
        } else if rest.starts_with(b"\n") {
            at += 1;
        } else if let Some(code) = rest.get(..2).and_then(|code| std::str::from_utf8(code).ok())
            && let Ok(decoded) = u8::from_str_radix(code, 16)
        {
            plain.push(decoded);
            at += 2;
        } else {
            plain.push(byte);
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(text: &str) -> Vec<(PartKind, String)> {
        let parts = parts(text).unwrap();
        parts.into_iter().map(|part| (part.kind, part.text.trim().to_owned())).collect()
    }

    #[test]
    fn a_message_is_taken_apart_whatever_its_line_ends_and_encodings() {
        let text = "Content-Type: multipart/mixed;\n boundary=\"x y\"\nMIME-Version: 1.0\n\npreamble\n\
            --x y\nContent-Type: text/cloud-config\n\na: 1\n\
            --x y\nContent-Transfer-Encoding: base64\n\nI2Nsb3VkLWNv\nbmZpZwo=\n\
            --x y\nContent-Transfer-Encoding: quoted-printable\n\n#cloud=2Dcon=\nfig\n\
            --x y\nContent-Type: multipart/mixed; boundary=in\n\n--in\n\n#!/bin/sh\n--in--\n\
            --x y\nContent-Type: text/x-include-url\n\nhttp://a\n--x y--\nafter\n";
        let expected = [
            (PartKind::Config, "a: 1"),
            (PartKind::Config, "#cloud-config"),
            (PartKind::Config, "#cloud-config"),
            (PartKind::Program, "#!/bin/sh"),
            (PartKind::Opaque, "http://a"),
        ]
        .map(|(kind, text)| (kind, text.to_owned()));
        assert_eq!(found(text), expected);
        assert_eq!(found(&text.replace('\n', "\r\n")), expected);
        assert_eq!(parts(text).unwrap()[0].line(1), 9);
    }

    #[test]
    fn an_archive_has_its_parts_and_their_lines() {
        let text = "#cloud-config-archive\n- type: text/cloud-config\n  content: |\n    a: 1\n- |\n  #!/bin/sh\n- 'b: 1'\n";
        let kinds: Vec<_> = found(text).into_iter().map(|(kind, _)| kind).collect();
        assert_eq!(kinds, [PartKind::Config, PartKind::Program, PartKind::Config]);
        assert_eq!(parts(text).unwrap()[2].line(1), 7);
    }

    proptest::proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "(MIME-Version: 1\n|Content-Type: multipart/mixed; boundary=x\n|--x(--)?\r?\n|[=:a0-9ü \n\r;-]){0,60}") {
            for part in parts(&text).into_iter().flatten() {
                let mistake = part.mistake(YamlMistake { line: 1, column: 1, byte: part.text.len(), what: String::new() });
                let _ = &text[mistake.byte..];
            }
        }
    }
}
