//! What is wrong with a file of machines, with the lines that it is about.

use std::fmt;

use miette::{
    Diagnostic, GraphicalReportHandler, GraphicalTheme, LabeledSpan, MietteError, MietteSpanContents,
    Severity, SourceCode, SourceSpan, SpanContents,
};
use vmkit::vmfile::{VmfileError, VmfileProblem, VmfileSpan};

/// How wide a report is at the most.
const COLUMNS: usize = 100;
/// A longer line is no line that a person wrote, and is not shown.
const MOST_LINE_BYTES: usize = 1000;

/// How a report looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ReportStyle {
    /// Letters alone, for files and other programs.
    Plain,
    /// Lines, for a terminal without colours.
    Lines,
    /// Lines and colours.
    Colours,
}

/// Returns the report: each problem, the lines it is about, and what may be done. With a `machine`
/// the file is right in itself, and this machine of it can't be as it says.
pub(crate) fn report(machine: Option<&str>, error: &VmfileError, look: ReportStyle) -> String {
    if error.is_unread() {
        let whys = error.problems().iter().map(|problem| harmless(&problem.message));
        let why = whys.collect::<Vec<_>>().join("; ");
        return format!("error: {} can't be read: {why}\n", harmless(&error.file().to_string_lossy()));
    }
    let theme = match look {
        ReportStyle::Plain => GraphicalTheme::none(),
        ReportStyle::Lines => GraphicalTheme::unicode_nocolor(),
        ReportStyle::Colours => GraphicalTheme::unicode(),
    };
    let handler = GraphicalReportHandler::new_themed(theme).with_width(COLUMNS).with_links(false);
    let file = harmless(&error.file().to_string_lossy());
    let source = MietteSource { name: file.clone(), text: harmless(error.text()) };
    let mut text = match (machine, error.problems().len()) {
        (Some(machine), _) => format!("error: {machine} can't become what {file} describes\n"),
        (None, 1) => format!("error: {file} has an error\n"),
        (None, count) => format!("error: {file} has {count} errors\n"),
    };
    for problem in error.problems() {
        text.push('\n');
        let shown =
            MietteDiagnostic { error, problem, source: &source, message: harmless(&message(error, problem)) };
        // Writing to a string can't fail, and neither can reading from one.
        let _ = handler.render_report(&mut text, &shown);
    }
    text
}

/// Returns what to say above the lines; without lines, with the place.
fn message(error: &VmfileError, problem: &VmfileProblem) -> String {
    let file = error.file().display();
    match &problem.place {
        None => format!("{file}: {}", problem.message),
        Some(place) if !is_shown(error, place) => {
            let (line, column) = error.line_and_column(place.span.start);
            format!("{file}:{line}:{column}: {}", problem.message)
        }
        Some(_) => problem.message.clone(),
    }
}

fn is_shown(error: &VmfileError, place: &VmfileSpan) -> bool {
    let text = error.text();
    let start = text[..place.span.start].rfind('\n').map_or(0, |end| end + 1);
    let end = text[place.span.end..].find('\n').map_or(text.len(), |end| place.span.end + end);
    !text.is_empty() && text[start..end].lines().all(|line| line.len() <= MOST_LINE_BYTES)
}

/// Returns the text with every byte in its place, and nothing in it that could command a terminal
/// or turn its lines around.
fn harmless(text: &str) -> String {
    let stands_for = |c: char| match (c, c.len_utf8()) {
        ('\n' | '\r' | '\t', _) => c,
        (c, 1) if c.is_control() => '?',
        (c, 2) if c.is_control() => '¿',
        ('\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}', _) => {
            '\u{fffd}'
        }
        _ => c,
    };
    text.chars().map(stands_for).collect()
}

/// The file as miette shows it, but that a column is a character, as in all else that tells of the
/// file, and not a byte.
#[derive(Debug)]
struct MietteSource {
    name: String,
    text: String,
}

impl SourceCode for MietteSource {
    fn read_span<'a>(
        &'a self,
        span: &SourceSpan,
        lines_before: usize,
        lines_after: usize,
    ) -> Result<Box<dyn SpanContents<'a> + 'a>, MietteError> {
        let found = self.text.as_str().read_span(span, lines_before, lines_after)?;
        let before = &self.text[..self.text.floor_char_boundary(found.span().offset())];
        let column = before.rsplit('\n').next().unwrap_or_default().chars().count();
        let (data, name) = (found.data(), self.name.clone());
        let found = MietteSpanContents::new_named(
            name,
            data,
            *found.span(),
            found.line(),
            column,
            found.line_count(),
        );
        Ok(Box::new(found))
    }
}

/// A problem as miette shows it.
#[derive(Debug)]
struct MietteDiagnostic<'a> {
    error: &'a VmfileError,
    problem: &'a VmfileProblem,
    source: &'a MietteSource,
    message: String,
}

impl fmt::Display for MietteDiagnostic<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for MietteDiagnostic<'_> {}

impl Diagnostic for MietteDiagnostic<'_> {
    fn severity(&self) -> Option<Severity> {
        Some(Severity::Error)
    }

    fn help<'a>(&'a self) -> Option<Box<dyn fmt::Display + 'a>> {
        self.problem.help.as_deref().map(|help| Box::new(harmless(help)) as Box<dyn fmt::Display>)
    }

    fn source_code(&self) -> Option<&dyn SourceCode> {
        let place = self.problem.place.as_ref()?;
        is_shown(self.error, place).then_some(self.source as &dyn SourceCode)
    }

    fn labels(&self) -> Option<Box<dyn Iterator<Item = LabeledSpan> + '_>> {
        let label = |place: &VmfileSpan| {
            let text = (!place.label.is_empty()).then(|| harmless(&place.label));
            LabeledSpan::new_with_span(text, place.span.clone())
        };
        let place = self.problem.place.as_ref()?;
        let primary =
            LabeledSpan::new_primary_with_span(label(place).label().map(str::to_owned), place.span.clone());
        Some(Box::new(std::iter::once(primary).chain(self.problem.also.iter().map(label))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::path::{Path, PathBuf};

    const CASES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../vmkit/tests/vmfile");
    const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/vmfile");

    fn refusal(name: &str, text: &str) -> VmfileError {
        vmkit::vmfile::parse(Path::new(name), text, &|_| Err("there is no such file".to_owned())).unwrap_err()
    }

    fn bad_files() -> Vec<PathBuf> {
        let mut files = Vec::new();
        for dir in ["shape", "sense", "toml"] {
            files
                .extend(fs::read_dir(Path::new(CASES).join(dir)).unwrap().map(|entry| entry.unwrap().path()));
        }
        files.sort();
        files
    }

    #[test]
    fn every_bad_file_is_reported_as_golden() {
        let mut differ = Vec::new();
        for file in bad_files() {
            let name = Path::new("/shop").join(file.file_name().unwrap());
            let error = refusal(name.to_str().unwrap(), &fs::read_to_string(&file).unwrap());
            let found = report(None, &error, ReportStyle::Plain);
            let golden = Path::new(GOLDEN).join(file.file_stem().unwrap()).with_extension("txt");
            if std::env::var_os("UPDATE_GOLDEN").is_some() {
                fs::create_dir_all(GOLDEN).unwrap();
                fs::write(&golden, &found).unwrap();
            }
            if fs::read_to_string(&golden).unwrap_or_default() != found {
                differ.push(format!("{}:\n{found}", golden.display()));
            }
        }
        assert!(
            differ.is_empty(),
            "not as golden (UPDATE_GOLDEN=1 writes them anew):\n{}",
            differ.join("\n")
        );
    }

    #[test]
    fn colours_are_for_those_who_asked_for_them() {
        let error = refusal("vmkit.toml", "version = 3\n");
        assert!(report(None, &error, ReportStyle::Colours).contains("\u{1b}["));
        for look in [ReportStyle::Plain, ReportStyle::Lines] {
            assert!(!report(None, &error, look).contains('\u{1b}'), "{look:?}");
        }
        assert!(report(None, &error, ReportStyle::Plain).is_ascii());
    }

    #[test]
    fn a_file_can_not_command_the_terminal() {
        let hostile =
            "version = 1\n[machine.web]\nimage = 'a\u{9b}2J\u{202e}b'\n\"a\\u001b[2J\" = 1\ncpus = 0\n";
        let text = report(None, &refusal("vm\u{1b}[2Jkit.toml", hostile), ReportStyle::Plain);
        assert!(!text.contains(['\u{1b}', '\u{9b}', '\u{202e}']), "{text:?}");
    }

    #[test]
    fn a_column_is_a_character_here_as_in_the_error_itself() {
        let text = "\u{feff}version = 1\n[machine.web]\n'üöä' = 1\nimage = 'ü' ü\n[machine.'ß']\nimage = 'x:1'\ncpus = 0\n";
        for text in [text, &text.replace("'ü' ü", "'ü'"), "version = 1\n['ü'.é]\n", "\u{feff}verzion = 1\n"]
        {
            let error = refusal("/p/vmkit.toml", text);
            let report = report(None, &error, ReportStyle::Plain);
            assert!(!report.contains('\u{fffd}'), "{report}");
            for problem in error.problems() {
                let (line, column) = error.line_and_column(problem.place.as_ref().unwrap().span.start);
                assert!(
                    report.contains(&format!("[/p/vmkit.toml:{line}:{column}]")),
                    "{line}:{column}: {report}"
                );
            }
        }
    }

    #[test]
    fn a_default_line_is_not_shown() {
        let text = format!("version = 1\n[machine.web]\nimage = '{}'\n", "x".repeat(900_000));
        let report = report(None, &refusal("/p/vmkit.toml", &text), ReportStyle::Plain);
        assert!(report.contains("/p/vmkit.toml:3:9: ") && report.len() < 1000, "{report}");
    }
}
