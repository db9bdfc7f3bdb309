//! How raw user-data begins, by which cloud-init knows what it is.
//!
//! Pure.

/// Returns whether user-data starts with this, in any case and after any space.
pub(super) fn begins_with(text: &str, beginning: &str) -> bool {
    let head = text.trim_start().as_bytes().get(..beginning.len());
    head.is_some_and(|head| head.eq_ignore_ascii_case(beginning.as_bytes()))
}

/// Returns whether user-data is a MIME document: it has this header somewhere in its first 4096
/// bytes.
pub(super) fn is_mime(text: &str) -> bool {
    let head = &text.as_bytes()[..text.len().min(4096)];
    let mime = b"mime-version:";
    head.windows(mime.len()).any(|window| window.eq_ignore_ascii_case(mime))
}
