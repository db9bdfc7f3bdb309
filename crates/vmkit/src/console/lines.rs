//! The last lines of a console, fit to be shown to a person.
//!
//! Pure: bytes to text.

use crate::error::ConsoleTail;

/// How many lines are shown.
const MOST_LINES: usize = 10;

/// Returns the last lines of what was said, fit to be shown on a terminal.
pub(crate) fn last_lines(said: &[u8]) -> Option<ConsoleTail> {
    let text = String::from_utf8_lossy(said);
    // What the guest prints is not trusted with the reader's terminal.
    let clean: String =
        without_sequences(&text).chars().filter(|c| !c.is_control() || matches!(c, '\n' | '\t')).collect();
    let lines: Vec<&str> = clean.lines().filter(|line| !line.trim().is_empty()).collect();
    ConsoleTail::new(&lines[lines.len().saturating_sub(MOST_LINES)..].join("\n"))
}

/// Returns the text without what commands a terminal: colours, cursor movements, titles.
///
/// Source: ECMA-48, 5.3 to 5.6 and 8.3.89.
pub(crate) fn without_sequences(text: &str) -> String {
    let mut plain = String::new();
    let mut rest = text.chars();
    while let Some(char) = rest.next() {
        if char != '\u{1b}' {
            plain.push(char);
            continue;
        }
        match rest.next() {
            // Up to its final byte.
            Some('[') => drop(rest.find(|c| matches!(c, '@'..='~'))),
            // Up to BEL, or to the ESC of the string terminator, whose other half is one character.
            Some(']' | 'P' | 'X' | '^' | '_') => {
                let end = rest.find(|c| matches!(c, '\u{7}' | '\u{1b}'));
                end.filter(|end| *end == '\u{1b}').and_then(|_| rest.next());
            }
            // A character set has its name behind it.
            Some('(' | ')' | '*' | '+') => drop(rest.next()),
            _ => {}
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_sequences_of_a_guest_are_not_shown() {
        let said = b"\x1b[2J\x1b[0;32m  OK  \x1b[0m] Started \x1b[0;1;39mssh\x1b[0m\r\n\x1b]0;title\x07\x1b(Blogin: \x1b[6n\n";
        let shown = |said: &[u8]| last_lines(said).map(|tail| tail.as_str().to_owned());
        assert_eq!(shown(said).as_deref(), Some("  OK  ] Started ssh\nlogin:"));
        assert_eq!(shown(b"cut off \x1b[").as_deref(), Some("cut off"));
        assert_eq!(shown("\u{1b}]never ended".as_bytes()), None);
    }
}
