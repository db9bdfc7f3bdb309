//! One call of a stand-in: what was typed, what it says, and the faults that a test has in store
//! for it.

use serde::{Deserialize, Serialize};

/// What a tool said, and how it ended.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ToolOutput {
    /// What it printed.
    pub stdout: String,
    /// What it complained of.
    pub stderr: String,
    /// Its exit code.
    pub code: u8,
}

impl ToolOutput {
    /// Returns what a tool says that did what was asked.
    pub(super) fn ok(stdout: impl Into<String>) -> Self {
        Self { stdout: stdout.into(), ..Self::default() }
    }

    /// Returns what a tool says that could not.
    pub(super) fn failed(code: u8, stderr: impl AsRef<str>) -> Self {
        Self { stderr: format!("{}\n", stderr.as_ref()), code, ..Self::default() }
    }
}

/// What happens to a call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub enum CallFault {
    /// It says this and ends with this code, and does nothing.
    Fail {
        /// What it says on its standard error.
        stderr: String,
        /// The exit code.
        code: u8,
    },
    /// It does what it shall, and then says this and ends with this code.
    FailAfterwards {
        /// What it says on its standard error.
        stderr: String,
        /// The exit code.
        code: u8,
    },
    /// It does nothing, and never ends.
    Hang,
    /// It does what it shall, but only after this long.
    Late {
        /// The time in milliseconds.
        millis: u64,
    },
}

/// The fault of one call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct PlannedFault {
    pub(super) call: u64,
    pub(super) fault: CallFault,
}

/// What was typed behind a subcommand, as `getopt` takes it apart: options first, operands
/// afterwards.
#[derive(Debug, Default)]
pub(super) struct ParsedArgs {
    options: Vec<(char, Option<String>)>,
    pub(super) operands: Vec<String>,
}

impl ParsedArgs {
    /// Takes apart; `known` names the options, each that takes a value followed by a colon.
    ///
    /// # Errors
    /// Returns the option that is not known, or the one that misses its value.
    pub(super) fn parse(args: &[String], known: &str) -> Result<Self, GetoptError> {
        let mut typed = Self::default();
        let mut args = args.iter();
        while let Some(arg) = args.next() {
            let Some(letters) = arg.strip_prefix('-').filter(|letters| !letters.is_empty()) else {
                typed.operands.push(arg.clone());
                typed.operands.extend(args.cloned());
                break;
            };
            let mut rest = letters.chars();
            while let Some(letter) = rest.next() {
                let Some(at) = known.find(letter).filter(|_| letter != ':') else {
                    return Err(GetoptError::Unknown(letter));
                };
                if !known[at + 1..].starts_with(':') {
                    typed.options.push((letter, None));
                    continue;
                }
                let glued: String = rest.by_ref().collect();
                let value = if glued.is_empty() { args.next().cloned() } else { Some(glued) };
                typed.options.push((letter, Some(value.ok_or(GetoptError::NoValue(letter))?)));
            }
        }
        Ok(typed)
    }

    pub(super) fn has(&self, letter: char) -> bool {
        self.options.iter().any(|(option, _)| *option == letter)
    }

    /// Returns the last value of an option.
    pub(super) fn value(&self, letter: char) -> Option<&str> {
        self.values(letter).last()
    }

    pub(super) fn values(&self, letter: char) -> impl Iterator<Item = &str> {
        self.options
            .iter()
            .filter(move |(option, _)| *option == letter)
            .filter_map(|(_, value)| value.as_deref())
    }
}

/// What `getopt` does not like.
#[derive(Debug)]
pub(super) enum GetoptError {
    Unknown(char),
    NoValue(char),
}
