//! The options for the login to a guest.

use std::env;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use clap::Args;
use vmkit::Error;
use vmkit::spec::VmName;
use vmkit::ssh::{HostKey, LoginOptions, Session, SshIdentity};

use super::ROOT;
use crate::context::CliManager;
use crate::failure::Failure;
use crate::places::stdin_or;
use crate::values::seconds;

/// How to log in to a guest, and how long that may take.
#[derive(Debug, Args)]
pub(crate) struct SshArgs {
    /// Log in as this user [else: the one that vmkit created].
    #[arg(long, short = 'u', value_name = "USER")]
    user: Option<String>,
    /// Log in with the key in this file [else: the one that vmkit created].
    #[arg(long, short = 'i', value_name = "FILE")]
    identity: Option<PathBuf>,
    /// Log in with the keys of the SSH agent at SSH_AUTH_SOCK.
    #[arg(long, conflicts_with = "identity")]
    ssh_agent: bool,
    /// Accept a server with this host key, given as a line or a file [else: the one that vmkit
    /// created].
    #[arg(long, value_name = "KEY|FILE", conflicts_with = "any_host_key")]
    host_key: Option<String>,
    /// Accept any host key.
    #[arg(long)]
    any_host_key: bool,
    /// Wait this long for a successful login.
    #[arg(long, value_name = "SECONDS", default_value = "120", value_parser = seconds)]
    #[arg(allow_negative_numbers = true)]
    timeout: Duration,
    /// The parsed options, kept because a pipe can be read only once.
    #[arg(skip)]
    read: OnceLock<Box<LoginOptions>>,
}

impl SshArgs {
    /// Returns the options that take precedence over the VM's record.
    ///
    /// # Errors
    /// `InvalidInput` for a key that is missing or can't be used.
    pub(crate) fn login(&self) -> Result<LoginOptions, Error> {
        if let Some(login) = self.read.get() {
            return Ok(LoginOptions::clone(login));
        }
        let login = self.read_login()?;
        Ok(LoginOptions::clone(self.read.get_or_init(|| Box::new(login))))
    }

    fn read_login(&self) -> Result<LoginOptions, Error> {
        let host_key = match &self.host_key {
            None => self.any_host_key.then(HostKey::any),
            Some(line) if line.contains(' ') => Some(HostKey::known(line)?),
            Some(path) => Some(HostKey::read(stdin_or(Path::new(path)))?),
        };
        let identity = match (&self.identity, self.ssh_agent) {
            (Some(path), _) => Some(SshIdentity::read(stdin_or(path))?),
            (None, true) => Some(ssh_agent()?),
            (None, false) => None,
        };
        Ok(LoginOptions { user: self.user.clone(), identity, host_key })
    }

    /// Logs in.
    ///
    /// # Errors
    /// Those of [`login`](Self::login) and of the manager.
    pub(crate) async fn session(&self, manager: &CliManager, name: &VmName) -> Result<Session, Failure> {
        let error = match manager.ssh_session(name, &self.login()?, self.timeout).await {
            Ok(session) => return Ok(session),
            Err(error) => error,
        };
        let hint = match &error {
            Error::LoginRefused { .. } => self.other_login(manager, name).await,
            _ => None,
        };
        let failure = Failure::from(error);
        Err(match hint {
            Some(hint) => Failure::Hinted { failure: Box::new(failure), hint },
            None => failure,
        })
    }

    /// Returns the user that vmkit can log in as, if another one was requested and refused.
    async fn other_login(&self, manager: &CliManager, name: &VmName) -> Option<String> {
        let vm = manager.info(name).await.ok()?;
        let own = &vm.spec.cloud_init()?.access.as_ref()?.user;
        let has_key = self.identity.is_some() || self.ssh_agent;
        match &self.user {
            _ if has_key => {
                Some(format!("with its own key vmkit logs in as `{own}`: omit the key and the user"))
            }
            // Errors about root have a hint of their own.
            Some(user) if user != own && user != ROOT => Some(format!(
                "with its own key vmkit logs in as `{own}` only: `vmkit exec {name} -- sudo -u {user} \
                 COMMAND` runs a command as \
                 `{user}`; --identity passes a key of that user"
            )),
            _ => None,
        }
    }

    /// Returns a given option of the login with its value: the guest agent has no logins.
    pub(crate) fn asked(&self) -> Option<(&'static str, String)> {
        let user = self.user.as_ref().map(|user| ("user", user.clone()));
        let identity = self.identity.as_ref().map(|path| ("identity", path.display().to_string()));
        let host_key = self.host_key.as_ref().map(|key| ("host-key", key.clone()));
        let agent = self.ssh_agent.then(|| ("ssh-agent", "true".to_owned()));
        user.or(identity).or(agent).or(host_key)
    }

    /// Returns the timeout.
    pub(crate) fn timeout(&self) -> Duration {
        self.timeout
    }
}

fn ssh_agent() -> Result<SshIdentity, Error> {
    let socket = env::var_os("SSH_AUTH_SOCK").filter(|socket| !socket.is_empty());
    let expected = "SSH_AUTH_SOCK names no SSH agent: start one with `eval $(ssh-agent)` and `ssh-add`";
    socket.map(SshIdentity::agent).ok_or_else(|| Error::invalid("ssh-agent", "true", expected))
}
