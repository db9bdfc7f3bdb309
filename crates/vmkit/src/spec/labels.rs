//! What a VM's owner writes on it, for their own use: [`Labels`].
//!
//! Pure. vmkit keeps labels and acts on none but its own, whose keys begin with `vmkit.`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::spec::name::shortened;

/// Keys with a value each, such as `team = web`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "BTreeMap<String, String>", into = "BTreeMap<String, String>")]
pub struct Labels(BTreeMap<String, String>);

impl Labels {
    /// The label with the image that a VM was created from, as
    /// [`VmSpec::image_name`](super::VmSpec::image_name) returns it.
    pub(crate) const IMAGE: &'static str = "vmkit.image";
    /// The most bytes that a value has; a path fits.
    pub const MAX_VALUE_BYTES: usize = 4096;
    /// The most labels that a VM has.
    pub const MAX: usize = 64;

    /// Adds a label, or replaces the one with the same key.
    ///
    /// # Errors
    /// `InvalidInput` on `labels` for a key that is not 1 to 63 of a-z, 0-9, `.`, `_` and `-`, a
    /// letter or digit first; for a value that is longer than
    /// [`MAX_VALUE_BYTES`](Self::MAX_VALUE_BYTES) or has control characters; for more than
    /// [`MAX`](Self::MAX) labels.
    pub fn set(&mut self, key: impl Into<String>, value: impl Into<String>) -> Result<()> {
        let (key, value) = (key.into(), value.into());
        let clean = |c: char| matches!(c, 'a'..='z' | '0'..='9' | '.' | '_' | '-');
        let head = key.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit());
        if !head || key.len() > 63 || !key.chars().all(clean) {
            let expected = "a label's key has 1 to 63 of a-z, 0-9, ., _ and -, a letter or digit first";
            return Err(Error::invalid("labels", shortened(&key), expected));
        }
        if value.len() > Self::MAX_VALUE_BYTES || value.contains(char::is_control) {
            let expected = format!("a label's value is one line of at most {} bytes", Self::MAX_VALUE_BYTES);
            return Err(Error::invalid(format!("labels.{key}"), shortened(&value), expected));
        }
        self.0.insert(key, value);
        if self.0.len() > Self::MAX {
            let bound = format!("a VM has at most {} labels", Self::MAX);
            return Err(Error::invalid("labels", self.0.len(), bound));
        }
        Ok(())
    }

    /// Returns those of a copy of the VM: vmkit's own, such as its project's, stay with the
    /// original.
    pub(crate) fn for_clone(mut self) -> Self {
        self.0.retain(|key, _| key == Self::IMAGE || !key.starts_with("vmkit."));
        self
    }

    /// Returns the value of a label.
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
}

impl TryFrom<BTreeMap<String, String>> for Labels {
    type Error = Error;

    fn try_from(map: BTreeMap<String, String>) -> Result<Self> {
        let mut labels = Self::default();
        map.into_iter().try_for_each(|(key, value)| labels.set(key, value))?;
        Ok(labels)
    }
}

impl From<Labels> for BTreeMap<String, String> {
    fn from(labels: Labels) -> Self {
        labels.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ambiguous_key_is_refused() {
        let mut labels = Labels::default();
        for key in ["", "Team", ".hidden", "a b", "a=b", &"x".repeat(64)] {
            assert!(labels.set(key, "web").is_err(), "{key:?}");
        }
        labels.set("vmkit.project", "/home/me/vmkit.toml").unwrap();
        assert_eq!(labels.get("vmkit.project"), Some("/home/me/vmkit.toml"));
    }

    #[test]
    fn a_value_is_one_bounded_line() {
        let mut labels = Labels::default();
        assert!(labels.set("note", "a\nb").is_err());
        assert!(labels.set("note", "x".repeat(Labels::MAX_VALUE_BYTES + 1)).is_err());
        labels.set("note", "x".repeat(Labels::MAX_VALUE_BYTES)).unwrap();
    }

    #[test]
    fn labels_are_checked_when_they_are_read() {
        assert!(serde_json::from_str::<Labels>("{\"Team\":\"web\"}").is_err());
        let labels: Labels = serde_json::from_str("{\"team\":\"web\"}").unwrap();
        assert_eq!(labels.iter().collect::<Vec<_>>(), [("team", "web")]);
    }
}
