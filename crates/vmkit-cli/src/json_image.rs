//! The shapes that `vmkit image … --json` prints; promised as those of `json` are.

use std::path::Path;

use serde::Serialize;
use vmkit::image::{CatalogueEntry, Digest, ImageFacts, ImageFormat, KeptImage, KeptName, Verified};
use vmkit::spec::{Arch, Firmware, VmName};

/// A kept image.
#[derive(Serialize)]
pub(crate) struct Kept<'a> {
    id: String,
    #[serde(flatten)]
    file: File<'a>,
    arch: Option<Arch>,
    kept_at: u64,
    names: Vec<Name<'a>>,
    /// The VMs that hang on it; `null` where they were not looked for.
    vms: Option<Vec<&'a str>>,
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

/// Whether a kept image is still what it was.
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
        let (id, file) = (image.id.to_string(), File::of(&image.facts));
        Self { id, file, arch: image.arch, kept_at: image.kept_at, names, vms: None }
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
