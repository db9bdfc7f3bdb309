//! The name of a backend: [`BackendTag`].
//!
//! Pure: plain data.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::Error;

/// Names the backend that a VM belongs to; in data it is a bare string.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
#[non_exhaustive]
pub enum BackendTag {
    /// Nothing runs: the contract's reference.
    Noop,
    /// QEMU on Linux.
    Qemu,
    /// Propolis (bhyve) on illumos.
    Propolis,
    /// A backend outside this crate.
    Custom(CustomTag),
}

/// The name of a backend outside this crate: `[a-z][a-z0-9-]{0,31}` and none of the built-in names.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CustomTag(String);

impl CustomTag {
    /// Returns the name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl BackendTag {
    /// Creates the tag of a backend outside this crate.
    ///
    /// # Errors
    /// `InvalidInput` for a name that is built in, or not `[a-z][a-z0-9-]{0,31}`.
    pub fn custom(name: &str) -> Result<Self, Error> {
        match name.parse()? {
            tag @ BackendTag::Custom(_) => Ok(tag),
            _ => Err(Error::invalid("backend", name, "this is the name of a built-in backend")),
        }
    }

    /// Returns the tag as text.
    pub fn as_str(&self) -> &str {
        match self {
            BackendTag::Noop => "noop",
            BackendTag::Qemu => "qemu",
            BackendTag::Propolis => "propolis",
            BackendTag::Custom(tag) => tag.as_str(),
        }
    }
}

impl FromStr for BackendTag {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        match text {
            "noop" => return Ok(BackendTag::Noop),
            "qemu" => return Ok(BackendTag::Qemu),
            "propolis" => return Ok(BackendTag::Propolis),
            _ => {}
        }
        let head = text.starts_with(|c: char| c.is_ascii_lowercase());
        let clean = text.chars().all(|c| matches!(c, 'a'..='z' | '0'..='9' | '-'));
        if head && clean && text.len() <= 32 {
            return Ok(BackendTag::Custom(CustomTag(text.to_owned())));
        }
        let value: String = text.chars().take(40).collect();
        Err(Error::invalid(
            "backend",
            value,
            "a backend's name has 1 to 32 of a-z, 0-9 and -, a letter first",
        ))
    }
}

impl TryFrom<String> for BackendTag {
    type Error = Error;

    fn try_from(text: String) -> Result<Self, Error> {
        text.parse()
    }
}

impl From<BackendTag> for String {
    fn from(tag: BackendTag) -> String {
        tag.as_str().to_owned()
    }
}

impl fmt::Display for BackendTag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_custom_tag_can_not_alias_a_built_in_one() {
        assert!(BackendTag::custom("qemu").is_err());
        assert!(BackendTag::custom("Qemu").is_err());
        assert_eq!(BackendTag::custom("cloud-hypervisor").unwrap().as_str(), "cloud-hypervisor");
    }

    #[test]
    fn a_tag_is_a_bare_string_in_data() {
        let tag = BackendTag::custom("mine").unwrap();
        assert_eq!(serde_json::to_string(&tag).unwrap(), "\"mine\"");
        assert_eq!(serde_json::from_str::<BackendTag>("\"qemu\"").unwrap(), BackendTag::Qemu);
    }
}
