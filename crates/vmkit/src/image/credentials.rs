//! Logins at registries: those in Docker's `config.json`, and the helpers that it names for others.
//!
//! Pure. The helper programs are run by `credential_helper.rs`.
//!
//! Source: Docker's documentation of `docker login`, "Credential stores" and "Credential helpers";
//! containers-auth.json(5).

use std::collections::BTreeMap;
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use super::reference::OciRef;
use crate::error::{Error, Result};

/// The server of Docker Hub, which is called docker.io, and whose login is stored for
/// index.docker.io.
pub(super) const DOCKER_HUB: &str = "registry-1.docker.io";
/// The key of the login at Docker Hub.
const DOCKER_HUB_LOGIN: &str = "https://index.docker.io/v1/";

/// The logins at registries in a `config.json` of Docker's.
#[derive(Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RegistryCredentials {
    #[serde(default)]
    auths: Option<BTreeMap<String, AuthEntry>>,
    /// The helper with the login, for each registry.
    #[serde(default)]
    cred_helpers: Option<BTreeMap<String, String>>,
    /// The helper with all other logins.
    #[serde(default)]
    creds_store: Option<String>,
}

#[derive(Clone, Deserialize)]
struct AuthEntry {
    /// `USER:PASSWORD` in Base64.
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    #[serde(rename = "identitytoken")]
    identity_token: Option<String>,
}

/// A login at a registry.
#[derive(Clone, PartialEq, Eq)]
pub(super) enum RegistryLogin {
    /// `USER:PASSWORD` in Base64.
    Password(String),
    /// An identity token, which a token server exchanges for access tokens.
    IdentityToken(String),
}

impl std::fmt::Debug for RegistryCredentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The passwords stay out of logs.
        f.debug_set().entries(self.auths.iter().flatten().map(|(registry, _)| registry)).finish()
    }
}

impl std::fmt::Debug for RegistryLogin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            RegistryLogin::Password(_) => "Password(…)",
            RegistryLogin::IdentityToken(_) => "IdentityToken(…)",
        })
    }
}

impl RegistryLogin {
    /// Creates the login of a user with a password.
    pub(super) fn password(user: &str, password: &str) -> Self {
        RegistryLogin::Password(STANDARD.encode(format!("{user}:{password}")))
    }
}

impl RegistryCredentials {
    /// Parses a `config.json` as `docker login`, `podman login` and `oras login` write it.
    ///
    /// The helpers that it names (`credsStore`, `credHelpers`) are programs, and run only after
    /// [`ImageStore::with_credential_helpers`](super::ImageStore::with_credential_helpers).
    ///
    /// # Errors
    /// `InvalidInput` on `registry credentials` for text that has another form.
    pub fn from_docker_config(text: &str) -> Result<Self> {
        // Only the position of the error: the text there is secret.
        serde_json::from_str(text).map_err(|error| {
            let place = format!("line {}, column {}", error.line(), error.column());
            Error::invalid("registry credentials", place, "this is not a config.json of Docker")
        })
    }

    /// Reads a file of logins.
    pub(super) fn from_file(path: &Path, bytes: &[u8]) -> Result<Self> {
        Self::from_docker_config(&String::from_utf8_lossy(bytes)).map_err(|error| match error {
            Error::Invalid { field, value, expected, .. } => {
                Error::invalid(field, format_args!("{}, {value}", path.display()), expected)
            }
            error => error,
        })
    }

    /// Returns whether there are neither logins nor helpers.
    pub(super) fn is_empty(&self) -> bool {
        let no_helpers = self.cred_helpers.as_ref().is_none_or(BTreeMap::is_empty);
        self.auths.as_ref().is_none_or(BTreeMap::is_empty) && no_helpers && self.creds_store.is_none()
    }

    /// Returns the helper with the login at a registry, by the last part of the program's name.
    pub(super) fn helper(&self, registry: &str) -> Option<&str> {
        let own = self.cred_helpers.iter().flatten().find(|(key, _)| is_same(host(key), registry));
        let name = own.map(|(_, name)| name).or(self.creds_store.as_ref())?;
        // An empty name excludes a registry.
        Some(name.as_str()).filter(|name| !name.is_empty())
    }

    /// Returns the stored login for an image: the one for a part of its registry before the
    /// registry's.
    pub(super) fn written_down(&self, image: &OciRef) -> Option<RegistryLogin> {
        let fitting = self.auths.iter().flatten().filter_map(|(key, entry)| Some((fit(key, image)?, entry)));
        let (_, entry) = fitting.max_by_key(|(fit, _)| *fit)?;
        let given = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
        if let Some(token) = given(&entry.identity_token) {
            return Some(RegistryLogin::IdentityToken(token));
        }
        match (given(&entry.auth), &entry.username, &entry.password) {
            (Some(auth), _, _) => Some(RegistryLogin::Password(auth)),
            (None, Some(user), Some(password)) => Some(RegistryLogin::password(user, password)),
            _ => None,
        }
    }
}

/// Returns whether this is Docker Hub, by any of its names.
pub(super) fn is_docker_hub(registry: &str) -> bool {
    matches!(registry, "docker.io" | "index.docker.io" | DOCKER_HUB)
}

/// Returns the key by which helpers know the login at a registry.
pub(super) fn login_name(registry: &str) -> &str {
    if is_docker_hub(registry) { DOCKER_HUB_LOGIN } else { registry }
}

fn is_same(one: &str, other: &str) -> bool {
    one == other || (is_docker_hub(one) && is_docker_hub(other))
}

/// Returns the registry of a key: older keys are whole addresses.
fn host(key: &str) -> &str {
    let key = key.split_once("://").map_or(key, |(_, rest)| rest);
    key.split('/').next().unwrap_or_default()
}

/// Returns how many bytes of an image's path a key covers, if the key is for that image.
fn fit(key: &str, image: &OciRef) -> Option<usize> {
    if !is_same(host(key), image.registry()) {
        return None;
    }
    let path = match key.split_once("://") {
        Some(_) => "",
        None => key.split_once('/').map_or("", |(_, path)| path.trim_end_matches('/')),
    };
    match path {
        "" | "v1" | "v2" => Some(0),
        path => {
            let rest = image.repository().strip_prefix(path)?;
            (rest.is_empty() || rest.starts_with('/')).then_some(path.len())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn credentials(text: &str) -> RegistryCredentials {
        RegistryCredentials::from_docker_config(text).unwrap()
    }

    fn image(name: &str) -> OciRef {
        format!("oci://{name}").parse().unwrap()
    }

    fn password(base64: &str) -> Option<RegistryLogin> {
        Some(RegistryLogin::Password(base64.to_owned()))
    }

    #[test]
    fn a_login_is_found_by_its_registry_and_never_shown() {
        let found = credentials(
            r#"{"auths": {"https://r.example/v1/": {"auth": "dTpw"},
            "localhost:5000": {"username": "u", "password": "geheim"}, "none": {},
            "token.example": {"auth": "MDAwMDo=", "identitytoken": "geheim"}}}"#,
        );
        assert_eq!(found.written_down(&image("r.example/disk")), password("dTpw"));
        assert_eq!(found.written_down(&image("localhost:5000/disk")), password("dTpnZWhlaW0="));
        assert_eq!(found.written_down(&image("localhost:5001/disk")), None);
        assert_eq!(found.written_down(&image("none/disk")), None);
        let token = found.written_down(&image("token.example/disk")).unwrap();
        assert_eq!(token, RegistryLogin::IdentityToken("geheim".to_owned()));
        assert!(!format!("{found:?} {token:?} {:?}", password("dTpw")).contains("dTpw"));
        assert!(!format!("{found:?} {token:?}").contains("geheim"));
        let error = RegistryCredentials::from_docker_config(r#"{"auths": {"r": {"auth": 17}}}"#).unwrap_err();
        assert!(error.to_string().contains("line 1") && !error.to_string().contains("17}"), "{error}");
    }

    #[test]
    fn a_login_for_a_part_of_a_registry_is_for_that_part() {
        let found = credentials(
            r#"{"auths": {"r.example/team": {"auth": "dGVhbQ=="}, "r.example/team/web": {"auth": "d2Vi"},
            "r.example": {"auth": "YWxs"}, "only.example/team": {"auth": "b25seQ=="}}}"#,
        );
        for (name, expected) in [
            ("r.example/team/web", password("d2Vi")),
            ("r.example/team/web2", password("dGVhbQ==")),
            ("r.example/other/web", password("YWxs")),
            ("only.example/team/web", password("b25seQ==")),
            ("only.example/teams/web", None),
        ] {
            assert_eq!(found.written_down(&image(name)), expected, "{name}");
        }
    }

    #[test]
    fn docker_hub_is_one_registry_by_all_its_names() {
        let found = credentials(r#"{"auths": {"https://index.docker.io/v1/": {"auth": "dTpw"}}}"#);
        for name in ["docker.io", "index.docker.io", "registry-1.docker.io"] {
            assert_eq!(found.written_down(&image(&format!("{name}/disk"))), password("dTpw"), "{name}");
            assert_eq!(login_name(name), "https://index.docker.io/v1/");
        }
        assert_eq!(login_name("r.example:5000"), "r.example:5000");
    }

    #[test]
    fn the_helper_of_a_registry_goes_before_that_of_all() {
        let found = credentials(
            r#"{"credHelpers": {"https://index.docker.io/v1/": "hub", "r.example:5000": "own", "off.example": ""},
            "credsStore": "all"}"#,
        );
        for (registry, helper) in [
            ("docker.io", Some("hub")),
            ("r.example:5000", Some("own")),
            ("r.example", Some("all")),
            ("off.example", None),
        ] {
            assert_eq!(found.helper(registry), helper, "{registry}");
        }
        assert!(!found.is_empty());
        assert!(credentials(r#"{"auths": null, "credHelpers": null, "psFormat": "x"}"#).is_empty());
    }

    proptest! {
        #[test]
        fn any_login_file_is_read_without_panic(text in ".*") {
            let _ = RegistryCredentials::from_docker_config(&text);
        }
    }
}
