//! Finds relative links in Markdown that lead nowhere.

use std::path::Path;

use super::Findings;

/// Adds every link whose target is no file and no directory. Links with a scheme and links within
/// the page pass.
pub(super) fn check(text: &str, repository: &Path, findings: &mut Findings) {
    let directory = repository.join(findings.path.parent().unwrap_or(Path::new("")));
    let mut in_code = false;
    for (index, line) in text.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            in_code = !in_code;
        }
        if in_code {
            continue;
        }
        for target in targets(line) {
            let path = target.split('#').next().unwrap_or_default();
            let leads = match path.strip_prefix('/') {
                _ if path.is_empty() || has_scheme(path) => true,
                Some(from_root) => repository.join(from_root).exists(),
                None => directory.join(path).exists(),
            };
            if !leads {
                findings.add(index + 1, format!("the link to `{path}` leads nowhere"));
            }
        }
    }
}

/// Returns the targets of `[text](target)` and `[name]: target`, outside of `code`.
fn targets(line: &str) -> Vec<&str> {
    // The even parts are outside of backticks. A link's text may be code, so its target is looked
    // for by its own start.
    let outside: Vec<&str> = line.split('`').step_by(2).collect();
    let inline =
        outside.iter().flat_map(|part| part.split("](").skip(1)).filter_map(|rest| rest.split(')').next());
    let reference = line.strip_prefix('[').and_then(|rest| rest.split_once("]: ")).map(|(_, target)| target);
    let targets = inline.chain(reference);
    // A title may follow the target.
    targets.filter_map(|target| target.split_whitespace().next()).collect()
}

fn has_scheme(target: &str) -> bool {
    target.contains("://") || target.starts_with("mailto:")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dead(text: &str) -> Vec<(usize, String)> {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("docs")).unwrap();
        std::fs::write(directory.path().join("README.md"), "").unwrap();
        let mut findings = Findings { path: Path::new("docs/page.md"), violations: Vec::new() };
        check(text, directory.path(), &mut findings);
        findings.violations.into_iter().map(|violation| (violation.line, violation.message)).collect()
    }

    #[test]
    fn a_link_is_followed_from_the_page_or_from_the_root() {
        assert!(dead("[a](../README.md) and [`b`](../README.md#part \"title\")\n[c](/docs)\n").is_empty());
        assert_eq!(dead("fine\n[a](README.md)\n"), [(2, "the link to `README.md` leads nowhere".to_owned())]);
        assert_eq!(dead("[`a`](/gone)\n").len(), 1);
        assert_eq!(dead("[a]: gone.md\n").len(), 1);
    }

    #[test]
    fn links_elsewhere_and_code_are_left_alone() {
        assert!(dead("[a](https://example.org/x) [b](#part) [c](mailto:a@example.org)\n").is_empty());
        assert!(dead("`[a](gone)`\n```\n[a](gone)\n```\n").is_empty());
    }
}
