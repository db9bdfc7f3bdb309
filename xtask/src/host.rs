//! What the machine that builds is: its distribution.

use std::path::Path;

use crate::error::{PathContext, Result};

/// The distribution, as os-release(5) names it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Distribution {
    /// Such as `debian`.
    pub(crate) id: String,
    /// Such as `bookworm`; empty where there is none.
    pub(crate) codename: String,
    /// Such as `Debian GNU/Linux 12 (bookworm)`.
    pub(crate) pretty_name: String,
}

impl Distribution {
    /// Reads the distribution of this machine.
    pub(crate) fn of_this_machine() -> Result<Self> {
        let path = Path::new("/etc/os-release");
        Ok(Self::parse(&std::fs::read_to_string(path).at("read", path)?))
    }

    /// Returns whether its packages are Debian's or Ubuntu's, by name and by tool.
    pub(crate) fn has_apt(&self) -> bool {
        matches!(self.id.as_str(), "debian" | "ubuntu")
    }

    fn parse(os_release: &str) -> Self {
        let value = |key: &str| {
            let line = os_release.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
            line.unwrap_or_default().trim_matches(['"', '\'']).to_owned()
        };
        Self { id: value("ID"), codename: value("VERSION_CODENAME"), pretty_name: value("PRETTY_NAME") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn os_release_is_read_with_and_without_quotes() {
        let text = "PRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\nVERSION_ID=\"12\"\nVERSION_CODENAME=bookworm\nID=debian\n";
        let distribution = Distribution::parse(text);
        assert_eq!(distribution.id, "debian");
        assert_eq!(distribution.codename, "bookworm");
        assert_eq!(distribution.pretty_name, "Debian GNU/Linux 12 (bookworm)");
        assert!(distribution.has_apt());
    }
}
