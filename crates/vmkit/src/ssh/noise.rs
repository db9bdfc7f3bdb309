//! What a guest's login shell prints before the program that it was to run begins.
//!
//! Pure but for the mark, which is a random number. A server runs each command by the user's login
//! shell, and whatever that shell's start-up files print comes first, on the same streams. A person
//! sees that; what vmkit reads itself must not begin with it.

use uuid::Uuid;

/// How much of what came before is kept to be quoted, in bytes.
const MOST_WORDS: usize = 400;

/// What stands between the shell's own words and the program's.
#[derive(Debug)]
pub(super) struct OutputMark {
    line: String,
    streams: [MarkedStream; 2],
}

/// One of the two streams until its mark has come.
#[derive(Debug, Default)]
struct MarkedStream {
    held: Vec<u8>,
    words: Vec<u8>,
    is_over: bool,
}

/// A stream of a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OutputStream {
    Stdout,
    Stderr,
}

impl OutputMark {
    /// Creates a mark that no shell can print by chance.
    pub(super) fn new() -> Self {
        Self { line: format!("vmkit-{}", Uuid::new_v4().simple()), streams: Default::default() }
    }

    /// Returns the text of the mark, which the guest prints on a line of its own.
    pub(super) fn text(&self) -> &str {
        &self.line
    }

    /// Checks whether the program has begun.
    pub(super) fn has_begun(&self) -> bool {
        self.streams.iter().any(|stream| stream.is_over)
    }

    /// Returns what of these bytes is the program's.
    pub(super) fn without_noise(&mut self, stream: OutputStream, data: Vec<u8>) -> Vec<u8> {
        let before = &mut self.streams[stream as usize];
        if before.is_over {
            return data;
        }
        before.held.extend(data);
        let mark = format!("{}\n", self.line);
        match find(&before.held, mark.as_bytes()) {
            Some(at) => {
                before.is_over = true;
                before.keep(at);
                before.held.split_off(at + mark.len())
            }
            None => {
                // The rest may be the mark's beginning.
                let known = before.held.len().saturating_sub(mark.len());
                before.keep(known);
                before.held.drain(..known);
                Vec::new()
            }
        }
    }

    /// Returns what was said in place of a program that has not begun, in one line.
    pub(super) fn said(mut self) -> String {
        for stream in &mut self.streams {
            stream.keep(stream.held.len());
        }
        let [stdout, stderr] = self.streams.map(|stream| first_line(&stream.words));
        if stdout.is_empty() { stderr } else { stdout }
    }
}

impl MarkedStream {
    fn keep(&mut self, bytes: usize) {
        let room = MOST_WORDS.saturating_sub(self.words.len()).min(bytes);
        self.words.extend_from_slice(&self.held[..room]);
    }
}

/// Returns where a pattern first stands.
pub(super) fn find(bytes: &[u8], pattern: &[u8]) -> Option<usize> {
    bytes.windows(pattern.len()).position(|window| window == pattern)
}

/// Returns the first line with anything in it, fit for a message.
pub(super) fn first_line(words: &[u8]) -> String {
    let text = String::from_utf8_lossy(words);
    let line = text.lines().find(|line| !line.trim().is_empty()).unwrap_or_default().trim();
    line.chars().filter(|c| !c.is_control()).take(120).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_before_the_mark_is_no_output_however_it_is_cut() {
        let text = OutputMark::new().text().to_owned();
        let whole = format!("WELCOME\nto vmkit-web {text} yours\n{text}\nline\n");
        for length in 1..whole.len() {
            let mut mark = OutputMark { line: text.clone(), streams: Default::default() };
            let mut output = Vec::new();
            for piece in whole.as_bytes().chunks(length) {
                output.extend(mark.without_noise(OutputStream::Stdout, piece.to_vec()));
            }
            assert_eq!(output, b"line\n", "{length}");
            assert!(
                mark.has_begun() && mark.without_noise(OutputStream::Stderr, b"noise".to_vec()).is_empty()
            );
        }
    }

    #[test]
    fn a_program_that_never_starts_is_reported_with_its_first_words() {
        let mut mark = OutputMark::new();
        let noise = [b"\n\x1b[1mThis account is currently not available.\n".to_vec(), vec![b'x'; 1 << 20]];
        for piece in noise {
            assert!(mark.without_noise(OutputStream::Stdout, piece).is_empty());
        }
        assert!(!mark.has_begun() && mark.streams[0].held.len() < 100);
        assert_eq!(mark.said(), "[1mThis account is currently not available.");
    }
}
