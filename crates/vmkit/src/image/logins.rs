//! The logins for registries: those that were given, those in files, and those of credential
//! helpers.
//!
//! Edge: files and programs.

use std::ffi::OsStr;
use std::path::PathBuf;

use super::credential_helper::CredentialProgram;
use super::credentials::{RegistryCredentials, RegistryLogin};
use super::files::read_bytes;
use super::reference::OciRef;
use crate::error::{ErrorKind, Result};

/// The sources of logins for registries.
#[derive(Debug, Clone, Default)]
pub(super) struct RegistryLogins {
    /// Logins that were given directly; they take precedence.
    pub(super) credentials: RegistryCredentials,
    /// The first one that exists is read.
    pub(super) files: Vec<PathBuf>,
    /// The directories of the credential helpers; without them no helper is run.
    helper_path: Option<Vec<PathBuf>>,
}

impl RegistryLogins {
    /// Sets the directories of the credential helpers, in the form of `PATH`.
    pub(super) fn set_helper_path(&mut self, path: &OsStr) {
        self.helper_path = Some(std::env::split_paths(path).collect());
    }

    /// Returns the login for the registry of an image: the credential helper's, else the one in a
    /// file.
    ///
    /// # Errors
    /// `InvalidInput` on `registry credentials` for a file of another format; `Io` for one that
    /// can't be read; `Host` and `TimedOut` for a helper that does not reply. A helper that is not
    /// installed causes only a warning.
    pub(super) async fn login(&self, image: &OciRef) -> Result<Option<RegistryLogin>> {
        let (credentials, registry) = (self.written_down()?, image.registry());
        if let (Some(path), Some(name)) = (&self.helper_path, credentials.helper(registry)) {
            match CredentialProgram::find(name, path, registry) {
                Ok(helper) => {
                    if let Some(login) = helper.login(registry).await? {
                        return Ok(Some(login));
                    }
                }
                // The configuration refers to a helper that was uninstalled. Most images need no
                // login; a registry that requires one reports it.
                Err(error) if error.kind() == ErrorKind::Host => {
                    tracing::warn!(%error, "going on without a login");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(credentials.written_down(image))
    }

    /// Returns the logins that were given, else those in a file.
    fn written_down(&self) -> Result<RegistryCredentials> {
        if !self.credentials.is_empty() {
            return Ok(self.credentials.clone());
        }
        for path in &self.files {
            if let Some(bytes) = read_bytes(path)? {
                return RegistryCredentials::from_file(path, &bytes);
            }
        }
        Ok(RegistryCredentials::default())
    }
}
