//! `vmkit image rm`.

use clap::Args;
use vmkit::spec::Arch;

use crate::context::CommandContext;
use crate::failure::Failure;
use crate::{human_image, images, output};

/// Remove images; an image in use stays, and the VMs that use it are named
#[derive(Debug, Args)]
pub(crate) struct ImageRmArgs {
    /// The images: a name, an address, or sha256: and at least 6 digits for an image with all
    /// its names.
    #[arg(value_name = "IMAGE", required = true)]
    images: Vec<String>,
    /// Only images for this architecture.
    #[arg(long, value_name = "x86_64|aarch64", value_parser = images::arch)]
    arch: Option<Arch>,
}

impl ImageRmArgs {
    pub(crate) fn run(self, context: &CommandContext) -> Result<(), Failure> {
        let store = context.images()?;
        context.block_on(async {
            let mut failures = Vec::new();
            for image in &self.images {
                match store.remove(image, self.arch).await {
                    Ok(removed) => {
                        output::status(format_args!("{image}: {}", human_image::removed(&removed)));
                    }
                    Err(error) => failures.push(Failure::from(error)),
                }
            }
            if failures.is_empty() { Ok(()) } else { Err(Failure::Several(failures)) }
        })
    }
}
