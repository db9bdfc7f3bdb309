//! How an image is named: [`ImageRef`], parsed from what a user typed.
//!
//! Pure: whether the image exists is found out later, in the catalogue, on disk or at a server.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::digest::Digest;
use crate::error::{Error, Result};
use crate::spec::{Mib, RootDisk};

/// The longest name of an image, in bytes, with its version.
const MAX_NAME_BYTES: usize = 128;

/// The extensions by which a file is told from a name of the catalogue.
const FILE_ENDS: &[&str] =
    &[".qcow2", ".img", ".raw", ".qcow", ".vmdk", ".vdi", ".iso", ".gz", ".xz", ".zst", ".bz2"];

/// An image as a user names it.
///
/// | text | meaning |
/// | --- | --- |
/// | `debian:12`, `debian` | a name of the catalogue, or one given by an import; without a version, the newest |
/// | `./disk.qcow2`, `/srv/disk.raw`, `disk.qcow2` | a file: what has a slash, or ends as images do |
/// | `file:///srv/disk.raw` | a file |
/// | `https://…`, `http://…` | a download; `#sha256=HEX` or `#sha512=HEX` at its end is the checksum that it must have |
/// | `oci://registry/name:tag`, `…@sha256:HEX` | a disk in an OCI registry |
///
/// # Examples
/// ```
/// use vmkit::image::ImageRef;
///
/// let image: ImageRef = "debian:12".parse()?;
/// assert!(matches!(image, ImageRef::Name(name) if name.version() == Some("12")));
/// # Ok::<(), vmkit::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
#[non_exhaustive]
pub enum ImageRef {
    /// A name of the catalogue or of an import.
    Name(ImageName),
    /// A file on this host; a relative path is relative to a directory that the caller chooses.
    Path(PathBuf),
    /// A download.
    Url(ImageUrl),
    /// A disk in an OCI registry.
    Oci(OciRef),
}

impl ImageRef {
    /// Returns the same image, with a relative path joined to `base`; a ZFS snapshot has no path.
    #[must_use]
    pub fn seen_from(self, base: &Path) -> Self {
        match self {
            ImageRef::Path(path) if !RootDisk::is_zfs(&path) => ImageRef::Path(base.join(path)),
            other => other,
        }
    }

    /// Returns a root disk over this image, for a [`Blueprint`](crate::spec::Blueprint).
    pub fn root_disk(&self, size: Option<Mib>) -> RootDisk {
        let image = match self {
            ImageRef::Path(path) if path.is_absolute() => path.clone(),
            other => other.to_string().into(),
        };
        RootDisk { image, size }
    }
}

impl FromStr for ImageRef {
    type Err = Error;

    /// Parses an image as it was typed.
    ///
    /// # Errors
    /// `InvalidInput` on `image`, with what would be right.
    fn from_str(text: &str) -> Result<Self> {
        let refused = |why: &str| Err(invalid(text, why));
        if text.is_empty() {
            return refused("expected an image, such as debian:12, a file or a URL");
        }
        if text.contains(char::is_control) {
            return refused("an image's name has no control characters");
        }
        let scheme = text.split_once(':').map(|(scheme, _)| scheme.to_ascii_lowercase());
        match scheme.as_deref() {
            Some("file") => return file_url(text),
            Some("http" | "https") if text.contains("://") => return text.parse().map(ImageRef::Url),
            Some("oci") if text.contains("://") => return text.parse().map(ImageRef::Oci),
            Some(scheme) if text[scheme.len()..].starts_with("://") => {
                let why = match scheme {
                    "docker" => "write oci://REGISTRY/NAME:TAG for an image in a registry",
                    _ => "a URL starts with https://, http://, file:// or oci://",
                };
                return refused(why);
            }
            _ => {}
        }
        let is_file = text.contains('/') || matches!(text, "." | "..") || {
            let lower = text.to_ascii_lowercase();
            FILE_ENDS.iter().any(|end| lower.ends_with(end))
        };
        if !is_file {
            return text.parse().map(ImageRef::Name);
        }
        let here = text.strip_prefix("./").filter(|rest| !rest.is_empty() && !rest.starts_with('/'));
        Ok(ImageRef::Path(here.unwrap_or(text).into()))
    }
}

impl fmt::Display for ImageRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ImageRef::Name(name) => name.fmt(f),
            ImageRef::Url(url) => url.fmt(f),
            ImageRef::Oci(oci) => oci.fmt(f),
            ImageRef::Path(path) if path.as_os_str().as_encoded_bytes().contains(&b'/') => {
                path.display().fmt(f)
            }
            // Otherwise the text would be parsed as a name.
            ImageRef::Path(path) => write!(f, "./{}", path.display()),
        }
    }
}

/// The name of an image: of the catalogue, or given by an import.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ImageName {
    name: String,
    version: Option<String>,
}

impl ImageName {
    /// Checks a name: `[a-z0-9][a-z0-9-]*`, and after a colon a version of `[a-zA-Z0-9._-]`; 128
    /// bytes at most.
    ///
    /// # Errors
    /// `InvalidInput` on `image`.
    pub fn new(text: &str) -> Result<Self> {
        let refused = |why: &str| Err(invalid(text, why));
        if text.len() > MAX_NAME_BYTES {
            return refused(&format!("the name of an image has at most {MAX_NAME_BYTES} bytes"));
        }
        let (name, version) = match text.split_once(':') {
            Some((name, version)) => (name, Some(version)),
            None => (text, None),
        };
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
        if !name.starts_with(plain) || !name.chars().all(|c| plain(c) || c == '-') {
            return refused(
                "the name of an image is a-z, 0-9 and -, as in debian:12; a file here is written ./FILE",
            );
        }
        let word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        if let Some(version) = version
            && (!version.starts_with(|c: char| c.is_ascii_alphanumeric()) || !version.chars().all(word))
        {
            return refused("the version of an image is letters, digits, ., _ and -, as in debian:12");
        }
        Ok(Self { name: name.to_owned(), version: version.map(str::to_owned) })
    }

    /// Returns the name without its version.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the version, if one was named.
    pub fn version(&self) -> Option<&str> {
        self.version.as_deref()
    }
}

impl FromStr for ImageName {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::new(text)
    }
}

impl fmt::Display for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.version {
            Some(version) => f.pad(&format!("{}:{version}", self.name)),
            None => f.pad(&self.name),
        }
    }
}

/// The address of a download, and the checksum that it must have.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ImageUrl {
    url: String,
    digest: Option<Digest>,
}

impl ImageUrl {
    /// Returns the address, without the checksum.
    pub fn as_str(&self) -> &str {
        &self.url
    }

    /// Returns the checksum that the download must have, if one was named.
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }
}

impl FromStr for ImageUrl {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let refused = |why: &str| Err(invalid(&without_password(text), why));
        let (url, fragment) = match text.split_once('#') {
            Some((url, fragment)) => (url, Some(fragment)),
            None => (text, None),
        };
        let Some((scheme, rest)) = url.split_once("://") else {
            return refused("a URL starts with https:// or http://");
        };
        let scheme = scheme.to_ascii_lowercase();
        if !matches!(scheme.as_str(), "http" | "https") {
            return refused("a URL starts with https:// or http://");
        }
        let host = rest.split(['/', '?']).next().unwrap_or_default();
        if host.is_empty() {
            return refused("this URL has no server: write https://SERVER/PATH");
        }
        if host.contains('@') {
            return refused("a URL can't have a password, since it is stored and shown");
        }
        if rest.contains(char::is_whitespace) {
            return refused("a space in a URL is written %20");
        }
        let digest = match fragment {
            None | Some("") => None,
            Some(fragment) => match fragment.split_once('=').map(|(kind, hex)| Digest::new(kind, hex)) {
                Some(Some(digest)) => Some(digest),
                _ => return refused("after # write the whole checksum, sha256=HEX or sha512=HEX"),
            },
        };
        Ok(Self { url: format!("{scheme}://{rest}"), digest })
    }
}

impl fmt::Display for ImageUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.url)?;
        match &self.digest {
            Some(digest) => write!(f, "#{}={}", digest.algorithm(), digest.hex()),
            None => Ok(()),
        }
    }
}

/// A disk in an OCI registry.
///
/// Source: the OCI Distribution Specification, "Pulling manifests", for the forms of names, tags
/// and digests.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct OciRef {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

impl OciRef {
    /// Returns the registry: a host, and a port if one was named.
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// Returns the repository in the registry.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// Returns the reference of the manifest: the digest if one was named, else the tag, else
    /// `latest`.
    pub fn reference(&self) -> String {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => digest.to_string(),
            (None, Some(tag)) => tag.clone(),
            (None, None) => "latest".to_owned(),
        }
    }

    /// Returns the digest that the manifest must have, if one was named.
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }
}

impl FromStr for OciRef {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let refused = |why: &str| Err(invalid(&without_password(text), why));
        let form = "write oci://REGISTRY/NAME:TAG or oci://REGISTRY/NAME@sha256:HEX";
        let Some(rest) = text.get(..6).filter(|s| s.eq_ignore_ascii_case("oci://")).map(|_| &text[6..])
        else {
            return refused(form);
        };
        let Some((registry, path)) = rest.split_once('/') else { return refused(form) };
        let is_host = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | ':' | '[' | ']');
        if registry.is_empty() || !registry.chars().all(is_host) {
            return refused(form);
        }
        let (path, digest) = match path.split_once('@') {
            Some((path, digest)) => {
                let parsed = digest.split_once(':').and_then(|(kind, hex)| Digest::new(kind, hex));
                match parsed {
                    Some(digest) => (path, Some(digest)),
                    None => return refused("after @ write the manifest's whole digest, sha256:HEX"),
                }
            }
            None => (path, None),
        };
        let (repository, tag) = match path.split_once(':') {
            Some((repository, tag)) => (repository, Some(tag)),
            None => (path, None),
        };
        let part = |part: &str| {
            part.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
                && part
                    .chars()
                    .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '.' | '_' | '-'))
        };
        if !repository.split('/').all(part) {
            return refused("a name in a registry is a-z, 0-9, ., _ and -, in parts with / between");
        }
        let is_tag = |tag: &str| {
            tag.len() <= 128
                && tag.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
                && tag.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'))
        };
        if !tag.is_none_or(is_tag) {
            return refused("a tag is letters, digits, ., _ and -, at most 128");
        }
        let registry = registry.to_ascii_lowercase();
        Ok(Self { registry, repository: repository.to_owned(), tag: tag.map(str::to_owned), digest })
    }
}

impl fmt::Display for OciRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "oci://{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        match &self.digest {
            Some(digest) => write!(f, "@{digest}"),
            None => Ok(()),
        }
    }
}

/// Implements serde for a type by its text form.
macro_rules! text_in_records {
    ($($type:ident),*) => {$(
        impl TryFrom<String> for $type {
            type Error = Error;

            fn try_from(text: String) -> Result<Self> {
                text.parse()
            }
        }

        impl From<$type> for String {
            fn from(value: $type) -> String {
                value.to_string()
            }
        }
    )*};
}

text_in_records!(ImageRef, ImageName, ImageUrl, OciRef);

fn invalid(text: &str, why: &str) -> Error {
    let shown: String = text.chars().take(200).collect();
    Error::invalid("image", shown, why)
}

/// Returns the text without what is between `//` and `@`: an error is shown, and a password must
/// not be.
fn without_password(text: &str) -> String {
    let Some((scheme, rest)) = text.split_once("//") else { return text.to_owned() };
    let host = rest.split('/').next().unwrap_or_default();
    match host.rsplit_once('@') {
        Some((secret, _)) => format!("{scheme}//…{}", &rest[secret.len()..]),
        None => text.to_owned(),
    }
}

/// Parses `file:///PATH` and `file:/PATH`, in which a byte may be written `%XX`.
///
/// Source: RFC 8089.
fn file_url(text: &str) -> Result<ImageRef> {
    let path = &text["file:".len()..];
    let path = match path.strip_prefix("//") {
        Some(rest) => rest.strip_prefix("localhost").unwrap_or(rest),
        None => path,
    };
    if !path.starts_with('/') {
        return Err(invalid(text, "a file's URL has its absolute path: write file:///PATH"));
    }
    let decoded = percent_decoded(path).and_then(|bytes| String::from_utf8(bytes).ok());
    match decoded.filter(|path| !path.contains(char::is_control)) {
        Some(path) => Ok(ImageRef::Path(path.into())),
        None => {
            Err(invalid(text, "in a URL, % is followed by two hexadecimal digits, and the result is UTF-8"))
        }
    }
}

fn percent_decoded(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        rest = tail;
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let (digits, tail) = rest.split_at_checked(2)?;
        if !digits.iter().all(u8::is_ascii_hexdigit) {
            return None;
        }
        bytes.push(u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?);
        rest = tail;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parsed(text: &str) -> ImageRef {
        text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    fn refusal(text: &str) -> String {
        text.parse::<ImageRef>().unwrap_err().to_string()
    }

    #[test]
    fn names_files_addresses_and_registries_are_distinguished() {
        for (text, name, version) in [
            ("debian", "debian", None),
            ("ubuntu:24.04", "ubuntu", Some("24.04")),
            ("centos-stream:9", "centos-stream", Some("9")),
        ] {
            let ImageRef::Name(found) = parsed(text) else { panic!("{text}") };
            assert_eq!((found.name(), found.version()), (name, version));
        }
        for text in ["/x/y", "a/b", "base.img", "Disk.QCOW2", "..", "debian-12.raw.zst"] {
            assert_eq!(parsed(text), ImageRef::Path(text.into()));
        }
        assert_eq!(parsed("./x"), ImageRef::Path("x".into()));
        assert_eq!(parsed("file:///a%20b/c"), ImageRef::Path("/a b/c".into()));
        assert_eq!(parsed("file:/a"), ImageRef::Path("/a".into()));
        let ImageRef::Url(url) = parsed("HTTPS://h/p?q=1") else { panic!() };
        assert_eq!(url.as_str(), "https://h/p?q=1");
        let ImageRef::Oci(oci) = parsed("oci://localhost:5000/a/b:v1") else { panic!() };
        assert_eq!(
            (oci.registry(), oci.repository(), oci.reference()),
            ("localhost:5000", "a/b", "v1".into())
        );
        let ImageRef::Oci(oci) = parsed("oci://r.example/a") else { panic!() };
        assert_eq!(oci.reference(), "latest");
    }

    #[test]
    fn a_digest_behind_an_address_is_read_and_shown() {
        let text = format!("https://h/x.qcow2#sha256={}", "ab".repeat(32));
        let ImageRef::Url(url) = parsed(&text) else { panic!() };
        assert_eq!(url.digest().unwrap().hex(), "ab".repeat(32));
        assert_eq!(url.to_string(), text);
        let text = format!("oci://h/x:t@sha256:{}", "0".repeat(64));
        let ImageRef::Oci(oci) = parsed(&text) else { panic!() };
        assert_eq!(oci.reference(), format!("sha256:{}", "0".repeat(64)));
    }

    #[test]
    fn what_is_wrong_is_refused_with_what_would_be_right() {
        for (text, why) in [
            ("", "such as debian:12"),
            ("Debian", "written ./FILE"),
            ("debian:", "the version"),
            ("debian:12 ", "the version"),
            ("a\nb", "control characters"),
            ("docker://x/y", "oci://REGISTRY/NAME:TAG"),
            ("ftp://x/y", "https://"),
            ("file:x", "file:///PATH"),
            ("file:///%zz", "two hexadecimal digits"),
            ("https:///x", "no server"),
            ("https://h/a b", "%20"),
            ("https://h/a#sha256=12", "whole"),
            ("oci://h", "oci://REGISTRY/NAME"),
            ("oci://h/UP:x", "a-z"),
            ("oci://h/a:b:c", "a tag is"),
            ("oci://h/a@md5:00", "sha256:HEX"),
        ] {
            let error = refusal(text);
            assert!(error.starts_with("image: ") && error.contains(why), "{text}: {error}");
        }
    }

    #[test]
    fn a_password_in_an_address_is_refused_and_not_repeated() {
        for text in ["https://me:secret@h/x", "oci://me:secret@h/x"] {
            let error = refusal(text);
            assert!(!error.contains("secret"), "{error}");
        }
    }

    proptest! {
        #[test]
        fn reading_any_text_never_panics(text in ".*") {
            let _ = text.parse::<ImageRef>();
        }

        #[test]
        fn what_was_read_is_read_back(
            text in r"(oci://|https://|http://|file:///)?[a-z0-9./:@#=%-]{0,40}"
        ) {
            if let Ok(image) = text.parse::<ImageRef>() {
                prop_assert_eq!(image.to_string().parse::<ImageRef>().unwrap(), image);
            }
        }
    }
}
