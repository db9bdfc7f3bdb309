//! One call of a stand-in: what was typed, what it says, and the faults that a test has in store
//! for it.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{Illumos, IllumosState, bhyvectl, dladm, zfs};

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

impl Illumos {
    /// Calls a tool; `None` means that it hangs.
    ///
    /// # Errors
    /// Whatever the system says to the directory in which the host lives.
    pub fn call(&self, tool: &str, args: &[String]) -> io::Result<Option<ToolOutput>> {
        let planned = self.planned()?;
        let fault = IllumosState::change(self, |state| -> io::Result<_> {
            state.calls += 1;
            self.record(tool, args)?;
            let fault = planned.into_iter().find(|planned| planned.call == state.calls);
            Ok(fault.map(|planned| planned.fault))
        })??;
        if let Some(CallFault::Late { millis }) = fault {
            std::thread::sleep(Duration::from_millis(millis));
        }
        IllumosState::change(self, |state| {
            match fault {
                Some(CallFault::Hang) => return Ok(None),
                Some(CallFault::Fail { stderr, code }) => return Ok(Some(ToolOutput::failed(code, stderr))),
                _ => {}
            }
            let said = match tool {
                "zfs" => zfs::run(self, state, args)?,
                "dladm" => dladm::run(self, state, args),
                "bhyvectl" => bhyvectl::run(self, args)?,
                other => ToolOutput::failed(127, format!("{other}: no stand-in has this name")),
            };
            Ok(Some(match fault {
                Some(CallFault::FailAfterwards { stderr, code }) => ToolOutput::failed(code, stderr),
                _ => said,
            }))
        })?
    }

    /// Returns the faults that are in store.
    pub(super) fn planned(&self) -> io::Result<Vec<PlannedFault>> {
        match std::fs::read(self.dir.join("faults.json")) {
            Ok(text) => Ok(serde_json::from_slice(&text)?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    fn record(&self, tool: &str, args: &[String]) -> io::Result<()> {
        let words: Vec<&str> = std::iter::once(tool).chain(args.iter().map(String::as_str)).collect();
        let mut log = OpenOptions::new().create(true).append(true).open(self.dir.join("calls.log"))?;
        // In one write: another process may be reading.
        log.write_all(format!("{}\n", serde_json::to_string(&words)?).as_bytes())
    }
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
