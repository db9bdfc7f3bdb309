//! From the text to what is written in it: is it TOML, is every key known, is every value of its
//! kind.
//!
//! Pure.

use std::collections::BTreeMap;
use std::ops::Range;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::forms::FormatVersion;
use super::raw;
use super::read::{FromValue, ValueNode};
use crate::error::VmfileProblem;

/// Returns the tables of a text that is TOML, and of a version that this vmkit reads.
pub(super) fn toml_of(text: &str) -> Result<Spanned<DeValue<'_>>, Vec<VmfileProblem>> {
    if text.trim().is_empty() {
        let empty = VmfileProblem::new("the file is empty");
        return Err(vec![
            empty.help("begin with `version = 1` and a machine: [machine.web] and its `image`"),
        ]);
    }
    let (document, errors) = DeTable::parse_recoverable(text);
    let table = document.into_inner();
    if let Some(newer) = newer_version(&table) {
        return Err(vec![newer]);
    }
    if !errors.is_empty() {
        return Err(not_toml(text, &errors));
    }
    // A missing key is to be told at the beginning of the file, not of all of it.
    Ok(Spanned::new(0..0, DeValue::Table(table)))
}

/// Says what is not TOML: all keys that stand there twice, but only the first of the other
/// mistakes, since what is read after one of them need not be what was meant.
fn not_toml(text: &str, errors: &[toml::de::Error]) -> Vec<VmfileProblem> {
    let span = |error: &toml::de::Error| error.span().unwrap_or_default();
    let (twice, mut others): (Vec<_>, Vec<_>) =
        errors.iter().partition(|error| error.message() == "duplicate key");
    others.sort_by_key(|error| span(error).start);
    let first = others.first().map(|error| {
        let problem =
            VmfileProblem::new(format!("this is not TOML: {}", error.message())).at(span(error), "");
        match error.message() {
            message if message.contains("must be quoted") || message.contains("invalid boolean") => {
                problem.help("a string is written in quotes: \"debian:12\"")
            }
            _ => problem,
        }
    });
    let before =
        |error: &&&toml::de::Error| others.first().is_none_or(|first| span(error).start < span(first).start);
    let is_header = |error: &&&toml::de::Error| line_of(text, span(error).start).starts_with('[');
    // In a table that stands there twice so does every key.
    let headers = twice.iter().any(|error| is_header(&error));
    let twice = twice.iter().filter(before).filter(|error| !headers || is_header(error));
    twice.map(|error| duplicate(text, span(error))).chain(first).collect()
}

/// Returns the line that a byte is in, without the blanks around it.
fn line_of(text: &str, byte: usize) -> &str {
    let start = text[..byte].rfind('\n').map_or(0, |end| end + 1);
    text[start..].lines().next().unwrap_or_default().trim()
}

/// Says of a key that it stands there a second time, and where the first one is.
fn duplicate(text: &str, span: Range<usize>) -> VmfileProblem {
    let line_start = text[..span.start].rfind('\n').map_or(0, |end| end + 1);
    let line = line_of(text, span.start);
    let key = &text[span.clone()];
    let (message, help) = match line.strip_prefix("[machine.") {
        Some(_) => (format!("two machines are called `{key}`"), "give each machine a name of its own"),
        None => (format!("`{key}` is set here a second time"), "keep one of the two"),
    };
    let problem = VmfileProblem::new(message).at(span, "again here").help(help);
    // The parser does not tell where the first one is: a header is the same line, a key the one
    // that begins alike.
    let begins_alike = |other: &str| match line.starts_with('[') {
        true => other.trim() == line,
        false => other.trim_start().strip_prefix(key).is_some_and(|rest| rest.trim_start().starts_with('=')),
    };
    let mut offset = line_start;
    for earlier in text[..line_start].split_inclusive('\n').rev() {
        offset -= earlier.len();
        if begins_alike(earlier) {
            let start = offset + earlier.find(key).unwrap_or_default();
            return problem.also(start..start + key.len(), "first here");
        }
        if !line.starts_with('[') && earlier.trim_start().starts_with('[') {
            break;
        }
    }
    problem
}

/// Says of a file of a newer version that it is one, before anything in it is taken for a mistake.
fn newer_version(table: &DeTable<'_>) -> Option<VmfileProblem> {
    let value = table.get("version")?;
    let number = value.get_ref().as_integer()?.as_str().parse::<u64>().ok()?;
    let problem = VmfileProblem::new(format!(
        "this file has version {number}, and this vmkit reads version {}",
        FormatVersion::NUMBER
    ));
    let help = "use a newer vmkit, or write the file for this one";
    (number > FormatVersion::NUMBER.into()).then(|| problem.at(value.span(), "").help(help))
}

/// A file as it was read, with the machines' defaults laid under them.
pub(super) struct MergedDocument {
    pub(super) project: Option<String>,
    pub(super) project_span: Range<usize>,
    pub(super) machines: Vec<NamedMachine>,
}

/// A machine as it was read.
pub(super) struct NamedMachine {
    pub(super) name: String,
    pub(super) raw: raw::RawMachine,
    /// Where everything that it says stands, by its path in the machine; the machine's own name is
    /// the empty one.
    pub(super) places: BTreeMap<String, Range<usize>>,
}

pub(super) fn read_file(
    document: &Spanned<DeValue<'_>>,
    problems: &mut Vec<VmfileProblem>,
) -> Option<MergedDocument> {
    let node = ValueNode::behind("the file", document);
    // The whole is read for its mistakes; each machine is read again below, with the defaults under
    // it.
    let raw::RawFile { version: _version, project, defaults: _defaults, machine: _machines } =
        raw::RawFile::read(&node, problems)?;
    let table = document.get_ref().as_table()?;
    if let Some(value) = table.get("defaults").and_then(|defaults| defaults.get_ref().get("depends_on")) {
        let problem = VmfileProblem::new("`depends_on` is for a machine, not for all of them");
        problems.push(problem.at(value.span(), "").help("write it in the machine that depends on another"));
    }
    let machines = table.get("machine").and_then(|machines| machines.get_ref().as_table());
    let machines = machines.map(|machines| machines.iter().collect::<Vec<_>>()).unwrap_or_default();
    if machines.is_empty() && problems.is_empty() {
        let none = VmfileProblem::new("the file describes no machine");
        problems.push(none.help("add one: [machine.web] and its `image`"));
    }
    if !problems.is_empty() {
        return None;
    }
    let mut named: Vec<NamedMachine> = Vec::with_capacity(machines.len());
    for (name, own) in machines {
        let mut value = own.clone();
        if let Some(defaults) = table.get("defaults") {
            lay_over(&mut value, defaults);
        }
        let mut places = BTreeMap::from([(String::new(), name.span())]);
        note_places(&value, "", &mut places);
        let raw = raw::RawMachine::read(&ValueNode::behind(name.get_ref(), &value), problems)?;
        named.push(NamedMachine { name: name.get_ref().to_string(), raw, places });
    }
    named.sort_by_key(|machine| machine.places[""].start);
    let name = table.get("project").and_then(|project| project.get_ref().get("name"));
    let project_span = name.map(Spanned::span).unwrap_or_default();
    Some(MergedDocument { project: project.and_then(|project| project.name), project_span, machines: named })
}

/// Puts into a table what only the other has: tables are joined key by key, all else is the upper
/// one's.
fn lay_over<'a>(upper: &mut Spanned<DeValue<'a>>, lower: &Spanned<DeValue<'a>>) {
    let (DeValue::Table(upper), DeValue::Table(lower)) = (upper.get_mut(), lower.get_ref()) else { return };
    for (key, value) in lower {
        match upper.get_mut(key) {
            Some(own) => lay_over(own, value),
            None => {
                upper.insert(key.clone(), value.clone());
            }
        }
    }
}

/// Writes down where everything below a value stands.
fn note_places(value: &Spanned<DeValue<'_>>, path: &str, places: &mut BTreeMap<String, Range<usize>>) {
    if !path.is_empty() {
        places.insert(path.to_owned(), value.span());
    }
    match value.get_ref() {
        DeValue::Table(table) => {
            for (key, value) in table {
                let dot = if path.is_empty() { "" } else { "." };
                note_places(value, &format!("{path}{dot}{}", key.get_ref()), places);
            }
        }
        DeValue::Array(array) => {
            for (index, value) in array.iter().enumerate() {
                note_places(value, &format!("{path}[{index}]"), places);
            }
        }
        _ => {}
    }
}
