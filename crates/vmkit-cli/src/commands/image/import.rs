//! `vmkit image import`.

use std::path::PathBuf;

use clap::Args;
use vmkit::image::ImageName;
use vmkit::spec::{Arch, UserName};

use crate::commands::machine::FirmwareName;
use crate::context::CommandContext;
use crate::failure::Failure;
use crate::places::{local, stdin_or};
use crate::{human_image, images, json_image, output};

/// Store a copy of a file as a local image, decompressed if needed, so that VMs can be created from
/// it by name.
#[derive(Debug, Args)]
pub(crate) struct ImageImportArgs {
    /// The file: raw or qcow2, uncompressed or with gzip, xz, zstd or bzip2; - for standard input.
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// The name of the local image; it takes precedence over the same name in the catalogue.
    #[arg(long)]
    name: ImageName,
    /// The architecture of the image [default: this host's].
    #[arg(long, value_name = "x86_64|aarch64", value_parser = images::arch)]
    arch: Option<Arch>,
    /// The user that its cloud-init creates.
    #[arg(long, value_name = "USER")]
    user: Option<UserName>,
    /// The firmware that it boots with.
    #[arg(long, value_enum)]
    firmware: Option<FirmwareName>,
    /// Print the image as a JSON object.
    #[arg(long)]
    json: bool,
}

impl ImageImportArgs {
    pub(crate) fn run(self, context: &CommandContext) -> Result<(), Failure> {
        let store = context.images()?;
        let file = local("image", stdin_or(&self.file))?;
        let name = self.name.to_string();
        let import = vmkit::image::ImportOptions {
            name: self.name,
            arch: self.arch.unwrap_or_else(images::host_arch),
            user: self.user,
            firmware: self.firmware.map(Into::into),
        };
        context.block_on(async {
            let kept = images::watched(&name, async |progress| store.import(&file, import, progress).await);
            let kept = kept.await?;
            match self.json {
                true => output::json(&json_image::ImageView::of(&kept)),
                false => {
                    output::status(format_args!("{name}: {}", human_image::here(&kept)));
                    Ok(())
                }
            }
        })
    }
}
