//! Errors: a message never has the text of the error below it, and a hint is found by a variant.
//!
//! The chain is printed once, at the edge: an error that has another's text in it would be read
//! twice, and a caller could no longer look at what is below. A hint that depends on the words of a
//! message is lost when the message is improved.
//!
//! How often files broke the first rule before there was one is listed in `old_errors.txt`; the
//! list only gets shorter.

use proc_macro2::TokenTree;
use syn::spanned::Spanned as _;
use syn::visit::{self, Visit};

use super::Findings;
use super::syntax::is_cfg_test;

/// The names that errors have where they are caught.
const CAUGHT: &[&str] = &["e", "err", "errno", "error", "source"];

/// The constructors of `Error` that take a message.
const CONSTRUCTORS: &[&str] = &["host", "invalid", "protocol", "record", "untrusted"];

/// Methods that look at words.
const COMPARISONS: &[&str] = &["contains", "ends_with", "eq_ignore_ascii_case", "find", "starts_with"];

/// What may be looked at by its words where hints are made: what QEMU printed, and paths.
const FOREIGN_TEXTS: &[&str] = &["path", "stderr"];

/// How often a file has the text of an error in a message: a path and a number a line.
const OLD_ERRORS: &str = include_str!("old_errors.txt");

/// Adds what breaks the rules in a file of the library or of the command.
pub(super) fn check(file: &syn::File, findings: &mut Findings) {
    let path = findings.path.to_string_lossy().into_owned();
    let mut messages = MessageVisitor::default();
    messages.visit_file(file);
    let old = OLD_ERRORS.lines().filter_map(|line| line.split_once(' '));
    let old = old.into_iter().find(|(old, _)| *old == path);
    let allowed = old.map_or(0, |(_, count)| count.trim().parse().unwrap_or(0));
    let found = messages.lines.len();
    if found > allowed {
        for line in messages.lines {
            findings.add(line, "a message has the text of another error: pass that on by `with_source`");
        }
    } else if found < allowed {
        findings.add(1, format!("messages with the text of an error: set `old_errors.txt` to {found}"));
    }
    if path.ends_with("failure/hints.rs") {
        HintVisitor { findings }.visit_file(file);
    }
}

/// Gathers the lines where a message is built from an error's text.
#[derive(Default)]
struct MessageVisitor {
    lines: Vec<usize>,
}

impl<'ast> Visit<'ast> for MessageVisitor {
    fn visit_item_mod(&mut self, module: &'ast syn::ItemMod) {
        if !module.attrs.iter().any(is_cfg_test) {
            visit::visit_item_mod(self, module);
        }
    }

    fn visit_macro(&mut self, call: &'ast syn::Macro) {
        if call.path.is_ident("format")
            && let Some(TokenTree::Literal(text)) = call.tokens.clone().into_iter().next()
            && has_caught(&text.to_string())
        {
            self.lines.push(call.span().start().line);
        }
    }

    fn visit_expr_call(&mut self, call: &'ast syn::ExprCall) {
        if is_constructor(&call.func)
            && let Some(text) = call.args.iter().find(|argument| is_text_of_caught(argument))
        {
            self.lines.push(text.span().start().line);
        }
        visit::visit_expr_call(self, call);
    }
}

/// Returns whether a text for `format!` has a caught error in it.
fn has_caught(text: &str) -> bool {
    CAUGHT.iter().any(|name| text.contains(&format!("{{{name}}}")) || text.contains(&format!("{{{name}:")))
}

/// Returns whether a function is one of those that make an `Error` of a message.
fn is_constructor(function: &syn::Expr) -> bool {
    let syn::Expr::Path(path) = function else { return false };
    let names: Vec<String> = path.path.segments.iter().map(|segment| segment.ident.to_string()).collect();
    matches!(&names[..], [.., of, name] if of == "Error" && CONSTRUCTORS.contains(&name.as_str()))
}

/// Returns whether an expression is `error.to_string()`.
fn is_text_of_caught(argument: &syn::Expr) -> bool {
    let syn::Expr::MethodCall(call) = argument else { return false };
    call.method == "to_string" && name_of(&call.receiver).is_some_and(|name| CAUGHT.contains(&name.as_str()))
}

/// Returns the name of a variable.
fn name_of(expression: &syn::Expr) -> Option<String> {
    match expression {
        syn::Expr::Path(path) => path.path.get_ident().map(ToString::to_string),
        _ => None,
    }
}

/// Reports where a hint looks at words.
struct HintVisitor<'a, 'b> {
    findings: &'a mut Findings<'b>,
}

impl HintVisitor<'_, '_> {
    fn refuse(&mut self, line: usize) {
        self.findings.add(line, "a hint matches a variant of an error, never the words of its message");
    }
}

impl<'ast> Visit<'ast> for HintVisitor<'_, '_> {
    fn visit_item_mod(&mut self, module: &'ast syn::ItemMod) {
        if !module.attrs.iter().any(is_cfg_test) {
            visit::visit_item_mod(self, module);
        }
    }

    fn visit_expr_method_call(&mut self, call: &'ast syn::ExprMethodCall) {
        let is_foreign = name_of(&call.receiver).is_some_and(|name| FOREIGN_TEXTS.contains(&name.as_str()));
        let compares = COMPARISONS.contains(&call.method.to_string().as_str());
        if compares && !is_foreign && call.args.first().is_some_and(is_text) {
            self.refuse(call.method.span().start().line);
        }
        visit::visit_expr_method_call(self, call);
    }

    // In a condition within `matches!` there is no tree to look at, only tokens.
    fn visit_macro(&mut self, call: &'ast syn::Macro) {
        let tokens = call.tokens.to_string();
        let compares = COMPARISONS.iter().any(|method| tokens.contains(&format!(". {method} (")));
        if call.path.is_ident("matches") && compares {
            self.refuse(call.span().start().line);
        }
    }

    fn visit_pat(&mut self, pattern: &'ast syn::Pat) {
        if matches!(pattern, syn::Pat::Lit(text) if matches!(text.lit, syn::Lit::Str(_))) {
            self.refuse(pattern.span().start().line);
        }
        visit::visit_pat(self, pattern);
    }
}

/// Returns whether an expression is a text.
fn is_text(expression: &syn::Expr) -> bool {
    matches!(expression, syn::Expr::Lit(literal) if matches!(literal.lit, syn::Lit::Str(_)))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn found(path: &str, text: &str) -> Vec<usize> {
        let mut findings = Findings { path: Path::new(path), violations: Vec::new() };
        check(&syn::parse_file(text).unwrap(), &mut findings);
        findings.violations.iter().map(|violation| violation.line).collect()
    }

    #[test]
    fn a_message_with_the_text_of_an_error_is_found() {
        let text = "fn f() {\n\
            let a = |error| Error::record(path, format!(\"not JSON: {error}\"));\n\
            let b = |error| Error::host(\"netlink\", error.to_string());\n\
            let c = |error| Error::host(\"netlink\", \"no socket\").with_source(error);\n\
            let d = format!(\"{name}: {why}\");\n\
            }\n\
            #[cfg(test)]\nmod tests { fn f() { format!(\"{error}\"); } }";
        assert_eq!(found("crates/vmkit/src/x.rs", text), [2, 3]);
    }

    #[test]
    fn a_hint_by_words_is_found() {
        let text = "fn f() {\n\
            match e { Error::NotFound { what: \"VM\" } => 1,\n\
            Error::Invalid { expected } if expected.ends_with(\"here\") => 2 }\n\
            stderr.contains(\"thread_create\");\n\
            matches!(error, Error::Copy { problem } if problem.contains(\"x\"));\n\
            path.ends_with(\"vm.json\");\n\
            }";
        assert_eq!(found("crates/vmkit-cli/src/failure/hints.rs", text), [2, 3, 5]);
        assert_eq!(found("crates/vmkit-cli/src/other.rs", text), [0; 0]);
    }

    #[test]
    fn the_old_list_has_files_that_are_there() {
        let repository = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        for line in OLD_ERRORS.lines() {
            let (path, count) = line.split_once(' ').unwrap();
            assert!(repository.join(path).is_file(), "{path} is not there: take it off the list");
            assert!(count.parse::<usize>().is_ok_and(|count| count > 0), "{line}");
        }
    }
}
