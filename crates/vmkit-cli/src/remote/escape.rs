//! How a user leaves a terminal in a guest that no longer responds: a new line, then `~.`, as with
//! `ssh`.

/// What was typed, after the escape was looked for in it.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum TypedBytes {
    /// This is for the guest.
    Pass(Vec<u8>),
    /// The person leaves.
    Left,
}

/// Where in the escape the person is.
#[derive(Debug)]
pub(super) struct EscapeParser {
    at: EscapeState,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum EscapeState {
    InLine,
    NewLine,
    Tilde,
}

impl EscapeParser {
    pub(super) fn new() -> Self {
        Self { at: EscapeState::NewLine }
    }

    /// Takes what was typed; a tilde that may begin the escape is held back until the next key.
    pub(super) fn take(&mut self, typed: &[u8]) -> TypedBytes {
        let mut pass = Vec::with_capacity(typed.len());
        for &byte in typed {
            self.at = match (self.at, byte) {
                (EscapeState::Tilde, b'.') => return TypedBytes::Left,
                (EscapeState::NewLine, b'~') => EscapeState::Tilde,
                // Twice is one for the guest.
                (EscapeState::Tilde, b'~') => {
                    pass.push(b'~');
                    EscapeState::InLine
                }
                (before, byte) => {
                    if before == EscapeState::Tilde {
                        pass.push(b'~');
                    }
                    pass.push(byte);
                    if matches!(byte, b'\r' | b'\n') { EscapeState::NewLine } else { EscapeState::InLine }
                }
            };
        }
        TypedBytes::Pass(pass)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(typed: &[&str]) -> (String, bool) {
        let (mut escape, mut passed) = (EscapeParser::new(), String::new());
        for piece in typed {
            match escape.take(piece.as_bytes()) {
                TypedBytes::Pass(piece) => passed.push_str(std::str::from_utf8(&piece).unwrap()),
                TypedBytes::Left => return (passed, true),
            }
        }
        (passed, false)
    }

    #[test]
    fn a_tilde_and_a_dot_leave_at_the_beginning_of_a_line_only() {
        assert_eq!(after(&["~."]), (String::new(), true));
        assert_eq!(after(&["ls\r~", "."]), ("ls\r".into(), true));
        assert_eq!(after(&["ls ~."]), ("ls ~.".into(), false));
    }

    #[test]
    fn every_other_tilde_reaches_the_guest() {
        assert_eq!(after(&["~/bin\r"]), ("~/bin\r".into(), false));
        assert_eq!(after(&["\r~~."]), ("\r~.".into(), false));
        assert_eq!(after(&["\r~", "x"]), ("\r~x".into(), false));
    }
}
