//! The record of a machine's provisioning: what is done, and what is due.
//!
//! Pure. The module `kept` stores it on disk.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::vmfile::RunPolicy;

/// The steps that were started on one machine, by their names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ProvisionRecord {
    version: u32,
    steps: BTreeMap<String, StepRecord>,
}

/// The record of one step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct StepRecord {
    /// The SHA-256 of the step's content.
    pub(super) digest: String,
    /// The result.
    pub(super) end: StepEnd,
    /// The time of the record, in seconds since 1970 (UTC).
    pub(super) at: u64,
}

/// The result of a step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum StepEnd {
    /// It was about to start, and its process was killed.
    Begun,
    /// It succeeded.
    Done,
    /// It failed with this error.
    Failed(String),
    /// It failed with this error, and may still run in the guest.
    CutOff(String),
}

impl StepEnd {
    /// Returns the error, if it failed.
    pub(super) fn failure(&self) -> Option<&str> {
        match self {
            StepEnd::Failed(how) | StepEnd::CutOff(how) => Some(how),
            StepEnd::Begun | StepEnd::Done => None,
        }
    }
}

/// Why a step is due.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum StepReason {
    /// It was never run.
    New,
    /// It was started, and its end was not recorded.
    CutOff,
    /// It failed the last time.
    Failed,
    /// Its content has changed since it was run.
    Changed,
    /// It is run at every `up`.
    Always,
    /// It was requested with `force`.
    Forced,
}

impl StepReason {
    /// Returns the reason in a word or two, such as `interrupted`.
    pub fn as_str(&self) -> &'static str {
        match self {
            StepReason::New => "new",
            StepReason::CutOff => "interrupted",
            StepReason::Failed => "failed before",
            StepReason::Changed => "changed",
            StepReason::Always => "every time",
            StepReason::Forced => "forced",
        }
    }
}

impl fmt::Display for StepReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl Default for ProvisionRecord {
    fn default() -> Self {
        Self { version: Self::VERSION, steps: BTreeMap::new() }
    }
}

impl ProvisionRecord {
    /// The version that this vmkit writes, and the newest that it reads.
    const VERSION: u32 = 1;

    /// Parses the record; `path` is where the bytes came from.
    ///
    /// # Errors
    /// `Record` for bytes that are no record, or of a newer version.
    pub(super) fn decode(path: &Path, bytes: &[u8]) -> Result<Self> {
        #[derive(Deserialize)]
        struct RecordVersion {
            version: u32,
        }
        let read = |error: serde_json::Error| {
            Error::record(path, "this is not a record of provisioning").with_source(error)
        };
        let RecordVersion { version } = serde_json::from_slice(bytes).map_err(read)?;
        if version > Self::VERSION {
            let newest = Self::VERSION;
            return Err(Error::record(
                path,
                format!(
                    "it was written by a newer vmkit: it has version {version}, and this one reads up to {newest}"
                ),
            ));
        }
        serde_json::from_slice(bytes).map_err(read)
    }

    /// Returns the record's bytes.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = serde_json::to_vec_pretty(self).expect("strings and numbers can be written as JSON");
        bytes.push(b'\n');
        bytes
    }

    /// Returns why a step is due, or `None` if it is not.
    ///
    /// `digest` returns the digest of the step's present content; it is called only if needed,
    /// since it may have to read files.
    pub(super) fn why<E>(
        &self,
        step: &str,
        run: RunPolicy,
        digest: impl FnOnce() -> std::result::Result<String, E>,
    ) -> std::result::Result<Option<StepReason>, E> {
        let Some(record) = self.steps.get(step) else { return Ok(Some(StepReason::New)) };
        Ok(match (&record.end, run) {
            (StepEnd::Begun | StepEnd::CutOff(_), _) => Some(StepReason::CutOff),
            (StepEnd::Failed(_), _) => Some(StepReason::Failed),
            (StepEnd::Done, RunPolicy::Once) => None,
            (StepEnd::Done, RunPolicy::Always) => Some(StepReason::Always),
            (StepEnd::Done, RunPolicy::Changed) => {
                (digest()? != record.digest).then_some(StepReason::Changed)
            }
        })
    }

    /// Returns whether a step did not succeed as far as is known: a part of it may still run.
    pub(super) fn has_loose_ends(&self) -> bool {
        self.steps.values().any(|step| step.end != StepEnd::Done)
    }

    /// Returns whether there is a step whose end was not recorded.
    pub(super) fn was_cut_off(&self) -> bool {
        self.steps.values().any(|step| matches!(step.end, StepEnd::Begun | StepEnd::CutOff(_)))
    }

    /// Records the result of a step.
    pub(super) fn set(&mut self, step: &str, record: StepRecord) {
        self.steps.insert(step.to_owned(), record);
    }

    /// Returns the record of a step.
    pub(super) fn get(&self, step: &str) -> Option<&StepRecord> {
        self.steps.get(step)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;

    fn why(end: StepEnd, run: RunPolicy, digest: &str) -> Option<StepReason> {
        let mut provisioned = ProvisionRecord::default();
        provisioned.set("install", StepRecord { digest: "a".into(), end, at: 0 });
        let Ok(why) = provisioned.why("install", run, || Ok::<_, Infallible>(digest.to_owned()));
        why
    }

    #[test]
    fn a_step_is_run_again_according_to_its_rule() {
        for (run, same, other) in [
            (RunPolicy::Once, None, None),
            (RunPolicy::Changed, None, Some(StepReason::Changed)),
            (RunPolicy::Always, Some(StepReason::Always), Some(StepReason::Always)),
        ] {
            assert_eq!(why(StepEnd::Done, run, "a"), same);
            assert_eq!(why(StepEnd::Done, run, "b"), other);
        }
    }

    #[test]
    fn a_step_that_did_not_succeed_is_run_again_whatever_its_rule() {
        for run in [RunPolicy::Once, RunPolicy::Changed, RunPolicy::Always] {
            assert_eq!(why(StepEnd::Begun, run, "a"), Some(StepReason::CutOff));
            assert_eq!(why(StepEnd::CutOff("the guest is gone".into()), run, "a"), Some(StepReason::CutOff));
            assert_eq!(why(StepEnd::Failed("exit code 1".into()), run, "a"), Some(StepReason::Failed));
            let Ok(new) =
                ProvisionRecord::default().why("install", run, || Ok::<_, Infallible>(String::new()));
            assert_eq!(new, Some(StepReason::New));
        }
    }

    #[test]
    fn a_record_survives_its_bytes_and_a_newer_one_is_refused() {
        let mut provisioned = ProvisionRecord::default();
        let end = StepEnd::Failed("exit code 3".into());
        provisioned.set("install", StepRecord { digest: "a".into(), end, at: 7 });
        let (path, bytes) = (Path::new("/p.json"), provisioned.encode());
        assert_eq!(ProvisionRecord::decode(path, &bytes).unwrap(), provisioned);
        let newer = String::from_utf8(bytes).unwrap().replace("\"version\": 1", "\"version\": 2");
        let error = ProvisionRecord::decode(path, newer.as_bytes()).unwrap_err().to_string();
        assert!(error.contains("version 2") && error.contains("reads up to 1"), "{error}");
        assert!(ProvisionRecord::decode(path, b"[]").unwrap_err().to_string().starts_with("/p.json: "));
    }
}
