//! The shapes that `vmkit image … --json` prints; promised as those of `json` are.

use std::path::Path;

use serde::Serialize;
use vmkit::image::{
    CatalogueEntry, Digest, ImageFacts, ImageFormat, KeptImage, KeptName, Published, Signed, Verified,
};
use vmkit::spec::{Arch, Firmware, VmName};

/// A local image, or an image of the catalogue.
#[derive(Serialize)]
pub(crate) struct Kept<'a> {
    /// `null` for one that was not pulled.
    id: Option<String>,
    #[serde(flatten)]
    file: FileOrNone<'a>,
    arch: Option<Arch>,
    kept_at: Option<u64>,
    names: Vec<Name<'a>>,
    /// The VMs that use it; `null` if they were not looked for.
    vms: Option<Vec<&'a str>>,
    /// What the catalogue knows of one that was not pulled.
    catalogue: Option<Catalogued<'a>>,
}

/// What a file is, where there is one.
#[derive(Serialize, Default)]
struct FileOrNone<'a> {
    path: Option<&'a Path>,
    format: Option<ImageFormat>,
    virtual_size_bytes: Option<u64>,
    file_bytes: Option<u64>,
}

/// What the catalogue knows of an image.
#[derive(Serialize)]
struct Catalogued<'a> {
    name: String,
    title: &'a str,
    url: &'a str,
    checksums: Option<&'a str>,
    digest: Option<String>,
    signature: Option<Signature<'a>>,
    user: Option<&'a str>,
    firmware: Firmware,
}

#[derive(Serialize)]
struct Signature<'a> {
    over: &'static str,
    url: &'a str,
    fingerprints: Vec<&'a str>,
}

/// What a file is.
#[derive(Serialize)]
pub(crate) struct File<'a> {
    path: &'a Path,
    format: ImageFormat,
    virtual_size_bytes: u64,
    file_bytes: u64,
}

#[derive(Serialize)]
struct Name<'a> {
    name: &'a str,
    arch: Arch,
    source: &'a str,
    since: u64,
    download: String,
    verified: &'a Verified,
    user: Option<&'a str>,
    firmware: Option<Firmware>,
}

/// A name of the catalogue.
#[derive(Serialize)]
pub(crate) struct Available {
    name: String,
    title: String,
    arches: Vec<Arch>,
    newest: bool,
    aliases: Vec<String>,
}

/// Whether a local image is undamaged.
#[derive(Serialize)]
pub(crate) struct Verdict {
    name: String,
    id: String,
    found: String,
    good: bool,
}

/// A file that an image was converted to.
#[derive(Serialize)]
pub(crate) struct Converted<'a> {
    path: &'a Path,
    format: ImageFormat,
    bytes: u64,
}

/// What was pruned.
#[derive(Serialize)]
pub(crate) struct Pruned {
    pub(crate) images: usize,
    pub(crate) freed_bytes: u64,
}

impl<'a> Kept<'a> {
    pub(crate) fn of(image: &'a KeptImage) -> Self {
        let names = image.names.iter().map(Name::of).collect();
        let ImageFacts { path, format, virtual_size_bytes, file_bytes } = &image.facts;
        let file = FileOrNone {
            path: Some(path),
            format: Some(*format),
            virtual_size_bytes: Some(*virtual_size_bytes),
            file_bytes: Some(*file_bytes),
        };
        let (id, kept_at) = (Some(image.id.to_string()), Some(image.kept_at));
        Self { id, file, arch: image.arch, kept_at, names, vms: None, catalogue: None }
    }

    pub(crate) fn published(title: &'a str, image: &'a Published) -> Self {
        let signature = image.signature.as_ref().map(|signature| Signature {
            over: match signature.signed {
                Signed::Image => "image",
                Signed::Checksums | Signed::Inline => "checksums",
            },
            url: &signature.url,
            fingerprints: signature.keys.iter().map(|key| key.fingerprint.as_str()).collect(),
        });
        let catalogue = Catalogued {
            name: image.name.to_string(),
            title,
            url: &image.url,
            checksums: image.checksums.as_deref(),
            digest: image.digest.as_ref().map(ToString::to_string),
            signature,
            user: image.user.as_ref().map(|user| user.as_str()),
            firmware: image.firmware,
        };
        Self {
            id: None,
            file: FileOrNone::default(),
            arch: Some(image.arch),
            kept_at: None,
            names: Vec::new(),
            vms: Some(Vec::new()),
            catalogue: Some(catalogue),
        }
    }

    pub(crate) fn used(image: &'a KeptImage, vms: &'a [VmName]) -> Self {
        Self { vms: Some(vms.iter().map(VmName::as_str).collect()), ..Self::of(image) }
    }
}

impl<'a> File<'a> {
    pub(crate) fn of(facts: &'a ImageFacts) -> Self {
        let ImageFacts { path, format, virtual_size_bytes, file_bytes } = facts;
        Self { path, format: *format, virtual_size_bytes: *virtual_size_bytes, file_bytes: *file_bytes }
    }
}

impl<'a> Converted<'a> {
    pub(crate) fn raw(path: &'a Path, bytes: u64) -> Self {
        Self { path, format: ImageFormat::Raw, bytes }
    }
}

impl<'a> Name<'a> {
    fn of(kept: &'a KeptName) -> Self {
        Self {
            name: &kept.name,
            arch: kept.arch,
            source: &kept.source,
            since: kept.since,
            download: kept.download.to_string(),
            verified: &kept.verified,
            user: kept.user.as_ref().map(|user| user.as_str()),
            firmware: kept.firmware,
        }
    }
}

impl Available {
    pub(crate) fn of(entry: &CatalogueEntry) -> Self {
        let CatalogueEntry { name, title, arches, newest, aliases } = entry;
        let (title, arches, aliases) = (title.clone(), arches.clone(), aliases.clone());
        Self { name: name.to_string(), title, arches, newest: *newest, aliases }
    }
}

impl Verdict {
    pub(crate) fn of(name: &str, image: &KeptImage, found: Digest) -> Self {
        let good = found == image.id;
        Self { name: name.to_owned(), id: image.id.to_string(), found: found.to_string(), good }
    }

    pub(crate) fn is_good(&self) -> bool {
        self.good
    }

    pub(crate) fn row(&self) -> [String; 3] {
        let verdict = match self.good {
            true => "good".to_owned(),
            false => format!("damaged: it hashes to {}", self.found),
        };
        [self.name.clone(), self.id.clone(), verdict]
    }
}
