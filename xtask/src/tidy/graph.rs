//! What the modules of a crate use of each other: no circles between files or between top-level
//! modules, and a pure module uses pure modules only.
//!
//! The graph is built from `use` items and paths, without tests. A name is followed through
//! re-exports to the file that defines it; a re-export itself is no use between files. Calls of
//! methods are not seen.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use syn::spanned::Spanned as _;
use syn::visit::{self, Visit};

use super::Violation;
use super::circles::UseGraph;
use super::syntax::{self, is_cfg_test};

/// Uses of one file by another that a circle may rest on, each with its reason.
const ALLOWED: &[(&str, &str, &str)] = &[
    ("error/mod.rs", "backend_tag.rs", "an error names a backend by its tag, and making one can fail"),
    ("error/mod.rs", "spec/name.rs", "an error names the VM, and making a name can fail"),
];

/// How many re-exports a name is followed through.
const MOST_RE_EXPORTS: usize = 8;

/// The modules of all crates.
#[derive(Default)]
pub(super) struct ModuleGraph {
    crates: BTreeMap<PathBuf, Modules>,
}

/// The modules of one crate by their paths; the root's is empty.
type Modules = BTreeMap<Vec<String>, Module>;

struct Module {
    file: PathBuf,
    is_pure: bool,
    is_root: bool,
    /// What a name stands for, by `use`.
    imports: BTreeMap<String, Vec<String>>,
    /// The modules that are compiled in tests only.
    test_modules: BTreeSet<String>,
    uses: Vec<Use>,
}

/// A path of a module's code, from the root of its crate.
struct Use {
    path: Vec<String>,
    line: usize,
    /// Whether it only passes a name on.
    is_re_export: bool,
}

impl ModuleGraph {
    /// Adds a file of a crate.
    pub(super) fn add(&mut self, file: &Path, text: &str, syntax: &syn::File) {
        let Some(sources) = file.ancestors().find(|parent| parent.ends_with("src")) else { return };
        let Ok(below) = file.strip_prefix(sources) else { return };
        let Some(path) = module_path(below) else { return };
        let mut module = Module {
            file: file.to_owned(),
            is_pure: syntax::is_pure(text),
            is_root: path.is_empty(),
            imports: BTreeMap::new(),
            test_modules: BTreeSet::new(),
            uses: Vec::new(),
        };
        Collector { path: &path, module: &mut module }.visit_file(syntax);
        self.crates.entry(sources.to_owned()).or_default().insert(path, module);
    }

    /// Returns the circles between files or top-level modules, and impure uses of pure modules.
    pub(super) fn violations(&self) -> Vec<Violation> {
        let mut violations = Vec::new();
        for modules in self.crates.values() {
            violations.extend(impure_uses(modules));
            violations.extend(circles(modules));
        }
        violations
    }
}

/// Returns the path of the module that a file is; `None` for a test's, and for one of a program,
/// which is a crate of its own.
fn module_path(below: &Path) -> Option<Vec<String>> {
    if below.starts_with("bin") {
        return None;
    }
    let mut path: Vec<String> =
        below.with_extension("").iter().map(|part| part.to_string_lossy().into_owned()).collect();
    if path.last().is_some_and(|last| ["lib", "main", "mod"].contains(&last.as_str())) {
        path.pop();
    }
    let is_test = |part: &String| part == "tests" || part.ends_with("_tests");
    (!path.iter().any(is_test)).then_some(path)
}

/// Returns what pure modules use of modules that are not.
fn impure_uses(modules: &Modules) -> Vec<Violation> {
    let mut violations = Vec::new();
    for (path, module) in modules.iter().filter(|(_, module)| module.is_pure) {
        let mut seen = BTreeSet::new();
        for used in &module.uses {
            let Some(Target::Item(target)) = resolve(modules, &used.path, 0) else { continue };
            let defines = &modules[&target];
            if target != *path && !defines.is_pure && seen.insert(target.clone()) {
                let message = format!(
                    "the module calls itself pure, and uses `{}` of {}, which does not",
                    used.path.join("::"),
                    defines.file.display()
                );
                violations.push(Violation { path: module.file.clone(), line: used.line, message });
            }
        }
    }
    violations
}

/// Returns each use by which a file or a top-level module belongs to a circle, once for each pair.
fn circles(modules: &Modules) -> Vec<Violation> {
    let mut files = UseGraph::default();
    let mut top_level = UseGraph::default();
    for (path, module) in modules.iter().filter(|(path, module)| !is_test(modules, path, module)) {
        for used in &module.uses {
            let Some(target) = resolve(modules, &used.path, 0) else { continue };
            let defines = &modules[target.path()];
            let is_allowed = |(from, to, _): &(&str, &str, &str)| {
                module.file.ends_with(from) && defines.file.ends_with(to)
            };
            if ALLOWED.iter().any(is_allowed) {
                continue;
            }
            if let (Target::Item(_), false) = (&target, used.is_re_export) {
                let names = [module, defines].map(|module| module.file.display().to_string());
                files.add(names, &module.file, used.line);
            }
            if let (Some(from), Some(to)) = (path.first(), target.path().first()) {
                top_level.add([from.clone(), to.clone()], &module.file, used.line);
            }
        }
    }
    let violations = top_level.circles();
    // The circle between two modules is one between their files, most often.
    if violations.is_empty() { files.circles() } else { violations }
}

/// Returns whether a module is compiled in tests only.
fn is_test(modules: &Modules, path: &[String], module: &Module) -> bool {
    let Some((name, above)) = path.split_last() else { return false };
    !module.is_root && modules.get(above).is_some_and(|parent| parent.test_modules.contains(name))
}

/// What a path leads to.
enum Target {
    /// A module as a whole.
    Module(Vec<String>),
    /// Something that this module defines.
    Item(Vec<String>),
}

impl Target {
    fn path(&self) -> &[String] {
        match self {
            Self::Module(path) | Self::Item(path) => path,
        }
    }
}

/// Follows a path from the root of the crate, through re-exports.
fn resolve(modules: &Modules, path: &[String], depth: usize) -> Option<Target> {
    let mut module = Vec::new();
    for (index, name) in path.iter().enumerate() {
        let mut child = module.clone();
        child.push(name.clone());
        if modules.contains_key(&child) {
            module = child;
            continue;
        }
        return match modules.get(&module)?.imports.get(name) {
            Some(import) if depth < MOST_RE_EXPORTS => {
                let rest = path[index + 1..].iter().cloned();
                resolve(modules, &import.iter().cloned().chain(rest).collect::<Vec<_>>(), depth + 1)
            }
            Some(_) => None,
            None => Some(Target::Item(module)),
        };
    }
    Some(Target::Module(module))
}

/// Collects the paths of a file that lead into its own crate.
struct Collector<'a> {
    path: &'a [String],
    module: &'a mut Module,
}

impl Collector<'_> {
    /// Returns a path from the root of the crate; `None` for one of another crate.
    fn absolute_path(&self, segments: &[String]) -> Option<Vec<String>> {
        let first = segments.first()?;
        let supers = segments.iter().take_while(|segment| *segment == "super").count();
        match first.as_str() {
            "crate" => Some(segments[1..].to_vec()),
            "self" => Some([self.path, &segments[1..]].concat()),
            "super" => {
                let above = self.path.len().checked_sub(supers)?;
                Some([&self.path[..above], &segments[supers..]].concat())
            }
            _ => {
                let import = self.module.imports.get(first)?;
                Some([import.as_slice(), &segments[1..]].concat())
            }
        }
    }
}

impl<'ast> Visit<'ast> for Collector<'_> {
    fn visit_item_mod(&mut self, module: &'ast syn::ItemMod) {
        if module.attrs.iter().any(is_cfg_test) {
            self.module.test_modules.insert(module.ident.to_string());
        } else {
            visit::visit_item_mod(self, module);
        }
    }

    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        if item.attrs.iter().any(is_cfg_test) {
            return;
        }
        let mut paths = Vec::new();
        syntax::expand_use(&item.tree, String::new(), &mut paths);
        for used in paths {
            let segments: Vec<String> = used.path.split("::").map(str::to_owned).collect();
            // What begins with neither `crate` nor a known name is a child, or of another crate:
            // that resolves to this module itself.
            let below = || [self.path, &segments].concat();
            let path = self.absolute_path(&segments).unwrap_or_else(below);
            self.module.imports.insert(used.name, path.clone());
            let is_re_export = !matches!(item.vis, syn::Visibility::Inherited);
            self.module.uses.push(Use { path, line: used.line, is_re_export });
        }
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let segments: Vec<String> = path.segments.iter().map(|segment| segment.ident.to_string()).collect();
        if let Some(path_from_root) = self.absolute_path(&segments) {
            let line = path.span().start().line;
            self.module.uses.push(Use { path: path_from_root, line, is_re_export: false });
        }
        visit::visit_path(self, path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn violations(files: &[(&str, &str)]) -> Vec<String> {
        let mut graph = ModuleGraph::default();
        for (path, text) in files {
            graph.add(Path::new(path), text, &syn::parse_file(text).unwrap());
        }
        graph.violations().iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_circle_between_top_level_modules_is_found_and_a_ladder_is_none() {
        let root = ("crates/a/src/lib.rs", "mod spec;\nmod clock;\npub use clock::Clock;\n");
        let spec = ("crates/a/src/spec.rs", "use crate::Clock;\n");
        let clock = ("crates/a/src/clock.rs", "pub enum Clock {}\nfn f(_: crate::spec::Mib) {}\n");
        assert_eq!(
            violations(&[root, spec, clock]),
            [
                "crates/a/src/clock.rs:2: `clock` uses `spec`, and that `clock`: a circle",
                "crates/a/src/spec.rs:1: `spec` uses `clock`, and that `spec`: a circle",
            ]
        );
        assert!(violations(&[root, spec, ("crates/a/src/clock.rs", "pub enum Clock {}\n")]).is_empty());
    }

    #[test]
    fn a_circle_between_files_of_one_directory_is_found_by_what_they_define() {
        let parent = ("crates/a/src/b/mod.rs", "mod c;\nmod d;\npub use c::C;\nuse d::f;\n");
        let one = ("crates/a/src/b/c.rs", "pub struct C;\nfn g() { super::d::f() }\n");
        let other = ("crates/a/src/b/d.rs", "use super::C;\npub fn f() {}\n");
        assert_eq!(
            violations(&[parent, one, other]),
            [
                "crates/a/src/b/c.rs:2: `crates/a/src/b/c.rs` uses `crates/a/src/b/d.rs`, and that \
                 `crates/a/src/b/c.rs`: a circle",
                "crates/a/src/b/d.rs:1: `crates/a/src/b/d.rs` uses `crates/a/src/b/c.rs`, and that \
                 `crates/a/src/b/d.rs`: a circle",
            ]
        );
        // What a parent re-exports is no use of its own.
        assert!(violations(&[parent, one, ("crates/a/src/b/d.rs", "pub fn f() {}\n")]).is_empty());
    }

    #[test]
    fn tests_make_no_circle() {
        let one = ("crates/a/src/b.rs", "use crate::c::D;\n");
        let other = ("crates/a/src/c.rs", "pub struct D;\n#[cfg(test)]\nmod tests {\nuse crate::b::E;\n}\n");
        assert!(violations(&[one, other]).is_empty());
    }

    #[test]
    fn a_pure_module_uses_pure_modules_only_also_by_a_re_export() {
        let pure = ("crates/a/src/b.rs", "//! Docs.\n//!\n//! Pure.\nuse crate::c::D;\n");
        let parent = ("crates/a/src/c/mod.rs", "//! Docs.\nmod d;\npub(crate) use d::D;\n");
        let impure = ("crates/a/src/c/d.rs", "//! Docs.\npub struct D;\n");
        assert_eq!(
            violations(&[pure, parent, impure]),
            ["crates/a/src/b.rs:4: the module calls itself pure, and uses `c::D` of \
                 crates/a/src/c/d.rs, which does not"]
        );
        let also_pure = ("crates/a/src/c/d.rs", "//! Docs.\n//!\n//! Pure.\npub struct D;\n");
        assert!(violations(&[pure, parent, also_pure]).is_empty());
    }
}
