//! `vmkit image verify`.

use clap::Args;
use vmkit::image::LocalImage;
use vmkit::spec::Arch;

use crate::context::CommandContext;
use crate::failure::Failure;
use crate::output::{self, TextTable};
use crate::{images, json_image};

/// Read local images completely and compare their checksums; without a name, all of them
#[derive(Debug, Args)]
pub(crate) struct ImageVerifyArgs {
    /// The images: a name, an address, or sha256: and at least 6 digits.
    #[arg(value_name = "IMAGE")]
    images: Vec<String>,
    /// Only images for this architecture.
    #[arg(long, value_name = "x86_64|aarch64", value_parser = images::arch)]
    arch: Option<Arch>,
    /// Print a JSON array.
    #[arg(long)]
    json: bool,
}

/// Returns the command that replaces a damaged image.
fn what_heals(image: &LocalImage) -> String {
    let Some(name) = image.names.first() else {
        return format!("`vmkit image rm {}` removes the damaged one, which has no name", image.id);
    };
    let arch = match name.arch == images::host_arch() {
        true => String::new(),
        false => format!(" --arch {}", name.arch.as_str()),
    };
    match name.source.contains("://") {
        true => format!("`vmkit image pull {}{arch}` fetches it again", name.name),
        false => format!(
            "`vmkit image import {} --name {}{arch}` imports it again, if that file is unchanged",
            name.source, name.name
        ),
    }
}

impl ImageVerifyArgs {
    pub(crate) fn run(self, context: &CommandContext) -> Result<(), Failure> {
        let store = context.images()?;
        let mut kept = Vec::new();
        if self.images.is_empty() {
            let (images, unreadable) = store.list()?;
            unreadable.iter().for_each(output::warning);
            kept = images;
        }
        for image in &self.images {
            kept.extend(store.find(image, self.arch)?);
        }
        let verdicts = context.block_on(async {
            let mut verdicts = Vec::new();
            for image in &kept {
                let name = image.names.first().map_or_else(|| image.id.to_string(), |name| name.name.clone());
                let found = images::watched(&name, async |progress| store.rehash(&image.id, progress).await);
                verdicts.push(json_image::VerdictView::of(&name, image, found.await?));
            }
            Ok(verdicts)
        })?;
        if self.json {
            output::json(&verdicts)?;
        } else {
            let mut table = TextTable::new(&["NAME", "ID", "VERDICT"]);
            verdicts.iter().for_each(|verdict| table.row(verdict.row()));
            output::text(table)?;
            let damaged = kept.iter().zip(&verdicts).filter(|(_, verdict)| !verdict.is_good());
            damaged.for_each(|(image, _)| output::hint(&what_heals(image)));
        }
        // The damaged images were just printed as the output.
        if verdicts.iter().all(json_image::VerdictView::is_good) { Ok(()) } else { Err(Failure::Unfit) }
    }
}
