//! `vmkit image convert`.

use std::path::PathBuf;

use clap::Args;
use vmkit::Error;
use vmkit::error::Subject;
use vmkit::image::{ImageFacts, ImageRef, OverwritePolicy, PullPolicy};
use vmkit::spec::Arch;

use crate::context::CommandContext;
use crate::failure::Failure;
use crate::places::absolute;
use crate::{images, json_image, output, progress};

/// Write the disk of an image as a raw file, as Propolis needs it.
///
/// Zeros become holes, and the file gets its name when it is complete. If interrupted, this leaves
/// FILE.unfinished, which the next conversion to the same file continues.
#[derive(Debug, Args)]
pub(crate) struct ImageConvertArgs {
    /// The image: as for `vmkit launch`, or sha256: and at least 6 digits. It is fetched unless it
    /// is local already.
    #[arg(value_name = "IMAGE")]
    image: String,
    /// The file to write; or a block device that is large enough, with --force.
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Replace the file if there is one, or overwrite a block device.
    #[arg(long)]
    force: bool,
    /// Choose the architecture [default: this host's].
    #[arg(long, value_name = "x86_64|aarch64", value_parser = images::arch)]
    arch: Option<Arch>,
    /// Print the file as a JSON object.
    #[arg(long)]
    json: bool,
}

impl ImageConvertArgs {
    pub(crate) fn run(self, context: &CommandContext) -> Result<(), Failure> {
        let to = absolute("file", &self.file)?;
        let existing = if self.force { OverwritePolicy::Replaced } else { OverwritePolicy::Stays };
        // Checked before an image is fetched in vain; the conversion checks again.
        if !self.force && to.symlink_metadata().is_ok() {
            return Err(Error::already_exists(Subject::File, to.display()).into());
        }
        context.block_on(async {
            let converted = images::watched(&self.image, async |progress| {
                let image = self.found(context, progress).await?;
                vmkit::image::convert(&image, &to, existing, progress).await
            });
            let bytes = converted.await?;
            match self.json {
                true => output::json(&json_image::ConvertedView::raw(&to, bytes)),
                false => {
                    let disk = progress::bytes(bytes);
                    output::status(format_args!("{}: here, a raw disk of {disk}", to.display()));
                    Ok(())
                }
            }
        })
    }

    /// Finds the image. The file of an image is used where it is, even if it can't be booted.
    async fn found(
        &self,
        context: &CommandContext,
        progress: &images::ProgressSender,
    ) -> Result<ImageFacts, Error> {
        if self.image.starts_with("sha256:") {
            let found = context.images()?.find(&self.image, None)?;
            return Ok(found.into_iter().next().expect("the result has at least one image").facts);
        }
        match images::image(&self.image)? {
            ImageRef::Path(path) => vmkit::image::inspect(&path),
            image => {
                let (store, arch) = (context.images()?, self.arch.unwrap_or_else(images::host_arch));
                Ok(store.resolve(&image, arch, PullPolicy::Missing, progress).await?.facts)
            }
        }
    }
}
