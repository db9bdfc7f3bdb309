//! Names of types: one type of a name in a crate, and most names more than one word.
//!
//! A reader who meets a type again need not look at the imports, and a name of one word is kept for
//! the ideas that the whole crate shares.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::Violation;
use super::syntax::is_cfg_test;

/// The share of one-word names that a crate may have: one in this many.
const ONE_WORD_SHARE: usize = 4;
/// Files of one directory of which only one is compiled, so that they may define the same type.
const PLATFORMS: &[&str] = &["illumos", "linux", "portable"];

/// The types of all crates, by the directory of their sources.
#[derive(Default)]
pub(super) struct TypeNames {
    crates: BTreeMap<PathBuf, BTreeMap<String, Vec<Definition>>>,
}

struct Definition {
    path: PathBuf,
    line: usize,
}

impl TypeNames {
    /// Adds the types that a file defines outside its tests.
    pub(super) fn add(&mut self, path: &Path, file: &syn::File) {
        let Some(sources) = path.ancestors().find(|parent| parent.ends_with("src")) else { return };
        let types = self.crates.entry(sources.to_owned()).or_default();
        for (name, line) in types_of(&file.items) {
            types.entry(name).or_default().push(Definition { path: path.to_owned(), line });
        }
    }

    /// Returns each type whose name another one of its crate has, and each crate with too many
    /// names of one word.
    pub(super) fn violations(&self) -> Vec<Violation> {
        let mut violations = Vec::new();
        for (sources, types) in &self.crates {
            for (name, definitions) in types {
                let [first, others @ ..] = definitions.as_slice() else { continue };
                for other in others.iter().filter(|other| !are_platforms(&first.path, &other.path)) {
                    let message = format!("`{name}` is also a type of {}", first.path.display());
                    violations.push(Violation { path: other.path.clone(), line: other.line, message });
                }
            }
            let one_word = types.keys().filter(|name| is_one_word(name)).count();
            if one_word * ONE_WORD_SHARE > types.len() {
                let message = format!(
                    "{one_word} of {} types have a name of one word; at most {} may",
                    types.len(),
                    types.len() / ONE_WORD_SHARE
                );
                violations.push(Violation { path: sources.clone(), line: 1, message });
            }
        }
        violations
    }
}

/// Returns the structs, enums, traits and aliases that are no tests, with their lines.
fn types_of(items: &[syn::Item]) -> Vec<(String, usize)> {
    let mut types = Vec::new();
    for item in items {
        let (name, attributes) = match item {
            syn::Item::Struct(item) => (&item.ident, &item.attrs),
            syn::Item::Enum(item) => (&item.ident, &item.attrs),
            syn::Item::Trait(item) => (&item.ident, &item.attrs),
            syn::Item::Type(item) => (&item.ident, &item.attrs),
            syn::Item::Mod(module) if !module.attrs.iter().any(is_cfg_test) => {
                types.extend(module.content.iter().flat_map(|(_, items)| types_of(items)));
                continue;
            }
            _ => continue,
        };
        if !attributes.iter().any(is_cfg_test) {
            types.push((name.to_string(), name.span().start().line));
        }
    }
    types
}

fn are_platforms(one: &Path, other: &Path) -> bool {
    let is_platform =
        |path: &Path| path.file_stem().is_some_and(|stem| PLATFORMS.iter().any(|known| stem == *known));
    one.parent() == other.parent() && is_platform(one) && is_platform(other)
}

/// Returns whether a name in camel case has one word: `Plan` and `QMP`, and not `QemuPlan`.
fn is_one_word(name: &str) -> bool {
    let begins_word = |(before, character): (char, char)| before.is_lowercase() && character.is_uppercase();
    !name.chars().zip(name.chars().skip(1)).any(begins_word)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn violations(files: &[(&str, &str)]) -> Vec<String> {
        let mut names = TypeNames::default();
        for (path, text) in files {
            names.add(Path::new(path), &syn::parse_file(text).unwrap());
        }
        names.violations().iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_second_type_of_a_name_is_found_in_the_same_crate_only() {
        let one = ("crates/a/src/b.rs", "struct VmPlan;");
        let other = ("crates/a/src/c/d.rs", "enum VmPlan {}");
        assert_eq!(
            violations(&[one, other]),
            ["crates/a/src/c/d.rs:1: `VmPlan` is also a type of crates/a/src/b.rs"]
        );
        assert!(violations(&[one, ("crates/e/src/b.rs", "struct VmPlan;")]).is_empty());
    }

    #[test]
    fn tests_and_platforms_may_repeat_a_name() {
        let one = ("crates/a/src/b.rs", "struct VmPlan;");
        let test = ("crates/a/src/c.rs", "#[cfg(test)]\nmod tests { struct VmPlan; }");
        assert!(violations(&[one, test]).is_empty());
        let linux = ("crates/a/src/p/linux.rs", "struct ProcessFd;");
        let illumos = ("crates/a/src/p/illumos.rs", "struct ProcessFd;");
        assert!(violations(&[linux, illumos]).is_empty());
    }

    #[test]
    fn one_name_in_four_may_be_one_word() {
        let text = "struct Plan; struct VmPlan; struct VmHandle; struct VmState;";
        assert!(violations(&[("crates/a/src/b.rs", text)]).is_empty());
        assert_eq!(
            violations(&[("crates/a/src/b.rs", &format!("{text} struct Spec;"))]),
            ["crates/a/src:1: 2 of 5 types have a name of one word; at most 1 may"]
        );
    }
}
