//! Names: of a VM, of a snapshot, of a bridge, of a link, of a user. A checked name is safe as one
//! path component and in every command line.
//!
//! Pure.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::Error;

/// The user that vmkit logs in as, unless the image has one of its own.
pub(super) const LOGIN_USER: &str = "vmkit";

/// The name of a VM: `[a-z0-9][a-z0-9-]{0,62}`, so it is a path component and a host name at once.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VmName(String);

impl VmName {
    /// The longest name, in bytes: a DNS label.
    pub const MAX_BYTES: usize = 63;

    /// Checks a name.
    ///
    /// # Errors
    /// `InvalidInput` when it is empty, too long, or has a character outside `a-z0-9-`.
    pub fn new(name: impl Into<String>) -> Result<Self, Error> {
        checked_label("name", name.into()).map(Self)
    }

    /// Returns the name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// The name of a snapshot, unique in its VM: `[a-z0-9][a-z0-9-]{0,62}`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SnapshotName(String);

impl SnapshotName {
    /// Checks a name.
    ///
    /// # Errors
    /// `InvalidInput` when it is empty, too long, or has a character outside `a-z0-9-`.
    pub fn new(name: impl Into<String>) -> Result<Self, Error> {
        checked_label("snapshot", name.into()).map(Self)
    }

    /// Returns the name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Checks a name that is a path component and a DNS label.
fn checked_label(field: &'static str, name: String) -> Result<String, Error> {
    let expected = if name.is_empty() {
        "a name has at least one character".to_owned()
    } else if name.len() > VmName::MAX_BYTES {
        format!("a name has at most {} bytes, this has {}", VmName::MAX_BYTES, name.len())
    } else if name.starts_with('-') {
        "a name begins with a letter or a digit".to_owned()
    } else if let Some(bad) = name.chars().find(|c| !matches!(c, 'a'..='z' | '0'..='9' | '-')) {
        format!("a name has only a-z, 0-9 and -, not {bad:?}")
    } else {
        return Ok(name);
    };
    Err(Error::invalid(field, shortened(&name), expected))
}

/// The name of an existing network bridge on the host, as the kernel allows it (1 to 15 bytes).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct BridgeName(String);

impl BridgeName {
    /// Checks a bridge's name.
    ///
    /// # Errors
    /// `InvalidInput` when no network interface can have it.
    pub fn new(name: impl Into<String>) -> Result<Self, Error> {
        let name = name.into();
        let fits = (1..=15).contains(&name.len());
        let clean = name.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c));
        if fits && clean && name != "." && name != ".." {
            return Ok(Self(name));
        }
        Err(Error::invalid(
            "network.bridge",
            shortened(&name),
            "a bridge has a name of 1 to 15 letters, digits, dots, dashes or underscores",
        ))
    }

    /// Returns the name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// The name of a data link of an illumos host, such as `net0`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct LinkName(String);

impl LinkName {
    /// The longest name, in bytes.
    pub const MAX_BYTES: usize = 31;

    /// Checks a link's name: a letter first, then letters, digits, `.`, `_` and `-`, a digit last,
    /// at most 31 bytes.
    ///
    /// Source: dladm(8), "Datalink names".
    ///
    /// # Errors
    /// `InvalidInput` for any other text.
    pub fn new(name: impl Into<String>) -> Result<Self, Error> {
        let name = name.into();
        let clean = name.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c));
        let head = name.starts_with(|c: char| c.is_ascii_alphabetic());
        let tail = name.ends_with(|c: char| c.is_ascii_digit());
        if head && clean && tail && name.len() <= Self::MAX_BYTES {
            return Ok(Self(name));
        }
        let (most, bytes) = (Self::MAX_BYTES, name.len());
        let bound = format!(
            "a link has a name of at most {most} letters, digits, dots, dashes or underscores that begins with a letter \
             and ends with a digit; this has {bytes}"
        );
        Err(Error::invalid("network.link", shortened(&name), bound))
    }

    /// Returns the name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// The name of a local user on the host, for QEMU to run as.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct UserName(String);

impl UserName {
    /// Checks a user's name: `[a-z_][a-z0-9_-]{0,31}`, as Debian's adduser takes it.
    ///
    /// # Errors
    /// `InvalidInput` for any other text.
    pub fn new(name: impl Into<String>) -> Result<Self, Error> {
        let name = name.into();
        let head = name.starts_with(|c: char| c.is_ascii_lowercase() || c == '_');
        let clean = name.chars().all(|c| matches!(c, 'a'..='z' | '0'..='9' | '_' | '-'));
        if head && clean && name.len() <= 32 {
            return Ok(Self(name));
        }
        Err(Error::invalid(
            "user",
            shortened(&name),
            "a user has a name of 1 to 32 of a-z, 0-9, _ and -, and begins with a letter or _",
        ))
    }

    /// Returns the name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Cuts a hostile value so that the error about it stays readable.
pub(super) fn shortened(value: &str) -> String {
    const MOST: usize = 80;
    if value.chars().count() <= MOST {
        return value.to_owned();
    }
    value.chars().take(MOST).chain(['…']).collect()
}

macro_rules! text_newtype {
    ($($name:ident),*) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }
        impl FromStr for $name {
            type Err = Error;
            fn from_str(text: &str) -> Result<Self, Error> {
                Self::new(text)
            }
        }
        impl TryFrom<String> for $name {
            type Error = Error;
            fn try_from(text: String) -> Result<Self, Error> {
                Self::new(text)
            }
        }
        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0
            }
        }
    )*};
}

text_newtype!(VmName, SnapshotName, BridgeName, LinkName, UserName);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_link_that_is_too_long_or_ends_in_no_digit_is_refused() {
        for name in ["net", "", "0", "0net0", "net 0", "net0/", &format!("{}0", "n".repeat(31))] {
            let error = LinkName::new(name).unwrap_err().to_string();
            assert!(error.contains("at most 31") && error.contains("ends with a digit"), "{error}");
        }
        for name in ["net0", "ixgbe1", "stub_a.b-c9", &format!("{}0", "n".repeat(30))] {
            LinkName::new(name).unwrap();
        }
    }

    #[test]
    fn hostile_names_are_refused_with_the_reason() {
        for (name, reason) in [
            ("", "at least one"),
            ("a/b", "not '/'"),
            ("..", "not '.'"),
            ("A", "not 'A'"),
            ("-x", "begins with"),
            ("a\0", "not '\\0'"),
            (&"x".repeat(300), "at most 63 bytes, this has 300"),
        ] {
            let error = VmName::new(name).unwrap_err().to_string();
            assert!(error.starts_with("name: ") && error.contains(reason), "{error}");
            let snapshot = SnapshotName::new(name).unwrap_err().to_string();
            assert!(snapshot.starts_with("snapshot: ") && snapshot.contains(reason), "{snapshot}");
            assert!(error.len() < 250, "{error}");
        }
    }

    proptest! {
        #[test]
        fn an_accepted_name_is_one_path_component(name in "\\PC{0,70}") {
            if let Ok(name) = VmName::new(name) {
                let path = std::path::Path::new(name.as_str());
                prop_assert_eq!(path.components().count(), 1);
                prop_assert!(path.file_name().is_some());
            }
        }
    }
}
