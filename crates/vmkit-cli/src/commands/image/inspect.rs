//! `vmkit image inspect`.

use clap::Args;
use vmkit::image::ImageRef;
use vmkit::spec::Arch;

use crate::context::Context;
use crate::failure::Failure;
use crate::{human_image, images, json_image, output};

/// Shows an image: what it is, where it came from, how it was verified, and which VMs hang on it.
///
/// A file is looked at where it lies.
#[derive(Debug, Args)]
pub(crate) struct Inspect {
    /// Names the image: a name, an address, a file, or sha256: and at least 6 digits.
    #[arg(value_name = "IMAGE")]
    image: String,
    /// Shows only the one for this architecture.
    #[arg(long, value_name = "x86_64|aarch64", value_parser = images::arch)]
    arch: Option<Arch>,
    /// Prints a JSON array, of one object for each architecture.
    #[arg(long)]
    json: bool,
}

impl Inspect {
    pub(crate) fn run(self, context: &Context) -> Result<(), Failure> {
        let is_file = !self.image.starts_with("sha256:");
        if is_file && let ImageRef::Path(path) = images::image(&self.image)? {
            let facts = vmkit::image::inspect(&path)?;
            return match self.json {
                true => output::json(&[json_image::File::of(&facts)]),
                false => output::text(human_image::file(&facts)),
            };
        }
        let store = context.images()?;
        let found = store.find(&self.image, self.arch)?;
        let mut shown = Vec::new();
        for image in &found {
            shown.push((image, store.users(&image.id)?));
        }
        match self.json {
            true => output::json(
                &shown.iter().map(|(image, vms)| json_image::Kept::used(image, vms)).collect::<Vec<_>>(),
            ),
            false => {
                let texts: Vec<String> =
                    shown.iter().map(|(image, vms)| human_image::details(image, vms)).collect();
                output::text(texts.join("\n"))
            }
        }
    }
}
