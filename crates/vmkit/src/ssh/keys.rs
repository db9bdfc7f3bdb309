//! The keys of both sides: generated, read from files, compared.

use std::fmt;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use russh::keys::key::safe_rng;
use russh::keys::ssh_key::{self, LineEnding};
use russh::keys::{Algorithm, HashAlg, PrivateKey, PublicKey, decode_secret_key};

use crate::error::{Error, Result};
use crate::input_file::InputStream;
use crate::spec::claims::ClaimedHostKey;
use crate::spec::{CloudInitConfig, GuestAccess, SshKeyPair, UserData, UserName, free_login};

/// The largest size of a file with one private key, in bytes.
const MOST_KEY_BYTES: u64 = 64 * 1024;

impl GuestAccess {
    /// Generates vmkit's own login for a new guest: a login key and a host key, both Ed25519.
    ///
    /// # Errors
    /// `Host` if the system has no random numbers.
    pub fn generate(user: impl Into<String>) -> Result<Self> {
        Ok(Self { user: user.into(), login_key: new_pair("vmkit")?, host_key: new_pair("")? })
    }
}

impl GuestAccess {
    /// Creates vmkit's own login for a new guest with this config, whose image has the user `own`.
    ///
    /// The user is the image's own, or one of another name if the user-data configures that one. An
    /// Ed25519 host key in the user-data is then the expected one.
    ///
    /// # Errors
    /// `InvalidInput` on `user_data` for raw text that no login can be merged with, with its line;
    /// `Host` if the system has no random numbers.
    pub fn beside(config: &CloudInitConfig, own: Option<&UserName>) -> Result<Self> {
        let (user, _) = free_login(&config.user_data, own.map(UserName::as_str))?;
        Self::of_user(user, config)
    }

    /// Creates vmkit's own login for a new guest with this config, as a user of this name.
    ///
    /// # Errors
    /// As [`beside`](Self::beside). [`CloudInitConfig::check`] checks whether the name is free.
    pub fn of_user(user: impl Into<String>, config: &CloudInitConfig) -> Result<Self> {
        let mut access = Self::generate(user)?;
        let (_, claimed) = free_login(&config.user_data, None)?;
        match (&config.user_data, claimed) {
            (UserData::Typed(typed), _) => {
                access.host_key = typed.ssh_host_key.clone().unwrap_or(access.host_key)
            }
            (_, Some(key)) => access.host_key = adopted(&key)?,
            _ => {}
        }
        Ok(access)
    }
}

/// Returns the pair of a host key that raw user-data sets.
fn adopted(claimed: &ClaimedHostKey) -> Result<SshKeyPair> {
    let refused = |key: &str, why: &str| {
        let expected = format!("line {}: `{key}` {why}", claimed.line);
        Error::invalid("user_data", "ssh_keys", expected)
    };
    let private = |why: &str| refused("ssh_keys.ed25519_private", why);
    let key = match decode_secret_key(&claimed.private, None) {
        Ok(key) if key.is_encrypted() => return Err(private(ENCRYPTED)),
        Err(russh::keys::Error::KeyIsEncrypted) => return Err(private(ENCRYPTED)),
        Err(_) => {
            return Err(private(
                "is not a readable private key: pass the whole file that `ssh-keygen` writes",
            ));
        }
        Ok(key) => key,
    };
    if key.algorithm() != Algorithm::Ed25519 {
        let why = format!("is a key of the kind {}: use an Ed25519 key", key.algorithm().as_str());
        return Err(private(&why));
    }
    let known = claimed.public.as_deref().map(|line| PublicKey::from_openssh(line.trim()));
    match known {
        Some(Ok(public)) if public.key_data() != key.public_key().key_data() => {
            Err(refused("ssh_keys.ed25519_public", "is not the public half of `ed25519_private`"))
        }
        Some(Err(_)) => {
            Err(refused("ssh_keys.ed25519_public", "is not a public key: write `ssh-ed25519 AAAA...`"))
        }
        _ => {
            let failed = |error: ssh_key::Error| private(&error.to_string());
            let public = key.public_key().to_openssh().map_err(failed)?;
            Ok(SshKeyPair { private: claimed.private.clone(), public })
        }
    }
}

const ENCRYPTED: &str =
    "is protected by a passphrase, and an SSH server can't ask for one: use a key without one";

fn new_pair(comment: &str) -> Result<SshKeyPair> {
    let failed =
        |error: ssh_key::Error| Error::host("a new SSH key", "it can't be created").with_source(error);
    let mut key = PrivateKey::random(&mut safe_rng(), Algorithm::Ed25519).map_err(failed)?;
    key.set_comment(comment);
    Ok(SshKeyPair {
        private: key.to_openssh(LineEnding::LF).map_err(failed)?.to_string(),
        public: key.public_key().to_openssh().map_err(failed)?,
    })
}

/// The keys for a login: a private key, or those of an SSH agent.
#[derive(Clone)]
pub struct SshIdentity {
    pub(super) keys: LoginKeys,
    origin: String,
}

/// The source of the keys.
#[derive(Clone)]
pub(super) enum LoginKeys {
    /// A private key.
    Own(Arc<PrivateKey>),
    /// The keys of the agent at this socket, which never leave it.
    Agent(PathBuf),
}

impl SshIdentity {
    /// Parses the key of a VM's record.
    ///
    /// # Errors
    /// `InvalidInput` for a text that is no private key, or one with a passphrase.
    pub fn of(pair: &SshKeyPair) -> Result<Self> {
        Self::parse(&pair.private, "the key in the VM's record")
    }

    /// Returns the keys of the SSH agent at this socket, the value of `SSH_AUTH_SOCK`; it is not
    /// contacted yet.
    pub fn agent(socket: impl Into<PathBuf>) -> Self {
        let socket = socket.into();
        Self { origin: format!("the SSH agent at {}", socket.display()), keys: LoginKeys::Agent(socket) }
    }

    /// Reads the key in a file, as `ssh -i` does.
    ///
    /// # Errors
    /// `InvalidInput` on `identity` for a file that is missing, can be read by other users, is
    /// protected by a passphrase, or has no private key of a supported kind.
    pub fn read(path: &Path) -> Result<Self> {
        let refused = |why: String| Error::invalid("identity", path.display(), why);
        let input = InputStream::open("identity", path)?;
        let mode = input.file.metadata().map_err(Error::io("examine", path))?.mode() & 0o777;
        if mode & 0o077 != 0 {
            let why = format!("others may use this key too (its mode is {mode:04o}): `chmod 600` it");
            return Err(refused(why));
        }
        if let Some(bytes) = input.bytes.filter(|bytes| *bytes > MOST_KEY_BYTES) {
            return Err(refused(format!("this is not a key: it has {bytes} bytes")));
        }
        let mut text = String::new();
        let read = input.file.take(MOST_KEY_BYTES).read_to_string(&mut text);
        read.map_err(|_| refused("this is not a private key: it is not text".to_owned()))?;
        Self::parse(&text, &path.display().to_string())
    }

    fn parse(text: &str, origin: &str) -> Result<Self> {
        let refused = |why: &str| Error::invalid("identity", origin, why);
        let key = match decode_secret_key(text, None) {
            Ok(key) if key.is_encrypted() => return Err(refused(PASSPHRASE)),
            Ok(key) => key,
            Err(russh::keys::Error::KeyIsEncrypted) => return Err(refused(PASSPHRASE)),
            Err(_) if PublicKey::from_openssh(text.trim()).is_ok() => {
                return Err(refused("this is the public half: pass the private one"));
            }
            Err(russh::keys::Error::UnsupportedKeyType { key_type_string, .. }) => {
                return Err(refused(&unsupported(&key_type_string)));
            }
            Err(_) => return Err(refused("this is not a readable private key")),
        };
        if key.algorithm() == Algorithm::Dsa {
            return Err(refused(&unsupported(key.algorithm().as_str())));
        }
        Ok(Self { keys: LoginKeys::Own(Arc::new(key)), origin: origin.to_owned() })
    }

    /// Returns the fingerprint of the key's public half, such as `SHA256:…`; none for an agent,
    /// which may have several keys.
    pub fn fingerprint(&self) -> Option<String> {
        match &self.keys {
            LoginKeys::Own(key) => Some(key.fingerprint(HashAlg::Sha256).to_string()),
            LoginKeys::Agent(_) => None,
        }
    }

    pub(super) fn origin(&self) -> &str {
        &self.origin
    }

    /// Returns the keys' name for errors.
    pub(super) fn described(&self) -> String {
        match self.fingerprint() {
            Some(fingerprint) => format!("the key {fingerprint}"),
            None => format!("any key of {}", self.origin),
        }
    }
}

fn unsupported(kind: &str) -> String {
    format!("{kind} keys are not supported: use an Ed25519 key")
}

const PASSPHRASE: &str = "it is protected by a passphrase, and vmkit can't ask for it: use a key without one, or remove the passphrase of a copy with `ssh-keygen -p`";

impl fmt::Debug for SshIdentity {
    /// Shows which key it is, without the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({}, {})", self.origin, self.fingerprint().unwrap_or_default())
    }
}

/// The host keys that are accepted from an SSH server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostKey(Option<PublicKey>);

impl HostKey {
    /// Accepts only this key of the server: a line such as `ssh-ed25519 AAAA…`.
    ///
    /// # Errors
    /// `InvalidInput` on `host_key` for a text that is no public key.
    pub fn known(line: &str) -> Result<Self> {
        let key = PublicKey::from_openssh(line.trim()).map_err(|_| {
            let shown: String = line.trim().chars().take(40).collect();
            Error::invalid(
                "host_key",
                shown,
                "this is not a public key (expected one line, `ssh-ed25519 AAAA…`)",
            )
        })?;
        Ok(Self(Some(key)))
    }

    /// Reads the key from a file's first line, as `ssh-keygen` writes the public half of one.
    ///
    /// # Errors
    /// `InvalidInput` on `host-key` for a file that is missing, can't be read, or has no public key
    /// there.
    pub fn read(path: &Path) -> Result<Self> {
        let refused = |why: &str| Error::invalid("host-key", path.display(), why);
        let input = InputStream::open("host-key", path)?;
        let mut text = String::new();
        let read = input.file.take(MOST_KEY_BYTES).read_to_string(&mut text);
        read.map_err(|_| refused("this is not a public key: it is not text"))?;
        Self::known(text.lines().next().unwrap_or_default()).map_err(|error| match error {
            Error::Invalid { expected, .. } => refused(&expected),
            error => error,
        })
    }

    /// Accepts any key of the server, even that of an attacker in its place.
    pub fn any() -> Self {
        Self(None)
    }

    /// Returns the fingerprint of the known key.
    pub fn fingerprint(&self) -> Option<String> {
        self.0.as_ref().map(fingerprint)
    }

    pub(super) fn accepts(&self, shown: &PublicKey) -> bool {
        self.0.as_ref().is_none_or(|known| known.key_data() == shown.key_data())
    }

    pub(super) fn algorithm(&self) -> Option<Algorithm> {
        self.0.as_ref().map(PublicKey::algorithm)
    }
}

pub(super) fn fingerprint(key: &PublicKey) -> String {
    key.fingerprint(HashAlg::Sha256).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::CloudConfig;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::process::Command;

    fn refusal(text: &str, mode: u32) -> String {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        SshIdentity::read(&path).unwrap_err().to_string()
    }

    fn keygen(arguments: &[&str]) -> String {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let mut keygen = Command::new("ssh-keygen");
        assert!(keygen.arg("-q").args(arguments).arg("-f").arg(&path).status().unwrap().success());
        fs::read_to_string(path).unwrap()
    }

    #[test]
    fn two_accesses_have_four_different_keys_that_the_spec_accepts() {
        let (one, two) = (GuestAccess::generate("vmkit").unwrap(), GuestAccess::generate("vmkit").unwrap());
        let mut all: Vec<_> = [&one, &two].iter().flat_map(|a| [&a.login_key, &a.host_key]).collect();
        all.sort_by(|a, b| a.public.cmp(&b.public));
        all.dedup();
        assert_eq!(all.len(), 4);
        let identity = SshIdentity::of(&one.login_key).unwrap();
        assert_eq!(HostKey::known(&one.login_key.public).unwrap().fingerprint(), identity.fingerprint());
        let config = crate::spec::CloudInitConfig { access: Some(one), ..Default::default() };
        config.check().unwrap();
    }

    #[test]
    fn a_host_key_that_raw_user_data_hands_in_is_the_one_that_is_expected() {
        let given = |private: &str, public: Option<&str>| {
            let mut text = "#cloud-config\nssh_keys:\n".to_owned();
            text.extend(public.map(|public| format!("  ed25519_public: {public}\n")));
            text += &format!("  ed25519_private: |\n    {}\n", private.trim_end().replace('\n', "\n    "));
            CloudInitConfig { user_data: UserData::Raw(text), ..Default::default() }
        };
        let theirs = GuestAccess::generate("x").unwrap().host_key;
        for public in [None, Some(theirs.public.as_str())] {
            let mut config = given(&theirs.private, public);
            let access = GuestAccess::beside(&config, None).unwrap();
            assert_eq!(access.host_key.private.trim_end(), theirs.private.trim_end());
            let known = |line: &str| HostKey::known(line).unwrap();
            assert_eq!(known(&access.host_key.public), known(&theirs.public));
            config.access = Some(access);
            config.check().unwrap();
            config.access = Some(GuestAccess::generate("vmkit").unwrap());
            let error = config.check().unwrap_err().to_string();
            assert!(error.starts_with("cloud_init.access.host_key") && error.contains("line "), "{error}");
        }
        let other = GuestAccess::generate("x").unwrap().host_key;
        for (private, public, expected) in [
            (&theirs.private, Some(other.public.as_str()), "is not the public half"),
            (&theirs.private, Some("x"), "is not a public key"),
            (&"x".to_owned(), None, "is not a readable private key"),
            (&keygen(&["-t", "ed25519", "-N", "secret"]), None, "passphrase"),
            (&keygen(&["-t", "ecdsa", "-N", ""]), None, "of the kind ecdsa"),
        ] {
            let error = GuestAccess::beside(&given(private, public), None).unwrap_err().to_string();
            assert!(error.starts_with("user_data: ") && error.contains(expected), "{error}");
        }
        let typed = CloudConfig { ssh_host_key: Some(theirs.clone()), ..CloudConfig::default() };
        let config = CloudInitConfig { user_data: UserData::Typed(typed), ..Default::default() };
        assert_eq!(GuestAccess::beside(&config, None).unwrap().host_key, theirs);
    }

    #[test]
    fn a_key_that_others_may_read_is_refused_with_its_mode() {
        let text = GuestAccess::generate("vmkit").unwrap().login_key.private;
        let error = refusal(&text, 0o640);
        assert!(error.contains("0640") && error.contains("chmod 600"), "{error}");
        assert!(!error.contains("PRIVATE"), "{error}");
    }

    #[test]
    fn every_file_that_is_no_usable_key_is_refused_for_what_it_is() {
        let public = GuestAccess::generate("vmkit").unwrap().login_key.public;
        assert!(refusal(&public, 0o600).contains("the public half"));
        assert!(refusal("hello", 0o600).contains("private key"));
        assert!(refusal(&keygen(&["-t", "ed25519", "-N", "secret"]), 0o600).contains("passphrase"));
        assert!(refusal(&keygen(&["-t", "rsa", "-N", "secret"]), 0o600).contains("passphrase"));
        let error = SshIdentity::read(Path::new("/nowhere/key")).unwrap_err().to_string();
        assert!(error.starts_with("identity: \"/nowhere/key\"") && error.contains("no such file"), "{error}");
    }

    #[test]
    fn a_host_key_is_read_from_a_file_and_what_is_none_is_refused_by_its_path() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("host.pub");
        let line = GuestAccess::generate("vmkit").unwrap().host_key.public;
        fs::write(&path, format!("{line}\n")).unwrap();
        assert_eq!(HostKey::read(&path).unwrap(), HostKey::known(&line).unwrap());
        for (content, why) in [(&b"hello\n"[..], "this is not a public key"), (b"\xff", "it is not text")] {
            fs::write(&path, content).unwrap();
            let error = HostKey::read(&path).unwrap_err().to_string();
            assert!(
                error.starts_with("host-key: ") && error.contains("/host.pub") && error.contains(why),
                "{error}"
            );
        }
        for (path, why) in [(dir.path().to_owned(), "a directory"), (dir.path().join("none"), "no such file")]
        {
            let error = HostKey::read(&path).unwrap_err();
            assert_eq!(error.kind(), crate::ErrorKind::InvalidInput);
            assert!(error.to_string().contains(why), "{error}");
        }
    }

    #[test]
    fn no_identity_shows_its_key() {
        let pair = GuestAccess::generate("vmkit").unwrap().login_key;
        let shown = format!("{:?}", SshIdentity::of(&pair).unwrap());
        assert!(shown.contains("SHA256:") && !shown.contains("PRIVATE"), "{shown}");
    }
}
