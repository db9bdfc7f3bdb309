//! The login: by a key that is at hand, or by those of an SSH agent.

use std::path::Path;
use std::sync::Arc;

use russh::AgentAuthError;
use russh::client::{AuthResult, Handle};
use russh::keys::agent::AgentIdentity;
use russh::keys::agent::client::AgentClient;
use russh::keys::{Algorithm, HashAlg, PrivateKeyWithHashAlg, PublicKey};

use super::SshTarget;
use super::keys::LoginKeys;
use super::verifier::ServerVerifier;

/// How many keys of an agent are tried: OpenSSH's server breaks off at the sixth that it does not
/// take (`MaxAuthTries`).
const MOST_KEYS: usize = 5;

/// Why no login came about.
pub(super) enum LoginFailure {
    /// The connection to the guest.
    Session(russh::Error),
    /// The agent of this host.
    Agent { problem: &'static str, source: Option<russh::keys::Error> },
}

impl LoginFailure {
    fn agent(problem: &'static str, source: russh::keys::Error) -> Self {
        LoginFailure::Agent { problem, source: Some(source) }
    }
}

impl From<russh::Error> for LoginFailure {
    fn from(error: russh::Error) -> Self {
        LoginFailure::Session(error)
    }
}

/// Logs in, and returns what the server said to the last key.
pub(super) async fn log_in(
    handle: &mut Handle<ServerVerifier>,
    target: &SshTarget,
) -> Result<AuthResult, LoginFailure> {
    match &target.identity.keys {
        LoginKeys::Own(key) => {
            let hash = hash(handle, &key.algorithm()).await?;
            let key = PrivateKeyWithHashAlg::new(Arc::clone(key), hash);
            Ok(handle.authenticate_publickey(&target.user, key).await?)
        }
        LoginKeys::Agent(socket) => by_agent(handle, &target.user, socket).await,
    }
}

async fn by_agent(
    handle: &mut Handle<ServerVerifier>,
    user: &str,
    socket: &Path,
) -> Result<AuthResult, LoginFailure> {
    let failed = |error: russh::keys::Error| LoginFailure::agent("it does not reply", error);
    let mut agent = AgentClient::connect_uds(socket).await.map_err(failed)?;
    let keys: Vec<PublicKey> =
        agent.request_identities().await.map_err(failed)?.into_iter().filter_map(plain).collect();
    let mut last = None;
    for key in keys.into_iter().take(MOST_KEYS) {
        let hash = hash(handle, &key.algorithm()).await?;
        let answer = handle.authenticate_publickey_with(user, key, hash, &mut agent).await;
        match answer {
            Ok(AuthResult::Failure { remaining_methods, partial_success })
                if !remaining_methods.is_empty() =>
            {
                last = Some(AuthResult::Failure { remaining_methods, partial_success });
            }
            Ok(answer) => return Ok(answer),
            Err(AgentAuthError::Send(_)) => return Err(LoginFailure::Session(russh::Error::SendError)),
            Err(AgentAuthError::Key(error)) => {
                return Err(LoginFailure::agent("it does not sign", error));
            }
        }
    }
    let problem = "it has no keys: `ssh-add` gives it one";
    last.ok_or(LoginFailure::Agent { problem, source: None })
}

/// Returns the key, unless it comes with a certificate: vmkit signs none for a guest.
fn plain(identity: AgentIdentity) -> Option<PublicKey> {
    match identity {
        AgentIdentity::PublicKey { key, .. } => Some(key),
        AgentIdentity::Certificate { .. } => None,
    }
}

/// Returns what a signature by this kind of key is made with, where there is a choice: what the
/// server knows, SHA-256 where it does not say.
async fn hash(handle: &Handle<ServerVerifier>, kind: &Algorithm) -> Result<Option<HashAlg>, russh::Error> {
    match kind {
        Algorithm::Rsa { .. } => Ok(handle.best_supported_rsa_hash().await?.unwrap_or(Some(HashAlg::Sha256))),
        _ => Ok(None),
    }
}
