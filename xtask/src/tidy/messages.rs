//! The language of messages: the texts in the code of the library and of the command keep to the
//! words that comments and documents keep to. Tests are free in theirs.

use proc_macro2::{TokenStream, TokenTree};
use syn::visit::{self, Visit};

use super::syntax::is_cfg_test;
use super::{Findings, language};

/// Adds what the texts of a file of the library or of the command have against the rules.
pub(super) fn check(file: &syn::File, findings: &mut Findings) {
    MessageVisitor { findings }.visit_file(file);
}

struct MessageVisitor<'a, 'b> {
    findings: &'a mut Findings<'b>,
}

impl MessageVisitor<'_, '_> {
    fn check_text(&mut self, text: &syn::LitStr) {
        language::check_words(&text.value(), text.span().start().line, self.findings);
    }

    /// Macros are not parsed: their texts are among their tokens.
    fn check_tokens(&mut self, tokens: TokenStream) {
        for token in tokens {
            match token {
                TokenTree::Group(group) => self.check_tokens(group.stream()),
                TokenTree::Literal(literal) => {
                    if let syn::Lit::Str(text) = syn::Lit::new(literal) {
                        self.check_text(&text);
                    }
                }
                TokenTree::Ident(_) | TokenTree::Punct(_) => {}
            }
        }
    }
}

impl<'ast> Visit<'ast> for MessageVisitor<'_, '_> {
    fn visit_item_mod(&mut self, module: &'ast syn::ItemMod) {
        if !module.attrs.iter().any(is_cfg_test) {
            visit::visit_item_mod(self, module);
        }
    }

    /// Doc comments are attributes, and are checked as comments.
    fn visit_attribute(&mut self, attribute: &'ast syn::Attribute) {
        if !attribute.path().is_ident("doc")
            && let syn::Meta::List(list) = &attribute.meta
        {
            self.check_tokens(list.tokens.clone());
        }
    }

    fn visit_macro(&mut self, call: &'ast syn::Macro) {
        self.check_tokens(call.tokens.clone());
    }

    fn visit_lit_str(&mut self, text: &'ast syn::LitStr) {
        self.check_text(text);
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn a_word_is_found_in_every_text_but_those_of_tests_and_comments() {
        for (code, count) in [
            ("const A: &str = \"it was cut off\";", 1),
            ("#[error(\"whoever has {what}\")] struct A;", 1),
            ("fn a() { b(format!(\"{x} hangs on {}\", c(\"anew\"))); }", 2),
            ("/// The user `nobody`, and nobody else.\nconst A: &str = \"the user `nobody`\";", 0),
            ("#[cfg(test)] mod tests { const A: &str = \"nobody\"; }", 0),
        ] {
            let mut findings = Findings { path: Path::new("a"), violations: Vec::new() };
            check(&syn::parse_file(code).unwrap(), &mut findings);
            assert_eq!(findings.violations.len(), count, "{code}");
        }
    }
}
