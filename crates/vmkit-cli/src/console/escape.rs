//! The key that leaves a console: [`EscapeKey`].

use std::fmt;
use std::str::FromStr;

use vmkit::Error;

/// The variable that names it where no option does.
pub(crate) const VARIABLE: &str = "VMKIT_ESCAPE";

/// A key with Ctrl held, or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct EscapeKey(Option<u8>);

impl Default for EscapeKey {
    /// Returns Ctrl-].
    fn default() -> Self {
        Self(Some(0x1d))
    }
}

impl EscapeKey {
    /// Returns the byte that a terminal sends for it.
    pub(super) fn byte(self) -> Option<u8> {
        self.0
    }
}

impl FromStr for EscapeKey {
    type Err = Error;

    /// Parses `^A`, `ctrl-a` or `C-a`, and `none`.
    ///
    /// # Errors
    /// `InvalidInput` on `escape`.
    fn from_str(text: &str) -> Result<Self, Error> {
        let lower = text.to_ascii_lowercase();
        if lower == "none" {
            return Ok(Self(None));
        }
        let prefixes = ["^", "ctrl-", "ctrl+", "c-"];
        let key = prefixes.iter().find_map(|prefix| lower.strip_prefix(prefix)).map(str::as_bytes);
        match key {
            Some([key @ (b'a'..=b'z' | b'[' | b'\\' | b']' | b'^' | b'_')]) => Ok(Self(Some(key & 0x1f))),
            _ => {
                let value: String = text.chars().take(40).collect();
                let expected =
                    "write ^ or ctrl- and a letter or one of [ \\ ] ^ _, such as ^A or ctrl-a; or none";
                Err(Error::invalid("escape", value, expected))
            }
        }
    }
}

impl fmt::Display for EscapeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(byte) => write!(f, "Ctrl-{} detaches", char::from(byte | 0x40)),
            None => f.write_str("no key detaches: end vmkit with a signal"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_written_as_virsh_or_ssh_or_a_person_writes_it() {
        for (text, byte, said) in [
            ("^]", Some(0x1d), "Ctrl-] detaches"),
            ("^A", Some(1), "Ctrl-A detaches"),
            ("ctrl-a", Some(1), "Ctrl-A detaches"),
            ("Ctrl-_", Some(0x1f), "Ctrl-_ detaches"),
            ("C-^", Some(0x1e), "Ctrl-^ detaches"),
            ("none", None, "no key detaches: end vmkit with a signal"),
        ] {
            let key: EscapeKey = text.parse().unwrap();
            assert_eq!((key.byte(), key.to_string().as_str()), (byte, said), "{text}");
        }
        assert_eq!(EscapeKey::default(), "^]".parse().unwrap());
        for text in ["", "a", "^", "^1", "ctrl-", "ctrl-ä", "^AB", "F1"] {
            let error = text.parse::<EscapeKey>().unwrap_err().to_string();
            assert!(error.starts_with("escape: ") && error.contains("^A or ctrl-a"), "{error}");
        }
    }
}
