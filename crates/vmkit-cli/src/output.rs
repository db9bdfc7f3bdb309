//! The only place that prints: data on standard output, everything else on standard error.

use std::env;
use std::error::Error;
use std::fmt::{self, Display};
use std::io::{self, IsTerminal, Write};

use serde::Serialize;
use vmkit::vmfile::VmfileError;

use crate::diagnostic::{self, ReportStyle};
use crate::failure::{Failure, FailureReport, ReportedError};

/// Prints the command's output; a line feed is added unless it ends with one.
pub(crate) fn text(text: impl Display) -> Result<(), Failure> {
    let mut text = text.to_string();
    if !text.is_empty() && !text.ends_with('\n') {
        text.push('\n');
    }
    bytes(text.as_bytes())
}

/// Prints one JSON document on a line of its own.
pub(crate) fn json(value: &impl Serialize) -> Result<(), Failure> {
    let mut line = serde_json::to_vec(value).map_err(|error| Failure::Output(error.into()))?;
    line.push(b'\n');
    bytes(&line)
}

/// Writes bytes unchanged and without delay.
pub(crate) fn bytes(bytes: &[u8]) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(bytes).and_then(|()| stdout.flush()).map_err(Failure::Output)
}

/// Writes to standard error, in one piece. If it is closed the text is dropped and the work
/// continues: `vmkit up 2>&1 | head` starts all machines.
fn utter(text: fmt::Arguments<'_>) {
    let _ = io::stderr().lock().write_all(text.to_string().as_bytes());
}

/// Writes a line to standard error.
fn say(line: fmt::Arguments<'_>) {
    utter(format_args!("{line}\n"));
}

/// Prints an error and its causes, each once; `of` is the machine or VM it is about.
pub(crate) fn error(of: Option<&str>, error: &(dyn Error + 'static)) {
    match of {
        Some(of) => say(format_args!("error: {of}: {}", printable(error))),
        None => say(format_args!("error: {}", printable(error))),
    }
    let mut cause = error.source();
    while let Some(error) = cause {
        say(format_args!("  caused by: {}", printable(error)));
        cause = error.source();
    }
}

/// Prints what went wrong, then what may be done about it.
pub(crate) fn failure(report: &FailureReport<'_>) {
    for reported in &report.errors {
        match reported {
            ReportedError::Library { of, error: cause } => error(*of, *cause),
            ReportedError::Vmfile { machine, error } => vmfile(*machine, error),
            ReportedError::Usage(error) => usage(error),
            ReportedError::Unwritten(error) => unwritten(error),
        }
    }
    report.hints.iter().for_each(|text| hint(text));
}

/// Prints the errors in a file of machines, or in its values for one of them.
fn vmfile(machine: Option<&str>, error: &VmfileError) {
    let look = match io::stderr().is_terminal() {
        false => ReportStyle::Plain,
        // Source: no-color.org; an empty value counts as none.
        true if env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty()) => ReportStyle::Lines,
        true => ReportStyle::Colours,
    };
    utter(format_args!("{}", diagnostic::report(machine, error, look)));
}

/// Prints that the command's output can't be written.
fn unwritten(error: &io::Error) {
    say(format_args!("error: cannot write to standard output\n  caused by: {error}"));
}

/// Prints a hint about the preceding error.
pub(crate) fn hint(hint: &str) {
    say(format_args!("hint: {hint}"));
}

/// Prints a warning: the work goes on, though this is probably not intended.
pub(crate) fn warning(warning: impl Display) {
    say(format_args!("warning: {}", printable(warning)));
}

/// Prints a line of progress, on a terminal and off it.
pub(crate) fn line(line: impl Display) {
    say(format_args!("{}", printable(line)));
}

/// Prints progress, on a terminal only.
pub(crate) fn progress(progress: impl Display) {
    if io::stderr().is_terminal() {
        say(format_args!("{}", printable(progress)));
    }
}

/// Prints progress unconditionally.
pub(crate) fn status(status: impl Display) {
    say(format_args!("{}", printable(status)));
}

/// Prints a question, whose reply is typed behind it.
pub(crate) fn ask(question: impl Display) {
    utter(format_args!("{}", printable(question)));
}

/// Prints a notice to a user at the console. In raw mode a line feed alone does not return the
/// carriage.
pub(crate) fn notice(notice: impl Display) {
    utter(format_args!("[vmkit: {}]\r\n", printable(notice)));
}

/// Prints the help or the version, which clap reports as an error.
pub(crate) fn help(help: &clap::Error) -> Result<(), Failure> {
    help.print().and_then(|()| io::stdout().flush()).map_err(Failure::Output)
}

/// Prints the usage error of clap.
fn usage(error: &clap::Error) {
    // As with all of standard error, a closed reader is no failure.
    let _ = error.print();
}

/// Returns the text without control characters: it may come from a guest or a file, and would
/// control the terminal.
pub(crate) fn printable(text: impl Display) -> String {
    let mut printable = String::new();
    for char in text.to_string().chars() {
        match char {
            '\n' | '\t' => printable.push(char),
            _ if char.is_control() => printable.extend(char.escape_default()),
            _ => printable.push(char),
        }
    }
    printable
}

/// Rows with aligned columns; the last column is never padded.
#[derive(Debug)]
pub(crate) struct TextTable {
    rows: Vec<Vec<String>>,
}

impl TextTable {
    /// Creates a table with this head.
    pub(crate) fn new(head: &[&str]) -> Self {
        Self { rows: vec![head.iter().map(|&cell| cell.to_owned()).collect()] }
    }

    /// Adds a row; characters that would break the alignment or control the terminal are escaped.
    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let one_line = |cell: String| printable(cell).replace(['\n', '\t'], " ");
        self.rows.push(cells.into_iter().map(one_line).collect());
    }
}

impl Display for TextTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            self.rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max()
        };
        let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
        for row in &self.rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                line.push_str(&format!("{cell:width$}  "));
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_can_not_command_the_terminal() {
        assert_eq!(printable("a\x1b[2Jb\tc\r\nd\u{9b}e"), "a\\u{1b}[2Jb\tc\\r\nd\\u{9b}e");
    }

    #[test]
    fn columns_are_aligned_and_lines_end_without_blanks() {
        let mut table = TextTable::new(&["NAME", "STATE"]);
        table.row(["web-server".to_owned(), "running".to_owned()]);
        table.row(["db".to_owned(), "line\nbreak".to_owned()]);
        table.row(["none".to_owned(), String::new()]);
        assert_eq!(
            table.to_string(),
            "NAME        STATE\nweb-server  running\ndb          line break\nnone\n"
        );
    }
}
