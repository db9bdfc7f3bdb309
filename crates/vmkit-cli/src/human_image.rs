//! How an image looks to a person: tables and lines, without a promise.

use vmkit::image::{
    ImageFacts, LocalImage, PublishedImage, PublishedSignature, RemovedImage, SignatureTarget, Verification,
};
use vmkit::spec::{Firmware, VmName};

use crate::human::LabelLines;
use crate::images;
use crate::output::TextTable;
use crate::progress::bytes;

/// As much of an identity as tells images apart.
const SHORT_ID: usize = 12;

/// Returns the table of local images, a line for each name.
pub(crate) fn list(images: &[LocalImage]) -> TextTable {
    let mut table = TextTable::new(&["NAME", "ARCH", "FORMAT", "DISK SIZE", "FILE SIZE", "ID", "VERIFIED"]);
    for image in images {
        let id = format!("sha256:{}", &image.id.hex()[..SHORT_ID]);
        let row = |name: String, arch: &str, verified: String| {
            let facts = &image.facts;
            let (disk, file) = (bytes(facts.virtual_size_bytes), bytes(facts.file_bytes));
            [name, arch.to_owned(), facts.format.to_string(), disk, file, id.clone(), verified]
        };
        for name in &image.names {
            table.row(row(name.name.clone(), name.arch.as_str(), name.verified.to_string()));
        }
        if image.names.is_empty() {
            table.row(row("-".to_owned(), image.arch.map_or("-", |arch| arch.as_str()), String::new()));
        }
    }
    table
}

/// Returns the line about an image that was just stored.
pub(crate) fn here(image: &LocalImage) -> String {
    format!("here, a {} disk of {}", image.facts.format, bytes(image.facts.virtual_size_bytes))
}

/// Returns what removing a name led to.
pub(crate) fn removed(removed: &RemovedImage) -> String {
    match removed.images {
        0 => "removed; the image has other names, and stays".to_owned(),
        _ => format!("removed, {} freed", bytes(removed.freed_bytes)),
    }
}

/// Returns what was pruned.
pub(crate) fn pruned(images: usize, freed_bytes: u64) -> String {
    match (images, freed_bytes) {
        (0, 0) => "nothing to remove".to_owned(),
        (0, freed) => format!("no image removed, {} of interrupted downloads freed", bytes(freed)),
        (1, freed) => format!("1 image removed, {} freed", bytes(freed)),
        (images, freed) => format!("{images} images removed, {} freed", bytes(freed)),
    }
}

/// Returns all that is known of an image, a line each.
pub(crate) fn details(image: &LocalImage, vms: &[VmName]) -> String {
    let mut lines = LabelLines::default();
    lines.add("id", &image.id);
    facts(&mut lines, &image.facts);
    if let Some(arch) = image.arch {
        lines.add("arch", arch.as_str());
    }
    for name in &image.names {
        lines.add("name", format_args!("{} for {}", name.name, name.arch.as_str()));
        lines.add("source", &name.source);
        match &name.verified {
            Verification::Nothing => lines.add("verified", "no"),
            by => lines.add("verified", format_args!("by its {by}")),
        }
        if let Some(user) = &name.user {
            lines.add("user", user);
        }
        if let Some(firmware) = name.firmware {
            lines.add("firmware", if firmware == Firmware::Uefi { "uefi" } else { "bios" });
        }
    }
    for vm in vms {
        lines.add("used by", vm);
    }
    lines.into_text()
}

/// Returns what is known of an image that was not pulled, a line each.
pub(crate) fn published(title: &str, image: &PublishedImage) -> String {
    let PublishedImage { name, arch, url, digest, checksums, signature, user, firmware } = image;
    let mut lines = LabelLines::default();
    let option = if *arch == images::host_arch() { "" } else { &format!("--arch {} ", arch.as_str()) };
    lines.add("name", format_args!("{name} for {}", arch.as_str()));
    lines.add("title", title);
    lines.add("pulled", format_args!("no; `vmkit image pull {option}{name}` fetches it"));
    lines.add("source", url);
    if let Some(checksums) = checksums {
        lines.add("checksums", checksums);
    }
    if let Some(digest) = digest {
        lines.add("digest", digest);
    }
    lines.add("signed", signature.as_ref().map_or_else(|| "no".to_owned(), signed));
    if let Some(user) = user {
        lines.add("user", user);
    }
    lines.add("firmware", if *firmware == Firmware::Uefi { "uefi" } else { "bios" });
    lines.into_text()
}

/// Returns what is signed, where the signature lies, and whose it must be.
fn signed(signature: &PublishedSignature) -> String {
    let what = match signature.signed {
        SignatureTarget::Image => "the image",
        SignatureTarget::Checksums | SignatureTarget::Inline => "the checksums",
    };
    let keys: Vec<&str> = signature.keys.iter().map(|key| key.fingerprint.as_str()).collect();
    format!("{what}, in {}\nby {}", signature.url, keys.join(" or "))
}

/// Returns what a file is, a line each.
pub(crate) fn file(found: &ImageFacts) -> String {
    let mut lines = LabelLines::default();
    facts(&mut lines, found);
    lines.into_text()
}

fn facts(lines: &mut LabelLines, facts: &ImageFacts) {
    lines.add("path", facts.path.display());
    lines.add("format", facts.format);
    lines.add("disk size", bytes(facts.virtual_size_bytes));
    lines.add("file size", bytes(facts.file_bytes));
}
