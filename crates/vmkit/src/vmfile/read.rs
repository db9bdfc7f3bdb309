//! From TOML's values to Rust's: [`FromValue`], and the macro [`table`] that implements it for the
//! tables of the format.
//!
//! Pure. Reading continues after an error, so that all errors are reported at once, each with its
//! place. The JSON Schema is generated from the same types, so the two can't differ.

use std::collections::BTreeMap;
use std::ops::Range;
use std::str::FromStr;

use schemars::{Schema, SchemaGenerator, json_schema};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::error::Error;
use crate::error::VmfileProblem;

/// A type that can be read from the file.
pub(super) trait FromValue: Sized {
    /// The expected form, such as `a whole number`.
    const WHAT: &'static str;

    /// Reads a value, or adds a problem.
    fn read(node: &ValueNode<'_>, problems: &mut Vec<VmfileProblem>) -> Option<Self>;

    /// Returns the JSON Schema of the type.
    fn schema(generator: &mut SchemaGenerator) -> Schema;
}

/// A value with its key.
#[derive(Clone, Copy)]
pub(super) struct ValueNode<'a> {
    pub(super) key: &'a str,
    /// Whether it is an item of a list.
    pub(super) item: bool,
    pub(super) value: &'a Spanned<DeValue<'a>>,
}

impl<'a> ValueNode<'a> {
    pub(super) fn behind(key: &'a str, value: &'a Spanned<DeValue<'a>>) -> Self {
        Self { key, item: false, value }
    }

    /// Returns the value's name for messages.
    pub(super) fn name(&self) -> String {
        let key = self.key.escape_debug();
        if self.item { format!("an item of `{key}`") } else { format!("`{key}`") }
    }

    /// Adds the problem that a value of another type is expected here.
    pub(super) fn wrong_type(&self, what: &str, problems: &mut Vec<VmfileProblem>) {
        let found = match self.value.get_ref() {
            DeValue::String(_) => "a text",
            DeValue::Integer(_) => "a whole number",
            DeValue::Float(_) => "a number with a fraction",
            DeValue::Boolean(_) => "true or false",
            DeValue::Datetime(_) => "a date or a time",
            DeValue::Array(_) => "a list",
            DeValue::Table(_) => "a table",
        };
        problems.push(self.problem(format!("{} is {what}", self.name()), format!("this is {found}")));
    }

    pub(super) fn problem(&self, message: String, label: impl Into<String>) -> VmfileProblem {
        VmfileProblem::new(message).at(self.value.span(), label)
    }

    /// Parses a string with `FromStr`.
    pub(super) fn parsed<T: FromStr<Err = Error>>(
        &self,
        text: &str,
        problems: &mut Vec<VmfileProblem>,
    ) -> Option<T> {
        text.parse().map_err(|error| problems.push(self.refused(&error))).ok()
    }

    /// Returns the problem for a value that its type refuses.
    fn refused(&self, error: &Error) -> VmfileProblem {
        let why = match error {
            Error::Invalid { expected, .. } => expected.clone(),
            other => other.to_string(),
        };
        self.problem(format!("{}: {why}", self.name()), "")
    }

    fn integer(&self) -> Option<i128> {
        let integer = self.value.get_ref().as_integer()?;
        // An overflow is outside of every range in the format.
        let most = if integer.as_str().starts_with('-') { i128::MIN } else { i128::MAX };
        Some(i128::from_str_radix(integer.as_str(), integer.radix()).unwrap_or(most))
    }
}

/// Implements `FromValue` for types with `FromStr`.
macro_rules! texts {
    ($($type:ty: $what:literal, $schema:tt;)*) => {$(
        impl FromValue for $type {
            const WHAT: &'static str = $what;

            fn read(node: &ValueNode<'_>, problems: &mut Vec<VmfileProblem>) -> Option<Self> {
                match node.value.get_ref().as_str() {
                    Some(text) => node.parsed(text, problems),
                    None => {
                        node.wrong_type(Self::WHAT, problems);
                        None
                    }
                }
            }

            fn schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!($schema)
            }
        }
    )*};
}
pub(super) use texts;

impl FromValue for String {
    const WHAT: &'static str = "a string in quotes";

    fn read(node: &ValueNode<'_>, problems: &mut Vec<VmfileProblem>) -> Option<Self> {
        let text = node.value.get_ref().as_str().map(str::to_owned);
        if text.is_none() {
            node.wrong_type(Self::WHAT, problems);
        }
        text
    }

    fn schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string" })
    }
}

impl FromValue for bool {
    const WHAT: &'static str = "true or false";

    fn read(node: &ValueNode<'_>, problems: &mut Vec<VmfileProblem>) -> Option<Self> {
        let value = node.value.get_ref().as_bool();
        if value.is_none() {
            node.wrong_type("true or false, without quotes", problems);
        }
        value
    }

    fn schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "boolean" })
    }
}

/// A whole number within bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BoundedInt<const LEAST: u32, const MOST: u32>(pub(super) u32);

impl<const LEAST: u32, const MOST: u32> FromValue for BoundedInt<LEAST, MOST> {
    const WHAT: &'static str = "a whole number";

    fn read(node: &ValueNode<'_>, problems: &mut Vec<VmfileProblem>) -> Option<Self> {
        let Some(number) = node.integer() else {
            node.wrong_type("a whole number, without quotes", problems);
            return None;
        };
        match u32::try_from(number) {
            Ok(number) if (LEAST..=MOST).contains(&number) => Some(Self(number)),
            _ => {
                problems.push(node.problem(format!("{} is {LEAST} to {MOST}", node.name()), ""));
                None
            }
        }
    }

    fn schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "integer", "minimum": LEAST, "maximum": MOST })
    }
}

/// Implements `FromValue` for types that accept a number as well as a string.
macro_rules! quantities {
    ($($type:ty: $what:literal, $number:expr, $schema:tt;)*) => {$(
        impl FromValue for $type {
            const WHAT: &'static str = $what;

            fn read(node: &ValueNode<'_>, problems: &mut Vec<VmfileProblem>) -> Option<Self> {
                match node.value.get_ref() {
                    DeValue::String(text) => node.parsed(text, problems),
                    DeValue::Integer(_) | DeValue::Float(_) => {
                        // A number is parsed like its text, so that both have the same bounds and
                        // units.
                        node.parsed(&$number(node), problems)
                    }
                    _ => {
                        node.wrong_type(Self::WHAT, problems);
                        None
                    }
                }
            }

            fn schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!($schema)
            }
        }
    )*};
}
pub(super) use quantities;

/// Returns a number's text, normalised by TOML's grammar.
pub(super) fn number(node: &ValueNode<'_>) -> String {
    match node.value.get_ref() {
        DeValue::Float(float) => float.as_str().to_owned(),
        _ => node.integer().map(|number| number.to_string()).unwrap_or_default(),
    }
}

impl<T: FromValue> FromValue for Vec<T> {
    const WHAT: &'static str = "a list";

    fn read(node: &ValueNode<'_>, problems: &mut Vec<VmfileProblem>) -> Option<Self> {
        let Some(array) = node.value.get_ref().as_array() else {
            node.wrong_type(&format!("a list; each item is {}", T::WHAT), problems);
            return None;
        };
        let items =
            array.iter().map(|value| T::read(&ValueNode { key: node.key, item: true, value }, problems));
        // Every item is read, so that the problems of all are reported.
        items.collect::<Vec<_>>().into_iter().collect()
    }

    fn schema(generator: &mut SchemaGenerator) -> Schema {
        let items = T::schema(generator);
        json_schema!({ "type": "array", "items": items })
    }
}

impl<T: FromValue> FromValue for BTreeMap<String, T> {
    const WHAT: &'static str = "a table";

    fn read(node: &ValueNode<'_>, problems: &mut Vec<VmfileProblem>) -> Option<Self> {
        let Some(table) = node.value.get_ref().as_table() else {
            node.wrong_type(&format!("a table; each value is {}", T::WHAT), problems);
            return None;
        };
        let mut map = Self::new();
        for (key, value) in table {
            let name: &str = key.get_ref();
            if let Some(value) = T::read(&ValueNode::behind(name, value), problems) {
                map.insert(name.to_owned(), value);
            }
        }
        Some(map)
    }

    fn schema(generator: &mut SchemaGenerator) -> Schema {
        let values = T::schema(generator);
        json_schema!({ "type": "object", "additionalProperties": values })
    }
}

/// A table that is being read: its keys, and the unknown keys.
pub(super) struct TableReader<'a> {
    what: &'static str,
    table: &'a DeTable<'a>,
    span: Range<usize>,
    /// The known keys that unknown keys were probably meant to be.
    meant: Vec<&'a str>,
}

impl<'a> TableReader<'a> {
    /// Starts to read a table with these keys, and reports every other one, with a suggestion.
    pub(super) fn of(
        what: &'static str,
        known: &[&'a str],
        node: &ValueNode<'a>,
        problems: &mut Vec<VmfileProblem>,
    ) -> Option<Self> {
        let Some(table) = node.value.get_ref().as_table() else {
            node.wrong_type("a table", problems);
            return None;
        };
        let mut all_meant = Vec::new();
        for key in table.keys().filter(|key| !known.contains(&key.get_ref().as_ref())) {
            let name: String = key.get_ref().chars().take(60).collect();
            let problem = VmfileProblem::new(format!("{what} has no key `{}`", name.escape_debug()));
            let help = match meant(&name, known) {
                Some(meant) => {
                    all_meant.push(meant);
                    format!("did you mean `{meant}`?")
                }
                None => format!("its keys are {}", listed(known)),
            };
            problems.push(problem.at(key.span(), "unknown key").help(help));
        }
        Some(Self { what, table, span: node.value.span(), meant: all_meant })
    }

    pub(super) fn optional<T: FromValue>(
        &self,
        key: &'a str,
        problems: &mut Vec<VmfileProblem>,
    ) -> Option<T> {
        self.table.get(key).and_then(|value| T::read(&ValueNode::behind(key, value), problems))
    }

    pub(super) fn required<T: FromValue>(
        &self,
        key: &'a str,
        problems: &mut Vec<VmfileProblem>,
    ) -> Option<T> {
        // A key under a misspelt name was reported already.
        if !self.table.contains_key(key) && !self.meant.contains(&key) {
            let missing = VmfileProblem::new(format!("{} needs `{key}`", self.what));
            let help = format!("add `{key}`, {}", T::WHAT);
            problems.push(missing.at(self.span.clone(), "it is missing here").help(help));
        }
        self.optional(key, problems)
    }
}

/// Keys of other tools, and the place of the setting here.
const ELSEWHERE: &[(&str, &str)] = &[
    ("base", "image"),
    ("box", "image"),
    ("cd", "cdrom"),
    ("cpu", "cpus"),
    ("disks", "data_disks"),
    ("env", "provision.env"),
    ("dvd", "cdrom"),
    ("hostname", "cloud_init.hostname"),
    ("iso", "cdrom"),
    ("machines", "machine"),
    ("mem", "memory"),
    ("packages", "cloud_init.packages"),
    ("ports", "forwards"),
    ("probes", "ready"),
    ("ram", "memory"),
    ("services", "machine"),
    ("user_data", "cloud_init.user_data"),
    ("users", "cloud_init.users"),
    ("vcpus", "cpus"),
    ("vm", "machine"),
    ("vms", "machine"),
];

/// Returns the known word that was probably meant.
pub(super) fn meant<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    let word = word.to_lowercase().replace('-', "_");
    let elsewhere = ELSEWHERE.iter().find(|(other, _)| *other == word).map(|(_, here)| *here);
    if let Some(here) = elsewhere
        && known.contains(&here.split('.').next().unwrap_or_default())
    {
        return Some(here);
    }
    let distance = |known: &&&str| strsim::damerau_levenshtein(&word, known);
    let nearest = known.iter().min_by_key(distance)?;
    let most = nearest.len().max(3) / 3;
    (distance(&nearest) <= most).then_some(nearest)
}

/// Returns the words as a list in one line.
pub(super) fn listed(words: &[&str]) -> String {
    let words: Vec<String> = words.iter().map(|word| format!("`{word}`")).collect();
    words.join(", ")
}

/// Describes a table of the format: its fields with their docs, which give `FromValue` and the JSON
/// Schema.
///
/// A field is `Option` unless its type is followed by `= required`.
macro_rules! table {
    (
        $(#[doc = $doc:literal])*
        struct $name:ident = $what:literal {
            $($(#[doc = $field_doc:literal])* $field:ident: $type:ty $(= $required:ident)?,)*
        }
    ) => {
        $(#[doc = $doc])*
        #[derive(Debug, Clone)]
        pub(super) struct $name {
            $($(#[doc = $field_doc])* pub(super) $field: table!(@type $type $(, $required)?),)*
        }

        impl FromValue for $name {
            const WHAT: &'static str = $what;

            fn read(node: &ValueNode<'_>, problems: &mut Vec<VmfileProblem>) -> Option<Self> {
                let fields = TableReader::of(Self::WHAT, &[$(stringify!($field)),*], node, problems)?;
                // Every field is read, so that the problems of all are reported.
                $(let $field = table!(@read fields, problems, $field $(, $required)?);)*
                Some(Self { $($field: table!(@take $field $(, $required)?),)* })
            }

            fn schema(generator: &mut SchemaGenerator) -> Schema {
                generator.subschema_for::<Self>()
            }
        }

        impl JsonSchema for $name {
            fn schema_name() -> std::borrow::Cow<'static, str> {
                // The schema names a table as the file does.
                stringify!($name).trim_start_matches("Raw").into()
            }

            fn json_schema(generator: &mut SchemaGenerator) -> Schema {
                let properties = serde_json::Map::from_iter([$((
                    stringify!($field).to_owned(),
                    described(<$type as FromValue>::schema(generator), concat!($($field_doc),*)).to_value(),
                )),*]);
                let required: &[&str] = &[$($(table!(@name $field, $required),)?)*];
                described(
                    json_schema!({
                        "type": "object",
                        "properties": properties,
                        "required": required,
                        "additionalProperties": false,
                    }),
                    concat!($($doc),*),
                )
            }
        }
    };
    (@type $type:ty) => { Option<$type> };
    (@type $type:ty, required) => { $type };
    (@read $fields:ident, $problems:ident, $field:ident) => {
        $fields.optional(stringify!($field), $problems)
    };
    (@read $fields:ident, $problems:ident, $field:ident, required) => {
        $fields.required(stringify!($field), $problems)
    };
    (@take $field:ident) => { $field };
    (@take $field:ident, required) => { $field? };
    (@name $field:ident, required) => { stringify!($field) };
}
pub(super) use table;

/// Returns the schema with this description, in the form of a doc comment.
pub(super) fn described(mut schema: Schema, doc: &str) -> Schema {
    schema.insert("description".to_owned(), doc.trim().into());
    schema
}

/// Implements `FromValue` for enumerations of the library, by a list of words.
macro_rules! words {
    ($($type:ty: $what:literal { $($word:literal => $value:expr),* $(,)? })*) => {$(
        impl FromValue for $type {
            const WHAT: &'static str = $what;

            fn read(node: &ValueNode<'_>, problems: &mut Vec<VmfileProblem>) -> Option<Self> {
                let Some(text) = node.value.get_ref().as_str() else {
                    node.wrong_type(Self::WHAT, problems);
                    return None;
                };
                match text {
                    $($word => Some($value),)*
                    _ => {
                        problems.push(unknown_word(node, text, Self::WHAT, &[$($word),*]));
                        None
                    }
                }
            }

            fn schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!({ "enum": [$($word),*] })
            }
        }
    )*};
}
pub(super) use words;

/// Adds the problem that a word is none of the known ones.
pub(super) fn unknown_word(node: &ValueNode<'_>, word: &str, what: &str, known: &[&str]) -> VmfileProblem {
    let problem = node.problem(format!("{} is {what}", node.name()), "");
    match meant(word, known) {
        Some(meant) => problem.help(format!("did you mean \"{meant}\"?")),
        None => problem,
    }
}
