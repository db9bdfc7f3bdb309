//! `vmkit image inspect`.

use clap::Args;
use vmkit::Error;
use vmkit::image::{ImageName, ImageRef, ImageStore};
use vmkit::spec::Arch;

use crate::context::CommandContext;
use crate::failure::Failure;
use crate::{human_image, images, json_image, output};

/// Show an image: its format, source and verification, and the VMs that use it
///
/// A file is inspected in place. For a name that was not pulled the catalogue's entry is shown: the
/// address, the verification, and the user that can log in.
#[derive(Debug, Args)]
pub(crate) struct ImageInspectArgs {
    /// The image: a name, an address, a file, or sha256: and at least 6 digits.
    #[arg(value_name = "IMAGE")]
    image: String,
    /// Only the image for this architecture.
    #[arg(long, value_name = "x86_64|aarch64", value_parser = images::arch)]
    arch: Option<Arch>,
    /// Print a JSON array, of one object for each architecture.
    #[arg(long)]
    json: bool,
}

impl ImageInspectArgs {
    pub(crate) fn run(self, context: &CommandContext) -> Result<(), Failure> {
        let is_identity = self.image.starts_with("sha256:");
        if !is_identity && let ImageRef::Path(path) = images::image(&self.image)? {
            let facts = vmkit::image::inspect(&path)?;
            return match self.json {
                true => output::json(&[json_image::FileView::of(&facts)]),
                false => output::text(human_image::file(&facts)),
            };
        }
        let store = context.images()?;
        let found = match store.find(&self.image, self.arch) {
            Err(Error::NotFound { .. })
                if !is_identity && let Ok(ImageRef::Name(name)) = self.image.parse() =>
            {
                return self.tell_published(&store, &name);
            }
            found => found?,
        };
        let mut shown = Vec::new();
        for image in &found {
            shown.push((image, store.users(&image.id)?));
        }
        match self.json {
            true => output::json(
                &shown.iter().map(|(image, vms)| json_image::ImageView::used(image, vms)).collect::<Vec<_>>(),
            ),
            false => {
                let texts: Vec<String> =
                    shown.iter().map(|(image, vms)| human_image::details(image, vms)).collect();
                output::text(texts.join("\n"))
            }
        }
    }

    /// Prints the catalogue's entry of an image that was not pulled.
    fn tell_published(&self, store: &ImageStore, name: &ImageName) -> Result<(), Failure> {
        let entry = store.catalogue().entry(name);
        let arches = match (self.arch, &entry) {
            (Some(arch), _) => vec![arch],
            (None, Some(entry)) => entry.arches.clone(),
            // An image without an entry is reported for the host's architecture.
            (None, None) => vec![images::host_arch()],
        };
        let published = arches.into_iter().map(|arch| store.published(name, arch));
        let published = published.collect::<Result<Vec<_>, _>>()?;
        let title = entry.as_ref().map_or_else(|| name.name(), |entry| entry.title.as_str());
        if self.json {
            let shown = published.iter().map(|one| json_image::ImageView::published(title, one));
            return output::json(&shown.collect::<Vec<_>>());
        }
        let texts: Vec<String> = published.iter().map(|one| human_image::published(title, one)).collect();
        output::text(texts.join("\n"))
    }
}
