//! The rules that need Rust's syntax: how long functions are, what things are called, and what a
//! pure module touches.

use syn::spanned::Spanned as _;
use syn::visit::{self, Visit};

use super::Findings;

const FUNCTION_LINES: usize = 70;

/// What a pure module may not name: a path that is one of these, or begins with one.
const IMPURE: &[&str] = &[
    "std::env",
    "std::fs",
    "std::io::stderr",
    "std::io::stdin",
    "std::io::stdout",
    // The addresses of std::net are plain data, its sockets are not.
    "std::net::TcpListener",
    "std::net::TcpStream",
    "std::net::ToSocketAddrs",
    "std::net::UdpSocket",
    "std::os::unix::net",
    "std::process",
    "std::thread",
    "rand",
    "rustix",
    "tokio",
];

/// What a pure module may not call, whatever type it comes from: clocks.
const IMPURE_CALLS: &[&str] = &["Instant::now", "SystemTime::now"];

/// Methods without arguments by which a path looks at the file system.
const IMPURE_METHODS: &[&str] = &[
    "canonicalize",
    "exists",
    "is_dir",
    "is_file",
    "is_symlink",
    "metadata",
    "read_dir",
    "read_link",
    "symlink_metadata",
    "try_exists",
];

/// Ends of type names that say nothing.
const VAGUE: &[&str] = &["Helper", "Impl", "Inner", "Utils"];

/// Adds what breaks a rule in a Rust file, and returns its syntax.
pub(super) fn check(text: &str, findings: &mut Findings) -> Option<syn::File> {
    let file = match syn::parse_file(text) {
        Ok(file) => file,
        Err(error) => {
            findings.add(error.span().start().line, format!("this is not Rust: {error}"));
            return None;
        }
    };
    Visitor { findings, pure: is_pure(text), in_tests: false }.visit_file(&file);
    Some(file)
}

/// Returns whether a module's docs call it pure.
pub(super) fn is_pure(text: &str) -> bool {
    let says_so = |line: &str| line.starts_with("//! Pure:") || line.starts_with("//! Pure.");
    text.lines().take_while(|line| line.starts_with("//!")).any(says_so)
}

struct Visitor<'a, 'b> {
    findings: &'a mut Findings<'b>,
    pure: bool,
    in_tests: bool,
}

impl Visitor<'_, '_> {
    fn check_function(&mut self, signature: &syn::Signature, end: &syn::Block) {
        let first = signature.span().start().line;
        let lines = end.span().end().line - first + 1;
        if lines >= FUNCTION_LINES {
            let name = &signature.ident;
            self.findings
                .add(first, format!("`{name}` has {lines} lines; fewer than {FUNCTION_LINES} are allowed"));
        }
    }

    fn check_getter(&mut self, visibility: &syn::Visibility, signature: &syn::Signature) {
        let name = signature.ident.to_string();
        if let Some(rest) =
            name.strip_prefix("get_").filter(|_| !matches!(visibility, syn::Visibility::Inherited))
        {
            self.findings.add(signature.span().start().line, format!("`{name}` is called `{rest}` here"));
        }
    }

    fn check_type_name(&mut self, name: &syn::Ident) {
        let text = name.to_string();
        if VAGUE.iter().any(|end| text.ends_with(end)) {
            self.findings.add(name.span().start().line, format!("`{text}` does not say what it is"));
        }
    }

    fn check_purity(&mut self, path: &str, line: usize) {
        if !self.pure || self.in_tests {
            return;
        }
        let path = path.trim_start_matches("::");
        let begins = |with: &&&str| {
            path.strip_prefix(**with).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
        };
        let calls = |call: &&&str| path == **call || path.ends_with(&format!("::{call}"));
        if IMPURE.iter().find(begins).or(IMPURE_CALLS.iter().find(calls)).is_some() {
            self.findings.add(line, format!("the module calls itself pure, and names `{path}`"));
        }
    }
}

impl<'ast> Visit<'ast> for Visitor<'_, '_> {
    fn visit_item_mod(&mut self, module: &'ast syn::ItemMod) {
        let outer = self.in_tests;
        self.in_tests |= module.attrs.iter().any(is_cfg_test);
        visit::visit_item_mod(self, module);
        self.in_tests = outer;
    }

    fn visit_item_fn(&mut self, function: &'ast syn::ItemFn) {
        self.check_function(&function.sig, &function.block);
        self.check_getter(&function.vis, &function.sig);
        visit::visit_item_fn(self, function);
    }

    fn visit_impl_item_fn(&mut self, function: &'ast syn::ImplItemFn) {
        self.check_function(&function.sig, &function.block);
        self.check_getter(&function.vis, &function.sig);
        visit::visit_impl_item_fn(self, function);
    }

    fn visit_trait_item_fn(&mut self, function: &'ast syn::TraitItemFn) {
        if let Some(body) = &function.default {
            self.check_function(&function.sig, body);
        }
        visit::visit_trait_item_fn(self, function);
    }

    fn visit_item_struct(&mut self, item: &'ast syn::ItemStruct) {
        self.check_type_name(&item.ident);
        visit::visit_item_struct(self, item);
    }

    fn visit_item_enum(&mut self, item: &'ast syn::ItemEnum) {
        self.check_type_name(&item.ident);
        visit::visit_item_enum(self, item);
    }

    fn visit_item_trait(&mut self, item: &'ast syn::ItemTrait) {
        self.check_type_name(&item.ident);
        visit::visit_item_trait(self, item);
    }

    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        let mut paths = Vec::new();
        expand_use(&item.tree, String::new(), &mut paths);
        for used in paths {
            self.check_purity(&used.path, used.line);
        }
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let segments: Vec<String> = path.segments.iter().map(|segment| segment.ident.to_string()).collect();
        self.check_purity(&segments.join("::"), path.span().start().line);
        visit::visit_path(self, path);
    }

    fn visit_expr_method_call(&mut self, call: &'ast syn::ExprMethodCall) {
        let method = call.method.to_string();
        if self.pure && !self.in_tests && call.args.is_empty() && IMPURE_METHODS.contains(&method.as_str()) {
            let line = call.method.span().start().line;
            self.findings.add(
                line,
                format!("the module calls itself pure, and `.{method}()` looks at the file system"),
            );
        }
        visit::visit_expr_method_call(self, call);
    }
}

pub(super) fn is_cfg_test(attribute: &syn::Attribute) -> bool {
    let syn::Meta::List(list) = &attribute.meta else { return false };
    list.path.is_ident("cfg") && list.tokens.to_string() == "test"
}

/// One name that a `use` brings in.
pub(super) struct UsedPath {
    /// The whole path, with `::` between its segments.
    pub(super) path: String,
    /// What it is called here.
    pub(super) name: String,
    /// Counted from 1.
    pub(super) line: usize,
}

/// Takes a `use` apart into whole paths.
pub(super) fn expand_use(tree: &syn::UseTree, prefix: String, into: &mut Vec<UsedPath>) {
    let joined =
        |name: &syn::Ident| if prefix.is_empty() { name.to_string() } else { format!("{prefix}::{name}") };
    let last = |path: &str| path.rsplit("::").next().unwrap_or_default().to_owned();
    let mut add = |path: String, name: String, line| into.push(UsedPath { path, name, line });
    match tree {
        syn::UseTree::Path(path) => expand_use(&path.tree, joined(&path.ident), into),
        syn::UseTree::Name(name) => {
            let path = if name.ident == "self" { prefix.clone() } else { joined(&name.ident) };
            add(path.clone(), last(&path), name.span().start().line);
        }
        syn::UseTree::Rename(rename) => {
            add(joined(&rename.ident), rename.rename.to_string(), rename.span().start().line);
        }
        syn::UseTree::Glob(glob) => add(prefix.clone(), last(&prefix), glob.span().start().line),
        syn::UseTree::Group(group) => {
            group.items.iter().for_each(|item| expand_use(item, prefix.clone(), into))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn found(text: &str) -> Vec<(usize, String)> {
        let mut findings = Findings { path: Path::new("crates/a/src/b.rs"), violations: Vec::new() };
        let _syntax = check(text, &mut findings);
        findings.violations.into_iter().map(|violation| (violation.line, violation.message)).collect()
    }

    fn lines_found(text: &str) -> Vec<usize> {
        found(text).into_iter().map(|(line, _)| line).collect()
    }

    #[test]
    fn a_function_of_70_lines_is_too_long_wherever_it_is() {
        let body = |statements: usize| "let _ = 1;\n".repeat(statements);
        assert_eq!(lines_found(&format!("/// Docs.\nfn a() {{\n{}}}\n", body(68))), [2]);
        assert!(found(&format!("/// Docs.\nfn a() {{\n{}}}\n", body(67))).is_empty());
        assert_eq!(lines_found(&format!("impl A {{\nfn a() {{\n{}}}\n}}\n", body(68))), [2]);
        assert_eq!(lines_found(&format!("trait A {{\nfn a() {{\n{}}}\n}}\n", body(68))), [2]);
    }

    #[test]
    fn a_pure_module_names_nothing_of_the_host() {
        for line in [
            "use std::fs;",
            "use std::{fmt, fs::File};",
            "use std::net::{IpAddr, TcpStream};",
            "use tokio::time;",
            "fn f() { std::process::exit(1); }",
            "fn f() { let _ = std::time::Instant::now(); }",
            "fn f() { let _ = SystemTime::now(); }",
            "fn f(path: &std::path::Path) -> bool { path.exists() }",
        ] {
            assert_eq!(lines_found(&format!("//! Docs.\n//!\n//! Pure: yes.\n{line}\n")), [4], "{line}");
            assert!(found(&format!("//! Docs.\n{line}\n")).is_empty(), "{line}");
        }
    }

    #[test]
    fn a_pure_module_may_use_plain_data_and_its_tests_anything() {
        let text = "//! Pure.\nuse std::net::IpAddr;\nuse std::time::{Duration, Instant};\nuse crate::process::tokio;\n#[cfg(test)]\nmod tests {\nuse std::fs;\n}\n";
        assert_eq!(found(text), []);
    }

    #[test]
    fn a_meaningless_name_is_found() {
        assert_eq!(lines_found("pub fn get_name() {}\n"), [1]);
        assert_eq!(lines_found("impl A {\npub(crate) fn get_name() {}\n}\n"), [2]);
        assert_eq!(lines_found("struct VmInner;\nenum VmImpl {}\ntrait VmHelper {}\n"), [1, 2, 3]);
        assert!(found("fn get_up() {}\nstruct Winner;\nstruct Vm;\n").is_empty());
    }
}
