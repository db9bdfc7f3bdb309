//! The way into a guest, as it can be typed.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use vmkit::Error;
use vmkit::spec::VmName;
use vmkit::ssh::{HostKey, Identity, Login, Session};

use crate::arguments::seconds;
use crate::context::Manager;

/// Who logs in to a guest, and how long that may take.
#[derive(Debug, Args)]
pub(crate) struct Way {
    /// Logs in as this user [else: the one that vmkit made].
    #[arg(long, short = 'u', value_name = "USER")]
    user: Option<String>,
    /// Logs in with the key in this file [else: the one that vmkit made].
    #[arg(long, short = 'i', value_name = "FILE")]
    identity: Option<PathBuf>,
    /// Believes a server with this host key, given as a line or a file [else: the one that vmkit made].
    #[arg(long, value_name = "KEY|FILE", conflicts_with = "any_host_key")]
    host_key: Option<String>,
    /// Believes whoever answers.
    #[arg(long)]
    any_host_key: bool,
    /// Waits so long until the guest lets one in.
    #[arg(long, value_name = "SECONDS", default_value = "120", value_parser = seconds)]
    #[arg(allow_negative_numbers = true)]
    timeout: Duration,
}

impl Way {
    /// Answers what goes before the VM's record.
    ///
    /// # Errors
    /// `InvalidInput` for a key that is missing or can't be used.
    pub(crate) fn login(&self) -> Result<Login, Error> {
        let host_key = match &self.host_key {
            None => self.any_host_key.then(HostKey::any),
            Some(line) if line.contains(' ') => Some(HostKey::known(line)?),
            Some(path) => {
                let text = fs::read_to_string(path).map_err(Error::io("read", path))?;
                Some(HostKey::known(text.lines().next().unwrap_or_default())?)
            }
        };
        let identity = self.identity.as_deref().map(|path: &Path| Identity::read(path)).transpose()?;
        Ok(Login { user: self.user.clone(), identity, host_key })
    }

    /// Logs in.
    ///
    /// # Errors
    /// Those of [`login`](Self::login) and of the manager.
    pub(crate) async fn session(&self, manager: &Manager, name: &VmName) -> Result<Session, Error> {
        manager.ssh_session(name, &self.login()?, self.timeout).await
    }

    /// Answers how long it may take.
    pub(crate) fn timeout(&self) -> Duration {
        self.timeout
    }
}
