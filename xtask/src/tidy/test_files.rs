//! Integration tests are few binaries, and each file of them is compiled.
//!
//! Every binary links the whole library again, so a crate has at most two. And rustc says nothing
//! about a file that no `mod` declares: its tests would never run. A sleep has its reason beside
//! it.

use std::path::{Component, Path, PathBuf};

use super::{Findings, Violation};

/// How many binaries the workspace may have; each takes its time to link, and room on the disk.
const BINARIES: usize = 10;

/// Checks the Rust files in the `tests` directories of all crates, each with its text.
pub(super) fn check(files: &[(PathBuf, String)]) -> Vec<Violation> {
    let mut violations = Vec::new();
    let declared: Vec<PathBuf> = files.iter().flat_map(|(path, text)| declared(path, text)).collect();
    let mut binaries = 0;
    for (path, _) in files {
        let message = match depth(path) {
            Some(1) => "a test binary of its own: move it into one of the directories beside it".to_owned(),
            Some(2) if path.ends_with("main.rs") => {
                binaries += 1;
                if binaries <= BINARIES {
                    continue;
                }
                format!("test binary {binaries}; at most {BINARIES} are allowed")
            }
            Some(_) if !declared.contains(path) => "forgotten: no `mod` declares the file".to_owned(),
            _ => continue,
        };
        violations.push(Violation { path: path.clone(), line: 1, message });
    }
    violations
}

/// Adds the sleeps of a test file that have no comment beside them or above them.
///
/// A test waits for events: a wait for time is too short on a busy host, or too long on all others.
pub(super) fn check_sleeps(text: &str, findings: &mut Findings) {
    let mut before = "";
    for (index, line) in text.lines().map(str::trim).enumerate() {
        let code = line.split("//").next().unwrap_or_default();
        if is_sleep(code) && code.len() == line.len() && !before.starts_with("//") {
            findings.add(index + 1, "a sleep in a test: wait for an event, or say why there is none");
        }
        before = line;
    }
}

/// Returns whether a line calls a function of this name.
fn is_sleep(code: &str) -> bool {
    let call = concat!("sleep", "(");
    code.match_indices(call).any(|(start, _)| {
        let before = code[..start].chars().next_back();
        !before.is_some_and(|before| before.is_alphanumeric() || before == '_')
    })
}

/// Returns whether this is a Rust file of integration tests.
pub(super) fn is_test_file(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "rs") && depth(path).is_some()
}

/// Returns how many names follow `tests` in a path such as `crates/vmkit/tests/it/main.rs`: 2.
fn depth(path: &Path) -> Option<usize> {
    let names: Vec<_> = path.iter().collect();
    let tests = names.iter().position(|name| *name == "tests")?;
    let of_a_crate = tests == if names[0] == "crates" { 2 } else { 1 };
    of_a_crate.then_some(names.len() - tests - 1)
}

/// Returns the files that the `mod` lines of a file may stand for.
fn declared(path: &Path, text: &str) -> Vec<PathBuf> {
    let dir = path.parent().unwrap_or(Path::new(""));
    let stem = path.file_stem().unwrap_or_default();
    let modules = if stem == "main" || stem == "mod" { dir.to_owned() } else { dir.join(stem) };
    let mut found = Vec::new();
    let mut named = None;
    for line in text.lines().map(str::trim) {
        if let Some(path) = line.strip_prefix("#[path = \"").and_then(|rest| rest.strip_suffix("\"]")) {
            named = Some(normal(&dir.join(path)));
        } else if let Some(name) = module(line) {
            match named.take() {
                Some(path) => found.push(path),
                None => {
                    found.push(modules.join(name).with_extension("rs"));
                    found.push(modules.join(name).join("mod.rs"));
                }
            }
        } else if !line.starts_with("#[") {
            named = None;
        }
    }
    found
}

/// Returns the name in a line such as `pub(crate) mod name;`.
fn module(line: &str) -> Option<&str> {
    let declaration = line.strip_prefix("pub(crate) ").unwrap_or(line);
    declaration.strip_prefix("mod ")?.strip_suffix(';')
}

/// Resolves each `..` of a path that has no links.
fn normal(path: &Path) -> PathBuf {
    let mut normal = PathBuf::new();
    for component in path.components() {
        if component == Component::ParentDir {
            normal.pop();
        } else {
            normal.push(component);
        }
    }
    normal
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(files: &[(&str, &str)]) -> Vec<String> {
        let files: Vec<_> = files.iter().map(|(path, text)| (path.into(), (*text).to_owned())).collect();
        check(&files).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_file_that_no_mod_declares_is_found() {
        let main = "#[cfg(unix)]\nmod one;\nmod two;\n#[path = \"../three/mod.rs\"]\nmod three;\n";
        let files = [
            ("crates/a/tests/it/main.rs", main),
            ("crates/a/tests/it/one.rs", ""),
            ("crates/a/tests/it/two/mod.rs", "pub(crate) mod deep;\n"),
            ("crates/a/tests/it/two/deep.rs", ""),
            ("crates/a/tests/three/mod.rs", ""),
            ("crates/a/tests/it/four.rs", ""),
            ("crates/a/tests/it/deep.rs", ""),
        ];
        assert_eq!(
            found(&files),
            [
                "crates/a/tests/it/four.rs:1: forgotten: no `mod` declares the file",
                "crates/a/tests/it/deep.rs:1: forgotten: no `mod` declares the file",
            ]
        );
    }

    #[test]
    fn a_file_directly_in_tests_is_a_binary_too_many() {
        let found = found(&[("bench/tests/one.rs", "")]);
        assert!(found[0].contains("a test binary of its own"), "{found:?}");
    }

    #[test]
    fn the_eleventh_binary_is_found() {
        let paths: Vec<String> = (1..=11).map(|nth| format!("crates/a/tests/{nth}/main.rs")).collect();
        let files: Vec<_> = paths.iter().map(|path| (path.as_str(), "")).collect();
        assert_eq!(found(&files), ["crates/a/tests/11/main.rs:1: test binary 11; at most 10 are allowed"]);
    }

    #[test]
    fn a_sleep_without_a_reason_is_found() {
        let path = Path::new("crates/a/tests/it/one.rs");
        let lines = |text: &str| {
            let mut findings = Findings { path, violations: Vec::new() };
            check_sleeps(text, &mut findings);
            findings.violations.iter().map(|violation| violation.line).collect::<Vec<_>>()
        };
        assert_eq!(lines("fn a() {\n    thread::sleep(SHORT);\n    sleep(SHORT).await;\n}\n"), [2, 3]);
        assert!(lines("// No event tells.\nsleep(SHORT);\n").is_empty());
        assert!(lines("sleep(SHORT); // No event tells.\n").is_empty());
        assert!(lines("guest_sleeps(vm);\nrun(\"sleep 60\");\ndo_not_sleep(1);\n").is_empty());
    }

    #[test]
    fn a_module_of_a_crate_that_is_called_tests_is_none_of_these() {
        assert!(!is_test_file(Path::new("crates/a/src/tests/one.rs")));
        assert!(!is_test_file(Path::new("crates/a/tests/golden/one.argv")));
        assert!(is_test_file(Path::new("crates/a/tests/it/one.rs")));
    }
}
