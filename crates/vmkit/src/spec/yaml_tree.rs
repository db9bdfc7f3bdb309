//! A document of YAML as cloud-init's parser loads it, each node with its place.
//!
//! Pure. PyYAML reads plain texts by the rules of YAML 1.1: `yes` is no text there, nor is `12:30`.
//! Only what is a text, nothing, a list or a mapping is told apart here; numbers, truth values and
//! dates are all the same.
//!
//! Source: PyYAML, `lib/yaml/resolver.py` and `lib/yaml/constructor.py`.

use std::collections::BTreeMap;

use granit_parser::{Event, Marker, Parser, ScalarStyle, Tag};

use super::yaml::YamlMistake;

/// More entries than any mapping has once its merge keys are followed: aliases of aliases grow
/// without end.
const MOST_ENTRIES: usize = 10_000;
/// How deep merge keys are followed.
const MOST_MERGES: usize = 16;

/// A document.
#[derive(Debug)]
pub(super) struct YamlTree {
    nodes: Vec<StoredNode>,
    root: Option<usize>,
}

#[derive(Debug)]
struct StoredNode {
    line: usize,
    column: usize,
    byte: usize,
    value: YamlValue,
}

#[derive(Debug)]
enum YamlValue {
    Null,
    Text(String),
    Other,
    /// `<<`, which joins another mapping as a key.
    Merge,
    List(Vec<usize>),
    Mapping(Vec<(usize, usize)>),
}

/// What a node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NodeKind {
    /// Nothing.
    Null,
    /// A text.
    Text,
    /// A number, a truth value, a date, or what has a tag of its own.
    Other,
    /// A list.
    List,
    /// Keys and values.
    Mapping,
}

/// A node of a document.
#[derive(Debug, Clone, Copy)]
pub(super) struct YamlNode<'a> {
    tree: &'a YamlTree,
    index: usize,
}

impl YamlTree {
    /// Parses a text that [`check`](super::yaml::check) lets pass.
    ///
    /// # Errors
    /// The first mistake.
    pub(super) fn parse(text: &str) -> Result<Self, YamlMistake> {
        let mut building = TreeBuilder::default();
        for event in Parser::new_from_str(text) {
            let (event, span) = event.map_err(|error| {
                let what = format!("this is not YAML: {}", error.info());
                stored(text, error.marker(), YamlValue::Null).mistake(what)
            })?;
            building.take(event, |value| stored(text, &span.start, value));
        }
        Ok(Self { nodes: building.nodes, root: building.root })
    }

    /// Returns the node at the top; none for a document of comments alone.
    pub(super) fn root(&self) -> Option<YamlNode<'_>> {
        self.root.map(|index| YamlNode { tree: self, index })
    }
}

fn stored(text: &str, at: &Marker, value: YamlValue) -> StoredNode {
    let byte = at.byte_offset().unwrap_or_default().min(text.len());
    StoredNode { line: at.line(), column: at.col() + 1, byte, value }
}

impl StoredNode {
    fn mistake(&self, what: String) -> YamlMistake {
        YamlMistake { line: self.line, column: self.column, byte: self.byte, what }
    }
}

/// A tree under construction.
#[derive(Default)]
struct TreeBuilder {
    nodes: Vec<StoredNode>,
    root: Option<usize>,
    anchors: BTreeMap<usize, usize>,
    /// The lists and mappings that are open, each with the key that has no value yet.
    open: Vec<(usize, Option<usize>)>,
}

impl TreeBuilder {
    fn take(&mut self, event: Event<'_>, store: impl FnOnce(YamlValue) -> StoredNode) {
        let (value, anchor, opens) = match event {
            Event::Scalar(text, style, anchor, tag) => {
                (scalar(&text, style == ScalarStyle::Plain, tag.as_deref()), anchor, false)
            }
            Event::SequenceStart(_, anchor, _) => (YamlValue::List(Vec::new()), anchor, true),
            Event::MappingStart(_, anchor, _) => (YamlValue::Mapping(Vec::new()), anchor, true),
            Event::SequenceEnd | Event::MappingEnd => {
                self.open.pop();
                return;
            }
            Event::Alias(anchor) => {
                if let Some(index) = self.anchors.get(&anchor) {
                    self.attach(*index);
                }
                return;
            }
            _ => return,
        };
        let index = self.nodes.len();
        self.nodes.push(store(value));
        if anchor != 0 {
            self.anchors.insert(anchor, index);
        }
        self.attach(index);
        if opens {
            self.open.push((index, None));
        }
    }

    fn attach(&mut self, index: usize) {
        let Some((parent, key)) = self.open.last_mut() else {
            self.root.get_or_insert(index);
            return;
        };
        match &mut self.nodes[*parent].value {
            YamlValue::List(items) => items.push(index),
            YamlValue::Mapping(entries) => match key.take() {
                Some(key) => entries.push((key, index)),
                None => *key = Some(index),
            },
            _ => {}
        }
    }
}

fn scalar(text: &str, is_plain: bool, tag: Option<&Tag>) -> YamlValue {
    match tag.map(|tag| tag.core_suffix().unwrap_or(tag.suffix())) {
        Some("str" | "") => YamlValue::Text(text.to_owned()),
        Some("null") => YamlValue::Null,
        Some(_) => YamlValue::Other,
        None if !is_plain => YamlValue::Text(text.to_owned()),
        None => plain(text),
    }
}

fn plain(text: &str) -> YamlValue {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => YamlValue::Null,
        "<<" => YamlValue::Merge,
        "yes" | "Yes" | "YES" | "no" | "No" | "NO" | "true" | "True" | "TRUE" | "false" | "False"
        | "FALSE" | "on" | "On" | "ON" | "off" | "Off" | "OFF" | "=" => YamlValue::Other,
        text if is_number(text) || is_date(text) => YamlValue::Other,
        text => YamlValue::Text(text.to_owned()),
    }
}

fn is_number(text: &str) -> bool {
    let text = text.strip_prefix(['+', '-']).unwrap_or(text);
    let all =
        |digits: &str, of: fn(char) -> bool| !digits.is_empty() && digits.chars().all(|c| c == '_' || of(c));
    let decimal = |digits: &str| all(digits, |c| c.is_ascii_digit());
    if let Some(hex) = text.strip_prefix("0x") {
        return all(hex, |c| c.is_ascii_hexdigit());
    }
    if let Some(binary) = text.strip_prefix("0b") {
        return all(binary, |c| matches!(c, '0' | '1'));
    }
    if matches!(text, ".inf" | ".Inf" | ".INF" | ".nan" | ".NaN" | ".NAN") {
        return true;
    }
    if !text.starts_with(|c: char| c.is_ascii_digit() || c == '.') {
        return false;
    }
    // In base 60.
    if text.contains(':') {
        return text.split(':').all(|part| decimal(part.split('.').next().unwrap_or_default()));
    }
    let Some((whole, rest)) = text.split_once('.') else { return decimal(text) };
    let (part, exponent) = match rest.split_once(['e', 'E']) {
        Some((part, exponent)) => (part, Some(exponent)),
        None => (rest, None),
    };
    let is_exponent = |exponent: &str| exponent.strip_prefix(['+', '-']).is_some_and(decimal);
    (whole.is_empty() || decimal(whole))
        && (part.is_empty() || decimal(part))
        && text != "."
        && exponent.is_none_or(is_exponent)
}

fn is_date(text: &str) -> bool {
    let day = text.split(['T', 't', ' ', '\t']).next().unwrap_or_default();
    let lengths: Vec<usize> = day.split('-').map(str::len).collect();
    day.chars().all(|c| c.is_ascii_digit() || c == '-') && matches!(lengths[..], [4, 1..=2, 1..=2])
}

impl<'a> YamlNode<'a> {
    fn stored(self) -> &'a StoredNode {
        &self.tree.nodes[self.index]
    }

    /// Returns what the node is.
    pub(super) fn kind(self) -> NodeKind {
        match self.stored().value {
            YamlValue::Null => NodeKind::Null,
            YamlValue::Text(_) => NodeKind::Text,
            YamlValue::Other | YamlValue::Merge => NodeKind::Other,
            YamlValue::List(_) => NodeKind::List,
            YamlValue::Mapping(_) => NodeKind::Mapping,
        }
    }

    /// Returns the text that the node is.
    pub(super) fn text(self) -> Option<&'a str> {
        match &self.stored().value {
            YamlValue::Text(text) => Some(text),
            _ => None,
        }
    }

    /// Returns the items of a list; none of anything else.
    pub(super) fn items(self) -> impl Iterator<Item = YamlNode<'a>> {
        let items: &[usize] = match &self.stored().value {
            YamlValue::List(items) => items,
            _ => &[],
        };
        items.iter().map(move |index| YamlNode { index: *index, ..self })
    }

    /// Returns the keys and values of a mapping, with those that its merge keys bring before its
    /// own; of equal keys the last is in force. None of anything else.
    pub(super) fn entries(self) -> Vec<(YamlNode<'a>, YamlNode<'a>)> {
        let mut entries = Vec::new();
        self.collect(&mut entries, MOST_MERGES);
        entries
    }

    fn collect(self, into: &mut Vec<(YamlNode<'a>, YamlNode<'a>)>, depth: usize) {
        let YamlValue::Mapping(own) = &self.stored().value else { return };
        let own = || {
            own.iter()
                .map(|(key, value)| (YamlNode { index: *key, ..self }, YamlNode { index: *value, ..self }))
        };
        if depth > 0 {
            for (_, merged) in own().filter(|(key, _)| matches!(key.stored().value, YamlValue::Merge)) {
                let mut several: Vec<_> = merged.items().collect();
                // The first of several goes before the others.
                several.reverse();
                for mapping in several.into_iter().chain([merged]) {
                    if into.len() < MOST_ENTRIES {
                        mapping.collect(into, depth - 1);
                    }
                }
            }
        }
        into.extend(own().filter(|(key, _)| !matches!(key.stored().value, YamlValue::Merge)));
    }

    /// Returns the value of a key.
    pub(super) fn get(self, key: &str) -> Option<YamlNode<'a>> {
        self.entries().into_iter().rev().find(|(found, _)| found.text() == Some(key)).map(|(_, value)| value)
    }

    /// Returns the node's line, counted from 1.
    pub(super) fn line(self) -> usize {
        self.stored().line
    }

    /// Returns a mistake at the node.
    pub(super) fn mistake(self, what: impl Into<String>) -> YamlMistake {
        self.stored().mistake(what.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_texts_are_what_pyyaml_takes_them_for() {
        for (text, expected) in [
            ("ann", NodeKind::Text),
            ("'12'", NodeKind::Text),
            ("!!str 12", NodeKind::Text),
            ("12ab", NodeKind::Text),
            ("1e3", NodeKind::Text),
            ("y", NodeKind::Text),
            ("a.b", NodeKind::Text),
            ("~", NodeKind::Null),
            ("''", NodeKind::Text),
            ("yes", NodeKind::Other),
            ("0o17", NodeKind::Text),
            ("017", NodeKind::Other),
            ("-1_000", NodeKind::Other),
            ("0x1f", NodeKind::Other),
            ("1.5", NodeKind::Other),
            ("1.0e+3", NodeKind::Other),
            (".inf", NodeKind::Other),
            ("12:30:45", NodeKind::Other),
            ("2024-01-01", NodeKind::Other),
            ("[a]", NodeKind::List),
            ("{a: b}", NodeKind::Mapping),
        ] {
            let document = format!("x: {text}\n");
            let tree = YamlTree::parse(&document).unwrap();
            assert_eq!(tree.root().unwrap().get("x").unwrap().kind(), expected, "{text}");
        }
    }

    #[test]
    fn aliases_merge_keys_and_repeated_keys_are_followed() {
        let text = "base: &b {name: ann, sudo: x}\nusers:\n- <<: [{name: eve}, *b]\n  sudo: y\n- *b\nusers2: 1\nusers2: 2\n";
        let tree = YamlTree::parse(text).unwrap();
        let users: Vec<_> = tree.root().unwrap().get("users").unwrap().items().collect();
        let said = |node: YamlNode<'_>, key: &str| node.get(key).unwrap().text().unwrap().to_owned();
        assert_eq!((said(users[0], "name"), said(users[0], "sudo")), ("eve".into(), "y".into()));
        assert_eq!((said(users[1], "name"), users[1].line()), ("ann".into(), 1));
    }

    proptest::proptest! {
        #[test]
        fn no_text_makes_it_panic_or_run_on(text in "[\\[\\]{}:,&*!|>'\"%@`#<\\- \\t\\nabü]{0,60}") {
            if let Ok(tree) = YamlTree::parse(&text) {
                let _ = tree.root().map(|root| (root.entries().len(), root.get("a").map(YamlNode::kind)));
            }
        }
    }
}
