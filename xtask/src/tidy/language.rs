//! The language of comments and documents: plain English of the field, in lines of at most 100
//! columns.

use super::Findings;

/// The longest line of a comment or of prose, in characters.
const COLUMNS: usize = 100;

/// Verbs that no doc comment begins with, and what to write.
const VERBS: &[(&str, &str)] = &[
    ("Answers", "Returns"),
    ("Begins", "Starts, Creates or Opens"),
    ("Has", "the thing itself as a noun, or Returns"),
    ("Makes", "Creates"),
    ("Tells", "Returns or Reports"),
];

/// Words that comments and documents do without, and what to write.
const WORDS: &[(&str, &str)] = &[
    ("anew", "again, or recreate"),
    ("answers", "returns or replies"),
    ("cut off", "interrupted"),
    ("further disk", "data disk"),
    ("further disks", "data disks"),
    ("hang on", "have as their backing file"),
    ("hangs on", "has as its backing file"),
    ("kept image", "local image"),
    ("kept images", "local images"),
    ("nobody", "no process, no user, or nothing"),
    ("somebody", "another process, a user, or a caller"),
    ("whoever", "the process, user or caller that"),
];

/// Adds what the comments of a Rust file have against the rules; code blocks and drawings pass.
pub(super) fn check_rust(text: &str, findings: &mut Findings) {
    let (mut in_docs, mut in_code) = (false, false);
    for (index, line) in text.lines().enumerate() {
        let line = line.trim_end();
        let Some(comment) = comment_of(line) else {
            (in_docs, in_code) = (false, false);
            continue;
        };
        let is_doc = line.trim_start().starts_with("///");
        if is_doc && !in_docs {
            check_verb(comment, index + 1, findings);
        }
        in_docs = is_doc;
        if comment.starts_with("```") {
            in_code = !in_code;
        } else if !in_code {
            check_columns(line, index + 1, findings);
            check_words(comment, index + 1, findings);
        }
    }
}

/// Adds what the prose of a Markdown file has against the rules; code blocks and tables pass.
pub(super) fn check_markdown(text: &str, findings: &mut Findings) {
    let mut in_code = false;
    for (index, line) in text.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            in_code = !in_code;
            continue;
        }
        if in_code {
            continue;
        }
        check_words(line, index + 1, findings);
        if !line.starts_with('|') {
            check_columns(line, index + 1, findings);
        }
    }
}

/// Returns the text of a line that is nothing but a comment.
fn comment_of(line: &str) -> Option<&str> {
    let comment = line.trim_start().strip_prefix("//")?;
    Some(comment.trim_start_matches(['/', '!']).trim())
}

fn check_verb(comment: &str, line: usize, findings: &mut Findings) {
    let first = comment.split_whitespace().next().unwrap_or_default();
    if let Some((verb, instead)) = VERBS.iter().find(|(verb, _)| *verb == first) {
        findings.add(line, format!("a doc comment begins with `{verb}` (expected {instead})"));
    }
}

fn check_columns(line: &str, number: usize, findings: &mut Findings) {
    let columns = line.chars().count();
    // A row of a table, a drawing or an address can't be wrapped.
    let comment = comment_of(line).unwrap_or(line);
    let is_prose = !comment.starts_with('|') && comment.contains(' ') && !comment.contains("://");
    if columns > COLUMNS && is_prose {
        findings.add(number, format!("the line has {columns} columns (expected at most {COLUMNS})"));
    }
}

/// Adds the words of a text that are not of the field; names in backticks pass.
pub(super) fn check_words(text: &str, line: usize, findings: &mut Findings) {
    // The even parts are outside of backticks: what is inside is a name.
    let prose = text.split('`').step_by(2).collect::<Vec<_>>().join(" ").to_lowercase();
    for (word, instead) in WORDS.iter().filter(|(word, _)| super::contains_word(&prose, word)) {
        findings.add(line, format!("`{word}` (expected {instead})"));
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn found(check: fn(&str, &mut Findings), text: &str) -> Vec<(usize, String)> {
        let mut findings = Findings { path: Path::new("a"), violations: Vec::new() };
        check(text, &mut findings);
        findings.violations.into_iter().map(|found| (found.line, found.message)).collect()
    }

    #[test]
    fn a_doc_comment_begins_with_a_plain_verb() {
        let text = "/// Returns a.\n/// Answers nothing.\nfn a() {}\n/// Answers b.\nfn b() {}\n";
        let lines: Vec<usize> = found(check_rust, text).into_iter().map(|(line, _)| line).collect();
        // `answers` is found in each, the verb only where the comment begins.
        assert_eq!(lines, [2, 4, 4]);
    }

    #[test]
    fn words_of_the_list_are_found_outside_of_backticks_and_code() {
        assert_eq!(found(check_rust, "// Whoever comes.\nlet nobody = 1;\n").len(), 1);
        assert!(found(check_rust, "// The user `nobody`.\n").is_empty());
        assert!(found(check_rust, "/// ```\n/// nobody\n/// ```\n").is_empty());
        assert!(found(check_markdown, "```\nnobody\n```\nThe user `nobody`.\n").is_empty());
        assert_eq!(found(check_markdown, "| nobody |\n").len(), 1, "tables are read, too");
    }

    #[test]
    fn prose_ends_at_100_columns_and_tables_and_addresses_may_be_longer() {
        let long = "word ".repeat(21);
        assert_eq!(found(check_rust, &format!("// {long}\n")).len(), 1);
        assert!(found(check_rust, &format!("let a = \"{long}\";\n")).is_empty(), "rustfmt wraps code");
        assert_eq!(found(check_markdown, &format!("{long}\n")).len(), 1);
        assert!(found(check_markdown, &format!("| {long} |\n")).is_empty());
        assert!(found(check_markdown, &format!("see https://{}\n", "x".repeat(100))).is_empty());
    }
}
