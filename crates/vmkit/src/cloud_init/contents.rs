//! What a seed holds: [`Seed`].
//!
//! Pure.

use std::fmt;

/// The documents that cloud-init reads from a NoCloud seed.
#[derive(Clone, PartialEq, Eq)]
pub struct Seed {
    /// What the guest shall become.
    pub user_data: String,
    /// Which instance this is, and its name.
    pub meta_data: String,
    /// How its network is set up.
    pub network_config: String,
}

impl fmt::Debug for Seed {
    /// Shows lengths only: user-data may hold a private key, which has no place in a log.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Seed")
            .field("user_data_bytes", &self.user_data.len())
            .field("meta_data_bytes", &self.meta_data.len())
            .field("network_config_bytes", &self.network_config.len())
            .finish()
    }
}

#[cfg(all(target_os = "linux", feature = "qemu"))]
impl Seed {
    /// Returns the documents, each with the name of its file.
    pub(crate) fn documents(&self) -> [(&'static str, &str); 3] {
        [
            ("user-data", &self.user_data),
            ("meta-data", &self.meta_data),
            ("network-config", &self.network_config),
        ]
    }
}
