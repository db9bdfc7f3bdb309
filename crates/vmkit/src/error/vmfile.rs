//! What is wrong with a file of machines, and where in its text: [`VmfileError`].
//!
//! Pure. Here problems are data, with one line of text for each; showing them is the caller's.

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::ErrorKind;

/// Everything that is wrong with one file.
///
/// Its text is a line `FILE:LINE:COLUMN: MESSAGE` for each problem, as editors and `grep` have it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmfileError {
    file: PathBuf,
    text: Arc<str>,
    problems: Vec<VmfileProblem>,
    kind: ErrorKind,
    is_unread: bool,
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct VmfileProblem {
    /// What is wrong: lower case, no full stop.
    pub message: String,
    /// Where; `None` where no place in the text is to blame.
    pub place: Option<VmfileSpan>,
    /// Where else to look, such as at the first one of two.
    pub also: Vec<VmfileSpan>,
    /// What may be done about it.
    pub help: Option<String>,
}

/// A place in the file's text.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct VmfileSpan {
    /// The bytes from the beginning of the text.
    pub span: Range<usize>,
    /// What to say of them; may be empty.
    pub label: String,
}

impl VmfileProblem {
    /// Creates a problem that has no place yet.
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), place: None, also: Vec::new(), help: None }
    }

    /// Returns the same problem, at this place.
    #[must_use]
    pub fn at(mut self, span: Range<usize>, label: impl Into<String>) -> Self {
        self.place = Some(VmfileSpan { span, label: label.into() });
        self
    }

    /// Returns the same problem, with another place to look at.
    #[must_use]
    pub fn also(mut self, span: Range<usize>, label: impl Into<String>) -> Self {
        self.also.push(VmfileSpan { span, label: label.into() });
        self
    }

    /// Returns the same problem, with what may be done about it.
    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }
}

impl VmfileError {
    /// Creates the error of a file with this text; the problems are put in the order of their
    /// places.
    pub(crate) fn new(file: &Path, text: Arc<str>, mut problems: Vec<VmfileProblem>) -> Self {
        problems.sort_by_key(|problem| problem.place.as_ref().map_or(0, |place| place.span.start));
        Self { file: file.to_owned(), text, problems, kind: ErrorKind::InvalidInput, is_unread: false }
    }

    /// Creates the error of a file that can't be read, which is its only problem.
    pub(crate) fn unread(file: &Path, why: String) -> Self {
        Self { is_unread: true, ..Self::new(file, Arc::from(""), vec![VmfileProblem::new(why)]) }
    }

    /// Returns the same error, of another kind: what the file asks for is right, and could not be
    /// had.
    #[must_use]
    pub fn of_kind(self, kind: ErrorKind) -> Self {
        Self { kind, ..self }
    }

    /// Returns what a caller can do about it: `InvalidInput`, unless the file is right and what it
    /// asks for failed.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// Returns whether the file could not be read at all, so that nothing is known of what is in
    /// it.
    pub fn is_unread(&self) -> bool {
        self.is_unread
    }

    /// Returns the file.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// Returns the file's text, which every span counts in; empty where it could not be read.
    pub fn text(&self) -> &Arc<str> {
        &self.text
    }

    /// Returns what is wrong, in the order of the text; at least one problem.
    pub fn problems(&self) -> &[VmfileProblem] {
        &self.problems
    }

    /// Returns the line and the column of a byte, both counted from 1; a column is a character.
    pub fn line_and_column(&self, byte: usize) -> (usize, usize) {
        let byte = self.text.floor_char_boundary(byte);
        let before = &self.text[..byte];
        let line = before.matches('\n').count() + 1;
        let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
        (line, column)
    }
}

impl fmt::Display for VmfileError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.problems.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            write!(f, "{}:", self.file.display())?;
            if let Some(place) = &problem.place {
                let (line, column) = self.line_and_column(place.span.start);
                write!(f, "{line}:{column}:")?;
            }
            write!(f, " {}", problem.message)?;
            if let Some(help) = &problem.help {
                write!(f, ": {help}")?;
            }
        }
        Ok(())
    }
}

impl std::error::Error for VmfileError {}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str, problems: Vec<VmfileProblem>) -> VmfileError {
        VmfileError::new(Path::new("/p/vmkit.toml"), text.into(), problems)
    }

    #[test]
    fn lines_and_columns_count_characters_from_one() {
        let error = error("a\r\nü = 1\n", vec![VmfileProblem::new("x")]);
        for (byte, place) in [(0, (1, 1)), (3, (2, 1)), (4, (2, 1)), (5, (2, 2)), (10, (3, 1)), (99, (3, 1))]
        {
            assert_eq!(error.line_and_column(byte), place, "{byte}");
        }
    }

    #[test]
    fn problems_are_reported_in_the_order_of_the_text() {
        let error = error(
            "a\nb\n",
            vec![
                VmfileProblem::new("second").at(2..3, "").help("mend it"),
                VmfileProblem::new("first").at(0..1, ""),
            ],
        );
        assert_eq!(error.to_string(), "/p/vmkit.toml:1:1: first\n/p/vmkit.toml:2:1: second: mend it");
    }
}
