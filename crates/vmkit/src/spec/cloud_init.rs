//! What cloud-init in the guest is told.
//!
//! Pure. How it is rendered and where it lies is `crate::cloud_init`'s business.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The seed that cloud-init finds at its first boot (NoCloud).
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CloudInitConfig {
    /// The guest's host name; the VM's name where none is given.
    pub hostname: Option<String>,
    /// What the guest shall become.
    pub user_data: UserData,
    /// A network-config (version 1 or 2) in cloud-init's own words; DHCP on the first device where none is given.
    pub network_config: Option<String>,
    /// Counts up to make cloud-init run again: it is part of the instance-id.
    pub run: u32,
}

/// The user-data, typed or raw.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum UserData {
    /// Fields that vmkit writes as cloud-config.
    Typed(CloudConfig),
    /// Text that goes in as it is: cloud-config, a script, or MIME parts.
    Raw(String),
}

impl Default for UserData {
    fn default() -> Self {
        UserData::Typed(CloudConfig::default())
    }
}

/// The typed part of cloud-config.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CloudConfig {
    /// Users to make. The image's own default user stays.
    pub users: Vec<User>,
    /// Packages to install.
    pub packages: Vec<String>,
    /// Files to write, in order.
    pub files: Vec<GuestFile>,
    /// Commands to run once at the first boot, in order; each is a program and its arguments, no shell between.
    pub commands: Vec<Vec<String>>,
    /// An Ed25519 host key for the guest's SSH server, so that it makes none and its identity is known beforehand.
    pub ssh_host_key: Option<SshHostKey>,
}

/// A user of the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct User {
    /// The login name.
    pub name: String,
    /// Public keys that may log in, one `ssh-…` line each.
    #[serde(default)]
    pub ssh_keys: Vec<String>,
    /// Whether the user may become root without a password.
    #[serde(default)]
    pub sudo: bool,
    /// The login shell; `/bin/bash` where none is given.
    #[serde(default)]
    pub shell: Option<String>,
}

/// A file of the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestFile {
    /// The absolute path in the guest.
    pub path: PathBuf,
    /// What is in it.
    pub content: String,
    /// Its permission bits, such as `0o644`.
    #[serde(default = "default_mode")]
    pub mode: u32,
    /// `USER:GROUP`; root's where none is given.
    #[serde(default)]
    pub owner: Option<String>,
}

fn default_mode() -> u32 {
    0o644
}

/// A host key pair of the guest's SSH server.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SshHostKey {
    /// The private key in OpenSSH's format.
    pub private: String,
    /// The public key, one `ssh-ed25519 …` line.
    pub public: String,
}

impl std::fmt::Debug for SshHostKey {
    /// Shows the public half only: a private key has no place in a log.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SshHostKey").field("public", &self.public).finish_non_exhaustive()
    }
}
