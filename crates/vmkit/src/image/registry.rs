//! Disks in OCI registries: finds the layer that is the disk, and authenticates at the registry.
//!
//! Edge: the network. It knows manifests and tokens; the disk itself is a file like any other,
//! fetched and verified by the digest in the manifest.
//!
//! The disk is the only layer of an artifact, whatever its media type, or the only one whose media
//! type names a disk or whose title has the extension of an image. Container images, which have a
//! disk in a tar (`/disk/…`), are refused with what to do.
//!
//! Source: the OCI Image and Distribution Specifications; the Docker Registry token authentication
//! specification, and its "OAuth2 token authentication" for identity tokens.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::credentials::{DOCKER_HUB, RegistryLogin, is_docker_hub};
use super::digest::{Digest, Hasher};
use super::kept::Verification;
use super::logins::RegistryLogins;
use super::reference::OciRef;
use super::remote::{HttpFetcher, HttpReply};
use super::source::PullSource;
use crate::error::{Error, Result};
use crate::spec::Arch;

/// The largest manifest, in bytes: what the specification requires registries to accept.
const MOST_MANIFEST_BYTES: usize = 4 << 20;
const MOST_TOKEN_BYTES: usize = 1 << 20;
/// The media types of manifests that are accepted; indexes come last.
const MANIFESTS: &str = "application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.v2+json, \
    application/vnd.oci.image.index.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json";
/// The extensions of titles that are disks.
const DISK_ENDS: &[&str] = &[".qcow2", ".raw", ".img", ".gz", ".xz", ".zst", ".bz2"];

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct OciManifest {
    #[serde(default)]
    manifests: Vec<OciDescriptor>,
    #[serde(default)]
    layers: Vec<OciDescriptor>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
struct OciDescriptor {
    #[serde(default)]
    media_type: String,
    digest: String,
    platform: Option<OciPlatform>,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

#[derive(Debug, Clone, Deserialize)]
struct OciPlatform {
    architecture: String,
}

#[derive(Deserialize)]
struct BearerToken {
    token: Option<String>,
    access_token: Option<String>,
}

/// An authentication challenge of a registry: `Bearer realm="…",service="…"`.
#[derive(Debug, PartialEq, Eq)]
struct AuthChallenge {
    scheme: String,
    parameters: BTreeMap<String, String>,
}

/// A client of registries.
pub(super) struct RegistryClient<'a> {
    pub(super) remote: &'a HttpFetcher,
    pub(super) logins: &'a RegistryLogins,
}

impl RegistryClient<'_> {
    /// Finds the disk of an artifact in a registry.
    ///
    /// # Errors
    /// `Remote`, `NotFound`; `InvalidInput` on `image` if the artifact has no disk, or none of this
    /// architecture.
    pub(super) async fn source(&self, image: &OciRef, arch: Arch) -> Result<PullSource> {
        let mut session = RegistrySession { client: self, image, authorization: None };
        let refused = |why: String| Err(Error::invalid("image", image, why));
        let mut manifest = session.manifest(&image.reference(), image.digest()).await?;
        if !manifest.manifests.is_empty() {
            let name = oci_name(arch);
            let of_arch =
                |one: &&OciDescriptor| one.platform.as_ref().is_some_and(|p| p.architecture == name);
            let Some(found) = manifest.manifests.iter().find(of_arch) else {
                let platforms = manifest.manifests.iter().filter_map(|one| one.platform.as_ref());
                let there: Vec<&str> = platforms.map(|platform| platform.architecture.as_str()).collect();
                return refused(format!("it does not exist for {name}, only for {}", there.join(", ")));
            };
            let digest = checked(image, &found.digest)?;
            manifest = session.manifest(&digest.to_string(), Some(&digest)).await?;
        }
        let disk = match disk_of(&manifest) {
            Ok(disk) => disk,
            Err(why) => return refused(why),
        };
        let digest = checked(image, &disk.digest)?;
        let url = format!("{}/blobs/{digest}", session.base());
        Ok(PullSource {
            url,
            registry: Some((image.clone(), session.authorization)),
            digest: Some(digest),
            verified: Verification::Digest,
            signed_file: None,
        })
    }

    /// Returns the authorization for a registry that has sent a challenge; `None` if no login is
    /// known.
    ///
    /// # Errors
    /// `Remote` if the registry gives no token.
    pub(super) async fn authorization(&self, image: &OciRef, challenge: &str) -> Result<Option<String>> {
        RegistrySession { client: self, image, authorization: None }.answer(challenge).await
    }
}

/// A conversation with one registry about one repository.
struct RegistrySession<'a> {
    client: &'a RegistryClient<'a>,
    image: &'a OciRef,
    authorization: Option<String>,
}

impl RegistrySession<'_> {
    /// Returns the address of the repository. Registries on this host are spoken to without TLS, as
    /// other tools do.
    fn base(&self) -> String {
        let registry = self.image.registry();
        let host = registry.rsplit_once(':').map_or(registry, |(host, _)| host);
        let is_here = matches!(host, "localhost" | "127.0.0.1" | "[::1]");
        let scheme = if is_here { "http" } else { "https" };
        let server = if is_docker_hub(registry) { DOCKER_HUB } else { registry };
        format!("{scheme}://{server}/v2/{}", self.repository())
    }

    /// Returns the repository by the name that the registry has for it.
    fn repository(&self) -> String {
        let repository = self.image.repository();
        match is_docker_hub(self.image.registry()) && !repository.contains('/') {
            true => format!("library/{repository}"),
            false => repository.to_owned(),
        }
    }

    async fn manifest(&mut self, reference: &str, digest: Option<&Digest>) -> Result<OciManifest> {
        let url = format!("{}/manifests/{reference}", self.base());
        let bytes = self.ask(&url).await?.body(&url)?;
        let untrusted = |problem: String| Error::untrusted(self.image.to_string(), problem);
        if let Some(wanted) = digest {
            let found = Hasher::digest(wanted.algorithm(), &bytes);
            if found != *wanted {
                return Err(untrusted(format!("its manifest has the digest {found} (expected {wanted})")));
            }
        }
        serde_json::from_slice(&bytes)
            .map_err(|error| untrusted("its manifest can't be read".to_owned()).with_source(error))
    }

    /// Sends a request, and again with an authorization if the registry asks for one.
    async fn ask(&mut self, url: &str) -> Result<HttpReply> {
        let remote = self.client.remote;
        let answer =
            remote.ask(url, Some(MANIFESTS), self.authorization.as_deref(), MOST_MANIFEST_BYTES).await?;
        let Some(challenge) = &answer.challenge else { return Ok(answer) };
        self.authorization = self.answer(challenge).await?;
        if self.authorization.is_none() {
            return Ok(answer);
        }
        remote.ask(url, Some(MANIFESTS), self.authorization.as_deref(), MOST_MANIFEST_BYTES).await
    }

    /// Returns the authorization for a challenge: a token if the registry takes one, else a
    /// password.
    async fn answer(&self, header: &str) -> Result<Option<String>> {
        let challenges = challenges(header);
        let of = |scheme: &str| challenges.iter().find(|challenge| challenge.scheme == scheme);
        let login = self.client.logins.login(self.image).await?;
        let basic = match (of("basic"), &login) {
            (Some(_), Some(RegistryLogin::Password(password))) => Some(basic(password)),
            _ => None,
        };
        let Some(bearer) = of("bearer") else { return Ok(basic) };
        match (self.token(bearer, login).await, basic) {
            (Ok(token), _) => Ok(Some(token)),
            (Err(error), Some(basic)) => {
                tracing::debug!(%error, "going on with a password, which the registry takes as well");
                Ok(Some(basic))
            }
            (Err(error), None) => Err(error),
        }
    }

    /// Fetches a token for reading this repository, with a login or anonymously.
    async fn token(&self, challenge: &AuthChallenge, login: Option<RegistryLogin>) -> Result<String> {
        let untrusted =
            |problem: &str| Error::untrusted(format!("the registry {}", self.image.registry()), problem);
        let parameter = |name: &str| challenge.parameters.get(name).map(String::as_str);
        let realm = parameter("realm").unwrap_or_default();
        // A password is not sent over a connection that others can listen on.
        if !realm.starts_with("https://") && !self.base().starts_with("http://") {
            return Err(untrusted("it requests the password without TLS"));
        }
        let mut query = format!("scope={}", escaped(&format!("repository:{}:pull", self.repository())));
        if let Some(service) = parameter("service") {
            query.push_str(&format!("&service={}", escaped(service)));
        }
        let remote = self.client.remote;
        let url = format!("{realm}{}{query}", if realm.contains('?') { '&' } else { '?' });
        let answer = match login {
            Some(RegistryLogin::IdentityToken(token)) => {
                let form = format!(
                    "grant_type=refresh_token&client_id=vmkit&{query}&refresh_token={}",
                    escaped(&token)
                );
                remote.post(realm, form, MOST_TOKEN_BYTES).await?.body(realm)?
            }
            Some(RegistryLogin::Password(password)) => {
                remote.ask(&url, None, Some(&basic(&password)), MOST_TOKEN_BYTES).await?.body(&url)?
            }
            None => remote.ask(&url, None, None, MOST_TOKEN_BYTES).await?.body(&url)?,
        };
        let token: BearerToken =
            serde_json::from_slice(&answer).map_err(|_| untrusted("its token can't be read"))?;
        let token = token.token.or(token.access_token).ok_or_else(|| untrusted("it returned no token"))?;
        Ok(format!("Bearer {token}"))
    }
}

/// Returns the authorization by a password.
fn basic(password: &str) -> String {
    format!("Basic {password}")
}

/// Returns the layer that is the disk.
fn disk_of(manifest: &OciManifest) -> Result<&OciDescriptor, String> {
    let is_container = |layer: &OciDescriptor| {
        layer.media_type.starts_with("application/vnd.oci.image.layer.v1.tar")
            || layer.media_type.starts_with("application/vnd.docker.image.rootfs.diff.tar")
    };
    let is_disk = |layer: &&OciDescriptor| {
        let title = layer.annotations.get("org.opencontainers.image.title");
        layer.media_type.contains("disk")
            || title
                .is_some_and(|title| DISK_ENDS.iter().any(|end| title.to_ascii_lowercase().ends_with(end)))
    };
    let plain: Vec<&OciDescriptor> = manifest.layers.iter().filter(|layer| !is_container(layer)).collect();
    match plain[..] {
        [] if manifest.layers.is_empty() => Err("it is empty".to_owned()),
        [] => Err("this is a container image, not a disk image: extract the disk that may be in it, and push that, as `oras push NAME:TAG disk.qcow2` does"
            .to_owned()),
        [disk] => Ok(disk),
        _ => {
            let disks: Vec<&&OciDescriptor> = plain.iter().filter(|layer| is_disk(layer)).collect();
            match disks[..] {
                [disk] => Ok(disk),
                _ => Err(format!("it has {} files, and which of them is the disk is unknown", plain.len())),
            }
        }
    }
}

fn checked(image: &OciRef, digest: &str) -> Result<Digest> {
    let parsed = digest.split_once(':').and_then(|(kind, hex)| Digest::new(kind, hex));
    parsed.ok_or_else(|| {
        Error::untrusted(image.to_string(), format!("its manifest has the invalid digest {digest:?}"))
    })
}

/// Returns the name of an architecture in manifests, which is Go's name for it.
fn oci_name(arch: Arch) -> &'static str {
    match arch {
        Arch::X86_64 => "amd64",
        Arch::Aarch64 => "arm64",
    }
}

/// Parses a list of challenges: schemes, each with parameters, whose values are in quotes or not.
///
/// Source: RFC 9110, "WWW-Authenticate".
fn challenges(header: &str) -> Vec<AuthChallenge> {
    const BLANKS: [char; 2] = [' ', '\t'];
    let mut challenges: Vec<AuthChallenge> = Vec::new();
    let mut rest = header;
    loop {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        if rest.is_empty() {
            return challenges;
        }
        let end = rest.find([' ', '\t', ',', '=']).unwrap_or(rest.len());
        let (word, after) = rest.split_at(end);
        let word = word.to_ascii_lowercase();
        match after.trim_start_matches(BLANKS).strip_prefix('=') {
            Some(value) => {
                let (value, after) = parameter_value(value.trim_start_matches(BLANKS));
                rest = after;
                if let Some(challenge) = challenges.last_mut() {
                    challenge.parameters.insert(word, value);
                }
            }
            // A word without a value begins the next challenge.
            None => {
                challenges.push(AuthChallenge { scheme: word, parameters: BTreeMap::new() });
                rest = after;
            }
        }
    }
}

/// Parses a value, in quotes or not, and returns it with the rest of the text.
fn parameter_value(text: &str) -> (String, &str) {
    let Some(quoted) = text.strip_prefix('"') else {
        let (value, rest) = text.split_at(text.find([',', ' ', '\t']).unwrap_or(text.len()));
        return (value.to_owned(), rest);
    };
    let (mut value, mut is_escaped) = (String::new(), false);
    for (at, letter) in quoted.char_indices() {
        match letter {
            '"' if !is_escaped => return (value, &quoted[at + 1..]),
            '\\' if !is_escaped => is_escaped = true,
            letter => {
                value.push(letter);
                is_escaped = false;
            }
        }
    }
    (value, "")
}

/// Escapes characters that have a meaning in an address as `%XX`.
fn escaped(text: &str) -> String {
    let mut escaped = String::new();
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' | b':' | b'/' => {
                escaped.push(char::from(byte))
            }
            _ => escaped.push_str(&format!("%{byte:02X}")),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn manifest(layers: &[(&str, &str)]) -> OciManifest {
        let layers = layers.iter().map(|(media_type, title)| {
            serde_json::json!({
                "mediaType": media_type,
                "digest": format!("sha256:{title}"),
                "annotations": {"org.opencontainers.image.title": title},
            })
        });
        serde_json::from_value(serde_json::json!({"layers": layers.collect::<Vec<_>>()})).unwrap()
    }

    #[test]
    fn the_layer_that_is_a_disk_is_found() {
        let tar = "application/vnd.oci.image.layer.v1.tar+gzip";
        for (layers, expected) in [
            (&[("application/octet-stream", "a")][..], Ok("sha256:a")),
            (&[("text/plain", "README.md"), ("x/y", "d.qcow2")], Ok("sha256:d.qcow2")),
            (&[("x/config", "a"), ("application/vnd.cirruslabs.tart.disk.v1", "b")], Ok("sha256:b")),
            (&[("x/y", "a.raw"), ("x/y", "b.raw")], Err("which of them is the disk")),
            (&[(tar, "rootfs")], Err("a container image")),
            (&[], Err("it is empty")),
        ] {
            let manifest = manifest(layers);
            let found = disk_of(&manifest).map(|disk| disk.digest.as_str());
            match expected {
                Ok(digest) => assert_eq!(found, Ok(digest)),
                Err(why) => assert!(found.unwrap_err().contains(why), "{layers:?}"),
            }
        }
    }

    #[test]
    fn a_challenge_is_read_with_commas_in_its_values() {
        let found =
            challenges(r#"Bearer realm="https://a/t",service="r.example",scope="repository:x:pull,push""#);
        assert_eq!((found.len(), found[0].scheme.as_str()), (1, "bearer"));
        assert_eq!(found[0].parameters["scope"], "repository:x:pull,push");
        assert_eq!(found[0].parameters["realm"], "https://a/t");
        assert_eq!(challenges("Basic realm=plain")[0].parameters["realm"], "plain");
        assert_eq!(challenges("Negotiate")[0].scheme, "negotiate");
        assert_eq!(challenges(r#"Basic realm="a \"b\", c""#)[0].parameters["realm"], "a \"b\", c");
    }

    #[test]
    fn several_challenges_are_read_from_one_header() {
        for text in [
            r#"Basic realm="r, x", Bearer realm="https://a/t",service=s"#,
            r#"basic realm = plain ,BEARER realm="https://a/t" , service="s""#,
            r#"Negotiate, Basic realm=x, Bearer realm="https://a/t", service="s""#,
            r#"Negotiate YII==, Bearer realm="https://a/t", service="s", Basic"#,
        ] {
            let found = challenges(text);
            let bearer = found.iter().find(|one| one.scheme == "bearer").unwrap_or_else(|| panic!("{text}"));
            assert_eq!((&*bearer.parameters["realm"], &*bearer.parameters["service"]), ("https://a/t", "s"));
            assert!(found.iter().any(|one| one.scheme == "basic"), "{text}");
        }
        assert_eq!(challenges(" , "), []);
    }

    #[test]
    fn docker_hub_is_asked_at_its_server_by_all_its_names() {
        for (name, base) in [
            ("oci://docker.io/me/disk:1", "https://registry-1.docker.io/v2/me/disk"),
            ("oci://docker.io/disk:1", "https://registry-1.docker.io/v2/library/disk"),
            ("oci://index.docker.io/me/disk:1", "https://registry-1.docker.io/v2/me/disk"),
            ("oci://registry-1.docker.io/me/disk:1", "https://registry-1.docker.io/v2/me/disk"),
        ] {
            let image: OciRef = name.parse().unwrap();
            let (remote, logins) = (HttpFetcher::default(), RegistryLogins::default());
            let client = RegistryClient { remote: &remote, logins: &logins };
            let session = RegistrySession { client: &client, image: &image, authorization: None };
            assert_eq!(session.base(), base);
        }
    }

    proptest! {
        #[test]
        fn any_challenge_is_read_without_panic(text in ".*") {
            let _ = challenges(&text);
        }
    }
}
