//! `vmkit image pull`.

use clap::Args;
use vmkit::spec::Arch;

use crate::context::CommandContext;
use crate::failure::Failure;
use crate::{human_image, images, json_image, output};

/// Fetch images, or look for newer ones.
///
/// An interrupted download is continued. The checksum is verified, and also the signature if the
/// publisher signs and vmkit has the key.
#[derive(Debug, Args)]
pub(crate) struct ImagePullArgs {
    /// The images: debian:12, an https:// address, oci://REGISTRY/NAME:TAG.
    #[arg(value_name = "IMAGE", required = true)]
    images: Vec<String>,
    /// Choose the architecture [default: this host's].
    #[arg(long, value_name = "x86_64|aarch64", value_parser = images::arch)]
    arch: Option<Arch>,
    /// Print each image afterwards, as one JSON object a line.
    #[arg(long)]
    json: bool,
}

impl ImagePullArgs {
    pub(crate) fn run(self, context: &CommandContext) -> Result<(), Failure> {
        let store = context.images()?;
        let arch = self.arch.unwrap_or_else(images::host_arch);
        // All names are parsed before the first image is fetched, so that a typo in the last one is
        // reported early.
        let wanted = self.images.iter().map(|text| images::image(text)).collect::<Result<Vec<_>, _>>()?;
        context.block_on(async {
            for image in &wanted {
                let name = image.to_string();
                let kept =
                    images::watched(&name, async |progress| store.pull(image, arch, progress).await).await?;
                if self.json {
                    output::json(&json_image::ImageView::of(&kept))?;
                    continue;
                }
                let verified = kept.names.iter().max_by_key(|name| name.since).map(|name| &name.verified);
                let verified = verified.map(|verified| format!(", {verified}")).unwrap_or_default();
                output::status(format_args!("{name}: {}{verified}", human_image::here(&kept)));
            }
            Ok(())
        })
    }
}
