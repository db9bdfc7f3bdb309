//! `cargo xtask tidy`: the rules of the house that neither the compiler nor clippy checks.
//!
//! | rule | where |
//! | --- | --- |
//! | a file has fewer than 700 lines, a function fewer than 70 | every Rust file |
//! | a file begins with what its module is for | `crates/*/src`, `xtask/src` |
//! | a module that calls itself `Pure` touches no file, process, socket, clock, environment or runtime | the same, but for tests |
//! | no left-overs, no `utils.rs`, no `get_…`, no `…Inner`, `…Impl`, `…Helper` | every Rust file |
//! | integration tests are at most ten binaries, and a `mod` declares each of their files | `*/tests` |
//! | a sleep in a test has a comment with its reason | the same |
//! | a type's name is unique in its crate, and one in four at most has one word | `crates/*/src`, outside tests |
//! | files, and top-level modules, use each other without a circle; pure modules use pure ones | the same |
//! | ARCHITECTURE.md has at most 200 lines | |
//! | no work on Tokio's blocking threads, which panic where there can be none | `crates/vmkit/src` |
//! | a message has no other error's text, a hint matches no words | the library and the command, but for what `old_errors.txt` counts |
//! | a relative link has a target | every Markdown file |
//! | comments and prose are plain English in 100 columns | every Rust and Markdown file |
//! | messages are plain English | the library and the command, outside tests |
//!
//! Files are those that git tracks or would track.

mod circles;
mod errors;
mod graph;
mod language;
mod links;
mod messages;
mod names;
mod syntax;
mod test_files;

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Error, PathContext, Result};
use crate::programs;

const FILE_LINES: usize = 700;
const ARCHITECTURE_LINES: usize = 200;

/// Words that mean "not done", spelt so that this file has none of them.
const LEFT_OVERS: &[&str] = &[
    concat!("to", "do!"),
    concat!("unimple", "mented!"),
    concat!("TO", "DO"),
    concat!("FIX", "ME"),
    concat!("X", "XX"),
];

/// What runs on Tokio's blocking threads.
const POOL_THREADS: &[&str] = &["spawn_blocking", "tokio::fs", "lookup_host"];

/// A place where a rule is broken.
#[derive(Debug, PartialEq, Eq)]
struct Violation {
    path: PathBuf,
    /// Counted from 1.
    line: usize,
    message: String,
}

/// Gathers the violations of one file.
struct Findings<'a> {
    path: &'a Path,
    violations: Vec<Violation>,
}

/// Prints every violation as `path:line: message`.
///
/// # Errors
///
/// Exit code 1 if there is one.
pub(crate) fn run() -> Result<()> {
    let violations = check(&repository())?;
    for violation in &violations {
        println!("{violation}");
    }
    match violations.len() {
        0 => Ok(()),
        count => Err(Error::failed(format!("tidy: violations: {count}"))),
    }
}

fn repository() -> PathBuf {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    package.parent().expect("xtask is a directory of the repository").to_owned()
}

fn check(repository: &Path) -> Result<Vec<Violation>> {
    let mut violations = Vec::new();
    let mut tests = Vec::new();
    let mut names = names::TypeNames::default();
    let mut graph = graph::ModuleGraph::default();
    for path in files(repository)? {
        let is = |extension: &str| path.extension().is_some_and(|found| found == extension);
        if !is("rs") && !is("md") {
            continue;
        }
        let absolute = repository.join(&path);
        let text = fs::read_to_string(&absolute).at("read", &absolute)?;
        let mut findings = Findings { path: &path, violations: Vec::new() };
        if is("rs") {
            let syntax = check_rust(&text, &mut findings);
            language::check_rust(&text, &mut findings);
            if let Some(syntax) = syntax.filter(|_| path.starts_with("crates") && is_module(&path)) {
                names.add(&path, &syntax);
                if ["crates/vmkit/src", "crates/vmkit-cli/src"].iter().any(|part| path.starts_with(part)) {
                    errors::check(&syntax, &mut findings);
                    if !path.to_string_lossy().ends_with("_tests.rs") {
                        messages::check(&syntax, &mut findings);
                    }
                }
                graph.add(&path, &text, &syntax);
            }
        } else {
            check_markdown(&text, repository, &mut findings);
            language::check_markdown(&text, &mut findings);
        }
        violations.extend(findings.violations);
        if test_files::is_test_file(&path) {
            tests.push((path, text));
        }
    }
    violations.extend(test_files::check(&tests));
    violations.extend(names.violations());
    violations.extend(graph.violations());
    Ok(violations)
}

/// Lists the files that are tracked, or would be after `git add`, relative to the repository.
fn files(repository: &Path) -> Result<Vec<PathBuf>> {
    let mut git = programs::command("git")?;
    git.current_dir(repository).args([
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
        "--deduplicate",
    ]);
    let names = programs::capture_text(&mut git)?;
    let paths = names.split_terminator('\0').map(PathBuf::from);
    // A tracked file may be gone from the working tree.
    Ok(paths.filter(|path| repository.join(path).is_file()).collect())
}

/// Adds what breaks a rule in a Rust file, and returns its syntax.
fn check_rust(text: &str, findings: &mut Findings) -> Option<syn::File> {
    let lines = text.lines().count();
    if lines >= FILE_LINES {
        findings.add(lines, format!("the file has {lines} lines; fewer than {FILE_LINES} are allowed"));
    }
    let name = findings.path.file_name().unwrap_or_default();
    if ["utils.rs", "util.rs", "helpers.rs"].iter().any(|vague| name == *vague) {
        findings.add(1, "a module is named for what it knows");
    }
    for (index, line) in text.lines().enumerate() {
        for word in LEFT_OVERS.iter().filter(|word| contains_word(line, word)) {
            findings.add(index + 1, format!("`{word}` is left over"));
        }
        let is_library = findings.path.starts_with("crates/vmkit/src");
        for word in POOL_THREADS.iter().filter(|word| is_library && contains_word(line, word)) {
            findings.add(index + 1, format!("`{word}` panics without a thread: use `blocking.rs`"));
        }
    }
    let documented =
        text.lines().find(|line| !line.trim().is_empty()).is_none_or(|line| line.starts_with("//!"));
    if is_module(findings.path) && !documented {
        findings.add(1, "the file does not begin with `//!` and what its module is for");
    }
    if test_files::is_test_file(findings.path) {
        test_files::check_sleeps(text, findings);
    }
    syntax::check(text, findings)
}

fn check_markdown(text: &str, repository: &Path, findings: &mut Findings) {
    let lines = text.lines().count();
    if findings.path == Path::new("ARCHITECTURE.md") && lines > ARCHITECTURE_LINES {
        findings.add(lines, format!("the file has {lines} lines; at most {ARCHITECTURE_LINES} are allowed"));
    }
    links::check(text, repository, findings);
}

/// Returns whether a file is a module of a crate of ours, and not an integration test or an
/// example.
fn is_module(path: &Path) -> bool {
    let mut parts = path.iter().map(|part| part.to_string_lossy());
    match parts.next().as_deref() {
        Some("crates") => parts.nth(1).as_deref() == Some("src"),
        Some("xtask") => parts.next().as_deref() == Some("src"),
        _ => false,
    }
}

/// Returns whether the line has the word with no letter, digit or underscore on either side.
fn contains_word(line: &str, word: &str) -> bool {
    let is_part = |character: char| character.is_alphanumeric() || character == '_';
    line.match_indices(word).any(|(start, _)| {
        let before = line[..start].chars().next_back();
        let after = line[start + word.len()..].chars().next();
        !before.is_some_and(is_part) && !after.is_some_and(is_part)
    })
}

impl Findings<'_> {
    fn add(&mut self, line: usize, message: impl Into<String>) {
        self.violations.push(Violation { path: self.path.to_owned(), line, message: message.into() });
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.path.display(), self.line, self.message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rust(path: &str, text: &str) -> Vec<String> {
        let mut findings = Findings { path: Path::new(path), violations: Vec::new() };
        check_rust(text, &mut findings);
        findings.violations.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn tidy_holds() {
        let violations = check(&repository()).unwrap();
        let lines: Vec<String> = violations.iter().map(ToString::to_string).collect();
        assert!(lines.is_empty(), "cargo xtask tidy finds:\n{}", lines.join("\n"));
    }

    #[test]
    fn a_file_of_700_lines_is_too_long_and_one_of_699_is_not() {
        let long = "//! Docs.\n".repeat(700);
        assert_eq!(
            rust("crates/a/src/b.rs", &long),
            ["crates/a/src/b.rs:700: the file has 700 lines; fewer than 700 are allowed"]
        );
        assert!(rust("crates/a/src/b.rs", &long[10..]).is_empty());
    }

    #[test]
    fn a_module_without_docs_is_found_and_an_integration_test_needs_none() {
        assert_eq!(rust("crates/a/src/b.rs", "fn main() {}\n").len(), 1);
        assert!(rust("crates/a/tests/b.rs", "fn main() {}\n").is_empty());
    }

    #[test]
    fn a_left_over_is_a_whole_word() {
        let word = LEFT_OVERS[4];
        assert_eq!(rust("examples/a.rs", &format!("// {word}: later\n")).len(), 1);
        assert!(rust("examples/a.rs", &format!("const TEMPLATE: &str = \"{word}{word}\";\n")).is_empty());
    }

    #[test]
    fn a_blocking_thread_of_tokio_is_found_in_the_library_only() {
        let text = "//! Docs.\nfn a() { tokio::task::spawn_blocking(|| ()); }\n";
        assert_eq!(rust("crates/vmkit/src/b.rs", text).len(), 1);
        assert!(rust("crates/vmkit-cli/src/b.rs", text).is_empty());
    }

    #[test]
    fn a_vague_file_name_is_found() {
        assert_eq!(rust("crates/a/tests/utils.rs", "").len(), 1);
    }

    #[test]
    fn architecture_is_held_to_200_lines() {
        let check = |text: &str| {
            let mut findings = Findings { path: Path::new("ARCHITECTURE.md"), violations: Vec::new() };
            check_markdown(text, Path::new("/"), &mut findings);
            findings.violations.len()
        };
        assert_eq!((check(&"line\n".repeat(200)), check(&"line\n".repeat(201))), (0, 1));
    }
}
