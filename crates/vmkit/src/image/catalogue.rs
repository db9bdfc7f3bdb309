//! The catalogue: the names of images, their addresses, and how each image is verified.
//!
//! Pure. The catalogue is data, `catalogue.toml`, compiled into the program; a user's own file of
//! the same format adds to it and replaces entries of the same name. `docs/images.md` describes the
//! format.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;

use super::digest::Digest;
use super::reference::ImageName;
use crate::error::{Error, Result, ValueProblem};
use crate::spec::{Arch, Firmware, UserName};

/// The catalogue that comes with vmkit.
const BUILT_IN: &str = include_str!("catalogue.toml");

/// The version of the format that this vmkit reads.
const VERSION: u32 = 1;

/// Images by name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Catalogue {
    images: BTreeMap<String, CatalogueImage>,
    keys: BTreeMap<String, OpenPgpKey>,
    mirrors: Vec<MirrorRule>,
}

/// What is known of an image for one architecture: its address, and how it is verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublishedImage {
    /// The whole name, with its version.
    pub name: ImageName,
    /// The architecture of the guest.
    pub arch: Arch,
    /// The address, with mirrors applied.
    pub url: String,
    /// The checksum that the image must have, if the catalogue has it.
    pub digest: Option<Digest>,
    /// The address of the file with the checksum.
    pub checksums: Option<String>,
    /// The signature, if the publisher signs and vmkit has the key.
    pub signature: Option<PublishedSignature>,
    /// The user that cloud-init in the image creates, if it creates one.
    pub user: Option<UserName>,
    /// The firmware that the image boots with.
    pub firmware: Firmware,
}

/// What is signed, the address of the signature, and the keys that may have signed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublishedSignature {
    /// What is signed.
    pub signed: SignatureTarget,
    /// The address of the signature.
    pub url: String,
    /// The keys, any of which may have signed.
    pub keys: Vec<OpenPgpKey>,
}

/// What a signature covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SignatureTarget {
    /// The file of checksums; the signature is another file.
    Checksums,
    /// The file of checksums, which contains the signature.
    Inline,
    /// The image; the signature is another file.
    Image,
}

impl SignatureTarget {
    /// Returns the word that the catalogue has for it.
    fn as_str(self) -> &'static str {
        match self {
            Self::Checksums => "checksums",
            Self::Inline => "inline",
            Self::Image => "image",
        }
    }
}

/// A public key, identified by its fingerprint, wherever the key comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenPgpKey {
    /// The fingerprint of the primary key, in upper-case hexadecimal digits.
    pub fingerprint: String,
    /// Where the key itself comes from.
    pub public: PublicKey,
}

/// Where a public key comes from, in ASCII armour.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PublicKey {
    /// In the catalogue.
    Here(String),
    /// At this address, with mirrors applied. Only the key with the fingerprint is accepted from
    /// there.
    At(String),
}

/// A prefix of addresses, and its replacement.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct MirrorRule {
    /// The prefix; empty matches every address, whose host then stays as the first directory.
    #[serde(default)]
    from: String,
    to: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawCatalogue {
    version: u32,
    #[serde(default)]
    key: BTreeMap<String, CatalogueKey>,
    #[serde(default)]
    mirror: Vec<MirrorRule>,
    #[serde(default)]
    image: BTreeMap<String, CatalogueImage>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct CatalogueKey {
    fingerprint: String,
    public: Option<String>,
    url: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct CatalogueImage {
    title: Option<String>,
    user: Option<UserName>,
    newest: Option<String>,
    #[serde(default)]
    release: BTreeMap<String, CatalogueRelease>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct CatalogueRelease {
    #[serde(default)]
    names: Vec<String>,
    checksums: Option<String>,
    signature: Option<String>,
    signed: Option<SignatureTarget>,
    #[serde(default)]
    keys: Vec<String>,
    x86_64: Option<CatalogueFile>,
    aarch64: Option<CatalogueFile>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct CatalogueFile {
    url: String,
    checksums: Option<String>,
    signature: Option<String>,
    digest: Option<Digest>,
    firmware: Option<Firmware>,
}

/// A name of the catalogue, for a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CatalogueEntry {
    /// The whole name, with its version.
    pub name: ImageName,
    /// The title that people know it by.
    pub title: String,
    /// The architectures that the image exists for.
    pub arches: Vec<Arch>,
    /// Whether the name without a version means this one.
    pub newest: bool,
    /// Its other names, such as `debian:bookworm`.
    pub aliases: Vec<String>,
}

impl Catalogue {
    /// Returns the catalogue that comes with vmkit.
    pub fn built_in() -> Self {
        let empty = Self { images: BTreeMap::new(), keys: BTreeMap::new(), mirrors: Vec::new() };
        empty
            .extended(BUILT_IN, Path::new("catalogue.toml"))
            .expect("a test reads the catalogue that is part of the program")
    }

    /// Returns this catalogue extended by a user's own; `file` is the path that the text came from.
    ///
    /// A release of the same name is replaced as a whole, and so is a key. Mirrors of later files
    /// are tried first.
    ///
    /// # Errors
    /// `Record` with the file, the line and what is wrong there.
    pub fn extended(mut self, text: &str, file: &Path) -> Result<Self> {
        let refused = |problem: String| Error::record(file, problem);
        let raw: RawCatalogue = toml::from_str(text).map_err(|error| refused(explain(text, &error)))?;
        if raw.version != VERSION {
            return Err(refused(format!(
                "the catalogue has version {}, and this vmkit reads version {VERSION}",
                raw.version
            )));
        }
        for (name, key) in raw.key {
            let key = key.checked().map_err(|why| refused(format!("key `{name}`: {why}")))?;
            self.keys.insert(name, key);
        }
        self.mirrors.splice(0..0, raw.mirror);
        for (name, image) in raw.image {
            image.check(&name, &self.keys).map_err(refused)?;
            match self.images.get_mut(&name) {
                Some(known) => known.replace(image),
                None => drop(self.images.insert(name, image)),
            }
        }
        Ok(self)
    }

    /// Returns this catalogue with mirrors in the form of an environment variable: entries
    /// separated by blanks, each `FROM=TO` for addresses that begin with FROM, or `TO` for all
    /// addresses, to which the server's name and the path are appended.
    ///
    /// # Errors
    /// `InvalidInput` on `mirror` for an entry that is no address.
    pub fn with_mirrors(mut self, text: &str) -> Result<Self> {
        let mirrors: Result<Vec<MirrorRule>> = text.split_whitespace().map(mirror).collect();
        self.mirrors.splice(0..0, mirrors?);
        Ok(self)
    }

    /// Returns the full name that a name stands for: with the newest version if none was named, and
    /// the version's own name for an alias, such as `debian:12` for `debian:bookworm`. `None` for
    /// an unknown name.
    pub fn whole_name(&self, name: &ImageName) -> Option<ImageName> {
        let image = self.images.get(name.name())?;
        let version = match name.version() {
            Some(version) => image.release_named(version)?.0,
            None => image.newest()?,
        };
        ImageName::new(&format!("{}:{version}", name.name())).ok()
    }

    /// Returns the address of an image and how it is verified.
    ///
    /// # Errors
    /// `InvalidInput` on `image` for an unknown name, with the nearest one; for an unknown version,
    /// with the versions that exist; and for an architecture that the image does not exist for.
    pub fn find(&self, name: &ImageName, arch: Arch) -> Result<PublishedImage> {
        self.find_beside(name, arch, Vec::new)
    }

    /// Returns the address of an image and how it is verified. For an unknown name, the nearest one
    /// is looked for among `others`, too.
    ///
    /// # Errors
    /// Those of [`find`](Self::find).
    pub(super) fn find_beside(
        &self,
        name: &ImageName,
        arch: Arch,
        others: impl Fn() -> Vec<ImageName>,
    ) -> Result<PublishedImage> {
        let refused = |why: String| Err(Error::invalid("image", name, why));
        let Some(image) = self.images.get(name.name()) else {
            let why = unknown(name.name(), &self.names_beside(&others()));
            return Err(Error::invalid("image", name, why).with_problem(ValueProblem::UnknownImage));
        };
        let versions = || self.names_beside(&others())[name.name()].join(", ");
        let Some(version) = name.version().or(image.newest()) else {
            return refused("the catalogue has no version of it".to_owned());
        };
        let Some((version, release)) = image.release_named(version) else {
            return refused(format!("there is no such version; there are {}", versions()));
        };
        let Some(file) = release.file(arch) else {
            let others: Vec<&str> = release.arches().into_iter().map(Arch::as_str).collect();
            let why = format!("it does not exist for {}, only for {}", arch.as_str(), others.join(", "));
            return refused(why);
        };
        let beside = |reference: &String| self.mirrored(&beside(&file.url, reference));
        let checksums = file.checksums.as_ref().or(release.checksums.as_ref());
        let keys: Vec<OpenPgpKey> = release.keys.iter().filter_map(|key| self.key(key)).collect();
        let signature = match (release.signed, file.signature.as_ref().or(release.signature.as_ref())) {
            (Some(signed), Some(signature)) if !keys.is_empty() => Some((signed, beside(signature))),
            (Some(SignatureTarget::Inline), None) if !keys.is_empty() => {
                checksums.map(|checksums| (SignatureTarget::Inline, beside(checksums)))
            }
            _ => None,
        };
        let usual = match arch {
            Arch::X86_64 => Firmware::Bios,
            Arch::Aarch64 => Firmware::Uefi,
        };
        Ok(PublishedImage {
            name: ImageName::new(&format!("{}:{version}", name.name()))?,
            arch,
            url: self.mirrored(&file.url),
            digest: file.digest.clone(),
            checksums: checksums.map(beside),
            signature: signature.map(|(signed, url)| PublishedSignature { signed, url, keys }),
            user: image.user.clone(),
            firmware: file.firmware.unwrap_or(usual),
        })
    }

    /// Returns the entry of a name in a list; `None` for an unknown name.
    pub fn entry(&self, name: &ImageName) -> Option<CatalogueEntry> {
        let whole = self.whole_name(name)?;
        self.entries().into_iter().find(|entry| entry.name == whole)
    }

    /// Returns all names with their versions, in order.
    pub fn entries(&self) -> Vec<CatalogueEntry> {
        let mut entries = Vec::new();
        for (name, image) in &self.images {
            for version in image.versions() {
                let Ok(whole) = ImageName::new(&format!("{name}:{version}")) else { continue };
                entries.push(CatalogueEntry {
                    name: whole,
                    title: image.title.clone().unwrap_or_else(|| name.clone()),
                    arches: image.release[version].arches(),
                    newest: image.newest() == Some(version),
                    aliases: image.release[version]
                        .names
                        .iter()
                        .map(|word| format!("{name}:{word}"))
                        .collect(),
                });
            }
        }
        entries
    }

    fn key(&self, name: &str) -> Option<OpenPgpKey> {
        let mut key = self.keys.get(name)?.clone();
        if let PublicKey::At(url) = &mut key.public {
            *url = self.mirrored(url);
        }
        Some(key)
    }

    /// Returns all names, each with its versions in order, including those of `others`.
    fn names_beside(&self, others: &[ImageName]) -> BTreeMap<String, Vec<String>> {
        let own = |image: &CatalogueImage| image.versions().into_iter().map(str::to_owned).collect();
        let mut names: BTreeMap<String, Vec<String>> =
            self.images.iter().map(|(name, image)| (name.clone(), own(image))).collect();
        for other in others {
            let versions = names.entry(other.name().to_owned()).or_default();
            if let Some(version) =
                other.version().filter(|version| !versions.iter().any(|one| one == version))
            {
                versions.push(version.to_owned());
            }
        }
        names
    }

    /// Returns an address with its prefix replaced by the first mirror that matches.
    fn mirrored(&self, url: &str) -> String {
        let fitting = self.mirrors.iter().find_map(|mirror| match mirror.from.as_str() {
            "" => {
                url.split_once("://").map(|(_, rest)| format!("{}/{rest}", mirror.to.trim_end_matches('/')))
            }
            from => url.strip_prefix(from).map(|rest| mirror.followed_by(rest)),
        });
        fitting.unwrap_or_else(|| url.to_owned())
    }
}

impl MirrorRule {
    /// Returns the mirror's address with the rest that followed `from`, separated by a slash where
    /// `from` ended with one or was followed by one.
    fn followed_by(&self, rest: &str) -> String {
        let (to, is_query) = (self.to.as_str(), self.to.contains('?'));
        match (self.from.ends_with('/') || rest.starts_with('/')) && !is_query {
            true => format!("{}/{}", to.trim_end_matches('/'), rest.trim_start_matches('/')),
            false => format!("{to}{rest}"),
        }
    }
}

impl CatalogueKey {
    fn checked(self) -> Result<OpenPgpKey, String> {
        let CatalogueKey { fingerprint, public, url } = self;
        let is_digit = |b: u8| b.is_ascii_digit() || (b'A'..=b'F').contains(&b);
        if !matches!(fingerprint.len(), 40 | 64) || !fingerprint.bytes().all(is_digit) {
            let why = "a fingerprint has 40 or 64 digits, 0-9 and A-F, without spaces";
            return Err(format!("{fingerprint:?}: {why}"));
        }
        let public = match (public, url) {
            (Some(text), None) => PublicKey::Here(text),
            (None, Some(url)) if is_address(&url) => PublicKey::At(url),
            (None, Some(url)) => {
                return Err(format!("{url:?} is not a URL (expected https:// or http://)"));
            }
            (Some(_), Some(_)) | (None, None) => {
                return Err("set `public` to the key, or `url` to the key's URL".to_owned());
            }
        };
        Ok(OpenPgpKey { fingerprint, public })
    }
}

/// Creates the error for an unknown name, with the names that may have been meant.
fn unknown(name: &str, names: &BTreeMap<String, Vec<String>>) -> String {
    let near =
        names.iter().map(|(other, versions)| (strsim::damerau_levenshtein(name, other), other, versions));
    let nearest = near.min().filter(|(distance, ..)| *distance <= name.len().div_ceil(3).max(1));
    match nearest {
        Some((_, other, versions)) => match &versions[..] {
            [] => format!("no image has this name; did you mean {other}?"),
            [version] => format!("no image has this name; did you mean {other}:{version}?"),
            versions => format!("no image has this name; did you mean {other} ({})?", versions.join(", ")),
        },
        None => {
            let names: Vec<&str> = names.keys().map(String::as_str).collect();
            format!("no image has this name; there are {}; a file is written ./{name}", names.join(", "))
        }
    }
}

impl CatalogueImage {
    /// Checks what serde can't check.
    fn check(&self, name: &str, keys: &BTreeMap<String, OpenPgpKey>) -> Result<(), String> {
        for (version, release) in &self.release {
            let here = format!("image.{name}.release.{version}");
            for word in release.names.iter().chain([version]) {
                ImageName::new(&format!("{name}:{word}")).map_err(|error| format!("{here}: {error}"))?;
            }
            if release.arches().is_empty() {
                return Err(format!("{here}: it has no URL: set `url` for x86_64 or aarch64"));
            }
            if let Some(key) = release.keys.iter().find(|key| !keys.contains_key(*key)) {
                return Err(format!("{here}: there is no key `{key}`"));
            }
            if !release.keys.is_empty() && release.signed.is_none() {
                return Err(format!("{here}: it has keys: set `signed` to checksums, inline or image"));
            }
            for arch in release.arches() {
                let file = release.file(arch).expect("this architecture was found in it");
                if !is_address(&file.url) {
                    return Err(format!(
                        "{here}: {:?} is not a URL (expected https:// or http://)",
                        file.url
                    ));
                }
                release.check_signature(file).map_err(|why| format!("{here}.{}: {why}", arch.as_str()))?;
            }
        }
        if let Some(newest) = &self.newest
            && !self.release.is_empty()
            && self.release_named(newest).is_none()
        {
            return Err(format!("image.{name}: newest is {newest:?}, and there is no such release"));
        }
        Ok(())
    }

    fn replace(&mut self, other: CatalogueImage) {
        self.title = other.title.or(self.title.take());
        self.user = other.user.or(self.user.take());
        self.newest = other.newest.or(self.newest.take());
        self.release.extend(other.release);
    }

    fn release_named(&self, version: &str) -> Option<(&str, &CatalogueRelease)> {
        let named = |(own, release): &(&String, &CatalogueRelease)| {
            *own == version || release.names.iter().any(|name| name == version)
        };
        self.release.iter().find(named).map(|(own, release)| (own.as_str(), release))
    }

    fn newest(&self) -> Option<&str> {
        let named = self.newest.as_deref().and_then(|newest| self.release_named(newest));
        named.map(|(version, _)| version).or_else(|| self.versions().last().copied())
    }

    /// Returns the versions from the oldest to the newest, compared as numbers.
    fn versions(&self) -> Vec<&str> {
        let mut versions: Vec<&str> = self.release.keys().map(String::as_str).collect();
        versions.sort_by(|a, b| by_number(a, b));
        versions
    }
}

impl CatalogueRelease {
    fn file(&self, arch: Arch) -> Option<&CatalogueFile> {
        match arch {
            Arch::X86_64 => self.x86_64.as_ref(),
            Arch::Aarch64 => self.aarch64.as_ref(),
        }
    }

    /// Refuses an entry that asks for a signature and lacks what to verify it with: nothing would
    /// be verified.
    fn check_signature(&self, file: &CatalogueFile) -> Result<(), String> {
        let checksums = file.checksums.as_ref().or(self.checksums.as_ref());
        let signature = file.signature.as_ref().or(self.signature.as_ref());
        let keys = self.keys.first();
        let lacks = |field: &str, what: &str| {
            let signed = self.signed.map_or("", SignatureTarget::as_str);
            Err(format!("it is `signed = \"{signed}\"`, and `{field}` is missing: {what}"))
        };
        match self.signed {
            None if signature.is_some() => {
                Err("it has a `signature`: set `signed` to checksums, inline or image".to_owned())
            }
            None => Ok(()),
            Some(_) if keys.is_none() => lacks("keys", "the keys of which any may have signed"),
            Some(SignatureTarget::Checksums | SignatureTarget::Inline) if checksums.is_none() => {
                lacks("checksums", "the file of checksums that is signed")
            }
            Some(SignatureTarget::Checksums | SignatureTarget::Image) if signature.is_none() => {
                lacks("signature", "the file that has the signature")
            }
            Some(_) => Ok(()),
        }
    }

    fn arches(&self) -> Vec<Arch> {
        [Arch::X86_64, Arch::Aarch64].into_iter().filter(|arch| self.file(*arch).is_some()).collect()
    }
}

/// Compares versions by the numbers in them, so that 9 comes before 10.
fn by_number(a: &str, b: &str) -> Ordering {
    let parts = |text: &str| -> Vec<(u64, String)> {
        let part = |part: &str| (part.parse().unwrap_or(u64::MAX), part.to_owned());
        text.split(['.', '-', '_']).map(part).collect()
    };
    parts(a).cmp(&parts(b))
}

/// Returns an address without its query, which is no part of a file's name.
pub(super) fn without_query(url: &str) -> &str {
    url.split(['?', '#']).next().unwrap_or(url)
}

/// Returns the address of a file beside another one: `{file}` stands for that one's own name.
fn beside(url: &str, reference: &str) -> String {
    let url = without_query(url);
    let (dir, file) = url.rsplit_once('/').unwrap_or((url, ""));
    let reference = reference.replace("{file}", file);
    if is_address(&reference) { reference } else { format!("{dir}/{reference}") }
}

fn is_address(text: &str) -> bool {
    let rest = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"));
    rest.is_some_and(|rest| !rest.is_empty() && !text.contains(char::is_whitespace))
}

fn mirror(entry: &str) -> Result<MirrorRule> {
    let (from, to) = match entry.split_once("=http") {
        Some((from, rest)) => (from, &entry[entry.len() - rest.len() - "http".len()..]),
        None => ("", entry),
    };
    if !is_address(to) || !(from.is_empty() || is_address(from)) {
        let why = "a mirror is a URL, or FROM=TO with two URLs; spaces separate mirrors";
        return Err(Error::invalid("mirror", entry, why));
    }
    Ok(MirrorRule { from: from.to_owned(), to: to.to_owned() })
}

/// Returns the position of an error in the text, and the error, on one line.
fn explain(text: &str, error: &toml::de::Error) -> String {
    let message = error.message().trim().replace('\n', "; ");
    match error.span() {
        Some(span) => {
            let before = text.get(..span.start).unwrap_or_default();
            let line = before.matches('\n').count() + 1;
            let column = before.rsplit('\n').next().map_or(0, |line| line.chars().count()) + 1;
            format!("line {line}, column {column}: {message}")
        }
        None => message,
    }
}
