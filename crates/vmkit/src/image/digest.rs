//! Checksums, and hashing.
//!
//! Pure.

use std::fmt;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256, Sha512};

/// The checksum of a file's bytes.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest {
    algorithm: DigestAlgorithm,
    hex: String,
}

/// The algorithm of a checksum.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DigestAlgorithm {
    /// SHA-256.
    Sha256,
    /// SHA-512.
    Sha512,
}

impl DigestAlgorithm {
    /// Returns the algorithm of this name, such as `sha256` or `SHA512`.
    pub fn named(name: &str) -> Option<Self> {
        match name.to_ascii_lowercase().as_str() {
            "sha256" => Some(Self::Sha256),
            "sha512" => Some(Self::Sha512),
            _ => None,
        }
    }

    /// Returns how many hexadecimal digits a checksum has.
    pub fn hex_digits(self) -> usize {
        match self {
            Self::Sha256 => 64,
            Self::Sha512 => 128,
        }
    }
}

impl fmt::Display for DigestAlgorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Sha256 => "sha256",
            Self::Sha512 => "sha512",
        })
    }
}

impl Digest {
    /// Returns the checksum of these digits; `kind` is the algorithm's name. `None` for anything
    /// but a whole checksum.
    pub fn new(kind: &str, hex: &str) -> Option<Self> {
        let algorithm = DigestAlgorithm::named(kind)?;
        let is_whole =
            hex.len() == algorithm.hex_digits() && hex.bytes().all(|byte| byte.is_ascii_hexdigit());
        is_whole.then(|| Self { algorithm, hex: hex.to_ascii_lowercase() })
    }

    /// Returns the checksum of these digits; their number determines the algorithm.
    pub fn of_hex(hex: &str) -> Option<Self> {
        ["sha256", "sha512"].into_iter().find_map(|kind| Self::new(kind, hex))
    }

    /// Returns the algorithm.
    pub fn algorithm(&self) -> DigestAlgorithm {
        self.algorithm
    }

    /// Returns the checksum in lower-case hexadecimal digits.
    pub fn hex(&self) -> &str {
        &self.hex
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.algorithm, self.hex)
    }
}

impl TryFrom<String> for Digest {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let digest = text.split_once(':').and_then(|(kind, hex)| Self::new(kind, hex));
        digest.ok_or_else(|| format!("{text:?} is not a checksum such as sha256:HEX"))
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> String {
        digest.to_string()
    }
}

/// Hashes bytes as they are received.
#[derive(Clone)]
pub(crate) enum Hasher {
    Sha256(Sha256),
    Sha512(Sha512),
}

impl Hasher {
    pub(crate) fn new(algorithm: DigestAlgorithm) -> Self {
        match algorithm {
            DigestAlgorithm::Sha256 => Self::Sha256(Sha256::new()),
            DigestAlgorithm::Sha512 => Self::Sha512(Sha512::new()),
        }
    }

    pub(crate) fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hasher) => hasher.update(bytes),
            Self::Sha512(hasher) => hasher.update(bytes),
        }
    }

    pub(crate) fn finish(self) -> Digest {
        match self {
            Self::Sha256(hasher) => {
                Digest { algorithm: DigestAlgorithm::Sha256, hex: hex(&hasher.finalize()) }
            }
            Self::Sha512(hasher) => {
                Digest { algorithm: DigestAlgorithm::Sha512, hex: hex(&hasher.finalize()) }
            }
        }
    }

    /// Returns the checksum of these bytes.
    pub(crate) fn digest(algorithm: DigestAlgorithm, bytes: &[u8]) -> Digest {
        let mut hasher = Self::new(algorithm);
        hasher.update(bytes);
        hasher.finish()
    }
}

/// Writes bytes as lower-case hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digit = |value: u8| char::from(DIGITS[usize::from(value)]);
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_bytes_have_their_known_checksums() {
        let sha256 = Hasher::digest(DigestAlgorithm::Sha256, b"abc");
        assert_eq!(sha256.hex(), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        let sha512 = Hasher::digest(DigestAlgorithm::Sha512, b"abc");
        assert!(sha512.hex().starts_with("ddaf35a193617abacc417349ae204131"), "{sha512}");
        assert_eq!(Digest::of_hex(sha512.hex()), Some(sha512));
    }

    #[test]
    fn only_whole_checksums_are_checksums() {
        let whole = "A".repeat(64);
        assert_eq!(Digest::new("SHA256", &whole).unwrap().to_string(), format!("sha256:{}", "a".repeat(64)));
        for (kind, hex) in [("sha256", &whole[1..]), ("sha512", &whole), ("md5", &whole), ("sha256", "")] {
            assert_eq!(Digest::new(kind, hex), None, "{kind} {hex}");
        }
        assert_eq!(Digest::of_hex(&"g".repeat(64)), None);
    }
}
