//! Sizes with their unit in the type.
//!
//! Pure.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::Error;

/// A number of mebibytes (2^20 bytes), never zero.
///
/// Its text is `512MiB`, `2GiB`, `1TiB`, the same with `M`, `G`, `T` as QEMU has them, or a bare
/// number of MiB; in data it is a number of MiB or such a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "MibText", into = "u64")]
pub struct Mib(u64);

#[derive(Deserialize)]
#[serde(untagged)]
enum MibText {
    Number(u64),
    Text(String),
}

impl Mib {
    /// The largest size: 1 EiB, so that bytes always fit 63 bits.
    pub const MAX: Mib = Mib(1 << 40);

    /// The smallest number that is read as MiB without saying so: who writes `4` means something
    /// else.
    pub(crate) const LEAST_BARE: u64 = 64;

    /// Creates a size of so many MiB.
    ///
    /// # Errors
    /// `InvalidInput` for 0 and for more than [`Mib::MAX`].
    pub fn new(mib: u64) -> Result<Self, Error> {
        if (1..=Self::MAX.0).contains(&mib) {
            Ok(Self(mib))
        } else {
            Err(Error::invalid("size", mib, format!("a size is 1 to {} MiB", Self::MAX.0)))
        }
    }

    /// Returns the number of MiB.
    pub const fn mib(self) -> u64 {
        self.0
    }

    /// Returns the number of bytes.
    pub const fn bytes(self) -> u64 {
        self.0 << 20
    }

    /// Returns the smallest size that holds so many bytes, at least 1 MiB.
    pub fn holding(bytes: u64) -> Self {
        Self(bytes.div_ceil(1 << 20).clamp(1, Self::MAX.0))
    }
}

impl FromStr for Mib {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let refused = |why: &str| {
            let value: String = text.chars().take(40).collect();
            Error::invalid(
                "size",
                value,
                format!("{why}; write 512MiB, 2GiB or a bare number of MiB, from 64 on"),
            )
        };
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        if number.is_empty() {
            return Err(refused("a size begins with a number"));
        }
        let factor: u64 = match unit {
            "" | "MiB" | "M" => 1,
            "GiB" | "G" => 1 << 10,
            "TiB" | "T" => 1 << 20,
            _ if unit.starts_with('.') => return Err(refused("a size is a whole number")),
            _ => {
                return Err(refused(&format!(
                    "unknown unit {:?}",
                    unit.chars().take(20).collect::<String>()
                )));
            }
        };
        let mib = number.parse::<u64>().ok().and_then(|n| n.checked_mul(factor));
        match mib {
            Some(0) => Err(refused("a size is at least 1 MiB")),
            Some(mib) if unit.is_empty() && mib < Self::LEAST_BARE => Err(refused(&format!(
                "without a unit this is {mib} MiB, and {mib}GiB or {mib}MiB says what is meant"
            ))),
            Some(mib) if mib <= Self::MAX.0 => Ok(Self(mib)),
            _ => Err(refused(&format!("a size is at most {} MiB", Self::MAX.0))),
        }
    }
}

impl TryFrom<MibText> for Mib {
    type Error = Error;

    fn try_from(text: MibText) -> Result<Self, Error> {
        match text {
            MibText::Number(mib) => Mib::new(mib),
            MibText::Text(text) => text.parse(),
        }
    }
}

impl From<Mib> for u64 {
    fn from(size: Mib) -> u64 {
        size.0
    }
}

impl fmt::Display for Mib {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_multiple_of(1024) {
            write!(f, "{}GiB", self.0 / 1024)
        } else {
            write!(f, "{}MiB", self.0)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_are_read_with_their_units() {
        for (text, mib) in [("512MiB", 512), ("2GiB", 2048), ("2G", 2048), ("1TiB", 1 << 20), ("300", 300)] {
            assert_eq!(text.parse::<Mib>().unwrap().mib(), mib);
        }
    }

    #[test]
    fn rubbish_sizes_are_refused_with_what_would_be_right() {
        for text in ["0", "", "4 GB?", "4GB", "-1", "1.5GiB", "99999999999999999999", "MiB", "9999999TiB"] {
            let error = text.parse::<Mib>().unwrap_err().to_string();
            assert!(error.contains("write 512MiB"), "{text}: {error}");
        }
    }

    #[test]
    fn a_small_number_needs_a_unit() {
        let error = "4".parse::<Mib>().unwrap_err().to_string();
        assert!(
            error.contains("without a unit this is 4 MiB, and 4GiB or 4MiB says what is meant"),
            "{error}"
        );
        assert_eq!("4MiB".parse::<Mib>().unwrap().mib(), 4);
        assert_eq!("64".parse::<Mib>().unwrap().mib(), 64);
    }

    proptest! {
        #[test]
        fn a_size_survives_its_text(mib in 1u64..=Mib::MAX.mib()) {
            let size = Mib::new(mib).unwrap();
            prop_assert_eq!(size.to_string().parse::<Mib>().unwrap(), size);
        }
    }
}
