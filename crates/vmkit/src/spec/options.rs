//! What only one backend understands: [`BackendOptions`].
//!
//! Pure. Which keys there are, and what their values mean, is each backend's own; one refuses those
//! that it does not know.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::spec::name::shortened;

/// Options of a VM for the backend that runs it, such as `address = 10.0.0.7:12400` for Propolis.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "BTreeMap<String, String>", into = "BTreeMap<String, String>")]
pub struct BackendOptions(BTreeMap<String, String>);

impl BackendOptions {
    /// The most bytes that a value has; a path fits.
    pub const MAX_VALUE_BYTES: usize = 4096;

    /// Adds an option, or replaces the one with the same key.
    ///
    /// # Errors
    /// `InvalidInput` on `backend_options` for a key that is not 1 to 32 of a-z, 0-9 and `-`, a
    /// letter first; for a value that is empty, has more than
    /// [`MAX_VALUE_BYTES`](Self::MAX_VALUE_BYTES) or has control characters.
    pub fn set(&mut self, key: impl Into<String>, value: impl Into<String>) -> Result<()> {
        let (key, value) = (key.into(), value.into());
        let clean = |c: char| matches!(c, 'a'..='z' | '0'..='9' | '-');
        let head = key.starts_with(|c: char| c.is_ascii_lowercase());
        if !head || key.len() > 32 || !key.chars().all(clean) {
            let expected = "an option's key has 1 to 32 of a-z, 0-9 and -, a letter first";
            return Err(Error::invalid("backend_options", shortened(&key), expected));
        }
        if value.is_empty() || value.len() > Self::MAX_VALUE_BYTES || value.contains(char::is_control) {
            let expected = format!("an option's value is one line of 1 to {} bytes", Self::MAX_VALUE_BYTES);
            return Err(Error::invalid(format!("backend_options.{key}"), shortened(&value), expected));
        }
        self.0.insert(key, value);
        Ok(())
    }

    /// Returns the value of an option.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(String::as_str)
    }

    /// Returns all of them, in the order of their keys.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(key, value)| (key.as_str(), value.as_str()))
    }

    /// Returns whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Refuses every key that a backend does not know.
    ///
    /// # Errors
    /// `InvalidInput` on the first of them, naming those that are known.
    pub fn check_known(&self, known: &[&str]) -> Result<()> {
        let Some((key, value)) = self.iter().find(|(key, _)| !known.contains(key)) else {
            return Ok(());
        };
        let there = match known {
            [] => "this backend has no options".to_owned(),
            known => format!("this backend has no such option; there are {}", known.join(", ")),
        };
        Err(Error::invalid(format!("backend_options.{key}"), shortened(value), there))
    }
}

impl TryFrom<BTreeMap<String, String>> for BackendOptions {
    type Error = Error;

    fn try_from(map: BTreeMap<String, String>) -> Result<Self> {
        let mut options = Self::default();
        map.into_iter().try_for_each(|(key, value)| options.set(key, value))?;
        Ok(options)
    }
}

impl From<BackendOptions> for BTreeMap<String, String> {
    fn from(options: BackendOptions) -> Self {
        options.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_or_a_value_that_is_no_single_word_and_line_is_refused() {
        let mut options = BackendOptions::default();
        for key in ["", "Dataset", "1st", "a=b", &"x".repeat(33)] {
            assert!(options.set(key, "tank").is_err(), "{key:?}");
        }
        for value in ["", "a\nb", &"x".repeat(BackendOptions::MAX_VALUE_BYTES + 1)] {
            assert!(options.set("dataset", value).is_err(), "{value:?}");
        }
        options.set("dataset", "tank/vm").unwrap();
        assert_eq!(options.get("dataset"), Some("tank/vm"));
    }

    #[test]
    fn an_unknown_key_is_refused_with_those_that_are_known() {
        let options: BackendOptions = serde_json::from_str("{\"datset\":\"tank\"}").unwrap();
        options.check_known(&["datset"]).unwrap();
        let error = options.check_known(&["address", "dataset"]).unwrap_err().to_string();
        assert!(error.starts_with("backend_options.datset") && error.contains("address, dataset"), "{error}");
        assert!(options.check_known(&[]).unwrap_err().to_string().contains("has no options"));
    }
}
