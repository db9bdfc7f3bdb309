//! The shapes that `vmkit image … --json` prints; promised as those of `json` are.

use std::path::Path;

use serde::Serialize;
use vmkit::image::{
    CatalogueEntry, Digest, ImageFacts, ImageFormat, LocalImage, LocalName, PublishedImage, SignatureTarget,
    Verification,
};
use vmkit::spec::{Arch, Firmware, VmName};

/// A local image, or an image of the catalogue.
#[derive(Serialize)]
pub(crate) struct ImageView<'a> {
    /// `null` for one that was not pulled.
    id: Option<String>,
    #[serde(flatten)]
    file: FileOrNone<'a>,
    arch: Option<Arch>,
    kept_at: Option<u64>,
    names: Vec<NameView<'a>>,
    /// The VMs that use it; `null` if they were not looked for.
    vms: Option<Vec<&'a str>>,
    /// What the catalogue knows of one that was not pulled.
    catalogue: Option<CatalogueView<'a>>,
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
struct CatalogueView<'a> {
    name: String,
    title: &'a str,
    url: &'a str,
    checksums: Option<&'a str>,
    digest: Option<String>,
    signature: Option<SignatureView<'a>>,
    user: Option<&'a str>,
    firmware: Firmware,
}

#[derive(Serialize)]
struct SignatureView<'a> {
    over: &'static str,
    url: &'a str,
    fingerprints: Vec<&'a str>,
}

/// What a file is.
#[derive(Serialize)]
pub(crate) struct FileView<'a> {
    path: &'a Path,
    format: ImageFormat,
    virtual_size_bytes: u64,
    file_bytes: u64,
}

#[derive(Serialize)]
struct NameView<'a> {
    name: &'a str,
    arch: Arch,
    source: &'a str,
    since: u64,
    download: String,
    verified: &'a Verification,
    user: Option<&'a str>,
    firmware: Option<Firmware>,
}

/// A name of the catalogue.
#[derive(Serialize)]
pub(crate) struct AvailableView {
    name: String,
    title: String,
    arches: Vec<Arch>,
    newest: bool,
    aliases: Vec<String>,
}

/// Whether a local image is undamaged.
#[derive(Serialize)]
pub(crate) struct VerdictView {
    name: String,
    id: String,
    found: String,
    good: bool,
}

/// A file that an image was converted to.
#[derive(Serialize)]
pub(crate) struct ConvertedView<'a> {
    path: &'a Path,
    format: ImageFormat,
    bytes: u64,
}

/// What was pruned.
#[derive(Serialize)]
pub(crate) struct PrunedView {
    pub(crate) images: usize,
    pub(crate) freed_bytes: u64,
}

impl<'a> ImageView<'a> {
    pub(crate) fn of(image: &'a LocalImage) -> Self {
        let names = image.names.iter().map(NameView::of).collect();
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

    pub(crate) fn published(title: &'a str, image: &'a PublishedImage) -> Self {
        let signature = image.signature.as_ref().map(|signature| SignatureView {
            over: match signature.signed {
                SignatureTarget::Image => "image",
                SignatureTarget::Checksums | SignatureTarget::Inline => "checksums",
            },
            url: &signature.url,
            fingerprints: signature.keys.iter().map(|key| key.fingerprint.as_str()).collect(),
        });
        let catalogue = CatalogueView {
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

    pub(crate) fn used(image: &'a LocalImage, vms: &'a [VmName]) -> Self {
        Self { vms: Some(vms.iter().map(VmName::as_str).collect()), ..Self::of(image) }
    }
}

impl<'a> FileView<'a> {
    pub(crate) fn of(facts: &'a ImageFacts) -> Self {
        let ImageFacts { path, format, virtual_size_bytes, file_bytes } = facts;
        Self { path, format: *format, virtual_size_bytes: *virtual_size_bytes, file_bytes: *file_bytes }
    }
}

impl<'a> ConvertedView<'a> {
    pub(crate) fn raw(path: &'a Path, bytes: u64) -> Self {
        Self { path, format: ImageFormat::Raw, bytes }
    }
}

impl<'a> NameView<'a> {
    fn of(kept: &'a LocalName) -> Self {
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

impl AvailableView {
    pub(crate) fn of(entry: &CatalogueEntry) -> Self {
        let CatalogueEntry { name, title, arches, newest, aliases } = entry;
        let (title, arches, aliases) = (title.clone(), arches.clone(), aliases.clone());
        Self { name: name.to_string(), title, arches, newest: *newest, aliases }
    }
}

impl VerdictView {
    pub(crate) fn of(name: &str, image: &LocalImage, found: Digest) -> Self {
        let good = found == image.id;
        Self { name: name.to_owned(), id: image.id.to_string(), found: found.to_string(), good }
    }

    pub(crate) fn is_good(&self) -> bool {
        self.good
    }

    pub(crate) fn row(&self) -> [String; 3] {
        let verdict = match self.good {
            true => "good".to_owned(),
            false => format!("damaged: its checksum is {}", self.found),
        };
        [self.name.clone(), self.id.clone(), verdict]
    }
}
